"""Masks that bring their own counts: found in a checkpoint, a state dict or the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.given_masks import GivenMasks, Source, TensorsOnDemand, masks_in, refuse_other_masks
from sparse_callbacks.core.live.live_runs import zeros_of_live
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.patterns import group_of, why_other_pattern
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.shards import layout_of
from sparse_callbacks.core.state_layout import damaged, shown_short

WAITING = "waiting"
"""In ``aux``, where given masks of layers lie that wait to be trained."""


@dataclass(frozen=True)
class MaskSource:
    """Where first masks come from, as a user has said it.

    Attributes:
        start: ``"random"``, ``"magnitude"``, ``"nonzero"``, the path of a checkpoint, or a state dict.
        argument: the name of the argument that said so.
    """

    start: Source
    argument: str

    @property
    def brings_counts(self) -> bool:
        """The counts of the masks are found and not planned."""
        return self.start not in ("random", "magnitude")

    @property
    def shown(self) -> str:
        """The argument in a message."""
        return f"{self.argument}=" + ("" if isinstance(self.start, Mapping) else repr(str(self.start)))


def one_of(initial_mask: Any, argument: str, value: Any) -> Any:
    """``initial_mask``, which a method may also be given under an older name.

    Args:
        initial_mask: the argument; ``"random"`` where it was not given.
        argument: the older name.
        value: what was given under it; None for nothing.

    Raises:
        ValueError: both are given.
    """
    if value is None:
        return initial_mask
    if initial_mask != "random":
        raise ValueError(
            f"initial_mask= and {argument}= are both given, and both decide the first masks. Give one of them."
        )
    return value


@dataclass(frozen=True)
class FoundMasks:
    """What was found of masks that bring their own counts.

    Attributes:
        zeros: the zeros in each layer.
        sparsity: the fraction of zeros over all of them.
        given: the masks of parameters that have none from a run yet, until a run takes them.
    """

    zeros: Mapping[str, int]
    sparsity: float
    given: GivenMasks | None


def found_masks(
    method: Method,
    source: MaskSource,
    model: nn.Module | None,
    entries: Sequence[Entry],
    saved: SavedRun | None,
    together: bool = False,
) -> FoundMasks:
    """Find the masks of a run, or those of its masks that it has not yet. They are looked at one at a time.

    Args:
        method: the method of the run.
        source: where masks come from.
        model: the model; None where nobody knows it.
        entries: all parameters of it.
        saved: the run that goes on; None for that of ``method.aux``, or a new one.
        together: whether all ranks ask, which then count what the first has found.

    Raises:
        ValueError: there is no mask, or it does not fit the model or the other arguments.
    """
    chosen = [e for e in entries if not e.reason]
    aux, masks = (saved.aux, saved.masks) if saved is not None else (method.aux, method.weights.held_masks)
    if saved is None and method.attachment.model is not model:
        aux, masks = {}, {}
    path = None if saved is None else saved.path
    held = [e for e in chosen if e.name in masks and tuple(masks[e.name].shape) == e.full_shape]
    known = {e.name: known_zeros(e, aux, masks, path) for e in held}
    known |= zeros_of_live(model, chosen, saved)
    given = None
    if missing := [e for e in chosen if e.name not in known]:
        waiting = {e.name: aux[key] for e in missing if (key := f"{WAITING}/{e.name}") in aux}
        refuse_other_masks(waiting, missing, path)
        given = _with_waiting(source, model, [e for e in missing if e.name not in waiting], waiting)
        # in a loop ranks may still have weights of their own
        counts = _counted(method, source, given.masks, missing, of_first_rank=together and source.start == "nonzero")
        if not known:  # what is added to a run may be dense
            _refuse_no_masks(source, sum(map(sum, counts.values())), sum(e.size for e in missing))
        known |= counts
    zeros = {layer: n for e in chosen for layer, n in zip(e.layers, known[e.name], strict=True)}
    size = sum(e.size for e in chosen)
    if missing:
        # each layer rounds its zeros down, or its columns to the next whole number
        rounded = sum(1 if group_of(method, e) is None else e.parts * e.shape[0] for e in chosen)
        _refuse_other_sparsity(method, source, sum(zeros.values()), size, max(rounded, len(zeros)))
    return FoundMasks(zeros, sum(zeros.values()) / max(1, size), given)


def _with_waiting(
    source: MaskSource, model: nn.Module | None, others: Sequence[Entry], waiting: Mapping[str, Tensor]
) -> GivenMasks:
    """Masks that a run has kept for layers that wait to be trained, and those of ``others`` from the source."""
    if not others:
        return GivenMasks(waiting, {}, False)
    found = masks_in(source.start, others, source.argument) if source.start != "nonzero" else _nonzero(model, others)
    names = [*waiting, *found.masks]
    masks = TensorsOnDemand(names, lambda name: waiting[name] if name in waiting else found.masks[name])
    return GivenMasks(masks, found.weights, found.trained)


def _nonzero(model: nn.Module | None, entries: Sequence[Entry]) -> GivenMasks:
    """The non-zeros of a model's own weights."""
    if model is None:
        raise ValueError("initial_mask='nonzero' plans by the weights of a model, and none is known. Give plan(model).")
    parameters = dict(model.named_parameters())
    return GivenMasks(TensorsOnDemand((e.name for e in entries), lambda n: parameters[n].detach() != 0), {}, False)


