"""What a saved run of DPF may hold."""

from collections.abc import Collection, Mapping

from torch import nn

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.joint_thresholds import are_joint, may_empty
from sparse_callbacks.core.schedules import pruning_curve
from sparse_callbacks.core.state_claims import Kept, Zeros, copied_names, expected_aux, possible_zeros
from sparse_callbacks.methods.dpf.dpf import DPF
from sparse_callbacks.methods.towards_pattern import possible_zeros_towards


@possible_zeros.register
def _(method: DPF, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    curve = pruning_curve(method.sparsity)
    if method.unit == "filter":  # fewer weights than a filter has are due at first
        return [Zeros((name,), range(saved.masks[name].numel() + 1)) for name in planned]
    if not are_joint(method) and curve.initial <= curve.final:
        return possible_zeros_towards(method, saved, planned)
    # one threshold for all layers leaves a weight of each, unless it was told otherwise
    return [Zeros((name,), range(saved.masks[name].numel() + may_empty(method))) for name in planned]


@copied_names.register
def _(method: DPF, saved: SavedRun) -> Collection[str]:
    return saved.masks if method.finetune is None else ()  # in fine-tuning there are none


@expected_aux.register
def _(method: DPF, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    return {"reactivated/total": Kept(dtype="int", low=0, required=saved.progress["updates"] > 0)}
