"""The past of a sparse layer: its first mask, the one before, what was ever active, and since when."""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_callbacks.core.live import ever_live
from sparse_callbacks.core.packed_bits import count_of_bits, packed, unpacked
from sparse_callbacks.core.sparse_layers.quick_places import true_places
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

LARGEST_INT16 = 2**15 - 1


@dataclass(frozen=True)
class Overlap:
    """Numbers of weights of a layer, or of several, by which a mask is compared with earlier ones.

    Attributes:
        size: all of them.
        active: active ones.
        ever: those that were active at some look.
        first: active at the first look.
        still: active at the first look and now.
        previous: active at the look before; None at the first look.
        kept: active at the look before and now.
        ages: the sum of the ages of the active ones, in optimizer steps.
    """

    size: int
    active: int
    ever: int
    first: int
    still: int
    previous: int | None
    kept: int
    ages: int

    def figures(self) -> dict[str, float | None]:
        """Churn, distances, and shares, by the names that a row of a record has."""
        looked = self.previous is not None
        return {
            "churn": _share(self.active - self.kept, self.active) if looked else None,
            "distance_previous": jaccard_distance(self.active, self.previous or 0, self.kept) if looked else None,
            "distance_first": jaccard_distance(self.active, self.first, self.still),
            "ever_active": _share(self.ever, self.size),
            "mean_age": _share(self.ages, self.active),
        }


def jaccard_distance(one: int, other: int, both: int) -> float:
    """1 - |A and B| / |A or B|; 0 where both sets are empty.

    Args:
        one, other: sizes of the two sets.
        both: how many elements they share.

    >>> jaccard_distance(15, 15, 9)
    0.5714285714285714
    """
    either = one + other - both
    return 1 - both / either if either else 0.0


def _share(some: int, of: int) -> float:
    return some / of if of else 0.0


class LayerHistory:
    """What is kept of a layer's earlier masks, in tensors that a checkpoint saves.

    Under a mask ``first``, ``previous`` and ``ever`` take a bit for each weight, and the births 2 bytes for each active one
    (4 after 32,767 looks): 3/8 + 2 * density bytes for each weight. Of an exchanged layer ``first`` and ``previous`` take 8
    bytes for each live unit, or a bit for each unit where that is less, ``ever`` the same for each unit that has lived and
    does not now, and the births 2 bytes for each live unit.

    Args:
        state: the tensors by name, which change in place.
        name: the name of the layer's weight, in which the names of the tensors end.
    """

    def __init__(self, state: MutableMapping[str, Tensor], name: str) -> None:
        self._state, self._name = state, name

    def _get(self, key: str, device: torch.device) -> Tensor | None:
        tensor = self._state.get(f"{key}/{self._name}")
        return None if tensor is None else tensor.to(device)

    def _set(self, **tensors: Tensor) -> None:
        self._state.update({f"{key}/{self._name}": tensor for key, tensor in tensors.items()})

    def look_at_mask(self, mask: Tensor, look: int, age: Callable[[Tensor], int]) -> Overlap:
        """Compare a mask with those of earlier looks, and take it for the one before the next.

        Args:
            mask: bool, of any shape.
            look: number of this look.
            age: the sum of the ages of connections by the numbers of the looks at which they were born.
        """
        device, field, flat = mask.device, packed(mask), mask.reshape(-1)
        first, previous = self._get("first", device), self._get("previous", device)
        if first is None or previous is None:
            active = count_of_bits(field)
            self._set(first=field, previous=field, ever=field, births=_births(active, look, device))
            return Overlap(flat.numel(), active, active, active, active, None, 0, 0)
        ever, births = self._get("ever", device), self._get("births", device)
        assert ever is not None  # saved with the others
        assert births is not None
        before, kept = births.numel(), count_of_bits(field & previous)
        if not torch.equal(field, previous):
            ever = ever | field
            births = _moved_births(births, unpacked(previous, flat.numel()), flat, look)
            self._set(previous=field, ever=ever, births=births)
        return Overlap(
            size=flat.numel(),
            active=births.numel(),
            ever=count_of_bits(ever),
            first=count_of_bits(first),
            still=count_of_bits(field & first),
            previous=before,
            kept=kept,
            ages=age(births),
        )

    def look_at_layer(self, layer: SparseLinear, look: int, age: Callable[[Tensor], int]) -> Overlap:
        """The same of an exchanged layer, by the keys of its units."""
        keys, units = layer.keys(), layer.block_rows * layer.in_features
        device, live, group = keys.device, keys.numel(), layer.group
        size = units * group
        first, previous = self._get("first", device), self._get("previous", device)
        if first is None or previous is None:
            held = _smaller(keys, units)
            self._set(first=held, previous=held, ever=ever_live.none_yet(device), births=_births(live, look, device))
            return Overlap(size, live * group, live * group, live * group, live * group, None, 0, 0)
        former, births = self._get("ever", device), self._get("births", device)
        assert former is not None  # saved with the others
        assert births is not None
        old = _keys_in(previous, units)
        in_old, in_new = torch.isin(keys, old, assume_unique=True), torch.isin(old, keys, assume_unique=True)
        kept = int(in_old.sum())
        if kept != live or kept != old.numel():
            births = _taken(births, in_new, in_old, look)
            former = ever_live.moved_on(former, old[~in_new], keys[~in_old], units)
            self._set(previous=_smaller(keys, units), ever=former, births=births)
        begun = _keys_in(first, units)
        still = int(torch.isin(keys, begun, assume_unique=True).sum())
        return Overlap(
            size=size,
            active=live * group,
            ever=(live + ever_live.count_of_former(former)) * group,
            first=begun.numel() * group,
            still=still * group,
            previous=old.numel() * group,
            kept=kept * group,
            ages=age(births) * group,
        )