def _counted(
    method: Method, source: MaskSource, masks: Mapping[str, Tensor], entries: Sequence[Entry], of_first_rank: bool
) -> dict[str, list[int]]:
    """The zeros of each layer in each parameter, of one mask after the other.

    Raises:
        ValueError: a mask is not of the pattern that the method keeps.
    """
    counts = {}
    for entry in entries:
        mask = masks[entry.name]
        if of_first_rank:
            mask = distributed.masks_of_first_rank({entry.name: mask})[entry.name]
        if why := why_other_pattern(method, {entry.name: mask}, [entry]):
            kept = getattr(method, "pattern", None)
            pattern = "storage='grouped'" if kept is None else f"pattern={kept!r}"
            raise ValueError(
                f"{source.shown} holds masks that are not of {pattern}: {why}. Give masks of that pattern, leave the layer dense with "
                f"exclude=[{entry.name!r}], or leave {pattern.partition('=')[0]}= out."
            )
        counts[entry.name] = [zeros_in(part) for part in entry.split(mask)]
    return counts


def _refuse_no_masks(source: MaskSource, zeros: int, size: int) -> None:
    """Refuse masks that leave every weight active, or none.

    Raises:
        ValueError: there is nothing to keep.
    """
    if not zeros:
        raise ValueError(
            f"{source.shown} holds no zeros in the selected weights, so there is no mask to keep. Give sparsity= instead."
        )
    if zeros == size:
        raise ValueError(
            f"{source.shown} holds nothing but zeros in the selected weights, so nothing would train. Give "
            f"{source.argument}= another checkpoint, or sparsity= for a new mask."
        )


def _refuse_other_sparsity(method: Method, source: MaskSource, zeros: int, size: int, rounded: int) -> None:
    """Refuse a target that the masks do not have.

    Raises:
        ValueError: they have another number of zeros.
    """
    wanted: Any = method.sparsity
    # a plan shows four decimals
    if wanted is None or abs(zeros - wanted * size) <= max(rounded, 5e-5 * size):
        return
    raise ValueError(
        f"sparsity={wanted!r} and {source.shown} differ: the masks there have {zeros:,} zeros in {size:,} "
        f"weights, which is {zeros / size:.4f}, and {type(method).__name__} keeps the counts that it begins with. "
        "Leave sparsity= out, or give other masks."
    )


# ---------------------------------------------------------------------- their counts


def zeros_in(mask: Tensor) -> int:
    """The zeros of a mask, over all processes that hold a part of it."""
    layout = layout_of(mask)
    return layout.total(mask.numel() - int(mask.count_nonzero()))


def known_zeros(entry: Entry, aux: Mapping[str, Tensor], masks: Mapping[str, Tensor], path: object) -> list[int]:
    """The zeros of each layer in a parameter of a run that goes on with given masks.

    Args:
        entry: the parameter.
        aux: the tensors of the run.
        masks: its masks.
        path: where it was saved, for errors.

    Raises:
        ValueError: the run has saved counts that no layer can have.
    """
    found = aux.get(f"planned/{entry.name}")
    if found is None:  # of Static, whose masks never move
        return [zeros_in(part) for part in entry.split(masks[entry.name])]
    zeros: Any = found.tolist()
    if tuple(found.shape) != (entry.parts,) or found.is_floating_point() or found.is_complex():
        raise damaged(
            f"its planned/{entry.name} is {shown_short(found)}, and should be {entry.parts} whole numbers", path
        )
    if not all(0 <= n <= entry.size // entry.parts for n in zeros):
        raise damaged(f"its planned/{entry.name} has other counts than layers can have", path)
    return [int(n) for n in zeros]
