"""Cutting slices out of the layers of a model, and putting them back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.core.inspection import copied

Key = tuple[str, int]


@dataclass
class Cuts:
    """What is left of a model: for each parameter and dimension the slices that stay (bool, of the original size), and what is added
    to the biases of layers (of the original outputs) for inputs that were constants."""

    kept: dict[Key, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)

    def with_group(self, group: Group, keep: Tensor, added: Mapping[str, Tensor] | None = None) -> "Cuts":
        """These cuts and those of ``group``, of which the units in ``keep`` (bool [size]) stay."""
        kept = dict(self.kept)
        for member in group.members:
            stays = member.kept(keep)
            kept[member.key] = kept[member.key] & stays if member.key in kept else stays
        total = dict(self.added)
        for name, shift in (added or {}).items():
            total[name] = total[name] + shift if name in total else shift
        return Cuts(kept, total)

    def without_cut(self, parameter: str, tensor: Tensor) -> Tensor:
        """``tensor`` (of the parameter's original shape) with zeros, or False, in every slice that goes."""
        for dim in range(tensor.ndim):
            if (stays := self.kept.get((parameter, dim))) is not None:
                tensor = tensor * stays.to(tensor.device).view([-1 if d == dim else 1 for d in range(tensor.ndim)])
        return tensor


class Surgery:
    """Makes a model what :class:`Cuts` leave of it; every cut is made from the tensors that the model had at first, and can be undone.

    Parameters are replaced by others, never written to; without any cut the model holds its original ones again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = {  # under every name that they have
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self.depthwise = depthwise(model)
        self._first = dict(self.tensors)
        self._touched: set[str] = set()

    def mask(self, member: Member, keep: Tensor) -> None:
        """Cut from here on from a weight that is zero for the units of ``member`` that are not in ``keep`` (bool [units])."""
        old = self.tensors[member.parameter]
        self.tensors[member.parameter] = zeroed(old, ~member.mask(keep, old.ndim))

    def cut(self, cuts: Cuts, members: Iterable[Member]) -> None:
        """Give the modules of ``members`` the slices that ``cuts`` leave them."""
        self._refresh({m.module for m in members} | set(cuts.added), cuts)

    def restore(self) -> None:
        """The model holds the very parameters that it held at first."""
        self.tensors = dict(self._first)
        self._refresh(self._touched, Cuts())

    def _refresh(self, modules: Iterable[str], cuts: Cuts) -> None:
        for name in modules:
            self._touched = self._touched | {name}
            module, prefix = self.model.get_submodule(name), f"{name}." if name else ""
            for local in (*module._parameters, *module._buffers):
                self._replace(module, prefix, local, cuts)
            refit(module, name in self.depthwise)

    def _replace(self, module: nn.Module, prefix: str, local: str, cuts: Cuts) -> None:
        old = self.tensors.get(prefix + local)
        if local == "bias" and (shift := cuts.added.get(prefix[:-1])) is not None:
            weight = self.tensors[f"{prefix}weight"]
            old = nn.Parameter(shift.to(weight) if old is None else old.detach() + shift.to(old), requires_grad=weight.requires_grad)
        if old is None:
            return _put(module, local, None)
        new = old.detach()
        for dim in range(new.ndim):
            if (stays := cuts.kept.get(self._key(module, prefix, local, dim))) is not None:
                stays = stays.repeat(old.shape[dim] // len(stays)).to(new.device)  # a grouped transposed convolution's bias
                new = new if stays.all() else new.index_select(dim, stays.nonzero()[:, 0])
        return _put(module, local, old if new.shape == old.shape else _like(new, old))

    def _key(self, module: nn.Module, prefix: str, local: str, dim: int) -> Key:
        """What cuts of dimension ``dim`` of a tensor go by: biases and statistics by the channels of the weight beside them."""
        if isinstance(module, NORMS):
            return f"{prefix}weight", 0
        if local == "bias" and is_layer(module):
            return f"{prefix}weight", 0 if prefix[:-1] in self.depthwise else output_dim(module)
        return prefix + local, dim


NORMS = (nn.modules.batchnorm._BatchNorm,)


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _ConvNd)


def output_dim(module: nn.Module) -> int:
    """Dimension of the outputs in a layer's weight. Transposed convolutions store their inputs first."""
    return int(isinstance(module, _ConvTransposeNd))


def depthwise(model: nn.Module) -> frozenset[str]:
    """Names of the convolutions with one input and one output in every group."""
    convs = [(n, m) for n, m in model.named_modules() if isinstance(m, _ConvNd)]
    return frozenset(n for n, m in convs if m.groups == m.in_channels == m.out_channels > 1)


def refit(module: nn.Module, is_depthwise: bool) -> None:
    """Set the sizes that ``module`` states of itself to those of its tensors; ``is_depthwise``: it was at first."""
    weight = next((t for t in (getattr(module, "weight", None), getattr(module, "running_mean", None)) if isinstance(t, Tensor)), None)
    if weight is None:
        return
    if isinstance(module, _ConvNd):
        first, second = weight.shape[:2]
        if is_depthwise:
            module.in_channels = module.out_channels = module.groups = first
        elif isinstance(module, _ConvTransposeNd):
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, NORMS):
        module.num_features = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)


def zeroed(old: Tensor, gone: Tensor) -> nn.Parameter:
    """A parameter like ``old`` with zeros where ``gone`` (bool, broadcasts) is true."""
    new = old.detach().clone()  # which keeps the memory format, where masked_fill does not
    return nn.Parameter(new.masked_fill_(gone.to(new.device), 0), requires_grad=old.requires_grad)


def masked_copy(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of ``model`` with zeros where the masks say so, and the masks in the shapes of the parameters.

    A parameter that several modules share stays one, and goes by its first name; masks of several of its names hold together.

    Raises:
        ValueError: a mask of no parameter, or of another shape; a model that cannot be copied.
    """
    masked = copied(model)
    every = dict(masked.named_parameters(remove_duplicate=False))
    first = {p: n for n, p in masked.named_parameters()}
    full: dict[str, Tensor] = {}
    for given, mask in masks.items():
        fitted = _fitted(given, mask, masked, every)
        name = first[every[given]]
        full[name] = full[name] & fitted if name in full else fitted
    for name, mask in full.items():
        new = zeroed(every[name], ~mask)
        for module in masked.modules():
            for local in [n for n, p in module._parameters.items() if p is every[name]]:
                module.register_parameter(local, new)
    return masked, full


def _fitted(name: str, mask: Tensor, model: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
    """``mask`` in the shape of its parameter."""
    if name not in parameters:
        known = ", ".join([*parameters][:6])
        raise ValueError(f"masks names {name!r}, and the model has no such parameter. There are for example {known}.")
    shape = parameters[name].shape
    mask = mask.to(parameters[name].device, torch.bool)
    if mask.ndim == 1 and len(shape) > 2:
        inputs = 1 - output_dim(model.get_submodule(name.rpartition(".")[0]))
        mask = mask.view([-1 if d == inputs else 1 for d in range(len(shape))])
    try:
        return mask.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"The mask of {name} has shape {list(mask.shape)} and the parameter {list(shape)}. Give a mask of that shape, or one that "
            "broadcasts against it."
        ) from error


def _like(new: Tensor, old: Tensor) -> Tensor:
    """``new`` as a parameter or buffer as ``old`` is one, in the same memory format."""
    if old.ndim == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last):
        new = new.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _put(module: nn.Module, local: str, tensor: Tensor | None) -> None:
    if local in module._parameters:
        module.register_parameter(local, tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
    else:
        module._buffers[local] = tensor
