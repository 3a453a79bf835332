"""Sparse training for PyTorch Lightning: one callback makes an ordinary LightningModule train sparse."""

from sparse_callbacks import distributions, ops, schedules
from sparse_callbacks.callback import SparsityCallback
from sparse_callbacks.methods import DPF, GMP, SET, SNFS, RigL, Static
from sparse_callbacks.plan import Plan

__version__ = "0.1.0"
__all__ = ["DPF", "GMP", "SET", "SNFS", "Plan", "RigL", "SparsityCallback", "Static", "distributions", "ops", "schedules"]
