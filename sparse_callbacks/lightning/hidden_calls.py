"""Methods of a Trainer's parts that are hidden for a while, where Lightning has no hook."""

from collections.abc import Callable
from typing import Any

from sparse_callbacks.lightning.namespaces import Trainer

_HIDDEN = ("load_checkpoint", "setup")


def call_instead(trainer: Trainer, name: str, call: Callable[..., Any]) -> None:
    """Let the next call of a method of the strategy, and no other, be one of ``call``.

    An attribute of the instance hides the method of its class until then.

    Args:
        trainer: the Trainer whose strategy it is.
        name: the name of the method.
        call: a function that takes the usual method and its arguments.
    """
    strategy = trainer.strategy
    vars(strategy).pop(name, None)
    usual = getattr(strategy, name)

    def once(*arguments: Any, **options: Any) -> Any:
        # before the call, which may raise
        vars(strategy).pop(name, None)
        return call(usual, *arguments, **options)

    setattr(strategy, name, once)


def find_again(trainer: Trainer) -> None:
    """Undo :func:`call_instead` for all methods, whether the call has come or not."""
    for name in _HIDDEN:
        vars(trainer.strategy).pop(name, None)


def call_after_training(trainer: Trainer, act: Callable[[], None]) -> None:
    """Let ``act`` be called whenever the loop of training is left, in whatever way.

    No hook is sure to come then: where ``on_exception`` of another callback raises, Lightning calls nobody behind it.

    Args:
        trainer: the Trainer whose fit begins.
        act: a function that may be called more often, as a learning rate finder runs the loop too.
    """
    loop = trainer.fit_loop
    usual = loop.run

    def run() -> None:
        try:
            usual()
        finally:
            act()

    vars(loop)["run"] = run


def run_as_usual(trainer: Trainer) -> None:
    """Undo :func:`call_after_training`."""
    vars(trainer.fit_loop).pop("run", None)
