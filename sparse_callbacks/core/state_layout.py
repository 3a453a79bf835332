"""The layout of a saved run's state: of what type each part is, whatever the model.

Bits are truth values by then (:mod:`~sparse_callbacks.core.saved_bits`).
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sparse_callbacks.core.live.live_layout import units_in, why_not_pattern, why_not_records
from sparse_callbacks.core.saved_bits import count_of_false

Check = Callable[[Any], str]
"""A function that says what is wrong with a value, as the end of a sentence; empty where nothing is."""

# Above it no calendar counts: DPF writes 2**62 for "never".
LARGEST_COUNT = 2**62
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 3, 60, 60


def shown_short(value: Any) -> str:
    """A value of a damaged file as text: never long, however large or deep the value is."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return _SHORT.repr(value)


def is_count(value: Any) -> TypeGuard[int]:
    """A whole number that a run may have counted to; a bool is not one."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


def _count(value: Any) -> str:
    return "" if is_count(value) else f"is {shown_short(value)} and not a whole number from 0 on"


def _truth(value: Any) -> str:
    return "" if isinstance(value, bool) else f"is {shown_short(value)} and not True or False"


def _counts_by_optimizer(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"is {shown_short(value)} and not a mapping"
    for index, count in value.items():
        if not (isinstance(index, str) and index.isdecimal() and is_count(count)):
            return f"has {shown_short(count)} under {shown_short(index)}, where the number of an optimizer has a count of steps"
    return ""


def _counts_by_name(value: Any) -> str:
    if isinstance(value, Mapping) and all(isinstance(name, str) and is_count(count) for name, count in value.items()):
        return ""
    return f"is {shown_short(value)} and not a count by name"


def _texts(value: Any) -> str:
    if isinstance(value, Mapping) and all(isinstance(t, str) for item in value.items() for t in item):
        return ""
    return f"is {shown_short(value)} and not texts by name"


def _names(value: Any) -> str:
    return "" if _are_texts(value) else f"is {shown_short(value)} and not a list of names"


def _names_by_part(value: Any) -> str:
    if (
        isinstance(value, Mapping)
        and value.keys() <= set(_LISTED)
        and all(_are_texts(names) for names in value.values())
    ):
        return ""
    return f"is {shown_short(value)} and not lists of names"


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _calendar(value: Any) -> str:
    if not isinstance(value, list | tuple) or len(value) not in (0, 3, 4) or not all(map(is_count, value)):
        return f"is {shown_short(value)} and not the three or four whole numbers of a calendar, or none"
    if value and (value[0] < 1 or list(value[1:]) != sorted(value[1:])):
        return f"is {shown_short(value)}: the interval must be at least 1, and the other times in order"
    return ""


def why_not_whole(tensor: Tensor) -> str:
    """Why a tensor is not one that a run saves: such a tensor has values, and memory for each of them."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return f"is {shown_short(tensor)} without ordinary values"
    # a stride of 0 gives a tensor of any size to a file of some bytes, and whoever computes with it needs all the memory
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"is {shown_short(tensor)}, and its memory has {tensor.untyped_storage().nbytes()} bytes"
    return ""


def _tensors(check: Check) -> Check:
    def complaint(value: Any) -> str:
        if not isinstance(value, Mapping):
            return f"is {shown_short(value)} and not a mapping"
        for name, tensor in value.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                return f"has {shown_short(tensor)} under {shown_short(name)}, where a name has a tensor"
            if why := check(tensor):
                return f"has under {shown_short(name)} what {why}"
        return ""

    return complaint


def _mask(tensor: Tensor) -> str:
    return why_not_whole(tensor) or (
        "" if tensor.dtype == torch.bool else f"is {shown_short(tensor)} and not of truth values"
    )


def _floats(tensor: Tensor) -> str:
    return why_not_whole(tensor) or (
        "" if tensor.is_floating_point() else f"is {shown_short(tensor)} and not of floating-point numbers"
    )


def _gradient(tensor: Tensor) -> str:
    # an embedding may have a sparse one
    if tensor.layout == torch.strided and (why := why_not_whole(tensor)):
        return why
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    return "" if differentiable else f"is {shown_short(tensor)} and not a gradient"


