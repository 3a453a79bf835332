"""PruneAtStart and EarlyCroP: one pruning by a score, of the fresh network or early in training."""

from sparse_callbacks.methods.prune_at_start import saved as saved  # registers what a checkpoint of them may hold
from sparse_callbacks.methods.prune_at_start.early_crop import EarlyCroP
from sparse_callbacks.methods.prune_at_start.prune_at_start import PruneAtStart

__all__ = ["EarlyCroP", "PruneAtStart"]
