"""Which storage each sparse layer of a model gets, and why one stays masked."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from sparse_callbacks.core.attachment import Choice
from sparse_callbacks.core.selection import NOT_TRAINED, Entry
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear, weight_name
from sparse_callbacks.core.storages.former_layers import held_elsewhere
from sparse_callbacks.core.storages.module_swap import names_added, names_of_sparse
from sparse_callbacks.core.storages.storage import why_no_exchange

_TYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model that may be exchanged.

    Attributes:
        names: all names of its weight.
        module: the layer.
        in_attention: a ``nn.MultiheadAttention`` holds it.
        is_model: it is the model itself.
    """

    names: tuple[str, ...]
    module: nn.Module
    in_attention: bool
    is_model: bool


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """The linear layers of a model by the first name of their weight; those too whose weight is computed from others."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, Layer] = {}
    in_attention: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            in_attention.update(map(id, module.children()))
        if isinstance(module, nn.Linear | SparseLinear):
            weight = module._parameters.get("weight")
            mine = [weight_name(prefix)] if weight is None else names[id(weight)]
            found.setdefault(mine[0], Layer(tuple(mine), module, id(module) in in_attention, module is model))
    return found


def choices_for(
    method: Any, model: nn.Module, entries: Sequence[Entry], device: torch.device | None = None
) -> dict[str, Choice]:
    """What ``storage=`` of a method makes of each parameter that becomes sparse, now or once it is trained.

    Args:
        method: the method; one without ``storage`` keeps masks.
        model: the model.
        entries: all parameters of it, with the reason why one stays dense.
        device: where the model will be trained; None: where its parameters are.

    Returns:
        Choices by parameter name; ``"auto"`` where times are to decide.

    Raises:
        ValueError: a glob matches nothing.
    """
    storage, layers = getattr(method, "storage", "masked"), linear_layers(model)
    refuse_idle_globs(storage, entries, "storage")
    refuse_idle_globs(getattr(method, "rows", None), entries, "rows")
    strict, why = isinstance(storage, str) and storage != "auto", why_no_exchange(method)
    found = {}
    elsewhere = (
        held_elsewhere(model)
        if "auto" in (storage, *(storage.values() if isinstance(storage, Mapping) else ()))
        else {}
    )
    for entry in entries:
        layer = layers.pop(entry.name, None)
        if entry.reason and not (layer and any(why in entry.reason for why in NOT_TRAINED)):
            continue
        asked = asked_for(storage, layer.names if layer else (entry.name,))
        if asked != "masked" and why:
            found[entry.name] = Choice("masked", f"{type(method).__name__} {why}")
        elif layer is None:
            note = "" if asked == "masked" else "only linear layers have another storage"
            found[entry.name] = Choice("masked", note)
        elif isinstance(layer.module, SparseLinear):
            known = method.attachment.choices_of(model).get(entry.name)
            as_given = known is None or known.live is None or known.as_given
            found[entry.name] = replace(kept(layer.module, known.note if known else ""), as_given=as_given)
        elif asked == "auto" and (holder := elsewhere.get(id(layer.module))):
            found[entry.name] = Choice("masked", f"{holder} holds the layer too, and would call the dense one")
        else:
            found[entry.name] = _choice(asked, entry, layer, getattr(method, "group", 1), device, strict)
    for name, layer in layers.items():  # their weight is not a parameter of the model
        if asked_for(storage, layer.names) != "masked" and not _is_left_out(method, layer):
            found[name] = Choice("masked", why_not_exchanged(layer), strict)
    return found


def planned_choices(method: Any, model: nn.Module, entries: Sequence[Entry]) -> dict[str, Choice]:
    """`choices_for` a plan: what times have decided for this model already is known."""
    known = method.attachment.choices_of(model)
    choices = choices_for(method, model, entries)
    return {n: replace(c, storage=k.storage, note=k.note) if (k := known.get(n)) else c for n, c in choices.items()}


def refuse_choices(storage: Any, choices: Mapping[str, Choice], dense: Container[str] = ()) -> None:
    """Refuse a run in which a layer cannot have the storage that was asked for.

    Args:
        storage: the argument, for the error.
        choices: what was decided, by parameter name.
        dense: names of parameters that stay dense all the same.

    Raises:
        ValueError: says which layer, and why.
    """
    for name, choice in choices.items():
        if choice.refused and name not in dense:
            raise ValueError(
                f"storage={storage!r}: {name} cannot have it, for {choice.note}. Leave it out with exclude=[{name!r}], or "
                f"give storage={{{name!r}: 'masked', '*': 'sparse'}}, 'auto' or 'masked'."
            )


def kept(layer: SparseLinear, note: str = "") -> Choice:
    """The choice for a layer that is exchanged already."""
    return Choice(layer.storage, note, group=layer.group, live=layer.live)


def asked_for(storage: str | Mapping[str, str], names: Iterable[str]) -> str:
    """The storage that was asked for a parameter with these names."""
    if isinstance(storage, str):
        return storage
    names = list(names)
    return next((value for glob, value in storage.items() if any(fnmatchcase(n, glob) for n in names)), "masked")


def _choice(asked: str, entry: Entry, layer: Layer, group: int, device: torch.device | None, strict: bool) -> Choice:
    if asked == "masked":
        return Choice("masked")
    weight = layer.module._parameters["weight"]
    assert weight is not None  # it has an entry
    # never a reason to refuse: no user can change what torch's attention reads
    if layer.in_attention:
        return Choice("masked", "the attention reads this weight itself")
    if why := why_not_exchanged(layer) or why_not_frozen(entry):
        return Choice("masked", why, strict)
    if asked == "grouped":
        rows = entry.full_shape[0]
        why = f"groups of {group} do not divide its {rows} rows" if rows % group else ""
        return Choice("masked", why) if why else Choice(asked, group=group)
    where = weight.device if device is None or weight.is_meta else device
    if where.type not in ("cpu", "meta"):
        why = f"sparse storage runs on the CPU, and the layer is trained on {where}, where a masked layer is faster"
        return Choice("masked", why, asked == "sparse")
    if weight.dtype not in _TYPES:
        dtype = str(weight.dtype).removeprefix("torch.")
        return Choice("masked", f"sparse storage computes in float32 and float64, and the layer is of {dtype}", strict)
    return Choice(asked)


def why_not_frozen(entry: Entry) -> str:
    """Why a layer that is not trained stays masked; empty where it is trained."""
    return "it is frozen, and exchanged layers are trained from the start" if entry.reason else ""


def why_not_exchanged(layer: Layer) -> str:
    """Why a linear layer cannot be exchanged, whatever the storage; empty where it can."""
    module, weight = layer.module, layer.module._parameters.get("weight")
    if weight is None or "parametrizations" in module._modules:
        return "it is parametrised: its weight or bias is computed from others in each forward pass"
    if len(layer.names) > 1:
        return f"{' and '.join(layer.names)} are one tensor, and a tied weight has no sparse storage"
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, which may compute otherwise than nn.Linear"
    if layer.is_model:
        return "it is the model itself, and no module holds it"
    for name in names_added(module):
        if hasattr(nn.Linear, name):
            return f"{name} is replaced on the instance" if not name.startswith("_") else "it is compiled by itself"
        if names_of_sparse(name):
            return f"its attribute {name!r} would hide one of a SparseLinear"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "its weight has a hook, which expects the dense gradient"
    return ""


def refuse_idle_globs(given: Any, entries: Sequence[Entry], argument: str) -> None:
    """Refuse a glob of ``storage=`` or ``rows=`` that matches no parameter of a layer.

    Raises:
        ValueError: lists what there is.
    """
    candidates = [e.name for e in entries if e.shape]
    # rows are those of a layer, which may be called by its own name
    names = [*candidates, *(n.removesuffix(".weight") for n in candidates)] if argument == "rows" else candidates
    for glob in given if isinstance(given, Mapping) else ():
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(
                f"{argument}= has a value for {glob!r}, which matches no parameter that can be sparse. Candidates: "
                f"{', '.join(candidates)}."
            )


def _is_left_out(method: Any, layer: Layer) -> bool:
    """Whether include= or exclude= leave out a layer whose weight is computed from other parameters."""
    prefix = layer.names[0].removesuffix("weight")
    names = [*layer.names, *(f"{prefix}{name}" for name, _ in layer.module.named_parameters())]

    def matches(globs: Iterable[str]) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs for name in names)

    return matches(method.exclude or ()) or (method.include is not None and not matches(method.include))
