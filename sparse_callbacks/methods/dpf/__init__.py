"""DPF and the whole filters that it can prune."""

from sparse_callbacks.methods.dpf.dpf import DPF

__all__ = ["DPF"]
