"""Static: one mask, held from the first step to the last."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.checkpoint_file import read_mapping
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.state_claims import Zeros, as_planned, possible_zeros
from sparse_callbacks.core.state_layout import shown_short, why_not_whole
from sparse_callbacks.core.thawed import masks_by_magnitude

_ANOTHER = "Give from_checkpoint= another checkpoint, or sparsity= for a new mask."


class Static(Method):
    """Static sparse training: one mask, drawn at random or taken from a checkpoint, held from the first step to the
    last.

    The baseline of every sparse-to-sparse method; and, with ``from_checkpoint``, fine-tuning that keeps a pruned
    network pruned.

    Args:
        sparsity: fraction of zeros over the selected weights, in [0, 1); None: 0.9, or what ``from_checkpoint`` holds.
        distribution: name, ``{glob: sparsity or name}`` or callable; see :class:`~sparse_callbacks.core.method.Method`.
        from_checkpoint: path of a checkpoint, or a state dict, whose zeros are the mask. A checkpoint written beside a
            callback of this package gives its exact masks (a freshly grown weight is zero and yet active). Only the
            mask is taken: load the weights yourself. Weights with no zeros in it stay dense.
        include, exclude, seed, **options: see :class:`~sparse_callbacks.core.method.Method`.

    Raises:
        ValueError: arguments out of range; ``sparsity`` beside ``from_checkpoint``; a checkpoint without zeros or of
            another model.

    Example:
        >>> from sparse_callbacks import Static
        >>> Static(sparsity=0.5, distribution="uniform").target_sparsity
        0.5
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        distribution: Distribution = "erdos_renyi_kernel",
        from_checkpoint: str | Path | Mapping[str, Any] | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        if sparsity is not None and from_checkpoint is not None:
            raise ValueError(
                f"sparsity={sparsity!r} and from_checkpoint= are both given, and both decide the mask. Give one of "
                "them."
            )
        # the base needs a number before the model is known; a checkpoint's own zeros take its place in share_out
        start = 0.0 if from_checkpoint is not None else 0.9
        super().__init__(
            start if sparsity is None else sparsity,
            distribution=distribution,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        self.sparsity = sparsity  # as given, also None: a resumed run compares the arguments
        self.from_checkpoint = from_checkpoint
        self._given: dict[str, Tensor] = {}
        self._resumed: dict[str, Tensor] = {}

    @property
    def target_sparsity(self) -> float:
        if self.from_checkpoint is None:
            return 0.9 if self.sparsity is None else float(self.sparsity)
        # in a run without the layers that wait to be trained
        given = [m for n, m in self._given.items() if not self.params or n in self.params]
        sizes = sum(m.numel() for m in given)
        return 1 - sum(int(m.count_nonzero()) for m in given) / sizes if sizes else 0.0

    def share_out(self, entries: Sequence[Entry]) -> dict[str, float]:
        if self.from_checkpoint is None:
            return super().share_out(entries)
        chosen = [e for e in entries if not e.reason]
        # kept here too: plan() asks for the targets also after training has begun, when ``saved`` is gone
        if self.saved is not None:
            self._resumed = dict(self.saved.masks)
        if all(e.name in self._resumed for e in chosen):  # a resumed run does not need the other checkpoint any more
            self._given = {e.name: self._resumed[e.name] for e in chosen}
        else:
            self._given = _masks_in(self.from_checkpoint, chosen) | {
                e.name: self._resumed[e.name] for e in chosen if e.name in self._resumed
            }
        parts = {
            layer: part for e in chosen for layer, part in zip(e.layers, e.split(self._given[e.name]), strict=True)
        }
        return {layer: 1 - int(part.count_nonzero()) / part.numel() for layer, part in parts.items()}

    def parameter_zeros(self, entries: Sequence[Entry], targets: Mapping[str, float]) -> dict[str, int]:
        if self.from_checkpoint is None:
            return super().parameter_zeros(entries, targets)
        given = {e.name: self._given[e.name] for e in entries if not e.reason}
        return {n: m.numel() - int(m.count_nonzero()) for n, m in given.items()}

    def initial_masks(self) -> dict[str, Tensor]:
        return super().initial_masks() if self.from_checkpoint is None else {n: self._given[n] for n in self.params}


def _masks_in(source: str | Path | Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Masks of ``entries`` from a checkpoint: those saved by a callback of this package, otherwise the non-zeros."""
    shown = "from_checkpoint=" + ("" if isinstance(source, Mapping) else repr(str(source)))
    if isinstance(source, Mapping):
        found = source
    elif Path(source).exists():
        found = read_mapping(Path(source), _ANOTHER)
    else:
        raise ValueError(
            f"from_checkpoint={str(source)!r} is not a file. Give the path of a checkpoint or a state dict."
        )
    weights: Mapping[str, Any] = found.get("state_dict", found)  # of a Trainer's checkpoint, or a plain state dict
    if not isinstance(weights, Mapping):
        raise ValueError(f"{shown}: its state_dict is {shown_short(weights)}. {_ANOTHER}")
    # checked before anything is computed with them: a damaged file may give a tensor any shape
    missing = [e.name for e in entries if not _is_weight(weights.get(e.name), e)]
    if missing:
        known = ", ".join(k for k, v in weights.items() if isinstance(v, Tensor) and v.ndim > 1)
        raise ValueError(
            f"{shown} does not fit the model: {', '.join(missing)} not found with the same shape. The "
            f"checkpoint has: {known}. Names must be those of the LightningModule; rename the keys, or leave layers "
            "out with include= or exclude=."
        )
    # saved masks go first: a weight that was just grown is zero and yet active, so the non-zeros would lose it
    saved = _saved_masks(found, weights, entries, shown)
    # beside masks that were saved, zeros of a parameter without one may be pruned, grown a moment ago, or as they were made
    if unclear := [n for n in (e.name for e in entries) if saved and n not in saved and bool((weights[n] == 0).any())]:
        raise ValueError(
            f"{shown} has masks, and none of {', '.join(unclear)}, where there are zeros as well. Leave these layers out "
            "with exclude=, or give a checkpoint with their masks, or a state dict without any."
        )
    if broken := [e.name for e in entries if e.name not in saved and not bool(weights[e.name].isfinite().all())]:
        raise ValueError(f"{shown}: {broken[0]} there has values that are not finite. {_ANOTHER}")
    masks = {e.name: saved[e.name] if e.name in saved else weights[e.name] != 0 for e in entries}
    if all(bool(m.all()) for m in masks.values()):
        raise ValueError(
            f"{shown} holds no zeros in the selected weights, so there is no mask to keep. Give sparsity= instead."
        )
    if not any(bool(m.any()) for m in masks.values()):
        raise ValueError(f"{shown} holds nothing but zeros in the selected weights, so nothing would train. {_ANOTHER}")
    return masks


def _is_weight(value: object, entry: Entry) -> bool:
    """Whether ``value`` is a whole tensor of numbers of the parameter's shape."""
    return isinstance(value, Tensor) and tuple(value.shape) == entry.full_shape and not why_not_whole(value)


def _saved_masks(
    found: Mapping[str, Any], weights: Mapping[str, Tensor], entries: Sequence[Entry], shown: str
) -> dict[str, Tensor]:
    """The masks of ``entries`` that callbacks of this package have saved.

    Raises:
        ValueError: a mask is damaged, or is not that of the weights beside it.
    """
    states = found.get("callbacks", {})
    if not isinstance(states, Mapping):
        raise ValueError(f"{shown}: its callbacks are {shown_short(states)}. {_ANOTHER}")
    listed = [s["masks"] for s in states.values() if isinstance(s, Mapping) and "masks" in s]
    saved: dict[str, Tensor] = {}
    for masks in listed:
        if not isinstance(masks, Mapping):
            raise ValueError(f"{shown}: masks in it are {shown_short(masks)}. {_ANOTHER}")
        saved |= masks
    for entry in entries:
        if entry.name not in saved:
            continue
        mask = saved[entry.name]
        if not _is_weight(mask, entry) or mask.dtype != torch.bool:
            raise ValueError(
                f"{shown}: the mask of {entry.name} is {shown_short(mask)}, and should be one of truth values of shape "
                f"{list(entry.full_shape)}. {_ANOTHER}"
            )
        if bool(weights[entry.name][~mask].any()):
            raise ValueError(
                f"{shown}: {entry.name} has weights that its mask there says are pruned, so the two do not belong "
                f"together. {_ANOTHER}"
            )
    return {e.name: saved[e.name] for e in entries if e.name in saved}


@masks_by_magnitude.register
def _(method: Static, names: Sequence[str]) -> dict[str, Tensor]:
    if method.from_checkpoint is None:
        return masks_by_magnitude.dispatch(Method)(method, names)
    return {n: method._given[n] for n in names}


@possible_zeros.register
def _(method: Static, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    # with from_checkpoint= the saved masks are themselves the plan
    return as_planned(planned) if method.from_checkpoint is None else []
