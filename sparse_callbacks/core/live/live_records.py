"""What exchanged layers record in a window whose update looks at gradients of pruned weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet, finalize, ref

import torch
from torch import Tensor

from sparse_callbacks.core import distributed
from sparse_callbacks.core.live.uncompiled import run_uncompiled
from sparse_callbacks.core.sparse_layers.product_records import Records
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

Record = tuple[Tensor, Tensor]
"""Inputs ``[in, n]`` and output gradients ``[out, n]`` of one pass through a layer."""
SavedRecords = Mapping[str, list[list[Tensor]]]
"""By parameter name, for each rank inputs and output gradients in turn. A last one without partner is the gradient ``[1, live]``
that reached the live values otherwise."""


class WindowRecords(Records):
    """The records of one layer in an accumulation window: those that its gradient is made of.

    A backward pass that begins where the gradient was set to None or to zero begins the window anew, however often the pass
    goes through the layer. A pass that adds nothing to the gradient, as ``torch.autograd.grad`` makes it, does not count,
    unless its gradient is what somebody has set as the gradient of the values.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        self._values = layer.values
        self._passes: dict[int, _Pass] = {}
        self._note_gradient()
        values: Any = self._values  # the second hook has no types in torch
        trained = values.requires_grad
        values.requires_grad_(
            True
        )  # torch hangs no hook on a layer that is frozen, and it may be thawed within the window
        hooks = _HooksOfPass(self)
        self._handles = [
            values.register_hook(hooks.comes),
            values.register_post_accumulate_grad_hook(hooks.over),
        ]
        values.requires_grad_(trained)
        self._leave = run_uncompiled(self)

    def append(self, record: Record) -> None:
        """A backward pass has gone through the layer."""
        self.extend([record])

    def extend(self, records: Iterable[Record]) -> None:
        """A backward pass has gone through the layer, in several pieces."""
        self._pass().pairs.extend(records)

    def reached(self, grad: Tensor) -> None:
        now = self._pass()
        # in the order of the engine, which adds them up too: where nothing else reaches the values both sums are one
        now.through = grad if now.through is None else now.through + grad

    def gradient_comes(self, grad: Tensor) -> None:
        """The whole gradient of a backward pass is about to be added to that of the values."""
        now = self._pass()
        now.total, now.goes_on = grad.detach().clone(), self._gradient_goes_on()  # torch may add the next one in place
        now.direct = now.total if now.through is None else now.total - now.through

    def pass_over(self) -> None:
        """The backward pass has added to the gradient, which it does once, after it has gone through the layer."""
        now = self._passes.pop(_running_pass(), None)
        if now is not None:
            if not now.goes_on:
                self._forget()
            self._take(now)
        self._note_gradient()

    def find_pass_of(self, gradient: Tensor) -> None:
        """Somebody has set this gradient of the values: take the records of the pass that has found it, if there is one."""
        found = [p for p in self._passes.values() if p.total is not None and torch.equal(p.total, gradient)]
        if found and not self and self.direct is None:
            self._take(found[-1])

    def put_back(self, records: Iterable[Record], direct: Tensor | None) -> None:
        """Go on from the records of a window that was open when they were saved."""
        super().extend(records)
        self._add_direct(direct)

    def clear(self) -> None:
        self._forget()
        self._passes.clear()

    def end(self) -> None:
        """Nothing is recorded any more."""
        for handle in self._handles:
            handle.remove()
        self._leave()
        self.clear()

    def _pass(self) -> "_Pass":
        """What is known of the backward pass that runs now; within it another one may, for a checkpoint."""
        return self._passes.setdefault(_running_pass(), _Pass())

    def _take(self, one: "_Pass") -> None:
        super().extend(one.pairs)
        self._add_direct(one.direct)

    def _add_direct(self, gradient: Tensor | None) -> None:
        if gradient is not None and bool(gradient.any()):
            self.direct = gradient if self.direct is None else self.direct + gradient

    def _forget(self) -> None:
        super().clear()
        self.direct = None

    def _note_gradient(self) -> None:
        gradient = self._values.grad
        self._left = None if gradient is None else (ref(gradient), gradient._version)

    def _gradient_goes_on(self) -> bool:
        """The gradient that the records are of is still there, to be added to."""
        gradient = self._values.grad
        if gradient is None:
            return False
        known, version = self._left or (lambda: None, -1)
        # somebody may have written to it since, such as the reduction over ranks
        return (known() is gradient and gradient._version == version) or bool(gradient.any())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()  # a copy of the layer records nothing


@dataclass
class _Pass:
    """One backward pass through a layer.

    Attributes:
        pairs: what it has recorded.
        through: the gradient that it has brought to the values through products and dense copies of the weight.
        total: all that it brings to them.
        direct: what it brings to them beside that.
        goes_on: whether it adds to a gradient that is there.
    """

    pairs: list[Record] = field(default_factory=list)
    through: Tensor | None = None
    total: Tensor | None = None
    direct: Tensor | None = None
    goes_on: bool = True


