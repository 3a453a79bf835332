"""Compiled models run uncompiled while layers record what an update looks at."""

import gc
from collections.abc import Callable
from typing import Any
from weakref import finalize

import torch


class Uncompiled:
    """Lets torch run compiled code eagerly from the first `enter` to the last `leave`.

    Lists that grow are not for a compiled graph. To break the graph at the layer is not enough: ``fullgraph=True`` refuses
    that, and elsewhere torch would prefer the broken code in every step that follows.
    """

    def __init__(self) -> None:
        self._entered = 0
        self._scope: Any = None

    @property
    def is_entered(self) -> bool:
        """Somebody has entered, and not left yet."""
        return self._entered > 0

    # within a compiled optimizer.step, torch refuses another stance unless what sets it is not compiled
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self) -> None:
        """One more layer records."""
        self._entered += 1
        if self._entered == 1:
            self._scope = torch.compiler.set_stance("force_eager")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self) -> None:
        """One layer less does."""
        self._entered -= 1
        if not self._entered:
            _leave_stance(self._scope)
            self._scope = None


UNCOMPILED = Uncompiled()


def _leave_stance(scope: Any) -> None:
    """Leave a stance, whether or not scopes of others that began within it have ended.

    Args:
        scope: what ``torch.compiler.set_stance`` gave.
    """
    here = torch.compiler.set_stance("default")
    current = here.prev
    here.__exit__(None, None, None)
    if current is scope.stance:
        scope.__exit__(None, None, None)
    # another scope that began within this one is still open, and will bring this very object back when it ends
    vars(scope.stance).update(vars(scope.prev))


def run_uncompiled(owner: object) -> Callable[[], object]:
    """Compiled code of this process runs eagerly from now on.

    Args:
        owner: when it is gone, compiled code runs compiled again.

    Returns:
        A function that lets it do so earlier; it may be called twice.
    """
    UNCOMPILED.enter()
    leave = finalize(owner, UNCOMPILED.leave)
    leave.atexit = False
    return leave


def leave_abandoned_runs() -> None:
    """Another run begins: one that nobody has closed, and nobody can reach, ends now and not when Python collects it."""
    if UNCOMPILED.is_entered:
        gc.collect()
