"""Biases and batch norms that belong to the output channels of a convolution."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer


@dataclass(frozen=True)
class ChannelMembers:
    """What belongs to the output channels of a convolution beside its kernel.

    Args:
        biases: parameter names of the biases.
        norms: module paths of the batch norms that take the convolution's output.
    """

    biases: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()

    @property
    def affine(self) -> tuple[str, ...]:
        """Names of the norms' gains and shifts."""
        return tuple(f"{path}.{local}" for path in self.norms for local in ("weight", "bias"))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters that belong to the channels, without the kernel."""
        return (*self.biases, *self.affine)

    def factors(self, kernel: str, z: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factor of each parameter, by name, when the gates of ``kernel`` are ``z``.

        Gains and shifts of norms get 0 (closed) or 1 (open): they only keep a closed channel at zero behind the norm.

        Args:
            kernel: name of the kernel.
            z: gates that broadcast against the kernel.
            params: parameters by name; a bias that is longer than ``z`` has its outputs in groups, each with all gates.
        """
        found = {kernel: z}
        for name in self.names:  # vectors all, so the gates of a kernel are flattened for them
            # not ``repeat_interleave``: the outputs of a group lie together, and each group has all gates
            factor = z.flatten().repeat(params[name].numel() // z.numel())
            found[name] = (factor != 0).to(factor) if name in self.affine else factor
        return found


def find_members(model: nn.Module, kernels: Iterable[str]) -> dict[str, ChannelMembers]:
    """Members of the output channels of each kernel: its convolution's bias, and a batch norm registered right behind.

    Args:
        model: the model whose ``named_parameters`` have the kernels' names.
        kernels: names of gated weights; a weight that is not a convolution's has no members.

    Raises:
        ValueError: a bias or norm that belongs to two kernels, or a norm without parameters that could close a channel.
    """
    # by identity: a tied weight has several names, and the kernels have the first, as named_parameters does
    names = {id(p): name for name, p in model.named_parameters()}
    found = {kernel: ChannelMembers() for kernel in kernels}
    kernel_of: dict[str, str] = {}

    def claim(member: str, kernel: str) -> bool:
        """Whether ``member`` is a new one of ``kernel``; refuses the member of another kernel."""
        if kernel_of.setdefault(member, kernel) != kernel:
            raise ValueError(
                f"{member} goes with the output channels of both {kernel_of[member]} and {kernel}, which have gates of "
                "their own. Leave one of them out with exclude=."
            )
        # two convolutions with one kernel may share a bias or a norm too, which is listed once
        return member not in (*found[kernel].biases, *found[kernel].norms)

    for conv, path, follower in _convolutions(model):
        kernel = names.get(id(conv.weight), "")
        if kernel not in found:
            continue
        if conv.bias is not None:
            bias = names[id(conv.bias)]
            if claim(bias, kernel):
                found[kernel] = ChannelMembers((*found[kernel].biases, bias), found[kernel].norms)
        # the order of registration is a guess, which norm_check tests on an example; equal sizes are the least
        if isinstance(follower, _BatchNorm) and follower.num_features == conv.out_channels and claim(path, kernel):
            # a norm turns the zeros of a closed channel into its shift, so only a closed gain and shift keep them zero
            if not follower.affine:
                raise ValueError(
                    f"{path} stands behind {kernel} and has no weight and bias (affine=False), so the channel of a "
                    f"closed gate would not be 0 behind it. Use affine=True, or leave {kernel} out with exclude=."
                )
            found[kernel] = ChannelMembers(found[kernel].biases, (*found[kernel].norms, path))
    return found


def _convolutions(model: nn.Module) -> Iterator[tuple[_ConvNd, str, nn.Module | None]]:
    """Every convolution, with the path of the module registered right behind it, and that module.

    A shared module has the first of its paths.
    """
    if isinstance(model, _ConvNd):
        yield model, "", None
    paths = {id(m): path for path, m in model.named_modules()}
    for parent in model.modules():
        # not children(), which skips a module that the parent holds a second time: neighbours would be wrong
        children = [c for c in parent._modules.values() if c is not None]
        for child, follower in pairwise([*children, None]):
            if isinstance(child, _ConvNd):
                yield child, paths.get(id(follower), ""), follower


def refuse_decay(optimizers: Iterable[Optimizer], gated: Mapping[int, str], l2: float) -> None:
    """Refuse weight decay of an optimizer beside expected L2: gated parameters would decay twice.

    Args:
        optimizers: the optimizers of the run.
        gated: names of the gated parameters by their ``id``.
        l2: coefficient of the expected L2 norm; nothing is refused where it is 0.

    Raises:
        ValueError: a gated parameter would decay twice.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if group.get("weight_decay")]
    decayed = [(name, group["weight_decay"]) for group in groups for name in _named(group, gated)]
    if l2 and decayed:
        raise ValueError(
            f"l2={l2:g} already decays gated parameters by their expected L2, and the optimizer has "
            f"weight_decay={decayed[0][1]:g} for {', '.join(name for name, _ in decayed)}. Put them into a parameter "
            "group with weight_decay=0, or give l2=0."
        )


def _named(group: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    return [names[id(p)] for p in group["params"] if id(p) in names]
