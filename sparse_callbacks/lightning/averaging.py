"""Lightning's callbacks that average weights, beside moving masks."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sparse_callbacks.core.averages import SparseAverage, follow, leave
from sparse_callbacks.core.host import TrainsInTurns
from sparse_callbacks.core.method import Method
from sparse_callbacks.lightning.namespaces import Trainer

# Classes are recognised by name, because they exist twice (in pytorch_lightning and in lightning.pytorch) and not in
# every version.
_OF_STEPS, _OF_EPOCHS = "WeightAveraging", "StochasticWeightAveraging"


def _is_a(callback: object, name: str) -> bool:
    """Whether a callback is of Lightning's class of this name, or of one of the user's that inherits from it."""
    packages = ("pytorch_lightning.", "lightning.")
    return any(c.__name__ == name and c.__module__.startswith(packages) for c in type(callback).__mro__)


def averages_steps(callback: object) -> bool:
    """Whether a callback is a ``WeightAveraging``, such as ``EMAWeightAveraging``."""
    return _is_a(callback, _OF_STEPS)


def averages_epochs(callback: object) -> bool:
    """Whether a callback is a ``StochasticWeightAveraging``."""
    return _is_a(callback, _OF_EPOCHS)


def averaging_callbacks(trainer: Trainer) -> list[Any]:
    """The callbacks of a Trainer that average weights."""
    return [c for c in trainer.callbacks if averages_steps(c) or averages_epochs(c)]


def refuse_averages(method: Method, trainer: Trainer) -> None:
    """Refuse an average that would be one of several networks.

    Args:
        method: the method of the fit that begins.
        trainer: its Trainer.

    Raises:
        ValueError: the method's networks train in turn, and somebody averages weights.
    """
    for callback in averaging_callbacks(trainer) if isinstance(method, TrainsInTurns) else ():
        raise ValueError(
            f"{type(callback).__name__} averages the weights of one network, and {type(method).__name__} trains several in "
            "turn. Remove it from callbacks=, or use GaP."
        )


def resume_averages(trainer: Trainer, module: nn.Module) -> None:
    """Let callbacks that average after epochs go on where a fit resumes within one.

    Lightning leaves out the hook of an epoch's beginning then, in which ``StochasticWeightAveraging`` takes back its
    schedule, and the next checkpoint would not hold how many averages were taken.

    Args:
        trainer: the Trainer, before its first batch.
        module: its LightningModule.
    """
    loop = trainer.fit_loop
    if loop.restarted_mid_epoch or loop.restarted_on_epoch_end:
        for callback in filter(averages_epochs, trainer.callbacks):
            callback.on_train_epoch_start(trainer, module)


class KeptAverages:
    """The averages that other callbacks keep of one method's weights, held to its masks for the length of a fit."""

    def __init__(self) -> None:
        self._kept: dict[str, SparseAverage] = {}
        self._owners: list[tuple[object, SparseAverage]] = []

    def begin(self, method: Method, trainer: Trainer, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Training begins: what the callbacks hold is masked now, and every average that they take from here on.

        Args:
            method: the method, in a run whose masks are written.
            trainer: the Trainer of the run.
            saved: what :meth:`state` gave for the run that goes on; empty for a new one.
        """
        self.end()
        self._kept = {}
        for callback in averaging_callbacks(trainer):
            average: nn.Module | None = callback._average_model
            if average is None:
                continue
            # both have `update_parameters`: of the one torch's AveragedModel, of the other the callback itself
            owner, averaged = (average, average.module) if averages_steps(callback) else (callback, average)
            key = callback.state_key
            kept = SparseAverage(method, averaged, saved.get(key, {}).get("born", {}))
            follow(owner, kept)
            self._kept[key] = kept
            self._owners.append((owner, kept))

    def end(self) -> None:
        """The fit is over, or somebody has refused it: the callbacks average as ever."""
        for owner, kept in self._owners:
            leave(owner, kept)
        self._owners = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of them; empty where nobody averages."""
        kept = {key: {"born": {n: b.clone() for n, b in a.born.items()}} for key, a in self._kept.items()}
        return {"averages": kept} if kept else {}

    def __reduce__(self) -> Any:
        return KeptAverages, ()  # a copy of a callback is in no fit
