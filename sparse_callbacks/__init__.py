"""Sparse training for PyTorch: one callback, or one call before a loop, makes a model train sparse."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_callbacks import distributions, ops, schedules
    from sparse_callbacks.channels.compact import load_compact, save_compact
    from sparse_callbacks.channels.groups import channel_groups
    from sparse_callbacks.channels.onnx import export_onnx
    from sparse_callbacks.channels.slim import slim
    from sparse_callbacks.channels.slim_attention import SlimAttention
    from sparse_callbacks.core.calendar import Time
    from sparse_callbacks.core.conversion.convert import convert
    from sparse_callbacks.core.conversion.semi_structured import to_semi_structured
    from sparse_callbacks.core.doctor.warning import DoctorWarning
    from sparse_callbacks.core.inference import to_inference
    from sparse_callbacks.core.loop import sparsify
    from sparse_callbacks.core.method import Method, Options
    from sparse_callbacks.core.plan import Plan
    from sparse_callbacks.core.running_statistics import recalibrate_batchnorm
    from sparse_callbacks.core.saved_masks import saved_masks
    from sparse_callbacks.core.schedules import pruning_curve
    from sparse_callbacks.core.score_options import Score
    from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
    from sparse_callbacks.core.sparse_run import SparseRun
    from sparse_callbacks.core.step import Step
    from sparse_callbacks.core.storages.exchange import exchange_layers, to_dense
    from sparse_callbacks.core.topology import Update
    from sparse_callbacks.lightning.at_target import BestAtTarget, EarlyStoppingAtTarget
    from sparse_callbacks.lightning.callback import SparsityCallback
    from sparse_callbacks.lightning.curvature_monitor import CurvatureMonitor
    from sparse_callbacks.lightning.methods import (
        CTRE,
        DPF,
        GMP,
        NM,
        SET,
        SMCP,
        SNFS,
        ChannelPruning,
        ConstrainedL0,
        EarlyCroP,
        GaP,
        ParallelGaP,
        PruneAtStart,
        RigL,
        Static,
        SupTickets,
    )
    from sparse_callbacks.lightning.optimizer_lives import horizon
    from sparse_callbacks.lightning.sparsity_report import SparsityReport
    from sparse_callbacks.methods.all_relu import AllReLU
    from sparse_callbacks.methods.drop_and_grow import DropAndGrow
    from sparse_callbacks.methods.gap.combination import combine
    from sparse_callbacks.methods.spdy.spdy import Spdy

__version__ = "0.1.0"
__all__ = [
    "CTRE",
    "DPF",
    "GMP",
    "NM",
    "SET",
    "SMCP",
    "SNFS",
    "AllReLU",
    "BestAtTarget",
    "ChannelPruning",
    "ConstrainedL0",
    "CurvatureMonitor",
    "DoctorWarning",
    "DropAndGrow",
    "EarlyCroP",
    "EarlyStoppingAtTarget",
    "GaP",
    "Method",
    "Options",
    "ParallelGaP",
    "Plan",
    "PruneAtStart",
    "RigL",
    "Score",
    "SlimAttention",
    "SparseLinear",
    "SparseRun",
    "SparsityCallback",
    "SparsityReport",
    "Spdy",
    "Static",
    "Step",
    "SupTickets",
    "Time",
    "Update",
    "channel_groups",
    "combine",
    "convert",
    "distributions",
    "exchange_layers",
    "export_onnx",
    "horizon",
    "load_compact",
    "ops",
    "pruning_curve",
    "recalibrate_batchnorm",
    "save_compact",
    "saved_masks",
    "schedules",
    "slim",
    "sparsify",
    "to_dense",
    "to_inference",
    "to_semi_structured",
]

# Where each name lives; it is imported when it is first asked for (PEP 562), so that `sparse_callbacks.core` and
# `sparse_callbacks.methods` work where Lightning is not installed.
_CALLBACKS = (
    *("CTRE", "DPF", "GMP", "NM", "SET", "SMCP", "SNFS", "ChannelPruning", "ConstrainedL0"),
    *("EarlyCroP", "GaP", "ParallelGaP", "PruneAtStart", "RigL", "Static", "SupTickets"),
)
_MODULE_OF = dict.fromkeys(_CALLBACKS, "lightning.methods") | {
    "AllReLU": "methods.all_relu",
    "BestAtTarget": "lightning.at_target",
    "CurvatureMonitor": "lightning.curvature_monitor",
    "DoctorWarning": "core.doctor.warning",
    "DropAndGrow": "methods.drop_and_grow",
    "EarlyStoppingAtTarget": "lightning.at_target",
    "Method": "core.method",
    "Options": "core.method",
    "Plan": "core.plan",
    "Score": "core.score_options",
    "SlimAttention": "channels.slim_attention",
    "SparseLinear": "core.sparse_layers.sparse_linear",
    "SparseRun": "core.sparse_run",
    "SparsityCallback": "lightning.callback",
    "SparsityReport": "lightning.sparsity_report",
    "Spdy": "methods.spdy.spdy",
    "Step": "core.step",
    "Time": "core.calendar",
    "Update": "core.topology",
    "channel_groups": "channels.groups",
    "combine": "methods.gap.combination",
    "convert": "core.conversion.convert",
    "exchange_layers": "core.storages.exchange",
    "export_onnx": "channels.onnx",
    "horizon": "lightning.optimizer_lives",
    "load_compact": "channels.compact",
    "pruning_curve": "core.schedules",
    "recalibrate_batchnorm": "core.running_statistics",
    "save_compact": "channels.compact",
    "saved_masks": "core.saved_masks",
    "slim": "channels.slim",
    "sparsify": "core.loop",
    "to_dense": "core.storages.exchange",
    "to_inference": "core.inference",
    "to_semi_structured": "core.conversion.semi_structured",
}
_MODULES = ("distributions", "ops", "schedules")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_MODULE_OF[name]}")
    except ModuleNotFoundError as error:
        if name not in _CALLBACKS or (error.name or "").startswith(__name__):
            raise
        raise ModuleNotFoundError(
            f"sparse_callbacks.{name} is a callback of a Trainer, and {error.name} is not installed. Install "
            f"pytorch-lightning, or use sparse_callbacks.methods.{name} with sparse_callbacks.sparsify in a loop of your own.",
            name=error.name,
        ) from error
    found = getattr(module, name)
    globals()[name] = found  # asked for once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
