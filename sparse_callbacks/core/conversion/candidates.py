"""Which layers of a network can be converted to N:M, and why the others stay dense."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from sparse_callbacks.core.nm_masks import NMPattern, why_not_nm
from sparse_callbacks.core.selection import Entry, KeepDense, select
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

_PLAIN = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
_FORWARDS = frozenset(kind.forward for kind in _PLAIN)


def holders_of_weights(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """By the ``id`` of each parameter every module that holds it, with the name that the parameter has there."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for local, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), []).append((f"{path}.{local}".lstrip("."), module))
    return found


def chosen_weights(
    model: nn.Module,
    pattern: NMPattern,
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
    keep_dense: KeepDense | None,
) -> tuple[list[Entry], dict[str, nn.Module]]:
    """Every weight of a network that could be sparse, and the layers that are converted by the name of their weight.

    Args:
        model: the network; its parameters count as trained, whatever their flags say.
        pattern: the pattern.
        include, exclude, keep_dense: see :func:`~sparse_callbacks.core.selection.select`.

    Raises:
        ValueError: a glob matches nothing, or no layer is left.
    """
    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    for p, _ in flags:
        p.requires_grad = True
    try:
        entries = [e for e in select(model, include, exclude, keep_dense) if e.shape]
    finally:
        for p, flag in flags:
            p.requires_grad = flag
    parameters, holders = dict(model.named_parameters()), holders_of_weights(model)
    found: list[Entry] = []
    layers: dict[str, nn.Module] = {}
    for entry in entries:
        held = holders[id(parameters[entry.name])]
        entry = replace(entry, reason=entry.reason or _why_dense(entry, held, pattern))
        found.append(entry)
        if not entry.reason:
            layers[entry.name] = held[0][1]
    if not layers:
        raise ValueError(
            f"pattern={str(pattern)!r} fits no layer that could be sparse: "
            f"{'; '.join(f'{e.name} ({e.reason})' for e in found)}. Give another pattern=, include= or exclude=, or keep_dense=None."
        )
    return found, layers


def _why_dense(entry: Entry, held: Sequence[tuple[str, nn.Module]], pattern: NMPattern) -> str:
    """Why a weight stays dense that could be sparse; empty where it is converted."""
    if len(held) > 1:
        return f"tied: {' and '.join(name for name, _ in held)} are one weight, with inputs of several layers"
    module = held[0][1]
    if isinstance(module, SparseLinear):
        return "an exchanged layer: to_dense(model) makes it an nn.Linear"
    if type(module).forward not in _FORWARDS:
        return f"the inputs of its product are not seen ({type(module).__name__})"
    return why_not_nm(entry.shape, pattern, groups=entry.groups)
