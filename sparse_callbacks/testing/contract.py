"""Makes the contract of a method: a class of pytest cases."""

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from sparse_callbacks.core.method import Method
from sparse_callbacks.testing.settings import PROMISES, Settings

CASES = ("values", "loops", "optimizers", "resume", "users")


def contract(callback_class: type[Method], settings: Settings) -> type:
    """A class of pytest cases that a method has to pass; give it a name that begins with ``Test`` in a test module.

    The cases train small networks for 16 optimizer steps on the CPU. They check that weights are what their masks leave
    of them after every batch, with six optimizers; that training equals a plain loop with the same masks, bit by bit;
    that gradients are treated as the settings say, before anybody clips them; that there are as many zeros as
    ``plan()`` announces; that updates move masks and nothing else; that accumulation, fp16 with skipped steps,
    gradients that are not finite, manual optimization, several optimizers, frozen, unused and tied parameters,
    validation, trial runs, a second fit, ``torch.compile`` and a second method beside this one change nothing that they
    should not; and that a run resumed from a checkpoint ends bitwise where one ends that never stopped.

    A failure ends in a note: which case it was, the promises of :data:`~sparse_callbacks.testing.PROMISES` that the
    case held the method to, and what the author can do. Change the method, or, where a promise is not what the method
    means to keep, name it with the reason in ``Settings.promises_not_made``. A case without such a promise holds for
    every method.

    Args:
        callback_class: a subclass of ``SparsityCallback``, or a plain ``Method``, whose callback is made here.
        settings: arguments of a short run, how gradients are treated, promises not made.

    Raises:
        TypeError: ``callback_class`` is not a class of methods.

    Example:
        >>> from sparse_callbacks import RigL
        >>> from sparse_callbacks.testing import Settings, contract
        >>> short = {"sparsity": 0.8, "every": 3, "stop": 14, "drop_fraction": 0.5, "print_plan": False}
        >>> TestRigL = contract(RigL, Settings(short))
    """
    if not (isinstance(callback_class, type) and issubclass(callback_class, Method)):
        raise TypeError(
            f"contract({callback_class!r}, ...) needs a class: a Method, or its callback, a SparsityCallback. Give the "
            "class itself and its arguments in settings."
        )
    import pytest  # here, so that this package can be imported where pytest is not installed

    # failures then show the values that were compared; once imported, a module can no longer be rewritten
    modules = [f"{__package__}.{name}" for name in ("comparison", "subject", *(f"cases_{part}" for part in CASES))]
    pytest.register_assert_rewrite(*(name for name in modules if name not in sys.modules))
    from sparse_callbacks.lightning.callback import SparsityCallback
    from sparse_callbacks.testing.subject import Contract

    if not issubclass(callback_class, SparsityCallback):
        doc = {"__doc__": callback_class.__doc__, "__module__": callback_class.__module__}
        callback_class = type(callback_class.__name__, (callback_class, SparsityCallback), doc)
    found: dict[str, Any] = {"callback_class": callback_class, "settings": settings}
    found["__doc__"] = f"The contract of {callback_class.__name__}."
    found["pytestmark"] = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
    for part in CASES:
        module = import_module(f"sparse_callbacks.testing.cases_{part}")
        for name, case in vars(module).items():
            required = getattr(case, "needs", ())
            if name.startswith("test_") and not set(required) & set(settings.promises_not_made):
                found[name] = _explained(case, required)
    return type(f"Test{callback_class.__name__}", (Contract,), found)


def _explained(case: Callable[..., None], required: tuple[str, ...]) -> Callable[..., None]:
    """The case, whose failures say what it is about and what can be done."""

    @functools.wraps(case)  # pytest reads parameters and marks of the case through the wrapper
    def explained(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            case(self, *args, **kwargs)
        except Exception as error:
            asked = dict.fromkeys(required) | vars(self).get("asked", {})
            error.add_note(_advice(self.callback_class.__name__, case, list(asked)))
            raise

    return explained


def _advice(method: str, case: Callable[..., None], asked: list[str]) -> str:
    about = " ".join((case.__doc__ or "").split()) or case.__name__
    if not asked:
        return f"Contract of {method}: {about} This holds for every method and cannot be waived: change {method}."
    held = "; ".join(f"{name!r} ({PROMISES[name]})" for name in asked)
    return (
        f"Contract of {method}: {about} It was held to the promises {held}. Change {method}, or, where it does not mean "
        "to keep one of them, give that promise and the reason in Settings(promises_not_made={...})."
    )
