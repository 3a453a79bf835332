"""Masks that a checkpoint or a state dict gives: those that a run has saved, otherwise its non-zeros."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sparse_callbacks.core.checkpoint_file import is_safetensors, read_mapping, read_tensors
from sparse_callbacks.core.live.live_layout import why_not_pattern
from sparse_callbacks.core.live.saved_patterns import mask_of, matrix_of
from sparse_callbacks.core.saved_bits import SavedBits, is_bits, truths_of, why_not_bits
from sparse_callbacks.core.score_rules import MADE_OF_NETWORK
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.state_layout import damaged, is_count, shown_short, why_not_whole

Source = str | Path | Mapping[str, Any]
"""The path of a checkpoint or of a state dict, or what such a file holds."""

_PIECE = 2**20


class TensorsOnDemand(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for and kept by nobody: of a whole network one exists at a time.

    Args:
        names: the names, in order.
        make: makes the tensor of a name.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class GivenMasks:
    """Masks from a checkpoint, and the weights that were saved beside them.

    Attributes:
        masks: bool masks by parameter name; those of a whole network may be made one at a time, when they are asked for.
        weights: values of the same parameters, which may still lie in the file; whoever keeps some copies them.
        trained: the checkpoint says that it was saved after training steps.
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    trained: bool


def masks_in(source: Source, entries: Sequence[Entry], argument: str) -> GivenMasks:
    """Masks of ``entries`` from a checkpoint: those saved by a callback or a loop of this package, otherwise the
    non-zeros.

    Args:
        source: where they are.
        entries: the parameters that become sparse.
        argument: the name of the argument that gave ``source``, for errors.

    Raises:
        ValueError: there is no such file, it is damaged, or does not fit the entries.
    """
    advice = f"Give {argument}= another checkpoint, or sparsity= for a new mask."
    shown = f"{argument}=" + ("" if isinstance(source, Mapping) else repr(str(source)))
    found = _content(source, argument, shown, advice)
    weights = _weights_in(found, entries, shown, advice)
    # saved masks go first: a weight that was just grown is zero and yet active, so the non-zeros would lose it
    saved = _saved_masks(found, weights, entries, shown, advice)
    # beside masks that were saved, zeros of a parameter without one may be pruned, grown a moment ago, or as they were made
    names = [e.name for e in entries]
    if unclear := [n for n in names if saved and n not in saved and bool((weights[n] == 0).any())]:
        raise ValueError(
            f"{shown} has masks, and none of {', '.join(unclear)}, where there are zeros as well. Leave these layers out "
            "with exclude=, or give a checkpoint with their masks, or a state dict without any."
        )
    if broken := [n for n in names if n not in saved and not _is_finite(weights[n])]:
        raise ValueError(f"{shown}: {broken[0]} there has values that are not finite. {advice}")
    masks = TensorsOnDemand(names, partial(_mask_of, saved, weights))
    return GivenMasks(masks, TensorsOnDemand(names, weights.__getitem__), _is_trained(found))


def _is_finite(weight: Tensor) -> bool:
    """Whether all values are finite; in pieces, as torch looks at a copy of all magnitudes."""
    return all(bool(piece.isfinite().all()) for piece in torch.split(weight.flatten(), _PIECE))


def _mask_of(saved: Mapping[str, Tensor], weights: Mapping[str, Tensor], name: str) -> Tensor:
    """The mask of a parameter, which nobody else holds: the run may write to it, and others to the file."""
    return saved[name].clone() if name in saved else weights[name] != 0


def _content(source: Source, argument: str, shown: str, advice: str) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    if Path(source).exists():
        if is_safetensors(Path(source)):
            return read_tensors(Path(source), advice)
        return read_mapping(Path(source), advice, mapped=True)
    if argument != "initial_mask":
        raise ValueError(f"{shown} is not a file. Give the path of a checkpoint or a state dict.")
    raise ValueError(
        f"{shown} is not a file. Give 'random', 'magnitude', 'nonzero', the path of a checkpoint or a state dict, or a score: "
        f"{', '.join(map(repr, MADE_OF_NETWORK))}."
    )


