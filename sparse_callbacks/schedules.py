"""Schedules of numbers over a run, from their home in ``core``."""

from sparse_callbacks.core.schedules import *  # noqa: F403
