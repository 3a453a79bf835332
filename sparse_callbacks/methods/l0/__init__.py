"""Constrained L0 and its gates."""

from sparse_callbacks.methods.l0 import averaged as averaged  # registers what an average of its weights is taken of
from sparse_callbacks.methods.l0 import saved as saved  # registers what a checkpoint of it may hold
from sparse_callbacks.methods.l0 import units_left as units_left  # registers what it leaves of a network
from sparse_callbacks.methods.l0.l0 import ConstrainedL0

__all__ = ["ConstrainedL0"]
