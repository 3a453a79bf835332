"""What a saved run of SMCP may hold."""

from collections.abc import Collection, Mapping

from torch import nn

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.state_claims import Kept, copied_names, expected_aux
from sparse_callbacks.methods.smcp.smcp import CORRECTED, SMCP


@copied_names.register
def _(method: SMCP, saved: SavedRun) -> Collection[str]:
    # of consumers of prunable channels alone, and of none after the last solve, even of a run that was made longer then
    over = not saved.dense or any(step >= saved.times[2] for step in saved.progress["done"].values())
    return () if over else [name for name, mask in saved.masks.items() if not bool(mask.all())]


@expected_aux.register
def _(method: SMCP, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    return {
        "scores.*": Kept(None),
        "latest.*": Kept(None),
        "steps.*": Kept(dtype="int", low=0),
        "norm/*": Kept(low=0),
        CORRECTED: Kept(dtype="bool"),
    }
