"""What a saved run of GaP and ParallelGaP may hold."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sparse_callbacks.core.awaited import why_never
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.initial_masks import joining_masks
from sparse_callbacks.core.state_claims import Kept, Zeros, expected_aux, possible_zeros
from sparse_callbacks.core.thawed import by_step, masks_by_magnitude
from sparse_callbacks.methods.gap.gap import GaP
from sparse_callbacks.methods.gap.gap_parallel import ParallelGaP


@possible_zeros.register
def _(method: GaP, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    # a parameter is dense in the phases of its partition; the calendar does not say which phase has ended, as a run may
    # have been made shorter in it
    each = [Zeros((name,), (0, zeros)) for name, zeros in planned.items()]
    # each optimizer goes on to the next phase when it has taken the steps; and partitions hold layers that wait to be
    # trained, whose sizes are not known here
    if len(saved.progress["steps"]) > 1 or saved.awaited:
        return each
    blocks = method.blocks({n: m.numel() for n, m in saved.masks.items()})
    one_dense = {sum(planned.values()) - sum(planned[n] for n in block) for block in blocks}
    return [*each, Zeros(tuple(planned), one_dense | {sum(planned.values())})]


@masks_by_magnitude.register
def _(method: GaP, names: Sequence[str]) -> dict[str, Tensor]:
    blocks, dense = method.blocks(), set[str]()
    for number, mine in by_step(method, names):
        phase = method.phase_at(number)
        dense |= set(mine) & set(blocks[phase % len(blocks)] if phase < method.phases else ())
    return joining_masks(method, names) | method.weights.all_active(dense)


@why_never.register
def _(method: ParallelGaP) -> str:
    return "the workers of ParallelGaP start from one network, whose layers are those of the start of the fit"


@expected_aux.register
def _(method: GaP, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    begun = bool(saved.times)  # they are written when the run has got its calendar
    return {
        "phase/run": Kept(dtype="int", low=0, required=begun),
        "phase/optimizers": Kept(dtype="int", low=0, required=begun),
        # infinite in a run without a known end
        "phase/length": Kept(finite=False, low=0, required=begun),
    }


@expected_aux.register
def _(method: ParallelGaP, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    trained = any(saved.progress["steps"].values())
    counts = {
        f"workers/{name}": Kept(dtype="int", low=0, required=trained) for name in ("epochs", "ranks", "begun", "offset")
    }
    counts |= {"workers/configured": Kept(dtype="int", low=0), "workers/finetune": Kept(dtype="int", low=0)}
    in_round = trained and "workers/finetune" not in saved.aux
    masks = {f"sparse/{n}": Kept(tuple(m.shape), "bool", required=in_round) for n, m in saved.masks.items()}
    tensors = {k: t for k, t in model.state_dict().items() if isinstance(t, Tensor)}
    networks = {f"{kind}/{k}": Kept(tuple(t.shape), "") for kind in ("start", "gathered") for k, t in tensors.items()}
    return {**expected_aux.dispatch(GaP)(method, saved, model), **counts, **masks, **networks}
