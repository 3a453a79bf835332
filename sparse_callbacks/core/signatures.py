"""Refusing overrides of hooks that have another signature, or another name, than the hooks of today."""

import inspect
from typing import Any

# The hooks of version 0.1 that have other names now. An override of one of them would silently never be called.
RENAMED = {
    "update": "new_masks(self, step), which returns an Update(masks, figures), and after_update(self, step)",
    "move_masks": "new_masks(self, step), whose masks the engine takes",
    "before_batch": "window_start(self, batch)",
    "after_batch": "batch_end(self, end)",
    "begin": "further_members(self, model, entries) and attach(self, model)",
    "apply_masks": "write(self, names, finite)",
}
_RENAMED_FACTS = {"anchor": "first_update", "curves": "figure_prefix"}

_NEW_SIGNATURE = {
    "before_step": "step.names, step.due, step.gradient(name), step.mask_gradients() and step.replace() take the place "
    "of self.names, self.due(), self.gradient(name), self.mask_gradients() and self.skip_step()",
    "after_step": "step.due takes the place of self.due(), and the hook returns self.new_masks(step) where an update "
    "falls",
    "new_masks": "step.names and step.number take the place of self.names and self.step, and the hook returns "
    "Update(masks)",
    "make_calendar": "run.total(), run.epoch() and run.lenient take the place of the three arguments",
}


def refuse_old_hooks(cls: type, base: type) -> None:
    """Refuse a subclass that overrides a hook in a way that the engine would not call.

    Args:
        cls: the class that is being made.
        base: the class that defines the hooks.

    Raises:
        TypeError: an override with another signature than the hook, or one of a hook that has another name now.
    """
    # what this class defines itself: its bases were looked at when they were made
    for name, made in vars(cls).items():
        if name in _RENAMED_FACTS:
            raise TypeError(
                f"{cls.__name__}.{name} is a fact of version 0.1 that nobody reads any more. "
                f"Write {_RENAMED_FACTS[name]}. The table of old and new names is in CHANGELOG.md."
            )
        if not inspect.isfunction(made):
            continue
        if name in RENAMED and not hasattr(base, name):
            raise TypeError(
                f"{cls.__name__}.{name} overrides a hook of version 0.1 that nobody calls any more. "
                f"Write {RENAMED[name]}. The table of old and new names is in CHANGELOG.md."
            )
        hook = getattr(base, name, None)
        if inspect.isfunction(hook) and not name.startswith("__") and not _takes_the_same(made, hook):
            advice = _NEW_SIGNATURE.get(name, "see the hook's docstring")
            raise TypeError(
                f"{cls.__name__}.{name}{inspect.signature(made)} does not take what the hook is called with, "
                f"{name}{inspect.signature(hook)}: {advice}. The table of old and new names is in CHANGELOG.md."
            )


def _takes_the_same(made: Any, hook: Any) -> bool:
    """``made`` can be called with the positional arguments of ``hook``."""
    positional = [p for p in inspect.signature(hook).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    try:
        inspect.signature(made).bind(*positional)
    except TypeError:
        return False
    return True
