"""Pure functions on scores and masks, from their home in ``core``."""

from sparse_callbacks.core.ops import *  # noqa: F403
