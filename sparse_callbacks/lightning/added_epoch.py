"""The epoch that StochasticWeightAveraging adds for batch norms: no weight is trained in it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from sparse_callbacks.lightning.averaging import averages_epochs
from sparse_callbacks.lightning.namespaces import Trainer


def epochs_to_train(trainer: Trainer) -> int | None:
    """``max_epochs`` without the epoch that is added; -1 for a run that only its steps end, None before a fit."""
    epochs: int | None = trainer.max_epochs
    for callback in trainer.callbacks:
        # it is counted in on_fit_start and no longer in on_train_end, so both must say that it is there
        adds = averages_epochs(callback) and callback._model_contains_batch_norm
        if adds and epochs is not None and epochs == callback._max_epochs + 1:
            return epochs - 1
    return epochs


def _is_added(trainer: Trainer) -> bool:
    """Whether the current epoch is the one that was added."""
    epochs = epochs_to_train(trainer)
    return epochs != trainer.max_epochs and epochs is not None and bool(trainer.current_epoch >= epochs)


def enter_epoch(trainer: Trainer) -> bool:
    """An epoch begins or goes on: whether it is the one that was added. In it no optimizer moves anything until
    :func:`move_again`."""
    if _is_added(trainer):
        _hold_still(trainer)
        return True
    return False


def unless_at_rest(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook of a sparsity callback that has nothing to do in the epoch that was added.

    Args:
        hook: the method of the callback's class.
    """

    @wraps(hook)
    def unless_it_rests(callback: Any, *arguments: Any) -> None:
        if not callback.fit_state.rests:
            hook(callback, *arguments)

    return unless_it_rests


def _hold_still(trainer: Trainer) -> None:
    """Let no optimizer move anything.

    Lightning leaves backward out in this epoch, and yet takes a step behind its last batch, with the gradients and the
    momentum of the last training batch. An attribute of the strategy's instance hides the method that takes it.
    """
    vars(trainer.strategy)["optimizer_step"] = _only_closure


def move_again(trainer: Trainer) -> None:
    """The fit is over: optimizers move again."""
    if vars(trainer.strategy).get("optimizer_step") is _only_closure:
        del vars(trainer.strategy)["optimizer_step"]


def _only_closure(optimizer: Any, closure: Callable[[], Any], *_: Any, **__: Any) -> Any:
    """Stands for a strategy's ``optimizer_step``: the forward pass, and nothing else."""
    return closure()
