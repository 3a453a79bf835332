"""What a saved run of NM may hold."""

from collections.abc import Collection, Mapping

from torch import nn

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.state_claims import (
    Kept,
    Zeros,
    as_planned,
    copied_names,
    expected_aux,
    possible_zeros,
    rises_to,
)
from sparse_callbacks.methods.nm.nm import CHANGED, NM, SCALE


@possible_zeros.register
def _(method: NM, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    if method.has_full_groups:
        return as_planned(planned) if method.ramp is None else rises_to(planned)
    # a tile may have room that no weight fills, and equal magnitudes all lie at the threshold
    least = dict.fromkeys(planned, 0) if method.ramp is not None else planned
    return [Zeros((name,), range(least[name], saved.masks[name].numel() + 1)) for name in planned]


@copied_names.register
def _(method: NM, saved: SavedRun) -> Collection[str]:
    return saved.masks


@expected_aux.register
def _(method: NM, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    if method.projection == "hard":
        return {}
    return {f"{CHANGED}/*": Kept(dtype="int", low=0)} | {
        f"{SCALE}/{name}": Kept(required=True, low=0) for name in saved.masks
    }
