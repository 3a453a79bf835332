"""A hand-written loop as the host of a method."""

import inspect
import warnings
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from sparse_callbacks.core import data_pass, distributed
from sparse_callbacks.core.calibration import (
    BATCHES_ADVICE,
    LOSS_ADVICE,
    Calibration,
    Loss,
    number_of_batches,
    sampling,
)
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.storages.storage_timing import rows_of_layers


class LoopHost:
    """The :class:`~sparse_callbacks.core.host.Host` of a hand-written loop.

    Args:
        model: the model of the run.
        engine: whose request for new optimizers the run carries out at the next step.
        name: name of the method, for messages.
        data: the loader of the training data; None where the loop gave none.
        forward: a function of the model and a batch that gives the network's output; None: by the batch's type.
    """

    def __init__(self, model: nn.Module, engine: Engine, name: str, data: Any | None, forward: Forward | None) -> None:
        self._model, self._engine, self._name = model, engine, name
        self._data, self._forward, self._compared = data, forward, False

    @property
    def announces_steps(self) -> bool:
        """The optimizers' own hooks announce every step."""
        return True

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
        data_pass.check_fraction(fraction)
        given = self._data if loader is None else loader
        if given is None:
            raise data_pass.NoPassError(
                f"{self._name} runs the network on training data. Give sparsify(..., data=loader), the loader of the "
                "training data."
            )
        world, rank = distributed.world_size(), distributed.rank()

        def choose() -> tuple[Iterable[Any], int | None]:
            if loader is None and _can_be_ordered(given):
                batches = data_pass.in_order(given, world, rank, whole=bool(train))
                if values:
                    self._warn_if_random(batches)
            elif getattr(getattr(given, "sampler", None), "num_replicas", 1) > 1:
                batches = given  # it gives each process a part of the data, as loaders of Fabric do
            else:
                batches = data_pass.EveryNthBatch(given, world, rank)
            return batches, data_pass.batch_count(batches, fraction)

        yield from data_pass.outputs(
            self._model, choose, forward=forward or self._forward, train=train, passed=self._engine.passed
        )

    def calibration(
        self,
        batches: int | Iterable[Any],
        *,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> Calibration:
        """See :meth:`~sparse_callbacks.core.host.Host.calibration`."""
        if loss is None:
            raise ValueError(
                f"{self._name} computes scores from the loss, which a loop of your own does not show. {LOSS_ADVICE}"
            )
        data, size = self._data, number_of_batches(batches)
        if size is not None and data is None:
            raise ValueError(
                f"{self._name} computes scores on batches of the training data. Give sparsify(..., data=loader), the loader "
                "of the training data, or batches=, a list of them."
            )

        def draw() -> Any:
            if size is None:
                return batches
            if not _can_be_ordered(data):
                return data
            return data_pass.in_order(data, whole=True, shuffled=sampling(seed), advice=BATCHES_ADVICE)

        return Calibration(
            self._model,
            draw,
            loss,
            size=size,
            seed=seed,
            move=lambda batch: data_pass.to_device(self._model, batch),
            passed=self._engine.passed,
        )

    def rows_seen(self) -> dict[str, int]:
        """The rows that each linear layer sees in one batch of the loop's data, by its name; empty where it gave none."""
        if self._data is None:
            return {}
        outputs = self.data_pass()
        try:
            return rows_of_layers(self._model, lambda: next(outputs, None))
        finally:
            outputs.close()

    def _warn_if_random(self, batches: Any) -> None:
        if not self._compared and data_pass.differs_when_fetched_again(batches):
            self.warn(data_pass.RANDOM_DATA.replace("statistics_dataloader=", "a loader without augmentation as data="))
        self._compared = True

    def request_restart(self) -> None:
        """See :meth:`~sparse_callbacks.core.host.Host.request_restart`."""
        self._engine.restart_wanted = True

    def inform(self, text: str) -> None:
        """See :meth:`~sparse_callbacks.core.host.Host.inform`."""
        if distributed.rank() == 0:
            print(text, flush=True)

    def warn(self, text: str, category: type[Warning] = UserWarning) -> None:
        """See :meth:`~sparse_callbacks.core.host.Host.warn`."""
        if distributed.rank() == 0:
            # to the line of the loop: the first one outside of this package
            level, frame = 1, inspect.currentframe()
            while frame is not None and frame.f_globals.get("__name__", "").startswith("sparse_callbacks."):
                level, frame = level + 1, frame.f_back
            warnings.warn(text, category, stacklevel=level)


def _can_be_ordered(data: Any) -> bool:
    """Whether ``data`` can be passed over in the order of its data set, without moving a sampler's generator on."""
    if callable(getattr(data, "in_order", None)):
        return True
    return isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)
