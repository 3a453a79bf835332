"""What goes with the output channels of a convolution, and values by layer for methods that gate whole channels."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer


@dataclass(frozen=True)
class Tied:
    """What goes with the output channels of a convolution: names of biases, and paths of the batch norms behind it."""

    biases: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()

    @property
    def affine(self) -> tuple[str, ...]:
        """Names of the norms' parameters."""
        return tuple(f"{path}.{local}" for path in self.norms for local in ("weight", "bias"))

    @property
    def members(self) -> tuple[str, ...]:
        """Names of all parameters that go with the channels."""
        return (*self.biases, *self.affine)

    def factors(self, kernel: str, z: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each parameter is multiplied by when the gates of ``kernel`` are ``z``; norms by 0 and 1 only, of what is closed and open.

        Args:
            kernel: its name.
            z: broadcasts against it.
            params: parameters by name; a bias that is longer than ``z`` has its outputs in groups, each with all gates.
        """
        per_channel = {n: z.flatten().repeat(params[n].numel() // z.numel()) for n in self.members}
        return {kernel: z} | {n: (f != 0).to(f) if n in self.affine else f for n, f in per_channel.items()}


def find_tied(model: nn.Module, kernels: Iterable[str]) -> dict[str, Tied]:
    """By kernel, what goes with its output channels: its convolution's bias, and a batch norm registered right behind it.

    Args:
        model: whose ``named_parameters`` the kernels go by.
        kernels: names of gated weights; those that are no convolution's have nothing tied.

    Raises:
        ValueError: a bias or norm that goes with two kernels, or a norm that has nothing to close a channel with.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    found: dict[str, Tied] = {kernel: Tied() for kernel in kernels}
    owners: dict[str, str] = {}

    def claim(thing: str, kernel: str) -> bool:
        """``thing`` is new to ``kernel``."""
        if owners.setdefault(thing, kernel) != kernel:
            raise ValueError(
                f"{thing} goes with the output channels of both {owners[thing]} and {kernel}, which have gates of their own. Leave one of "
                "them out with exclude=."
            )
        return thing not in (*found[kernel].biases, *found[kernel].norms)

    for conv, path, follower in _convolutions(model):
        kernel = names.get(id(conv.weight), "")
        if kernel not in found:
            continue
        if conv.bias is not None and claim(bias := names[id(conv.bias)], kernel):
            found[kernel] = Tied((*found[kernel].biases, bias), found[kernel].norms)
        if isinstance(follower, _BatchNorm) and follower.num_features == conv.out_channels and claim(path, kernel):
            if not follower.affine:
                raise ValueError(
                    f"{path} stands behind {kernel} and has no weight and bias (affine=False), so the channel of a closed gate would not "
                    f"be 0 behind it. Use affine=True, or leave {kernel} out with exclude=."
                )
            found[kernel] = Tied(found[kernel].biases, (*found[kernel].norms, path))
    return found


def _convolutions(model: nn.Module) -> Iterator[tuple[_ConvNd, str, nn.Module | None]]:
    """Every convolution, with the path of the module registered right behind it, and that module; what is shared has its first path."""
    if isinstance(model, _ConvNd):
        yield model, "", None
    paths = {id(m): path for path, m in model.named_modules()}
    for parent in model.modules():
        children = [c for c in parent._modules.values() if c is not None]  # children() leaves out what was there before
        for child, follower in pairwise([*children, None]):
            if isinstance(child, _ConvNd):
                yield child, paths.get(id(follower), ""), follower


def by_glob(values: float | Mapping[str, float], names: Iterable[str], argument: str) -> dict[str, float]:
    """One value for each of ``names``: the number itself, or that of the first glob in ``values`` which matches.

    Args:
        values: a number, or numbers by glob.
        names: of parameters.
        argument: what the values are called, for the error.

    Raises:
        ValueError: a name without a value, or a glob without a name.
    """
    names = list(names)
    if not isinstance(values, Mapping):
        return dict.fromkeys(names, float(values))
    for glob in values:
        if not any(fnmatchcase(n, glob) for n in names):
            raise ValueError(f"{argument}= has a value for {glob!r}, which matches no gated parameter. Gated are: {', '.join(names)}.")
    if missed := [n for n in names if not any(fnmatchcase(n, glob) for glob in values)]:
        raise ValueError(f"{argument}= has no value for {', '.join(missed)}. Add a glob that matches, or '*' for all others.")
    return {n: float(next(v for glob, v in values.items() if fnmatchcase(n, glob))) for n in names}


def refuse_outside(given: Any, argument: str, low: float, high: float, too_low: str = "") -> None:
    """Refuse a number, or one of several by glob, that is not finite and in [``low``, ``high``].

    Args:
        given: the number, or numbers by glob.
        argument: what it is called, for the error.
        low, high: the bounds; ``high`` may be infinite.
        too_low: why numbers from 0 to ``low`` cannot be, for the error.

    Raises:
        ValueError: there is one.
    """
    for value in given.values() if isinstance(given, Mapping) else [given]:
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not low <= float(value) <= high:
            most = f" and at most {high:g}" if math.isfinite(high) else ""
            why = f": {too_low}" if too_low and number and 0 <= float(value) < low else ""
            raise ValueError(f"{argument}={given!r}: {value!r} is out of range. Give a number that is at least {low:.4g}{most}{why}.")


def refuse_decay(optimizers: Iterable[Optimizer], gated: Mapping[int, str], l2: float) -> None:
    """Refuse weight decay of an optimizer beside expected L2: gated parameters (name by ``id``) would decay twice.

    Raises:
        ValueError: one would.
    """
    decayed = [(n, g["weight_decay"]) for o in optimizers for g in o.param_groups if g.get("weight_decay") for n in _named(g, gated)]
    if l2 and decayed:
        raise ValueError(
            f"l2={l2:g} already decays gated parameters by their expected L2, and the optimizer has weight_decay={decayed[0][1]:g} for "
            f"{', '.join(n for n, _ in decayed)}. Put them into a parameter group with weight_decay=0, or give l2=0."
        )


def _named(group: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    return [names[id(p)] for p in group["params"] if id(p) in names]
