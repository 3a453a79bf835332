"""Sparse training for PyTorch Lightning: one callback makes an ordinary LightningModule train sparse."""

from sparse_callbacks import distributions, ops, schedules
from sparse_callbacks.callback import SparsityCallback
from sparse_callbacks.methods import CTRE, DPF, GMP, SET, SNFS, GaP, ParallelGaP, RigL, Static
from sparse_callbacks.partitions import combine
from sparse_callbacks.phases import horizon
from sparse_callbacks.plan import Plan

__version__ = "0.1.0"
__all__ = [
    "CTRE", "DPF", "GMP", "SET", "SNFS", "GaP", "ParallelGaP", "Plan", "RigL", "SparsityCallback", "Static", "combine", "distributions",
    "horizon", "ops", "schedules",
]  # fmt: skip
