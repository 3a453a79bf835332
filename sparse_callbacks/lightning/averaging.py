"""Lightning's callbacks that average weights, beside moving masks."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparse_callbacks import methods
from sparse_callbacks.core.averages import HeldAverages
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
        ValueError: the method's networks train in turn, or it merges them itself, and somebody averages weights.
    """
    for callback in averaging_callbacks(trainer) if isinstance(method, methods.SupTickets) else ():
        raise ValueError(
            f"{type(callback).__name__} would write its average over the weights that {type(method).__name__} merges at the end of "
            "the run. Remove it from callbacks=, or use the base method alone with it."
        )
    for callback in averaging_callbacks(trainer) if isinstance(method, TrainsInTurns) else ():
        raise ValueError(
            f"{type(callback).__name__} averages the weights of one network, and {type(method).__name__} trains several in "
            "turn. Remove it from callbacks=, or use GaP."
        )


def catch_up(trainer: Trainer, module: nn.Module) -> bool:
    """Let averaging callbacks go on where a fit resumes within an epoch, in which Lightning leaves hooks out.

    Args:
        trainer: the Trainer, before its first batch.
        module: its LightningModule.

    Returns:
        Whether the beginning of the current epoch is announced to nobody, and :func:`start_epoch` has to be called.
    """
    loop, epochs = trainer.fit_loop, trainer.fit_loop.epoch_loop
    # saved behind the last batch of an epoch: Lightning counts it as over, and leaves out the hook of its end
    if loop.restarted_mid_epoch and epochs.restarted_on_train_batch_end and epochs.batch_progress.is_last_batch:
        for callback in filter(averages_steps, trainer.callbacks):
            if callback.should_update(epoch_idx=trainer.current_epoch - 1):
                callback._average_model.update_parameters(module)
    for callback in filter(averages_epochs, trainer.callbacks):
        if callback._model_contains_batch_norm and trainer.current_epoch == trainer.max_epochs:
            # saved behind the last batch of all: on_train_end takes back what only the hook that is left out has done
            callback._accumulate_grad_batches = trainer.accumulate_grad_batches
            loop.max_batches += 1
            # a product of dense values and gates may have rounded what it holds
            callback.transfer_weights(callback._average_model, module)
    return bool(loop.restarted_mid_epoch)


def start_epoch(trainer: Trainer, module: nn.Module) -> None:
    """The first batch of a fit that resumes within an epoch: ``StochasticWeightAveraging`` takes its schedule again, and
    an average if it has none of this epoch.

    Otherwise it would train on without its schedule, and the next checkpoint would say that no average was taken.

    Args:
        trainer: the Trainer of the fit.
        module: its LightningModule.
    """
    # not earlier: in the epoch that it adds it changes how many batches Lightning counts on
    for callback in filter(averages_epochs, trainer.callbacks):
        callback.on_train_epoch_start(trainer, module)


def end_with_averages(method: Method, trainer: Trainer, module: nn.Module) -> None:
    """A fit is over, and the model holds averages: dense values that wait outside of it follow.

    Args:
        method: the method of the fit.
        trainer: its Trainer.
        module: its LightningModule.
    """
    callbacks = averaging_callbacks(trainer)
    if method.saved is not None:  # the run was over when it was saved, so that on_train_end was left out
        for callback in filter(averages_steps, callbacks):
            callback._copy_average_to_current(module)
    if callbacks:
        method.weights.absorb(method.weights.copied)


def weights_beside_averages(trainer: Trainer, found: Mapping[str, Any], path: object) -> list[Mapping[str, Any]]:
    """The weights in a checkpoint in which averages lie in the place of weights; none in others.

    Args:
        trainer: the Trainer of the fit that resumes.
        found: the content of the checkpoint.
        path: its path, for the error.

    Raises:
        ValueError: they are missing, or what belongs to the averages is.
    """
    states = [state.get("averages") for state in found["callbacks"].values() if isinstance(state, Mapping)]
    keys = {key for averages in states if isinstance(averages, Mapping) for key in averages}
    if not any(callback.state_key in keys for callback in filter(averages_steps, trainer.callbacks)):
        return []
    # Lightning takes averages for weights where these are missing
    if lost := [key for key in ("current_model_state", "averaging_state") if not isinstance(found.get(key), Mapping)]:
        raise ValueError(
            f"{path} is damaged: it holds averages in the place of weights, and {', '.join(lost)} in it is missing or no "
            "mapping. Resume from another checkpoint of the run (ckpt_path=)."
        )
    return [found["current_model_state"]]


def saved_averages(method: Method, trainer: Trainer) -> HeldAverages:
    """What the run that goes on has saved of averages that callbacks of this Trainer keep; empty for a new run."""
    saved = {} if method.saved is None else method.saved.averages
    here = {callback.state_key for callback in averaging_callbacks(trainer)}
    return HeldAverages({key: kept for key, kept in saved.items() if key in here})


def hold_averages(method: Method, trainer: Trainer) -> HeldAverages:
    """Training begins: what averaging callbacks hold is masked now, and every average that they take from here on.

    Args:
        method: the method, in a run whose masks are written.
        trainer: the Trainer of the run.
    """
    held = saved_averages(method, trainer)
    for callback in averaging_callbacks(trainer):
        average = callback._average_model
        # both have `update_parameters`: of the one torch's AveragedModel, of the other the callback itself
        owner, averaged = (average, average.module) if averages_steps(callback) else (callback, average)
        held.hold(callback.state_key, owner, averaged, method)
    return held
