"""The channel groups that a method may prune, their masks, and the inputs that a model is traced with."""

import inspect
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.slim import slimmable_groups
from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.inspection import map_tensors, quiet, run, tensors_in


def prunable_groups(
    model: nn.Module,
    example_input: Any,
    exclude: Sequence[str] | None,
    owned: Iterable[Sequence[str]],
    stem: str | None = None,
) -> tuple[list[Group], dict[str, str]]:
    """The groups whose channels a method may remove, and the reason of every other group by its name.

    Args:
        model, example_input, exclude: see :func:`~sparse_callbacks.channels.slim.slimmable_groups`.
        owned: for each optimizer the names of its parameters that may be masked. All consumers of a group must belong
            to one optimizer, which then decides when the group is pruned.
        stem: name of a layer whose outputs stay.

    Raises:
        ValueError: there is no such group.
    """
    found, optimizers = slimmable_groups(model, example_input, exclude), [set(names) for names in owned]
    # what the network itself forbids is listed first, then what the user's choices leave
    reasons = {g.name: g.reason for g in found if g.reason}
    reasons |= {g.name: reason for g in found if not g.reason and (reason := _why_not_chosen(g, optimizers, stem))}
    if len(reasons) == len(found):
        raise ValueError(
            "no channels can be removed from this model: "
            + "; ".join(f"outputs of {name}: {reason}" for name, reason in reasons.items())
            + ". Change include=, exclude=, keep_dense= or prune_stem=, or use a method that prunes single weights."
        )
    return [g for g in found if g.name not in reasons], reasons


def _why_not_chosen(group: Group, optimizers: Sequence[set[str]], stem: str | None) -> str:
    """Why the channels of a group that could be cut stay; empty where they may be pruned."""
    if any(p.module == stem for p in group.producers):
        return f"{stem} is the stem"
    readers = list(dict.fromkeys(c.parameter for c in group.consumers))  # each once, in order
    dense = [name for name in readers if not any(name in names for names in optimizers)]
    if dense:
        return f"{', '.join(dense)} stay dense (see plan())"
    # optimizers step at different times: until the last one has stepped, some readers would still use channels that
    # others have lost
    if not any(names.issuperset(readers) for names in optimizers):
        return f"{', '.join(readers)} are in several optimizers"
    return ""


def example_inputs(model: nn.Module, batches: Generator[Any, None, None]) -> Any:
    """Inputs that the model's forward takes.

    They are the model's ``example_input_array`` as it is, or else what its forward gets from the first of ``batches``: its
    first sample, where all tensors have one first size and the forward takes a single sample, otherwise the whole batch.

    Args:
        model: the model that is trained.
        batches: passes over data that call the model, one batch at a time; closed at the end.

    Raises:
        ValueError: neither gives any, or the forward does not take the ``example_input_array``.
    """
    example = getattr(model, "example_input_array", None)
    seen: list[Any] = [] if example is None else [example]

    def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        # under one mapping by name where any argument is named, as run() takes positional or named arguments, not both
        seen.append(dict(inspect.signature(module.forward).bind(*inputs, **named).arguments) if named else inputs)

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        if not seen:
            # one batch is enough: the hook sees the inputs before the forward pass begins
            next(batches)
    # raised by the data pass, such as where there is no train loader; its advice is for other callers and is left out
    except ValueError as error:
        raise ValueError(
            "the model is looked at with one sample, and there is none: the module has no example_input_array, and "
            f"{str(error).partition('. ')[0]}. Set example_input_array to what its forward takes of one sample (or, in a "
            "loop of your own, give sparsify(..., data=) one batch); the forward must run the network that is to be pruned."
        ) from error
    finally:
        batches.close()
        handle.remove()
    like = next((p for p in model.parameters() if p.is_floating_point()), next(model.parameters()))

    def in_place(tensor: Tensor) -> Tensor:
        # an example may be float32 where the model is float64; whole numbers, such as tokens, must stay whole
        return tensor.detach().to(like if tensor.is_floating_point() else like.device)

    found = map_tensors(in_place, seen[0])
    if example is not None:
        if problem := why_not_taken(model, found):
            raise ValueError(
                f"{type(model).__name__} is looked at with its example_input_array, which its forward does not take "
                f"({problem}). Set example_input_array to what forward takes: a tensor, a tuple of positional or a mapping "
                "of named arguments."
            )
        return found
    if len({t.shape[0] for t in tensors_in(found) if t.ndim}) != 1:  # no common size that would be that of the batch
        return found
    single = map_tensors(lambda t: t[:1] if t.ndim else t, found)
    return found if why_not_taken(model, single) else single


def why_not_taken(model: nn.Module, inputs: Any) -> str:
    """The error of a forward pass on ``inputs``; empty where there is none."""
    try:
        with quiet(model):
            run(model, inputs)
    except Exception as error:  # whatever the user's forward raises
        return with_class(error)
    return ""


def kept_units(group: Group, masks: Mapping[str, Tensor]) -> Tensor:
    """Bool [size]: the units of a group that the mask of its first consumer keeps."""
    reader = group.consumers[0]
    # all consumers lose the same units, so the first one speaks for every other
    slices = masks[reader.parameter].movedim(reader.dim, 0).flatten(1).any(1)
    units = reader.units.to(slices.device)
    keep = torch.zeros(group.size, dtype=torch.bool, device=slices.device)
    keep[units[units >= 0]] = slices[units >= 0]
    return keep


def consumer_masks(groups: Sequence[Group], keeps: Sequence[Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of all consumers of the groups, bool, of the shapes of their weights.

    A layer that reads several groups has the masks of all of them.

    Args:
        groups: the groups.
        keeps: for each group the units that it keeps, bool [size].
        params: the weights, by name.
    """
    masks: dict[str, Tensor] = {}
    for group, keep in zip(groups, keeps, strict=True):
        for reader in group.consumers:
            like = params[reader.parameter]
            mask = reader.mask(keep.to(like.device), like.ndim)
            everything = torch.ones_like(like, dtype=torch.bool)
            masks[reader.parameter] = mask & masks.get(reader.parameter, everything)
    return masks
