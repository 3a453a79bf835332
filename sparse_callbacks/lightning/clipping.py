"""Lightning's clipping, its last call before an optimizer's step, as the place to take gradients away."""

from collections.abc import Callable

from pytorch_lightning import LightningModule

_HOOK = "configure_gradient_clipping"


def call_instead_of_clipping(module: LightningModule, act: Callable[[], None]) -> None:
    """Let ``act`` be called in the place of clipping in the step that comes, after all hooks that read gradients.

    With gradients that are taken away earlier, clipping by value and every hook that reads ``p.grad`` would fail.
    """

    def act_once(*_: object, **__: object) -> None:
        clip_again(module)
        act()

    vars(module)[_HOOK] = act_once  # the instance's attribute hides the class's hook


def clip_again(module: LightningModule) -> None:
    """Undo :func:`call_instead_of_clipping`."""
    vars(module).pop(_HOOK, None)
