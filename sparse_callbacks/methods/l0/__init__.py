"""Constrained L0 and its gates."""

from sparse_callbacks.methods.l0 import saved as saved  # registers what a checkpoint of it may hold
from sparse_callbacks.methods.l0.l0 import ConstrainedL0

__all__ = ["ConstrainedL0"]
