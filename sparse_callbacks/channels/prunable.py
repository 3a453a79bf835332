"""Channel groups under masks: which of them can be pruned, what is kept of each, and the inputs that a model is traced with."""

import inspect
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.slim import slimmable_groups
from sparse_callbacks.core.inspection import map_tensors


def prunable(
    model: nn.Module, example_input: Any, exclude: Sequence[str] | None, owned: Iterable[Sequence[str]], stem: str | None = None
) -> tuple[list[Group], dict[str, str]]:
    """Groups whose channels may go, and by name of the others why theirs stay.

    Args:
        model, example_input, exclude: see :func:`~sparse_callbacks.channels.slim.slimmable_groups`.
        owned: for each optimizer the names of its parameters that may be masked; all consumers of a group must be in one of them.
        stem: name of a layer whose outputs stay.

    Raises:
        ValueError: there are none.
    """
    found, sets = slimmable_groups(model, example_input, exclude), [set(names) for names in owned]
    stay = {g.name: g.reason for g in found if g.reason}
    for group in (g for g in found if not g.reason):
        readers = {c.parameter: None for c in group.consumers}
        if any(p.module == stem for p in group.producers):
            stay[group.name] = f"{stem} is the stem"
        elif dense := [name for name in readers if not any(name in names for names in sets)]:
            stay[group.name] = f"{', '.join(dense)} stay dense (see plan())"
        elif not any(names.issuperset(readers) for names in sets):
            stay[group.name] = f"{', '.join(readers)} are in several optimizers"
    if len(stay) == len(found):
        raise ValueError(
            "no channels can be removed from this model: "
            + "; ".join(f"outputs of {name}: {why}" for name, why in stay.items())
            + ". Change include=, exclude=, keep_dense= or prune_stem=, or use a method that prunes single weights."
        )
    return [g for g in found if g.name not in stay], stay


def example_inputs(model: nn.Module, batches: Generator[Any, None, None]) -> Any:
    """Inputs of one sample, as the model's forward takes them: its ``example_input_array``, or of the first of ``batches``.

    Args:
        model: of the run.
        batches: passes over data, calling the model; closed at the end.

    Raises:
        ValueError: neither gives any.
    """
    seen: list[Any] = [example] if (example := getattr(model, "example_input_array", None)) is not None else []

    def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(dict(inspect.signature(module.forward).bind(*inputs, **named).arguments) if named else inputs)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        if not seen:
            next(batches)
    except ValueError as error:
        raise ValueError(
            "the model is looked at with one sample, and there is none: the module has no example_input_array, and "
            f"{str(error).partition('. ')[0]}. Set example_input_array to what its forward takes of one sample; the forward must run the "
            "network that is to be pruned."
        ) from error
    finally:
        batches.close()
        handle.remove()
    like = next((p for p in model.parameters() if p.is_floating_point()), next(model.parameters()))

    def one(tensor: Tensor) -> Tensor:
        return tensor.detach()[:1].to(like if tensor.is_floating_point() else like.device)

    return map_tensors(one, seen[0])


def kept_units(group: Group, masks: Mapping[str, Tensor]) -> Tensor:
    """Bool [size]: the units of a group that the mask of its first consumer keeps."""
    reader = group.consumers[0]
    slices = masks[reader.parameter].movedim(reader.dim, 0).flatten(1).any(1)
    units = reader.units.to(slices.device)
    keep = torch.zeros(group.size, dtype=torch.bool, device=slices.device)
    keep[units[units >= 0]] = slices[units >= 0]
    return keep


def consumer_masks(groups: Sequence[Group], keeps: Sequence[Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bool masks of all consumers, of their shapes, for the units that are kept of each group; what reads several groups has all masks."""
    masks: dict[str, Tensor] = {}
    for group, keep in zip(groups, keeps, strict=True):
        for reader in group.consumers:
            like = params[reader.parameter]
            mask = reader.mask(keep.to(like.device), like.ndim)
            masks[reader.parameter] = mask & masks.get(reader.parameter, torch.ones_like(like, dtype=torch.bool))
    return masks
