"""Masks of a model's sparse parameters, and the one place where parameter values are written."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.dense_copy import DenseCopy, undone
from sparse_callbacks.core.kept_tensors import KeptTensors
from sparse_callbacks.core.live.live_masks import MasksOnDemand
from sparse_callbacks.core.local_parts import LocalPart, follow
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.shards import layout_of
from sparse_callbacks.core.sparse_layers.product_records import Records
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

# integers of as many bytes as a float has: a bitwise `and` with all ones or all zeros masks whatever the float is, inf and
# NaN too, as fast as a product does, which would leave NaN there
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def whole(mask: Tensor) -> Tensor:
    """``mask`` with memory of its own for each element, whatever it was expanded from."""
    return mask.contiguous() if 0 in mask.stride() else mask


class SparseWeights:
    """Bool masks by parameter name, what is derived from them, and the parameters under them.

    Keeps the invariant of this package: between optimizer steps every sparse parameter holds ``mask * dense``. It is
    the only writer of parameter values (:meth:`write_masked`, :meth:`write_grown`, and the exchange of buffers in
    :class:`~sparse_callbacks.core.dense_copy.DenseCopy`).

    Args:
        params: the sparse parameters by name.
        entries: what each of them is.
        masks: the masks to begin with, of any device; every rank takes those of rank 0.
        layers: exchanged layers by the name of their weight; their places take the place of a mask.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        entries: Mapping[str, Entry],
        masks: Mapping[str, Tensor],
        layers: Mapping[str, SparseLinear] | None = None,
    ) -> None:
        self.params = dict(params)
        self.entries = dict(entries)
        self.layers_stored = dict(layers or {})
        """Exchanged layers by the name of their weight. They hold live values alone, so nothing is masked in them."""
        self._held: dict[str, Tensor] = {}  # of parameters in _unmasked the latest mask that somebody has asked for
        self._unmasked: set[str] = set()  # parameters whose gates have moved since: _settled() makes their masks
        self.left_records: dict[str, Records] = {}
        """What exchanged layers had recorded in the window that was open when the run ended, by name."""
        self.last_places: dict[str, int] = {}
        """Checksums of the places that a run has left in exchanged layers, by name."""
        self._counts: dict[str, int] = {name: layer.live for name, layer in self.layers_stored.items()}
        self._uncounted: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}  # gates, of those that set_factor was called for
        self._lasting: dict[str, Tensor] = {}  # the same without those that are taken for a while
        # of the others, made when something is first masked: all bits are ones where a weight is active, else zeros
        self._bits: dict[str, Tensor] = {}
        # by name the address of a parameter's values, and a view of them as integers, which would take as long to make
        # anew in every step as small weights take to be masked
        self._integers: dict[str, tuple[int, Tensor]] = {}
        self.scratch = KeptTensors()
        """Memory that steps compute in; a run that is over lets go of it."""
        self._copy = DenseCopy(self.params)
        self._parts = [p for p in self.params.values() if isinstance(p, LocalPart)]
        self.watchers: list[Callable[[str, Tensor, Tensor], None]] = []
        """Called with a parameter's name, its mask so far and its new one wherever a mask changes."""
        self.changes = 0
        """How often a mask or a dense copy has come or gone: while it stays, so do counts. Moves of exchanged layers change
        none."""
        self.may_hold_inf = False
        """A gradient or a dense value has held inf or NaN, so that a product with a closed gate may be NaN from here
        on."""
        masked = {n: p for n, p in params.items() if n not in self.layers_stored} if masks else {}
        placed = {n: masks[n].to(p.device, torch.bool) for n, p in masked.items()}
        for name, mask in self.same_everywhere(placed).items():
            self.set_mask(name, mask)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_bits": {}, "_integers": {}, "watchers": []}

    # ------------------------------------------------------------------ parameters in shards

    def same_everywhere(self, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The masks of rank 0 on every rank; where parameters are sharded each rank has its own parts, and keeps them."""
        return masks if self._parts else distributed.masks_of_first_rank(masks)

    def everywhere(self, flag: Tensor | bool) -> Tensor | bool:
        """Whether ``flag`` is true on every process that holds a part of the parameters."""
        if not self._parts:
            return flag
        return layout_of(self._parts[0]).total(int(not flag)) == 0

    def follow_parts(self) -> None:
        """Look where the memory of sharded parameters is now."""
        if self._parts:
            follow(self._parts)

    # ------------------------------------------------------------------ masks and counts

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Bool masks by parameter name; those of exchanged layers are made when they are asked for."""
        held = self._settled()
        return MasksOnDemand(self.params, held, self.layers_stored) if self.layers_stored else held

    @property
    def held_masks(self) -> Mapping[str, Tensor]:
        """The masks that exist: of all sparse parameters but those of exchanged layers."""
        return self._settled()

    def _settled(self) -> dict[str, Tensor]:
        """The masks by name. Gates move in every step, and their masks are made when somebody asks."""
        for name in self._unmasked:
            self._held[name] = self._mask_of_gates(name)
        self._unmasked = set()
        return self._held

    def _mask_of_gates(self, name: str) -> Tensor:
        return (self._lasting[name] != 0).expand(self.params[name].shape)

    @property
    def records(self) -> Mapping[str, Records]:
        """What exchanged layers have recorded in a window that is open, or was when the run ended; of each that records."""
        now = {n: layer.records for n, layer in self.layers_stored.items() if isinstance(layer.records, Records)}
        return now or self.left_records

    def keep_records(self) -> None:
        """The run is over: a checkpoint that is written now has the :attr:`records` of its open window all the same."""
        self.left_records = {name: records.copied() for name, records in self.records.items()}

    def set_mask(self, name: str, mask: Tensor) -> None:
        """Take ``mask`` (bool, shape of the parameter); :meth:`write_masked` brings it into the values."""
        # whole filters may come as an expanded view, into which nothing could be written
        # and without the layout that the selection has noted on it, which a copy or a file would take along
        self._take(name, whole(mask).detach())
        self._counts[name] = self.count(name, mask)
        if name in self._bits:
            self._bits[name].copy_(mask).neg_()  # -1 has all bits
        self._factors.pop(name, None)
        self._lasting.pop(name, None)

    def _bits_of(self, name: str) -> Tensor:
        """The mask of a parameter as integers of its own size: four bytes a weight for float32, so that a model that is only
        looked at has none of them."""
        bits = self._bits.get(name)
        if bits is None:
            p = self.params[name]
            bits = torch.empty_like(p, dtype=_BITS[p.element_size()], requires_grad=False)
            self._bits[name] = bits.copy_(self._held[name]).neg_()  # -1 has all bits
        return bits

    def release_memory(self) -> None:
        """A run is over: forget the integers that steps are masked with, and what they computed in; both are made again
        when they are needed."""
        self._bits, self._integers = {}, {}
        self.scratch.clear()

    def _take(self, name: str, mask: Tensor) -> None:
        self._unmasked.discard(name)
        before = self._held.get(name, mask)
        self._held[name] = mask
        self.changes += 1
        for watcher in self.watchers:
            watcher(name, before, mask)

    def take_over_watchers(self, earlier: "SparseWeights") -> None:
        """Whoever watches the masks of ``earlier`` watches these; parameters that had none there were dense until now."""
        self.watchers = earlier.watchers
        masks = self._settled()
        for name in masks.keys() - earlier._held.keys():
            for watcher in self.watchers:
                watcher(name, torch.ones_like(masks[name]), masks[name])

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Take all of ``masks``, and bring them into the values."""
        for name, mask in masks.items():
            self.set_mask(name, mask)
        self.write_masked(masks)

    def set_factor(self, name: str, factor: Tensor) -> None:
        """Take a float ``factor`` that broadcasts against the parameter in place of a mask; active is where it is not
        zero."""
        self._factors[name] = self._lasting[name] = self._uncounted[name] = factor
        self._bits.pop(name, None)
        if self.watchers or name not in self._held:
            self._take(name, self._mask_of_gates(name))
        else:
            self._unmasked.add(name)
            self.changes += 1

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

    @property
    def has_gates(self) -> bool:
        """Some weights are under gates, which move in every step."""
        return bool(self._lasting)

    def size(self, name: str) -> int:
        """Weights of a parameter, active or not."""
        if name in self.layers_stored:
            return self.entries[name].size
        return layout_of(self.params[name]).whole_shape(self._held[name]).numel()

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
        entry, layout = self.entries[name], layout_of(self.params[name])
        parts = [layout.layers(t, entry.parts) for t in tensors]
        for index, layer in enumerate(entry.layers):
            yield layer, tuple(p[index] for p in parts)

    def by_layer(self, name: str, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``make(layer name, that layer's view of each tensor)`` for each layer in a parameter, joined to its shape."""
        made = [make(layer, *views) for layer, views in self.layers(name, *tensors)]
        return made[0] if len(made) == 1 else torch.cat(made)

    def mask_tensors(self) -> Iterator[Tensor]:
        """Every tensor that says which weights are active: masks, their bits, gates, and patterns of exchanged layers."""
        for held in (self._settled(), self._bits, self._factors, self._lasting):
            yield from held.values()
        for layer in self.layers_stored.values():
            yield from (tensor for _, tensor in layer.places.tensors())

    # ------------------------------------------------------------------ parameter values

    @torch.no_grad()
    def write_masked(self, names: Iterable[str], finite: bool = True) -> None:
        """Write ``mask * dense`` into the parameters.

        Args:
            names: names of sparse parameters.
            finite: whether all values are known to be finite. Otherwise, and where :attr:`may_hold_inf`, weights behind
                closed gates are filled with zeros, which costs more than a product alone.
        """
        copied = bool(self._copy)
        self.follow_parts()
        for name in names:
            p = self.params[name]
            if copied and name in self._copy:
                self._copy.swap_out([name])
                self._write_from_copy(name, p.data, finite, self._factors.get(name))
                self._copy.mark_written(name)
            elif name in self._factors:
                p.masked_fill_(~self.masks[name], 0)
            elif name not in self.layers_stored:
                bits = self._bits_of(name)
                address, integers = self._integers.get(name, (-1, p))  # an empty part has the address 0
                # the view keeps its memory, so that nothing else can have its address
                if address != p.data_ptr():
                    integers = p.view(bits.dtype)
                    self._integers[name] = p.data_ptr(), integers
                integers.bitwise_and_(bits)

    def _write_from_copy(self, name: str, into: Tensor, finite: bool, factor: Tensor | None) -> None:
        dense = self._copy.values(name)
        if factor is None:
            bits = self._bits_of(name)
            torch.bitwise_and(dense.view(bits.dtype), bits, out=into.view(bits.dtype))
            return
        torch.mul(dense, factor, out=into)
        if self.may_hold_inf or not finite:
            into.masked_fill_(factor == 0, 0)

    @contextmanager
    def effective(self) -> Iterator[None]:
        """Inside, parameters hold what they hold between batches, at whatever point of one this is: neither dense values,
        for a step, nor samples of gates."""
        held: dict[str, Tensor] = {}
        for name in self._copy.names:
            p, lasting = self.params[name], self._lasting.get(name)
            if not self._copy.is_in_step(name) and self._factors.get(name) is lasting:
                continue
            values = torch.empty_like(p, requires_grad=False)
            self._write_from_copy(name, values, False, lasting)
            # another buffer for a while: what is in this one comes back bit by bit, and torch counts no write
            held[name], p.data = p.data, values
        try:
            yield
        finally:
            for name, values in held.items():
                self.params[name].data = values

    @torch.no_grad()
    def write_grown(self, name: str, where: Tensor, values: Tensor) -> None:
        """Give the weights at ``where`` (bool) their ``values`` (both of the parameter's shape)."""
        self.params[name].masked_scatter_(where, values[where].to(self.params[name]))

    @torch.no_grad()
    def write_values(self, values: Mapping[str, Tensor], others: Mapping[str, nn.Parameter] | None = None) -> None:
        """Give parameters ``values`` by name as they are, whatever the masks: those of a run that is begun anew, or of
        another network.

        Args:
            values: the values by parameter name.
            others: further parameters of the model by name, which are not sparse.
        """
        params = {**(others or {}), **self.params}
        for name, value in values.items():
            params[name].copy_(value)

    def mask_gradient(self, name: str) -> None:
        """Zero the gradient of a parameter's pruned weights, if it has one, whatever it is there."""
        if (gradient := self.params[name].grad) is None:
            return
        gradient = gradient.detach()  # faster than torch.no_grad(), for a gradient that may have a graph of its own
        if name in self.layers_stored:
            return
        if name in self._factors or self.params[name].element_size() != gradient.element_size():
            gradient.masked_fill_(~self.masks[name], 0)
        else:
            bits = self._bits_of(name)
            gradient.view(bits.dtype).bitwise_and_(bits)

    @torch.no_grad()
    def mend_gradient(self, name: str) -> None:
        """Zero the gradient of a parameter's pruned weights where it is inf or NaN, for a step that they take part in.

        Nothing waits for the device.
        """
        if (gradient := self.params[name].grad) is not None:
            # under gates pruned is what the forward pass did not see, which the sample says
            active = self._factors[name] != 0 if name in self._factors else self.masks[name]
            gradient.copy_(torch.where(active, gradient, torch.nan_to_num(gradient, 0.0, 0.0, 0.0)))

    @torch.no_grad()
    def close_gradient(self, name: str) -> None:
        """Zero the gradient of a parameter wherever its mask, or the sample of its gates that is in force, is zero."""
        if name not in self._factors:
            self.mask_gradient(name)
        elif (gradient := self.params[name].grad) is not None:
            gradient.masked_fill_(self._factors[name] == 0, 0)

    def at_pruned(self, name: str, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """``tensor`` at pruned positions, zero at active ones, whatever it is there; under gates pruned is what their
        sample has closed.

        Args:
            name: name of a sparse parameter.
            tensor: of its shape.
            out: memory for the result, of the shape and type of ``tensor``; None for fresh memory. Masks that are integers
                use it, and others do not.
        """
        if name in self._factors:
            return tensor.masked_fill(self._factors[name] != 0, 0)
        if name in self.layers_stored or self.params[name].element_size() != tensor.element_size():
            return tensor.masked_fill(self.masks[name], 0)
        bits = self._bits_of(name)
        pruned = torch.bitwise_not(bits, out=None if out is None else out.view(bits.dtype))
        return pruned.bitwise_and_(tensor.view(bits.dtype)).view(tensor.dtype)

    # ------------------------------------------------------------------ dense values of pruned weights that learn on

    def dense_at_pruned(self, name: str, out: Tensor | None = None) -> Tensor:
        """Dense values of a parameter at pruned positions, zero at active ones.

        Args:
            name: name of a sparse parameter with a dense copy.
            out: memory for the result, of the shape and type of the parameter; None for fresh memory.
        """
        self.absorb_if_written([name])  # so that active weights are the same in both buffers
        dense = self._copy.waiting(name)
        if dense is None or name in self._factors:
            return self.at_pruned(name, self.dense_values(name), out)
        # where the masked values are at hand, one pass in place of the two that the mask takes
        return torch.sub(dense, self.params[name].detach(), out=out)

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
            dense = torch.where(self.masks[name], p, value.to(p))
            self._copy.start(name, dense)
            self.changes += 1
            self.may_hold_inf |= not bool(dense.isfinite().all())

    def end_copy(self, names: Iterable[str]) -> None:
        """Keep no dense values of these parameters any more."""
        self._copy.end(names)
        self.changes += 1

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

    def was_written(self, name: str) -> bool:
        """Somebody else has written to a parameter with a dense copy since :meth:`write_masked`, and torch saw it."""
        return self._copy.was_written(name)

    def absorb_if_written(self, names: Iterable[str]) -> None:
        """:meth:`absorb` what was written since :meth:`write_masked`, if torch saw it: the user clamped weights,
        say."""
        self.absorb(n for n in names if self.was_written(n))

    @torch.no_grad()
    def absorb(self, names: Iterable[str]) -> None:
        """Take into the dense values what somebody else wrote into the parameters, by the mask or factor that is in
        force."""
        for name in names if self._copy else ():
            dense = self._copy.waiting(name)
            if dense is not None:
                gate = self._factors[name] if name in self._factors else self.masks[name].to(dense)
                dense.copy_(undone(self.params[name].detach(), gate, dense))
