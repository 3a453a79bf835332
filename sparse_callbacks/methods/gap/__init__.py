"""GaP and its parallel form, and the partitions that grow and are pruned in turn."""

from sparse_callbacks.methods.gap import saved as saved  # registers what a checkpoint of it may hold
from sparse_callbacks.methods.gap.gap import GaP
from sparse_callbacks.methods.gap.gap_parallel import ParallelGaP

__all__ = ["GaP", "ParallelGaP"]
