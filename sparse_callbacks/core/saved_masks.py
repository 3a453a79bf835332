"""Reads the masks that runs of this package have saved, from a file or from what it holds."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.checkpoint_file import read_mapping
from sparse_callbacks.core.given_masks import Source, is_run, states_in
from sparse_callbacks.core.live.live_layout import why_not_pattern
from sparse_callbacks.core.live.saved_patterns import mask_of
from sparse_callbacks.core.saved_bits import is_bits, truths_of, why_not_bits
from sparse_callbacks.core.state_layout import shown_short

_ADVICE = "Give a checkpoint of a run of this package, or what run.state_dict() or callback.state_dict() gave."


@checked
def saved_masks(source: Source) -> dict[str, Tensor]:
    """Masks by parameter name: bool, of the shape of the weight, True where a connection is active.

    A state holds one bit for each weight (one that version 0.1 saved a byte); this reads both. Of layers with sparse storage
    the masks are made of their places, for which the weights must be in ``source`` too.

    Args:
        source: the path of a checkpoint, what ``torch.load`` gave of it, or what ``run.state_dict()`` or
            ``callback.state_dict()`` gave. Files are read with ``weights_only=True``, on the CPU.

    Raises:
        TypeError: ``source`` is neither a path nor a mapping.
        ValueError: there is no such file, it is damaged, or holds no masks of this package.

    Example:
        >>> import torch
        >>> from sparse_callbacks import saved_masks, sparsify
        >>> from sparse_callbacks.methods import Static
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        >>> with sparsify(Static(0.5, print_plan=False), model, torch.optim.SGD(model.parameters(), lr=0.1), steps=1) as run:
        ...     state = run.state_dict()
        >>> saved_masks(state)["0.weight"].shape
        torch.Size([6, 4])
    """
    shown = "source, the mapping," if isinstance(source, Mapping) else f"source={str(source)!r}"
    if not isinstance(source, Mapping) and not Path(source).is_file():
        raise ValueError(f"{shown} is not a file, so no masks can be read from it. {_ADVICE}")
    try:
        found = source if isinstance(source, Mapping) else read_mapping(Path(source), _ADVICE)
    except ValueError as error:
        raise ValueError(f"{shown} cannot be read, so it has no masks to give: {error}") from error
    states = [found] if is_run(found) else list(states_in(found, shown, _ADVICE))
    if not states:
        raise ValueError(f"{shown} holds no masks of this package. {_ADVICE}")
    shapes = dict(_shapes_in(found))
    masks: dict[str, Tensor] = {}
    for state in states:
        masks |= _masks_of(state, shapes, shown)
    return masks


def _masks_of(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], shown: str) -> dict[str, Tensor]:
    held, patterns = state["masks"], state.get("patterns", {})
    for part in (held, patterns):
        if not isinstance(part, Mapping):
            raise ValueError(f"{shown} is damaged: masks in it are {shown_short(part)}. {_ADVICE}")
    masks: dict[str, Tensor] = {}
    for name, mask in held.items():
        if is_bits(mask) and (why := why_not_bits(mask)):
            raise ValueError(f"{shown} is damaged: the mask of {name} {why}. {_ADVICE}")
        if not is_bits(mask) and not isinstance(mask, Tensor):
            raise ValueError(f"{shown} is damaged: the mask of {name} is {shown_short(mask)}. {_ADVICE}")
        masks[name] = truths_of(mask)
    for name, pattern in patterns.items():
        if why := why_not_pattern(pattern):
            raise ValueError(f"{shown} is damaged: what it has for the live weights of {name} {why}. {_ADVICE}")
        if name not in shapes:
            raise ValueError(
                f"{shown} has the places of the live weights of {name}, which has sparse storage, and not the weight, so "
                "its shape is not known. Give the whole checkpoint, or read callback.masks or run.masks."
            )
        try:
            masks[name] = mask_of(pattern, shapes[name])
        except ValueError as error:
            raise ValueError(f"{shown} is damaged: of the live weights of {name}, {error}. {_ADVICE}") from error
    return masks


def _shapes_in(found: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes of all tensors in a state dict, wherever in a checkpoint it is."""
    for part in (found, *found.values()):
        for name, value in part.items() if isinstance(part, Mapping) else ():
            if isinstance(name, str) and isinstance(value, Tensor):
                yield name, tuple(value.shape)