def _weights_in(found: Mapping[str, Any], entries: Sequence[Entry], shown: str, advice: str) -> Mapping[str, Any]:
    """The values of all ``entries`` in a Trainer's checkpoint, in a plain state dict, or in one beside other things."""
    weights: Any = found.get("state_dict", found)
    if not isinstance(weights, Mapping):
        raise ValueError(f"{shown}: its state_dict is {shown_short(weights)}. {advice}")
    # a loop of the user's own saves a state dict under a name of its own
    inner = [part for part in found.values() if isinstance(part, Mapping)]
    plain = (_made_dense(_multiplied(w, entries), entries, shown, advice) for w in (weights, *inner))
    weights = next((w for w in plain if not _missing(w, entries)), weights)
    # checked before anything is computed with them: a damaged file may give a tensor any shape
    if missing := _missing(weights, entries):
        if is_run(found):
            raise ValueError(
                f"{shown} is the state of a run alone, which has masks and no weights. Save the weights beside it, "
                "torch.save({'model': model.state_dict(), 'run': run.state_dict()}, path), and give that, or go on with the "
                "run by sparsify(..., state=)."
            )
        known = ", ".join(k for k, v in weights.items() if isinstance(v, Tensor) and v.ndim > 1)
        raise ValueError(
            f"{shown} does not fit the model: {', '.join(missing)} not found with the same shape. The "
            f"checkpoint has: {known or 'no matrix of weights'}. Names must be those of the LightningModule; rename the keys, or "
            "leave layers out with include= or exclude=."
        )
    checked: Mapping[str, Any] = weights
    return checked


def _multiplied(weights: Mapping[str, Any], entries: Sequence[Entry]) -> Mapping[str, Any]:
    """``weights``, with those that torch.nn.utils.prune keeps as a product and nobody has made plain."""
    pairs = {
        e: (weights.get(f"{e.name}_orig"), weights.get(f"{e.name}_mask")) for e in entries if e.name not in weights
    }
    return _with_made(
        weights,
        {e.name: partial(torch.mul, w, m) for e, (w, m) in pairs.items() if _is_weight(w, e) and _is_weight(m, e)},
    )


def _made_dense(weights: Mapping[str, Any], entries: Sequence[Entry], shown: str, advice: str) -> Mapping[str, Any]:
    """``weights``, with the matrices of those that an exchanged layer has saved as live values and their places."""
    parts = {e: compact_parts(weights, e.name) for e in entries if e.name not in weights}
    return _with_made(
        weights,
        {e.name: partial(_of_pattern, p, e, p["values"], shown, advice) for e, p in parts.items() if p},
    )


def _with_made(weights: Mapping[str, Any], made: Mapping[str, Callable[[], Tensor]]) -> Mapping[str, Any]:
    """``weights``, and further ones that are made when they are asked for."""
    if not made:
        return weights
    return TensorsOnDemand([*weights, *made], lambda name: made[name]() if name in made else weights[name])


