"""A Trainer as the host of a method: what methods may use of it, and nothing else."""

from collections.abc import Generator, Iterable, Sequence
from typing import Any

from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.calibration import Calibration, Loss
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.host import Forward
from sparse_callbacks.lightning import data_pass
from sparse_callbacks.lightning.calibration import calibration
from sparse_callbacks.lightning.namespaces import Trainer


class TrainerHost:
    """The :class:`~sparse_callbacks.core.host.Host` of a callback.

    Args:
        trainer: the Trainer of the run.
        module: the LightningModule of the run.
        engine: the engine of the method, which keeps a request for new optimizers until the next batch.
    """

    def __init__(self, trainer: Trainer, module: nn.Module, engine: Engine) -> None:
        self.trainer, self.module, self._engine = trainer, module, engine

    @property
    def announces_steps(self) -> bool:
        """See :meth:`~sparse_callbacks.core.host.Host.announces_steps`."""
        # in manual optimization the user's code may step the raw torch optimizer, which Lightning does not notice
        return bool(self.module.automatic_optimization)

    def data_pass(
        self,
        fraction: float = 1.0,
        *,
        forward: Forward | None = None,
        loader: Any | None = None,
        train: Sequence[nn.Module] = (),
        values: bool = True,
    ) -> Generator[Any, None, None]:
        """See :meth:`~sparse_callbacks.core.host.Host.data_pass`."""
        world, rank = self._share_of_data()
        passed = self._engine.passed
        yield from data_pass.outputs(
            self.trainer, self.module, forward, loader, fraction, world, rank, train, passed, values
        )

    def _share_of_data(self) -> tuple[int, int]:
        """Into how many shares a pass divides the data, and which of them is this rank's."""
        return distributed.world_size(), distributed.rank()

    def calibration(
        self,
        batches: int | Iterable[Any],
        *,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> Calibration:
        """See :meth:`~sparse_callbacks.core.host.Host.calibration`."""
        return calibration(self.trainer, self.module, batches, loss, seed, self._engine.passed)

    def request_restart(self) -> None:
        """See :meth:`~sparse_callbacks.core.host.Host.request_restart`."""
        # not at once: methods ask in the middle of a step, whose optimizer must live until its end
        self._engine.restart_wanted = True

    def inform(self, text: str) -> None:
        """See :meth:`~sparse_callbacks.core.host.Host.inform`."""
        rank_zero_info(text)

    def warn(self, text: str, category: type[Warning] = UserWarning) -> None:
        """See :meth:`~sparse_callbacks.core.host.Host.warn`."""
        rank_zero_warn(text, category=category)