def _averages(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"is {shown_short(value)} and not a mapping"
    for key, kept in value.items():
        if not isinstance(key, str) or not isinstance(kept, Mapping) or "born" not in kept:
            return f"has {shown_short(kept)} under {shown_short(key)}, where a callback has what its average needs"
        if why := _tensors(_mask)(kept["born"]):
            return f"has under {shown_short(key)} what {why}"
    return ""


def _patterns(value: Any) -> str:
    return _by_name(value, why_not_pattern, lambda pattern: pattern.values())


def _records(value: Any) -> str:
    return _by_name(value, why_not_records, chain.from_iterable)


def _by_name(value: Any, check: Check, tensors: Callable[[Any], Iterable[Tensor]]) -> str:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return f"is {shown_short(value)} and not a mapping by names"
    for name, kept in value.items():
        if why := check(kept) or next(filter(None, map(why_not_whole, tensors(kept))), ""):
            return f"has under {shown_short(name)} what {why}"
    return ""


_LISTED = ("arguments", "aux", "dense", "patterns")
LAYOUT: Mapping[str, Check] = {
    "arguments": _texts,
    "times": _calendar,
    "steps": _counts_by_optimizer,
    "done": _counts_by_optimizer,
    "updates": _count,
    "masks": _tensors(_mask),
    "patterns": _patterns,
    "records": _records,
    "zeros": _counts_by_name,
    "units": _counts_by_name,
    "names": _names_by_part,
    "aux": _tensors(why_not_whole),
    "dense": _tensors(_floats),
    "grads": _tensors(_gradient),
    "dense_grads": _tensors(_gradient),
    "window_open": _truth,
    "awaited": _names,
    "averages": _averages,
}
"""What each part of a state must be."""
# version 0.1 saved no inventory, that of the first weeks no dense values; gradients are saved only in a window, awaited
# layers, averages, patterns and records where there are any
_MAY_LACK = (
    "zeros",
    "names",
    "dense",
    "grads",
    "dense_grads",
    "window_open",
    "awaited",
    "averages",
    "patterns",
    "records",
    "units",
)


def inventory(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a state should hold: a checksum of it, as no plan says what a run that was made shorter has pruned, and as
    some tensors come only with time.

    Args:
        state: the state of a method, as it is saved.
    """
    units = {name: units_in(pattern) for name, pattern in state.get("patterns", {}).items()}
    return {
        "zeros": {name: count_of_false(mask) for name, mask in state["masks"].items()},
        "names": {part: sorted(state[part]) for part in _LISTED if part in state},
    } | ({"units": units} if units else {})


def refuse_damaged(state: Mapping[str, Any], path: object) -> None:
    """Refuse a state whose parts are missing, of other types, or contradict each other.

    Args:
        state: what was found in the checkpoint.
        path: the checkpoint's path, for the error.

    Raises:
        ValueError: says which part is wrong, and how.
    """
    if missing := [key for key in LAYOUT if key not in state and key not in _MAY_LACK]:
        raise damaged(f"{', '.join(missing)} missing in it", path)
    for key, check in LAYOUT.items():
        if key in state and (why := check(state[key])):
            raise damaged(f"what the state holds under {key!r} {why}", path)
    if why := _contradiction(state):
        raise damaged(why, path)


def _contradiction(state: Mapping[str, Any]) -> str:
    """What two parts of a state, each right by itself, say differently; empty where they agree."""
    steps, done = state["steps"], state["done"]
    for index, step in done.items():
        if index not in steps or step > steps[index]:
            counted = steps.get(index, "none")
            return f"its latest update is at step {step}, and it has counted {counted} steps of optimizer {index}"
    if state["updates"] < len(done):
        return f"it has counted {state['updates']} updates, and {len(done)} optimizers have had one"
    counts = state.get("zeros", {})
    # masks of other names are those of another model
    zeros = {name: int((~mask).sum()) for name, mask in state["masks"].items() if name in counts}
    if wrong := [name for name in zeros if zeros[name] != counts[name]]:
        counted = f"has {zeros[wrong[0]]} zeros, and {counts[wrong[0]]} were counted when it was saved"
        return f"its mask of {shown_short(wrong[0])} {counted}"
    live = {name: units_in(pattern) for name, pattern in state.get("patterns", {}).items()}
    for name, counted_then in state.get("units", {}).items():
        if live.get(name, counted_then) != counted_then:
            has = f"has {live[name]} live units, and {counted_then} were counted when it was saved"
            return f"its pattern of {shown_short(name)} {has}"
    for born in (kept["born"] for kept in state.get("averages", {}).values()):
        if wrong := [name for name, where in born.items() if not _lies_in(where, state["masks"].get(name))]:
            return (
                f"its weights of {shown_short(wrong[0])} that were born since an average are not among the active ones"
            )
    for part, names in state.get("names", {}).items():
        if wrong := sorted(set(names) ^ state.get(part, {}).keys()):
            has = "and had it not" if wrong[0] in state.get(part, {}) else "no more, and had it"
            return f"it has {shown_short(wrong[0])} in {part!r} {has} when it was saved"
    if foreign := [name for name in state.get("dense", {}) if name not in state["masks"]]:
        return f"it has dense values of {shown_short(foreign[0])}, and no mask"
    patterns = state.get("patterns", {})
    if masked := [name for name in state.get("awaited", ()) if name in state["masks"] or name in patterns]:
        return f"it has a mask of {shown_short(masked[0])}, which it says is not trained yet"
    if both := [name for name in patterns if name in state["masks"]]:
        return f"it has a mask and a pattern of {shown_short(both[0])}"
    return ""


def _lies_in(where: Tensor, mask: Tensor | None) -> bool:
    """Whether ``where`` is True only at active positions of a mask of the same shape."""
    return mask is not None and where.shape == mask.shape and not bool((where.to(mask.device) & ~mask).any())


def damaged(why: str, path: object) -> ValueError:
    """The error for a state that no run can have written.

    Args:
        why: what is wrong with the state, as a clause.
        path: the checkpoint's path.
    """
    return ValueError(
        f"the checkpoint {path} cannot be resumed from: {why}. The file is damaged or was changed. Resume from another "
        "checkpoint of the run, or give fresh_start=True to make new masks."
    )