def _births(count: int, look: int, device: torch.device) -> Tensor:
    """All born at one look."""
    return torch.full((count,), look, dtype=torch.int16 if look <= LARGEST_INT16 else torch.int32, device=device)


def _moved_births(births: Tensor, before: Tensor, after: Tensor, look: int) -> Tensor:
    """The births of the connections that are active after a move, in the order of their positions.

    Args:
        births: of those that were active before.
        before, after: truth values of all positions.
        look: number of the look at which new ones are born.
    """
    old, new = true_places(before), true_places(after)
    return _taken(births, after.index_select(0, old), before.index_select(0, new), look)


def _taken(births: Tensor, stays: Tensor, stood: Tensor, look: int) -> Tensor:
    """Births after a move.

    Args:
        births: those before.
        stays: which of the connections before are active now.
        stood: which of the connections of now were active before.
        look: number of the look at which the others are born.
    """
    moved = _births(stood.numel(), look, births.device)
    moved = moved.to(torch.promote_types(moved.dtype, births.dtype))
    return moved.masked_scatter_(stood, births[stays].to(moved.dtype))


def _smaller(keys: Tensor, units: int) -> Tensor:
    """Ascending keys, or a field with a bit for each unit where that takes less memory."""
    return ever_live.moved_on(ever_live.none_yet(keys.device), keys, keys[:0], units)


def _keys_in(held: Tensor, units: int) -> Tensor:
    return true_places(unpacked(held, units)) if held.dtype == torch.uint8 else held


def summed(overlaps: Mapping[str, Overlap]) -> Overlap:
    """Several layers as one. Those at their first look count as they are now in the comparison with the look before."""
    found = list(overlaps.values())
    looked = [o for o in found if o.previous is not None]
    return Overlap(
        size=sum(o.size for o in found),
        active=sum(o.active for o in found),
        ever=sum(o.ever for o in found),
        first=sum(o.first for o in found),
        still=sum(o.still for o in found),
        previous=sum(o.active if o.previous is None else o.previous for o in found) if looked else None,
        kept=sum(o.active if o.previous is None else o.kept for o in found) if looked else 0,
        ages=sum(o.ages for o in found),
    )
