"""Masks of a model's sparse parameters, and the one place where masks are written into parameter values."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sparse_callbacks import distributed
from sparse_callbacks.selection import Entry


class MaskStore:
    """Bool masks by parameter name, and what is derived from them: float factors and counts.

    Args:
        params: the sparse parameters by name.
        entries: what each of them is.
        masks: the masks to begin with, of any device; every rank takes those of rank 0.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], entries: Mapping[str, Entry], masks: Mapping[str, Tensor]) -> None:
        self.params = dict(params)
        self.entries = dict(entries)
        self.bools: dict[str, Tensor] = {}
        self.active: dict[str, int] = {}
        self._factors: dict[str, Tensor] = {}
        placed = {n: masks[n].to(p.device, torch.bool) for n, p in params.items()} if masks else {}
        distributed.agree(placed.values())
        for name, mask in placed.items():
            self.set(name, mask)

    def set(self, name: str, mask: Tensor) -> None:
        """Take ``mask`` (bool, shape of the parameter); :meth:`apply` writes it into the values."""
        self.bools[name] = mask
        self.active[name] = int(mask.count_nonzero())
        if name not in self._factors:
            self._factors[name] = torch.empty_like(self.params[name], requires_grad=False)
        self._factors[name].copy_(mask)  # a float factor multiplies twice as fast as a bool one

    def size(self, name: str) -> int:
        return self.bools[name].numel()

    @property
    def total(self) -> int:
        """Weights under a mask, active or not."""
        return sum(m.numel() for m in self.bools.values())

    @torch.no_grad()
    def apply(self, names: Iterable[str], finite: bool = True) -> None:
        """Write ``mask * dense`` into the parameters; where values may not be ``finite``, by filling (inf * 0 is NaN)."""
        for name in names:
            if finite:
                self.params[name].mul_(self._factors[name])
            else:
                self.params[name].masked_fill_(~self.bools[name], 0)

    @torch.no_grad()
    def mask_gradient(self, name: str, finite: bool = True) -> None:
        """Zero the gradient of a parameter's pruned weights, if it has one; ``finite`` as in :meth:`apply`."""
        if (gradient := self.params[name].grad) is None:
            return
        if finite:
            gradient.mul_(self._factors[name])
        else:
            gradient.masked_fill_(~self.bools[name], 0)

    def outside(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` at pruned positions, zero at active ones."""
        return tensor * (1 - self._factors[name])

    def layers(self, name: str, *tensors: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Name of each layer in a parameter, with that layer's view of each of ``tensors`` (of the parameter's shape)."""
        entry = self.entries[name]
        parts = [entry.split(t) for t in tensors]
        for index, layer in enumerate(entry.layers):
            yield layer, tuple(p[index] for p in parts)

    def by_layer(self, name: str, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``make(layer name, that layer's view of each tensor)`` for each layer in a parameter, joined to its shape."""
        made = [make(layer, *views) for layer, views in self.layers(name, *tensors)]
        return made[0] if len(made) == 1 else torch.cat(made)