def compact_parts(weights: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Live values and places of a weight as a compact ``state_dict`` holds them; empty where it does not."""
    prefix = f"{name}."
    parts = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return parts if "values" in parts and not why_not_pattern({k: v for k, v in parts.items() if k != "values"}) else {}


def _of_pattern(parts: Mapping[str, Tensor], entry: Entry, values: Tensor | None, shown: str, advice: str) -> Tensor:
    """The matrix of live values, or without any the mask, that a pattern of a parameter says.

    Raises:
        ValueError: it is not a pattern of this parameter.
    """
    pattern = {key: value for key, value in parts.items() if key != "values"}
    try:
        return mask_of(pattern, entry.full_shape) if values is None else matrix_of(pattern, values, entry.full_shape)
    except ValueError as error:
        raise ValueError(f"{shown}: of the live weights of {entry.name} there, {error}. {advice}") from error


def _missing(weights: Mapping[str, Any], entries: Sequence[Entry]) -> list[str]:
    return [e.name for e in entries if not _is_weight(weights.get(e.name), e)]


def _is_weight(value: object, entry: Entry) -> TypeGuard[Tensor]:
    """Whether ``value`` is a whole tensor of numbers of the parameter's shape."""
    return isinstance(value, Tensor) and tuple(value.shape) == entry.full_shape and not why_not_whole(value)


def _is_mask(value: object, entry: Entry) -> TypeGuard[Tensor]:
    """Whether ``value`` is a whole tensor of truth values of the parameter's shape."""
    return _is_weight(value, entry) and value.dtype == torch.bool


def is_run(state: object) -> bool:
    """Whether ``state`` is what a loop's run has saved."""
    return isinstance(state, Mapping) and {"version", "arguments", "masks"} <= state.keys()


def states_in(found: Mapping[str, Any], shown: str, advice: str) -> Iterator[Mapping[str, Any]]:
    """The states that callbacks or loops of this package have saved."""
    states = found.get("callbacks", {})
    if not isinstance(states, Mapping):
        raise ValueError(f"{shown}: its callbacks are {shown_short(states)}. {advice}")
    for state in states.values():
        if isinstance(state, Mapping) and "masks" in state:
            yield state
    for state in found.values():  # of run.state_dict(), which a loop saves beside its model
        if is_run(state):
            yield state


def _saved_masks(
    found: Mapping[str, Any], weights: Mapping[str, Tensor], entries: Sequence[Entry], shown: str, advice: str
) -> Mapping[str, Tensor]:
    """The masks of ``entries`` that runs of this package have saved.

    Raises:
        ValueError: a mask is damaged, or is not that of the weights beside it.
    """
    held: dict[str, Any] = {}
    # a compact state dict says itself where weights live, also those that are zero
    patterns = {e.name: parts for e in entries if (parts := compact_parts(found.get("state_dict", found), e.name))}
    for state in states_in(found, shown, advice):
        if not isinstance(state["masks"], Mapping):
            raise ValueError(f"{shown}: masks in it are {shown_short(state['masks'])}. {advice}")
        held |= state["masks"]
        patterns |= _patterns_in(state, shown, advice)
    made = {n: partial(_of_bits, held[n], n, shown, advice) for e in entries if is_bits(held.get(n := e.name))} | {
        e.name: partial(_of_pattern, patterns[e.name], e, None, shown, advice) for e in entries if e.name in patterns
    }
    saved = _with_made(held, made)
    for entry in (e for e in entries if e.name in saved):
        mask = saved[entry.name]
        if not _is_mask(mask, entry):
            raise ValueError(
                f"{shown}: the mask of {entry.name} is {shown_short(mask)}, and should be one of truth values of shape "
                f"{list(entry.full_shape)}. {advice}"
            )
        if bool(((weights[entry.name] != 0) & ~mask).any()):
            raise ValueError(
                f"{shown}: {entry.name} has weights that its mask there says are pruned, so the two do not belong "
                f"together. {advice}"
            )
    return TensorsOnDemand([e.name for e in entries if e.name in saved], saved.__getitem__)


def _of_bits(bits: SavedBits, name: str, shown: str, advice: str) -> Tensor:
    """The mask of a parameter that was saved as bits.

    Raises:
        ValueError: it is damaged.
    """
    if why := why_not_bits(bits):
        raise ValueError(f"{shown}: the mask of {name} {why}. {advice}")
    return truths_of(bits)


def _patterns_in(state: Mapping[str, Any], shown: str, advice: str) -> Mapping[str, Any]:
    """The patterns of exchanged layers in a saved state.

    Raises:
        ValueError: one is damaged.
    """
    patterns = state.get("patterns", {})
    if not isinstance(patterns, Mapping):
        raise ValueError(f"{shown}: patterns in it are {shown_short(patterns)}. {advice}")
    for name, pattern in patterns.items():
        if why := why_not_pattern(pattern):
            raise ValueError(f"{shown}: what it has for the live weights of {name} {why}. {advice}")
    return patterns


def _is_trained(found: Mapping[str, Any]) -> bool:
    """Whether a Trainer's checkpoint, or a loop's state in it, has counted training steps."""
    counted = [found.get("global_step", 0)]
    for state in found.values():
        steps = state.get("steps") if isinstance(state, Mapping) else None
        counted += steps.values() if isinstance(steps, Mapping) else []
    return any(is_count(c) and c > 0 for c in counted)


def refuse_other_masks(masks: Mapping[str, Tensor], entries: Sequence[Entry], path: object) -> None:
    """Refuse saved masks of layers that wait to be trained which are no masks of them.

    Args:
        masks: the masks by parameter name.
        entries: the parameters.
        path: where they were saved, for errors.

    Raises:
        ValueError: a mask is of another shape or type.
    """
    for entry in entries:
        mask = masks.get(entry.name)
        if mask is not None and not _is_mask(mask, entry):
            raise damaged(f"its waiting/{entry.name} is {shown_short(mask)} and not a mask of that parameter", path)
