"""NM: N:M masks of dense weights that learn on, or their soft projection."""

from sparse_callbacks.methods.nm import saved as saved  # registers what a checkpoint of it may hold
from sparse_callbacks.methods.nm.nm import NM

__all__ = ["NM"]
