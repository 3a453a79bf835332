"""Sparse training for PyTorch Lightning: one callback makes an ordinary LightningModule train sparse."""

from sparse_callbacks import distributions, ops, schedules
from sparse_callbacks.channels.compact import load_compact, save_compact
from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.onnx import export_onnx
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.core.loop import sparsify
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.lightning.optimizer_lives import horizon
from sparse_callbacks.methods import CTRE, DPF, GMP, SET, SMCP, SNFS, ConstrainedL0, GaP, ParallelGaP, RigL, Static
from sparse_callbacks.methods.gap.combination import combine

__version__ = "0.1.0"
__all__ = [
    "CTRE",
    "DPF",
    "GMP",
    "SET",
    "SMCP",
    "SNFS",
    "ConstrainedL0",
    "GaP",
    "ParallelGaP",
    "Plan",
    "RigL",
    "SparsityCallback",
    "Static",
    "channel_groups",
    "combine",
    "distributions",
    "export_onnx",
    "horizon",
    "load_compact",
    "ops",
    "save_compact",
    "schedules",
    "slim",
    "sparsify",
]
