"""SMCP and the knapsack that shares out its budget."""

from sparse_callbacks.methods.smcp import saved as saved  # registers what a checkpoint of it may hold
from sparse_callbacks.methods.smcp.smcp import SMCP

__all__ = ["SMCP"]
