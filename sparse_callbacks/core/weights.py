"""Masks of a model's sparse parameters, and the one place where parameter values are written."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.dense_copy import DenseCopy, undone
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.shards import layout_of


class SparseWeights:
    """Bool masks by parameter name, what is derived from them, and the parameters under them.

    Keeps the invariant of this package: between optimizer steps every sparse parameter holds ``mask * dense``. It is
    the only writer of parameter values (:meth:`write_masked`, :meth:`write_grown`, and the exchange of buffers in
    :class:`~sparse_callbacks.core.dense_copy.DenseCopy`).

    Args:
        params: the sparse parameters by name.
        entries: what each of them is.
        masks: the masks to begin with, of any device; every rank takes those of rank 0.
    """

    def __init__(
        self, params: Mapping[str, nn.Parameter], entries: Mapping[str, Entry], masks: Mapping[str, Tensor]
    ) -> None:
        self.params = dict(params)
        self.entries = dict(entries)
        self.masks: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._uncounted: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        self._copy = DenseCopy(self.params)
        # copies: a mask that gates have expanded has one place in memory for many weights, which a broadcast cannot fill
        placed = {n: masks[n].to(p.device, torch.bool).clone() for n, p in params.items()} if masks else {}
        distributed.broadcast_masks(placed.values())
        for name, mask in placed.items():
            self.set_mask(name, mask)

    # ------------------------------------------------------------------ masks and counts

    def set_mask(self, name: str, mask: Tensor) -> None:
        """Take ``mask`` (bool, shape of the parameter); :meth:`write_masked` brings it into the values."""
        self.masks[name] = mask
        self._counts[name] = self.count(name, mask)
        if name not in self._factors:
            self._factors[name] = torch.empty_like(self.params[name], requires_grad=False)
        self._factors[name].copy_(mask)  # a float factor multiplies twice as fast as a bool one

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Take all of ``masks``, and bring them into the values."""
        for name, mask in masks.items():
            self.set_mask(name, mask)
        self.write_masked(masks)

    def set_factor(self, name: str, factor: Tensor) -> None:
        """Take a float ``factor`` that broadcasts against the parameter in place of a mask; active is where it is not
        zero."""
        self.masks[name] = (factor != 0).expand(self.params[name].shape)
        self._uncounted[name] = factor
        self._factors[name] = factor

    def set_passing_factor(self, name: str, factor: Tensor) -> None:
        """Take another ``factor`` for a while, such as a sample of gates; what is active stays as :meth:`set_factor`
        said."""
        self._factors[name] = factor

    @property
    def active_counts(self) -> Mapping[str, int]:
        """Active weights by parameter name.

        Gates move in every step, so those under gates are counted when somebody asks, all at once: one wait for the
        device.
        """
        if self._uncounted:
            first = next(iter(self._uncounted.values())).device
            counts = torch.stack([f.count_nonzero().to(first) for f in self._uncounted.values()]).tolist()
            for (name, factor), count in zip(self._uncounted.items(), counts, strict=True):
                whole = count * (self.params[name].numel() // factor.numel())
                self._counts[name] = layout_of(self.params[name]).total(whole)
            self._uncounted = {}
        return self._counts

    def count(self, name: str, where: Tensor) -> int:
        """Positions at which ``where`` (bool, a parameter's shape) is True, over all processes that hold a part."""
        return layout_of(self.params[name]).total(int(where.count_nonzero()))

    def size(self, name: str) -> int:
        """Weights of a parameter, active or not."""
        return layout_of(self.params[name]).whole_shape(self.masks[name]).numel()

    @property
    def size_of_all(self) -> int:
        """Weights under a mask, active or not."""
        return sum(self.size(name) for name in self.masks)

    def all_active(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Masks of ``names`` that leave every weight active."""
        return {n: torch.ones_like(self.params[n], dtype=torch.bool) for n in names}

    def layers(self, name: str, *tensors: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Name of each layer in a parameter, with that layer's view of each of ``tensors`` (of the parameter's
        shape)."""
        entry = self.entries[name]
        parts = [entry.split(t) for t in tensors]
        for index, layer in enumerate(entry.layers):
            yield layer, tuple(p[index] for p in parts)

    def by_layer(self, name: str, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``make(layer name, that layer's view of each tensor)`` for each layer in a parameter, joined to its shape."""
        made = [make(layer, *views) for layer, views in self.layers(name, *tensors)]
        return made[0] if len(made) == 1 else torch.cat(made)

    # ------------------------------------------------------------------ parameter values

    @torch.no_grad()
    def write_masked(self, names: Iterable[str], finite: bool = True) -> None:
        """Write ``mask * dense`` into the parameters.

        Args:
            names: names of sparse parameters.
            finite: whether all values are known to be finite. Otherwise pruned weights are filled with zeros, which
                costs more than a multiplication and is needed because inf * 0 is NaN.
        """
        copied = bool(self._copy)
        for name in names:
            p = self.params[name]
            if copied and name in self._copy:
                self._copy.swap_out([name])
                if finite:
                    torch.mul(self._copy.values(name), self._factors[name], out=p.data)
                else:
                    p.copy_(self._copy.values(name)).mul_(self._factors[name]).masked_fill_(~self.masks[name], 0)
                self._copy.mark_written(name)
            elif finite:
                p.mul_(self._factors[name])
            else:
                p.masked_fill_(~self.masks[name], 0)

    @torch.no_grad()
    def write_grown(self, name: str, where: Tensor, values: Tensor) -> None:
        """Give the weights at ``where`` (bool) their ``values`` (both of the parameter's shape)."""
        self.params[name].masked_scatter_(where, values[where].to(self.params[name]))

    @torch.no_grad()
    def write_values(self, values: Mapping[str, Tensor]) -> None:
        """Give parameters ``values`` by name as they are, whatever the masks: those of a run that is begun anew."""
        for name, value in values.items():
            self.params[name].copy_(value)

    @torch.no_grad()
    def mask_gradient(self, name: str, finite: bool = True) -> None:
        """Zero the gradient of a parameter's pruned weights, if it has one; ``finite`` as in :meth:`write_masked`."""
        gradient = self.params[name].grad
        if gradient is None:
            return
        if finite:
            gradient.mul_(self._factors[name])
        else:
            gradient.masked_fill_(~self.masks[name], 0)

    def at_pruned(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` at pruned positions, zero at active ones."""
        return tensor * (1 - self._factors[name])

    # ------------------------------------------------------------------ dense values of pruned weights that learn on

    @property
    def copied(self) -> list[str]:
        """Names of the parameters with a dense copy."""
        return self._copy.names

    def has_copy(self, name: str) -> bool:
        """The parameter has a dense copy."""
        return name in self._copy

    def start_copy(self, values: Mapping[str, Tensor]) -> None:
        """Keep dense values from here on: ``values`` at pruned positions, the parameters' own at active ones."""
        for name, value in values.items():
            p = self.params[name].detach()
            self._copy.start(name, torch.where(self.masks[name], p, value.to(p)))

    def end_copy(self, names: Iterable[str]) -> None:
        """Keep no dense values of these parameters any more."""
        self._copy.end(names)

    def dense_values(self, name: str) -> Tensor:
        """Dense values of a parameter, wherever they are; its own where no copy is kept."""
        return self._copy.values(name)

    def swap_in(self, names: Iterable[str]) -> None:
        """The parameters hold their dense values until :meth:`write_masked` or :meth:`swap_out`: for an optimizer
        step."""
        if not self._copy:
            return  # most methods have no copies: in small networks the calls below would show
        names = list(names)
        self.absorb_if_written(names)
        self._copy.swap_in(names)

    def swap_out(self, names: Iterable[str]) -> None:
        """Undo :meth:`swap_in`; what the step did stays in the dense values."""
        if self._copy:
            self._copy.swap_out(names)

    def absorb_if_written(self, names: Iterable[str]) -> None:
        """:meth:`absorb` what was written since :meth:`write_masked`, if torch saw it: the user clamped weights,
        say."""
        self.absorb(n for n in names if self._copy.was_written(n))

    @torch.no_grad()
    def absorb(self, names: Iterable[str]) -> None:
        """Take into the dense values what somebody else wrote into the parameters, by the mask or factor that is in
        force."""
        for name in names if self._copy else ():
            dense = self._copy.waiting(name)
            if dense is not None:
                dense.copy_(undone(self.params[name].detach(), self._factors[name], dense))
