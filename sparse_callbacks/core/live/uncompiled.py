"""Compiled models run uncompiled while layers record what an update looks at."""

from contextlib import ExitStack

import torch


class Uncompiled:
    """Lets torch run compiled code eagerly from the first `enter` to the last `leave`.

    Lists that grow are not for a compiled graph. To break the graph at the layer is not enough: ``fullgraph=True`` refuses
    that, and elsewhere torch would prefer the broken code in every step that follows.
    """

    def __init__(self) -> None:
        self._entered = 0
        self._stance = ExitStack()

    # within a compiled optimizer.step, torch refuses another stance unless what sets it is not compiled
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self) -> None:
        """One more layer records."""
        self._entered += 1
        if self._entered == 1:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self) -> None:
        """One layer less does."""
        self._entered -= 1
        if not self._entered:
            self._stance.close()


UNCOMPILED = Uncompiled()
