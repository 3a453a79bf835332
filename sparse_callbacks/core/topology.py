"""Taking new masks: which weights are born, which are dropped, and which were ever active."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from numbers import Real

from torch import Tensor

from sparse_callbacks.core.argument_types import fits
from sparse_callbacks.core.live import ever_live
from sparse_callbacks.core.live.live_weights import Moves, carry_out
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.sparse_layers.moved_places import Move
from sparse_callbacks.core.state_layout import shown_short
from sparse_callbacks.core.weights import SparseWeights


@dataclass(frozen=True)
class Update:
    """The new masks of a topology update, as a method asks for them.

    Attributes:
        masks: new bool masks by parameter name, each of its parameter's shape, True where a weight is active. Parameters that
            are missing keep theirs.
        figures: numbers of the update for the log, by their full names, such as ``"update/drop_fraction"``.
        moves: for layers with sparse storage, which have no masks: functions by parameter name, each of which finds the units
            that are active from now on.

    Raises:
        TypeError: ``masks`` are not tensors by name, or ``figures`` not numbers by name.
    """

    masks: Mapping[str, Tensor]
    figures: Mapping[str, float] = field(default_factory=dict)
    moves: Moves = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what is not tensors and numbers by name, which an update would stumble over later."""
        if not fits(self.masks, Mapping[str, Tensor]):
            raise TypeError(
                f"masks={shown_short(self.masks)} is not a mapping of tensors. Give bool tensors by parameter name."
            )
        # not by their annotation: a figure may be NaN, or a tensor of one number
        if not fits(self.figures, Mapping[str, Real | Tensor]):
            raise TypeError(
                f"figures={shown_short(self.figures)} is not a mapping of numbers. Give numbers by their full names."
            )


def take(
    weights: SparseWeights,
    owners: Ownership | None,
    masks: Mapping[str, Tensor],
    new_weights: Callable[[str], Tensor | None],
    moves: Moves | None = None,
    note: Callable[[str, Move], object] = lambda *_: None,
) -> float:
    """Make ``masks`` those of the network, and carry out the ``moves`` of exchanged layers: every rank takes those of rank
    0.

    Born weights start from zero or from what ``new_weights`` gives, with the optimizer state of fresh weights.

    Args:
        weights: the masks and parameters to change.
        owners: the optimizers that get fresh state where weights are born; None where they are started anew instead.
        masks: new masks by parameter name.
        new_weights: a function that takes a parameter's name and returns values of its shape for the born weights, or
            None where they start from zero.
        moves: other units of exchanged layers that live from now on, by parameter name.
        note: told of each of these that was carried out.

    Raises:
        ValueError: there is a mask for an exchanged layer.

    Returns:
        The share of connections that the update replaced: dropped and born ones over those active before and after.
    """
    if exchanged := [name for name in masks if name in weights.layers_stored]:
        raise ValueError(
            f"{', '.join(exchanged)} have sparse storage, and an update gave masks of them. Give Update(moves=) for such layers, or "
            "storage='masked'."
        )
    moved, there = carry_out(weights, owners, moves or {}, new_weights, note)
    changed, total = _take_masks(weights, owners, masks, new_weights)
    return (moved + changed) / max(1, there + total)


def _take_masks(
    weights: SparseWeights,
    owners: Ownership | None,
    masks: Mapping[str, Tensor],
    new_weights: Callable[[str], Tensor | None],
) -> tuple[int, int]:
    """How many connections were dropped or born under the masks, and how many were active before and after."""
    # each rank has computed them, from sums that may differ in the last bit, and unequal masks would stay unequal
    masks = weights.same_everywhere(masks)
    changed = total = 0
    born_in: dict[str, Tensor] = {}
    for name, mask in masks.items():
        before, grown = weights.active_counts[name], mask & ~weights.masks[name]
        weights.set_mask(name, mask)
        born, after = weights.count(name, grown), weights.active_counts[name]
        # with a dense copy a weight comes back with what it has learnt, state included
        if born and not weights.has_copy(name):
            born_in[name] = grown
        changed += before + 2 * born - after  # dropped = before + born - after
        total += before + after
    weights.write_masked(masks)
    for name, grown in born_in.items():  # only now: the line above would multiply new values by the mask for nothing
        if (values := new_weights(name)) is not None:
            weights.write_grown(name, grown, values)
        if owners is not None:
            owners.clear(name, grown)  # behind the values, which some state starts from
    return changed, total


class EverActive:
    """Which weights were ever active in a run: kept among the tensors that a checkpoint saves.

    Of exchanged layers those units are kept that were active before and are not now.

    Args:
        aux: the method's saved tensors by key.
        weights: the current masks.
    """

    def __init__(self, aux: MutableMapping[str, Tensor], weights: SparseWeights) -> None:
        self._aux, self._weights = aux, weights

    def add(self, names: Iterable[str]) -> None:
        """Count the current masks of ``names`` in."""
        for name in names:
            if (layer := self._weights.layers_stored.get(name)) is not None:
                self._aux.setdefault(f"once_active/{name}", ever_live.none_yet(layer.values.device))
                continue
            mask = self._weights.masks[name]
            ever = self._aux.get(f"ever_active/{name}")
            self._aux[f"ever_active/{name}"] = mask.clone() if ever is None else ever.to(mask.device).logical_or_(mask)

    def note(self, name: str, move: Move) -> None:
        """Count in what the move of an exchanged layer makes active."""
        layer, key = self._weights.layers_stored[name], f"once_active/{name}"
        units = layer.block_rows * layer.in_features
        self._aux[key] = ever_live.moved_on(self._aux[key], move.leaving, move.coming, units)

    def share(self) -> float:
        """Share of all sparse weights that were ever active."""
        ever = 0
        for name in self._weights.params:
            if (layer := self._weights.layers_stored.get(name)) is not None:
                ever += layer.live + layer.group * ever_live.count_of_former(self._aux[f"once_active/{name}"])
            else:
                ever += self._weights.count(name, self._aux[f"ever_active/{name}"])
        return ever / self._weights.size_of_all
