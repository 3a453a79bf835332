"""CTRE and the activations that its cosine similarities come from."""

from sparse_callbacks.methods.ctre import saved as saved  # registers what a checkpoint of it may hold
from sparse_callbacks.methods.ctre.ctre import CTRE

__all__ = ["CTRE"]