def _running_pass() -> int:
    return torch._C._current_graph_task_id()


class _HooksOfPass:
    """Tells records of the end of a backward pass. It holds them weakly: torch keeps such hooks where Python's collector of
    garbage does not see them."""

    def __init__(self, records: WindowRecords) -> None:
        self._records = ref(records)

    def comes(self, grad: Tensor) -> None:
        """The gradient is about to be added to the one that is there."""
        if (records := self._records()) is not None:
            records.gradient_comes(grad)

    def over(self, _: Tensor) -> None:
        """It was added."""
        if (records := self._records()) is not None:
            records.pass_over()


class Recorder:
    """Switches the records of the layers of one run.

    A run that nobody has closed takes them along when it is collected: its model may live on, and would keep compiled code
    of the whole process switched off.
    """

    def __init__(self) -> None:
        self._layers: WeakSet[SparseLinear] = WeakSet()
        finalize(self, end_records, self._layers).atexit = False

    def record(self, layer: SparseLinear, wanted: bool) -> None:
        """Switch the records of a layer on or off; those that are on go on. One that is frozen may be thawed in time."""
        if not wanted:
            end_records([layer])
        elif layer.records is None:
            layer.records = WindowRecords(layer)
            self._layers.add(layer)

    def end(self) -> None:
        """No layer records any more."""
        end_records(self._layers)


def end_records(layers: Iterable[SparseLinear]) -> None:
    """Layers record no more: their run is over, or they have left its model."""
    for layer in list(layers):
        if isinstance(layer.records, WindowRecords):
            layer.records.end()
            layer.records = None


def forget_records(layers: Iterable[SparseLinear]) -> None:
    """The window is over without a step, as a GradScaler has skipped it."""
    for layer in layers:
        if layer.records is not None:
            layer.records.clear()


def are_finite(layers: Iterable[SparseLinear]) -> bool:
    """Whether all gradients of the layers that record are finite, those of pruned weights too, on every rank; True where
    none of them records."""
    recording = [layer.records for layer in layers if layer.records is not None]
    if not recording:
        return True
    finite = all(bool(tensor.isfinite().all()) for records in recording for pair in records for tensor in pair)
    failed = torch.tensor([float(not finite)], device=next(iter(layers)).values.device)
    distributed.total([failed])
    return not bool(failed)


def saved_records(open_records: Mapping[str, Records]) -> SavedRecords:
    """Copies of the records of this process in a window that is open, by parameter name.

    Args:
        open_records: the records of each layer that has a window of them.
    """
    found = {name: _tensors_of(records) for name, records in open_records.items()}
    return {name: [[tensor.clone() for tensor in tensors]] for name, tensors in found.items() if tensors}


def _tensors_of(records: Records) -> list[Tensor]:
    """Inputs and output gradients in turn, and at the end what has reached the live values otherwise, ``[1, live]``."""
    tensors = [tensor for pair in records for tensor in pair]
    return tensors if records.direct is None else [*tensors, records.direct.reshape(1, -1)]


def gathered_records(open_records: Mapping[str, Records]) -> SavedRecords:
    """:func:`saved_records` of all ranks, on rank 0; all of them must call it together."""
    mine = saved_records(open_records)
    if distributed.world_size() == 1:
        return mine
    names = sorted(open_records)
    found = distributed.gather([mine.get(name, [[]])[0] for name in names]) if names else []
    # one rank may have seen no batch of a layer
    return {name: [ranks[i] for ranks in found] for i, name in enumerate(names) if any(ranks[i] for ranks in found)}


def put_back_records(layers: Mapping[str, SparseLinear], saved: SavedRecords) -> None:
    """Let layers that record go on from the records of a window that was open when they were saved.

    Every process has the mean over ranks as its gradient then. So each takes its own records where there are as many ranks
    as before, and otherwise those of all, in the same proportion to what is still to come.

    Args:
        layers: exchanged layers by parameter name.
        saved: what :func:`saved_records` or :func:`gathered_records` gave.
    """
    for name, layer in layers.items():
        lists = saved.get(name, [])
        if not lists or not isinstance(layer.records, WindowRecords):
            continue
        alone = len(lists) == distributed.world_size()
        chosen, share = ([lists[distributed.rank()]], 1.0) if alone else (lists, 1 / len(lists))
        for tensors in chosen:
            moved = [tensor.to(layer.values.device) for tensor in tensors]
            direct = share * moved.pop().view(layer.values.shape) if len(moved) % 2 else None
            layer.records.put_back(((x, dy * share) for x, dy in zip(moved[::2], moved[1::2], strict=True)), direct)
