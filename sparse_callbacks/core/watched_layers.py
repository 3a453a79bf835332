"""Inputs and output gradients of layers in one batch, kept by hooks that go afterwards."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.core.curvature import WatchedCall
from sparse_callbacks.core.inspection import tensors_in
from sparse_callbacks.core.live.uncompiled import run_uncompiled
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

WATCHABLE = (nn.Linear, SparseLinear, _ConvNd)


def watchable_layers(
    model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
) -> dict[str, list[nn.Module]]:
    """Linear layers and convolutions by the name of their weight in ``named_parameters()``, several where they share it.

    Left out are weights that are computed from others (parametrizations, weight norm), and what `nn.MultiheadAttention` and
    recurrent layers multiply by, as no layer is called there.

    Args:
        model: the model.
        include: globs over names of weights; None: all.
        exclude: globs over names of weights to leave out; None: none.

    Raises:
        ValueError: a glob matches no such weight, or no layer is left.
    """
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    # torch reads the weight of this projection and does not call it
    unseen = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    found: dict[str, list[nn.Module]] = {}
    aliases: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(module, WATCHABLE) or weight is None or id(module) in unseen:
            continue
        name = names[id(weight)][0]
        if name in found and _use(found[name][0]) != _use(module):
            name = f"{path}.weight"  # a transposed convolution has other inputs than one with the same weight
        found.setdefault(name, []).append(module)
        aliases[name] = names[id(weight)]
    globs = {"include": tuple(include or ()), "exclude": tuple(exclude or ())}
    for argument, given in globs.items():
        for glob in given:
            if not any(_matches(listed, [glob]) for listed in aliases.values()):
                raise ValueError(
                    f"{argument}={glob!r} matches the weight of no linear layer or convolution. There are: "
                    f"{', '.join(found) or 'none'}."
                )
    chosen = {
        name: layers
        for name, layers in found.items()
        if (include is None or _matches(aliases[name], globs["include"]))
        and not _matches(aliases[name], globs["exclude"])
    }
    if not chosen:
        raise ValueError(
            f"no layer is left to watch: the linear layers and convolutions are {', '.join(found) or 'none'}. "
            "Give other globs as include= and exclude=, or a model with such a layer."
        )
    return chosen


def _use(layer: nn.Module) -> tuple[bool, int]:
    """What must be the same of layers that use one weight in the same way."""
    return bool(getattr(layer, "transposed", False)), int(getattr(layer, "groups", 1))


def _matches(names: Iterable[str], globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


class WatchedLayers:
    """Keeps the inputs and output gradients of layers from here until :meth:`end`. Compiled models run eagerly meanwhile.

    Layers whose weight is frozen are passed over. Passes without gradients are not kept, and what a layer computes again in
    the backward pass, under activation checkpointing, counts once. Inputs and gradients stay in memory until the end.

    Args:
        layers: the layers by name, several of one name where they share a weight.
    """

    def __init__(self, layers: Mapping[str, Sequence[nn.Module]]) -> None:
        self._calls: dict[str, list[WatchedCall]] = {name: [] for name in layers}
        self._handles: list[Any] = []
        for name, modules in layers.items():
            for module in modules:
                weight = module._parameters.get("weight")
                if weight is None or not weight.requires_grad:
                    continue
                self._handles.append(module.register_forward_hook(self._hook_of(name), with_kwargs=True))
        # torch would compile once with these hooks and once without
        self._compile_again = run_uncompiled(self)

    def _hook_of(self, name: str) -> Any:
        calls = self._calls[name]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            made = tensors_in(output)[0]
            if not (torch.is_grad_enabled() and made.requires_grad):
                return None
            given = tensors_in([*args, *kwargs.values()])[0].detach()
            # under autocast the layer has seen such a copy, and the original may be written to before the backward pass
            call = WatchedCall(module, given.to(made.dtype))
            calls.append(call)
            hooked: Any = made  # the hook has no types in torch
            self._handles.append(hooked.register_hook(lambda gradient: _keep(call, gradient)))
            # where an output is a view, as of SparseLinear, an activation in place would take the hook out of the graph
            return output.clone() if output is made else None

        return hook

    def end(self) -> dict[str, list[WatchedCall]]:
        """Remove the hooks.

        Returns:
            The calls of each layer that a gradient has come to, by the name of the layer.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._compile_again()
        return {name: [c for c in calls if c.gradients is not None] for name, calls in self._calls.items()}


def _keep(call: WatchedCall, gradient: Tensor) -> None:
    if call.gradients is None:  # of several backward passes through one graph the first counts
        call.gradients = gradient.detach()
