"""DPF and the whole filters that it can prune."""

from sparse_callbacks.methods.dpf import saved as saved  # registers what a checkpoint of it may hold
from sparse_callbacks.methods.dpf.dpf import DPF

__all__ = ["DPF"]
