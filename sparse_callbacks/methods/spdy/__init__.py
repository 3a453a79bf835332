"""SPDY: how sparse each layer becomes within a budget of FLOPs or time."""

from sparse_callbacks.methods.spdy.spdy import Spdy

__all__ = ["Spdy"]
