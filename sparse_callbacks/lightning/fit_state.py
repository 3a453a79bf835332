"""What a callback remembers within a fit."""

from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from torch import nn
from torch.optim import Optimizer

from sparse_callbacks.core.averages import HeldAverages
from sparse_callbacks.core.before_run import BeforeRun
from sparse_callbacks.core.storages.exchanged import Exchanged
from sparse_callbacks.core.storages.first_use import FirstUse
from sparse_callbacks.core.unseen_steps import StepWatch


@dataclass
class FitState:
    """What the shell remembers within a fit."""

    restored: dict[str, Any] | None = None
    """State of the checkpoint, until the fit has begun."""
    before: BeforeRun | None = None
    """What the fit is about to change, until its first batch; a fit that is refused gives it back."""
    window_open: bool = False
    """A backward pass has run since the last optimizer step."""
    waiting: set[int] = field(default_factory=set)
    """Indices of the optimizers that have not stepped since the last backward pass."""
    watch: StepWatch | None = None
    """Looks for steps that nobody announces, until every optimizer has stepped."""
    left_out: list[str] = field(default_factory=list)
    """Names of parameters that stay dense because nobody trains them yet."""
    given: list[Optimizer] = field(default_factory=list)
    """The optimizers of the Trainer at the latest look at who is trained."""
    logged_at: int = -1
    """The step number of the latest row of curves of this fit; -1 before the first."""
    in_bar: bool = False
    """Figures of the network stand in the progress bar, where they stay until they are next read."""
    accumulates: int = 1
    """How many batches make an optimizer step, as far as the run's length took account of it."""
    cut_off: bool = False
    """It was said that updates will fall behind the run's end, because more batches than expected make a step."""
    evaluates: bool = False
    """A checkpoint is being loaded to validate, test or predict, and Lightning gives its state to the callback next."""
    averages: HeldAverages = field(default_factory=HeldAverages)
    """The averages of the weights that other callbacks keep."""
    missed_epoch_start: bool = False
    """The fit goes on within an epoch, whose beginning Lightning has announced to nobody."""
    rests: bool = False
    """The current epoch trains nothing: it was added to gather the statistics of batch norms."""
    last_epoch: int = -1
    """The epoch of the latest batch."""
    resumed: bool = False
    """Training has begun, and goes on from a checkpoint."""
    exchanged: Exchanged | None = None
    """The layers that this fit has exchanged, with the dense ones, which a fit that is refused gives back; None from its
    first batch on."""
    were_dense: dict[str, "ref[nn.Parameter]"] = field(default_factory=dict)
    """Dense Parameters whose layers were exchanged, in this fit or an earlier one, by name."""
    first_use: FirstUse | None = None
    """Looks which exchanged layers the first batch uses, until it is over."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy is about no layers of a model: it trains another one, or in another process."""
        return {**vars(self), "exchanged": None, "first_use": None, "were_dense": {}}
