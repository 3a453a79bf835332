"""The account of a run: what its training has cost so far, in whole numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sparse_callbacks.core import distributed


class SampleCost(NamedTuple):
    """Multiply-adds for one sample, of a window of training or of one forward pass; times two they are FLOPs.

    Attributes:
        sparse: of the sparse layers.
        sparse_dense: of the same layers in a dense run.
        whole: of the whole model.
        whole_dense: of the whole model in a dense run.
    """

    sparse: int
    sparse_dense: int
    whole: int
    whole_dense: int


@dataclass
class Amounts:
    """Amounts that the processes of a run add up, each its own: samples, and multiply-adds."""

    samples: int = 0
    training: int = 0
    training_dense: int = 0
    sparse: int = 0
    sparse_dense: int = 0
    passes: int = 0
    similarities: int = 0

    def plus(self, other: "Amounts", times: int = 1) -> "Amounts":
        """The sum with ``times`` the amounts of another."""
        return Amounts(**{name: value + times * getattr(other, name) for name, value in asdict(self).items()})


class Account:
    """What a run has cost so far, exactly: a resumed run goes on with the same whole numbers.

    Each process counts what it does itself, and :meth:`gather` adds that up, where all processes call it.
    """

    def __init__(self) -> None:
        self.steps = 0
        """Windows of training that were charged."""
        self.active_sum = 0
        """Active weights of the whole model, added up over these windows."""
        self.gathered = Amounts()
        """Of all processes, at the last :meth:`gather`."""
        self._mine = Amounts()  # of this process since

    def charge(self, samples: int, cost: SampleCost, active: int) -> None:
        """A window of training is over.

        Args:
            samples: samples of it that this process has trained on.
            cost: multiply-adds for one of them.
            active: active weights of the whole model in it.
        """
        self.steps += 1
        self.active_sum += active
        mine = self._mine
        mine.samples += samples
        mine.training += samples * cost.whole
        mine.training_dense += samples * cost.whole_dense
        mine.sparse += samples * cost.sparse
        mine.sparse_dense += samples * cost.sparse_dense

    def charge_pass(self, samples: int, forward: SampleCost, similarities: int) -> None:
        """Samples were passed through the network in order to look at its activations.

        Args:
            samples: how many.
            forward: multiply-adds of a forward pass of one of them.
            similarities: multiply-adds of what was made of its activations.
        """
        mine = self._mine
        mine.passes += samples * forward.whole
        mine.training += samples * forward.whole
        mine.sparse += samples * forward.sparse
        mine.similarities += samples * similarities

    def gather(self) -> Amounts:
        """The amounts of all processes; every process calls it."""
        mine = Amounts(*distributed.sums_of(list(asdict(self._mine).values())))
        self.gathered, self._mine = self.gathered.plus(mine), Amounts()
        return self.gathered

    def figures(self) -> dict[str, float]:
        """The cumulative figures of a row; a multiply-add is two FLOPs."""
        found = self.gathered
        return {
            "samples": found.samples,
            "flops/training": 2 * found.training,
            "flops/training_dense": 2 * found.training_dense,
            "flops/training_sparse_layers": 2 * found.sparse,
            "flops/training_sparse_layers_dense": 2 * found.sparse_dense,
            "flops/passes": 2 * found.passes,
            "flops/similarities": 2 * found.similarities,
        }

    def state(self) -> dict[str, int]:
        """Whole numbers for a checkpoint. Where not all processes gather before, this one takes the others for its like."""
        total = self.gathered.plus(self._mine, distributed.world_size())
        return {**asdict(total), "steps": self.steps, "active_sum": self.active_sum}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.steps, self.active_sum = int(state["steps"]), int(state["active_sum"])
        self.gathered = Amounts(**{name: int(state[name]) for name in asdict(Amounts())})
        self._mine = Amounts()
