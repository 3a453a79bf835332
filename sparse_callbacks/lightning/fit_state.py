"""What a callback remembers within a fit."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class FitState:
    """What the shell remembers within a fit."""

    restored: dict[str, Any] | None = None
    """State of the checkpoint, until the fit has begun."""
    held_gradients: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of an accumulation window that was open when the checkpoint was written, until training starts."""
    window_open: bool = False
    """A backward pass has run since the last optimizer step."""
    left_out: list[str] = field(default_factory=list)
    """Names of parameters that stay dense because nobody trains them yet."""
    logged_at: int = -1
    """The Trainer's optimizer step of the latest row of curves."""
    last_run: Any = None
    """What :func:`~sparse_callbacks.core.loop_steps.last_run` gave, from setup until the masks are written."""
