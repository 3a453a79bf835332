"""Cuts slices out of the layers of a model, and puts them back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.attention_heads import update_heads_around
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.module_sizes import BATCH_NORMS, depthwise_groups, is_layer, output_dim, update_sizes
from sparse_callbacks.channels.split_sizes import update_splits_around

Key = tuple[str, int]
"""Name and dimension of a parameter."""


@dataclass
class Cuts:
    """What is left of a model.

    Attributes:
        kept: for a parameter and a dimension, the slices that stay: bool, of the original size.
        added: for a layer by its name, what is added to its bias for inputs that were constants: of the original number
            of outputs.
    """

    kept: dict[Key, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)

    def with_group(self, group: Group, keep: Tensor, added: Mapping[str, Tensor] | None = None) -> "Cuts":
        """These cuts, and those of one more group.

        Args:
            group: the group that is cut.
            keep: the units that stay, bool [size].
            added: what is added to the biases of layers for the units that go, by the name of the layer.
        """
        kept = dict(self.kept)
        for member in group.members:
            stays = member.kept(keep)
            # a layer that reads several groups has slices of each in one dimension
            kept[member.key] = kept[member.key] & stays if member.key in kept else stays
        total = dict(self.added)
        for name, shift in (added or {}).items():
            total[name] = total[name] + shift if name in total else shift
        return Cuts(kept, total)

    def without_cut(self, parameter: str, tensor: Tensor) -> Tensor:
        """``tensor`` with zeros, or False, in every slice that is cut.

        Args:
            parameter: name of a parameter.
            tensor: a tensor of the parameter's original shape, such as its mask.
        """
        for dim in range(tensor.ndim):
            stays = self.kept.get((parameter, dim))
            if stays is not None:
                tensor = tensor * stays.to(tensor.device).view([-1 if d == dim else 1 for d in range(tensor.ndim)])
        return tensor


class Surgery:
    """Makes of a model what :class:`Cuts` leave of it.

    Every cut starts from the tensors that the model had at first, so cuts are never applied to cut tensors, and any of
    them can be undone. Parameters are replaced by others and never written to; without any cut the model holds its
    original parameters again.

    Args:
        model: the model; its modules are changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # under every name that they have, as a cut looks them up by the name of the module
        self.tensors: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        # asked once: a convolution whose channels are cut may look depthwise, or no longer so
        self.depthwise = depthwise_groups(model)
        self._first = dict(self.tensors)
        self._touched: set[str] = set()

    def mask(self, member: Member, keep: Tensor) -> None:
        """Cut from here on from a weight that is zero for the units of ``member`` that are not in ``keep`` (bool)."""
        old = self.tensors[member.parameter]
        self.tensors[member.parameter] = zeroed(old, ~member.mask(keep, old.ndim))

    def cut(self, cuts: Cuts, members: Iterable[Member]) -> None:
        """Give the modules of ``members`` the slices that ``cuts`` leave them."""
        self._refresh({m.module for m in members} | set(cuts.added), cuts)

    def restore(self) -> None:
        """Give the model back the very parameters that it had at first."""
        self.tensors = dict(self._first)
        self._refresh(self._touched, Cuts())
        self._touched = set()

    def _refresh(self, modules: Iterable[str], cuts: Cuts) -> None:
        """Give every tensor of these modules, and the sizes that they state, what ``cuts`` leave of them."""
        self._touched = self._touched.union(modules)
        for name in modules:
            module, prefix = self.model.get_submodule(name), f"{name}." if name else ""
            for local in (*module._parameters, *module._buffers):
                _put(module, local, self._cut_tensor(module, prefix, local, cuts))
            update_sizes(module, self._groups_left(name, cuts))
        update_heads_around(self.model, modules)
        update_splits_around(self.model, modules)

    def _groups_left(self, name: str, cuts: Cuts) -> int | None:
        """The groups that ``cuts`` leave a depthwise convolution; None for every other module."""
        stays, groups = cuts.kept.get((f"{name}.weight", 0)), self.depthwise.get(name)
        return groups if groups is None or stays is None else int(stays.view(groups, -1).any(1).sum())

    def _cut_tensor(self, module: nn.Module, prefix: str, local: str, cuts: Cuts) -> Tensor | None:
        """What ``cuts`` leave of the tensor ``local`` of a module; None where the module has none of that name."""
        old = self.tensors.get(prefix + local)
        shift = cuts.added.get(prefix[:-1]) if local == "bias" else None
        if shift is not None:
            weight = self.tensors[f"{prefix}weight"]
            bias = shift.to(weight) if old is None else old.detach() + shift.to(old)
            old = nn.Parameter(bias, requires_grad=weight.requires_grad)
        if old is None:
            return None
        new = old.detach()
        for dim in range(new.ndim):
            stays = cuts.kept.get(self._key(module, prefix, local, dim))
            if stays is None:
                continue
            # the bias of a grouped transposed convolution is as long as all groups, its weight only as one
            stays = stays.repeat(old.shape[dim] // len(stays)).to(new.device)
            if not stays.all():
                new = new.index_select(dim, stays.nonzero()[:, 0])
        # the very same parameter where nothing was cut, so that tied parameters stay tied
        return old if new.shape == old.shape else _like(new, old)

    def _key(self, module: nn.Module, prefix: str, local: str, dim: int) -> Key:
        """The entry of :attr:`Cuts.kept` for one dimension of a tensor.

        A bias, and the statistics of a norm, go by the channels of the weight beside them.
        """
        if isinstance(module, BATCH_NORMS):
            return f"{prefix}weight", 0
        if local == "bias" and is_layer(module):
            return f"{prefix}weight", 0 if prefix[:-1] in self.depthwise else output_dim(module)
        return prefix + local, dim


def _like(new: Tensor, old: Tensor) -> Tensor:
    """``new`` as a parameter if ``old`` is one, otherwise as a buffer, in the memory format of ``old``."""
    if old.ndim == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last):
        new = new.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _put(module: nn.Module, local: str, tensor: Tensor | None) -> None:
    """Replace a parameter or buffer of ``module``."""
    if local not in module._parameters:
        module._buffers[local] = tensor
    elif tensor is None or isinstance(tensor, nn.Parameter):
        module.register_parameter(local, tensor)
    else:
        module.register_parameter(local, nn.Parameter(tensor))


# ---------------------------------------------------------------------- masked models


def zeroed(old: Tensor, gone: Tensor) -> nn.Parameter:
    """A parameter like ``old`` with zeros where ``gone`` is true (bool, broadcasts)."""
    new = old.detach().clone()  # clone() keeps the memory format, the masked_fill that is not in place does not
    return nn.Parameter(new.masked_fill_(gone.to(new.device), 0), requires_grad=old.requires_grad)
