"""CTRE and the activations that its cosine similarities come from."""

from sparse_callbacks.methods.ctre.ctre import CTRE

__all__ = ["CTRE"]
