"""What a checkpoint of PruneAtStart and EarlyCroP may hold."""

from collections.abc import Mapping

from torch import nn

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.distance_trigger import PRUNED, expected_of_trigger
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.state_claims import Kept, Zeros, as_planned, expected_aux, possible_zeros
from sparse_callbacks.methods.prune_at_start.one_ranking import SCORED
from sparse_callbacks.methods.prune_at_start.prune_at_start import PruneAtStart
from sparse_callbacks.methods.prune_at_start.pruning_time import PENDING


@possible_zeros.register
def _(method: PruneAtStart, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    if method.when != "start" and PRUNED not in saved.aux:
        return as_planned(dict.fromkeys(planned, 0))
    if waiting := [n for n in saved.masks if f"{PENDING}/{n}" in saved.aux]:
        return as_planned(dict.fromkeys(waiting, 0))
    together = {n: m.numel() for n, m in saved.masks.items() if f"{SCORED}/{n}" in saved.aux}
    claims = as_planned({n: zeros for n, zeros in planned.items() if n not in together})
    if together:
        zeros = zeros_for(method.target_sparsity, sum(together.values()))
        claims.append(Zeros(tuple(together), (zeros,)))
    return claims


@expected_aux.register
def _(method: PruneAtStart, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    of_trigger = expected_of_trigger(saved) if method.when == "distance" else {}
    pending = {f"{PENDING}/{name}": Kept(tuple(mask.shape), "bool") for name, mask in saved.masks.items()}
    return of_trigger | pending | {f"{SCORED}/*": Kept(dtype="bool")}
