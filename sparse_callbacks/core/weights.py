"""Masks of a model's sparse parameters, and the one place where masks are written into parameter values."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.selection import Entry


class MaskStore:
    """Bool masks by parameter name, and what is derived from them: float factors and counts.

    With a dense copy (:meth:`keep_dense`) there are two buffers for each parameter: one that holds ``mask * dense``, and one that
    holds the dense values. The dense one is the parameter's for the length of an optimizer step only.

    Args:
        params: the sparse parameters by name.
        entries: what each of them is.
        masks: the masks to begin with, of any device; every rank takes those of rank 0.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], entries: Mapping[str, Entry], masks: Mapping[str, Tensor]) -> None:
        self.params = dict(params)
        self.entries = dict(entries)
        self.bools: dict[str, Tensor] = {}
        self._active: dict[str, int] = {}
        self._uncounted: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        self._spare: dict[str, Tensor] = {}
        self._stepping: set[str] = set()
        self._versions: dict[str, int] = {}
        placed = {n: masks[n].to(p.device, torch.bool) for n, p in params.items()} if masks else {}
        distributed.agree(placed.values())
        for name, mask in placed.items():
            self.set(name, mask)

    def set(self, name: str, mask: Tensor) -> None:
        """Take ``mask`` (bool, shape of the parameter); :meth:`apply` writes it into the values."""
        self.bools[name] = mask
        self._active[name] = int(mask.count_nonzero())
        if name not in self._factors:
            self._factors[name] = torch.empty_like(self.params[name], requires_grad=False)
        self._factors[name].copy_(mask)  # a float factor multiplies twice as fast as a bool one

    def take(self, masks: Mapping[str, Tensor]) -> None:
        """:meth:`set` all of ``masks``, and write them into the values."""
        for name, mask in masks.items():
            self.set(name, mask)
        self.apply(masks)

    def gate(self, name: str, factor: Tensor) -> None:
        """Take a float ``factor`` that broadcasts against the parameter in place of a mask; active is where it is not zero."""
        self.bools[name] = (factor != 0).expand(self.params[name].shape)
        self._uncounted[name] = factor
        self._factors[name] = factor

    def scale(self, name: str, factor: Tensor) -> None:
        """Take another ``factor`` for a while, such as a sample of gates; what is active stays as :meth:`gate` said."""
        self._factors[name] = factor

    @property
    def active(self) -> Mapping[str, int]:
        """Active weights by parameter name. Those under gates are counted when somebody asks, all at once: gates move in every step."""
        if self._uncounted:
            first = next(iter(self._uncounted.values())).device
            counts = torch.stack([f.count_nonzero().to(first) for f in self._uncounted.values()]).tolist()
            for (name, factor), count in zip(self._uncounted.items(), counts, strict=True):
                self._active[name] = count * (self.params[name].numel() // factor.numel())
            self._uncounted = {}
        return self._active

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
            p = self.params[name]
            if name in self._spare:
                self.put_back([name])
                if finite:
                    torch.mul(self._spare[name], self._factors[name], out=p.data)
                else:
                    p.copy_(self._spare[name]).mul_(self._factors[name]).masked_fill_(~self.bools[name], 0)
                self._versions[name] = p._version
            elif finite:
                p.mul_(self._factors[name])
            else:
                p.masked_fill_(~self.bools[name], 0)

    @torch.no_grad()
    def fill(self, name: str, where: Tensor, values: Tensor) -> None:
        """Give the weights at ``where`` (bool) their ``values`` (all of the parameter's shape)."""
        self.params[name].masked_scatter_(where, values[where].to(self.params[name]))

    # ------------------------------------------------------------------ the dense copy

    @property
    def hidden(self) -> list[str]:
        """Names of the parameters with a dense copy."""
        return list(self._spare)

    def hides(self, name: str) -> bool:
        """The parameter has a dense copy."""
        return name in self._spare

    def keep_dense(self, values: Mapping[str, Tensor]) -> None:
        """Keep dense values from here on: ``values`` at pruned positions, the parameters' own at active ones."""
        for name, value in values.items():
            p = self.params[name].detach()
            spare = torch.empty_like(p)  # of the same memory format
            self._spare[name] = spare.copy_(torch.where(self.bools[name], p, value.to(p)))

    def drop_dense(self, names: Iterable[str]) -> None:
        """Keep no dense values of these parameters any more."""
        self.put_back(names)
        for name in names:
            self._spare.pop(name, None)

    def dense(self, name: str) -> Tensor:
        """Dense values of a parameter, wherever they are; its own where no copy is kept."""
        p = self.params[name].detach()
        return p if name in self._stepping else self._spare.get(name, p)

    def bring(self, names: Iterable[str]) -> None:
        """Exchange the buffers for an optimizer step: the parameters hold their dense values until :meth:`apply` or
        :meth:`put_back`. At any forward pass a parameter has the same address."""
        names = list(names)
        self.catch_up(names)
        for name in names:
            if name in self._spare and name not in self._stepping:
                self._exchange(name)
                self._stepping.add(name)

    def put_back(self, names: Iterable[str]) -> None:
        """Undo :meth:`bring`; what the step did stays in the dense values."""
        for name in names:
            if name in self._stepping:
                self._exchange(name)
                self._stepping.remove(name)

    def _exchange(self, name: str) -> None:
        p = self.params[name]
        p.data, self._spare[name] = self._spare[name], p.data

    def catch_up(self, names: Iterable[str]) -> None:
        """:meth:`absorb` what was written since :meth:`apply`, if torch saw it: the user clamped weights, say."""
        self.absorb(n for n in names if n in self._spare and self.params[n]._version != self._versions.get(n))

    @torch.no_grad()
    def absorb(self, names: Iterable[str]) -> None:
        """Take into the dense values what somebody else wrote into the parameters, by the mask or factor that is in force."""
        for name in names:
            if name in self._spare and name not in self._stepping:
                dense = self._spare[name]
                dense.copy_(undone(self.params[name].detach(), self._factors[name], dense))

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


def undone(weight: Tensor, gate: Tensor, dense: Tensor) -> Tensor:
    """Dense values of a ``weight`` that should be ``gate * dense`` and may have been written to since.

    ``dense`` wherever the weight is what it should be, rounded to its dtype, and where the gate is closed; elsewhere the weight over
    its gate.
    """
    return torch.where((weight == (gate * dense).to(weight)) | (gate == 0), dense, weight / gate)
