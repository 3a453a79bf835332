"""What exchanged layers record in a window whose update looks at gradients of pruned weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet, finalize, ref

import torch
from torch import Tensor

from sparse_callbacks.core import distributed
from sparse_callbacks.core.live.uncompiled import run_uncompiled
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

Record = tuple[Tensor, Tensor]
"""Inputs ``[in, n]`` and output gradients ``[out, n]`` of one pass through a layer."""
SavedRecords = Mapping[str, list[list[Tensor]]]
"""By parameter name, for each rank inputs and output gradients in turn."""


class WindowRecords(list[Record]):
    """The records of one layer in an accumulation window: those that its gradient is made of.

    A backward pass that begins where the gradient was set to None or to zero begins the window anew, however often the pass
    goes through the layer.

    Args:
        layer: the layer.
        begun: records of the window before it was interrupted, of which the gradient is made as it is.
    """

    def __init__(self, layer: SparseLinear, begun: Iterable[Record] = ()) -> None:
        super().__init__(begun)
        self._values = layer.values
        self._within_pass = False
        self._note_gradient()
        values: Any = self._values  # the hook has no types in torch
        self._handle = values.register_post_accumulate_grad_hook(_PassOver(self))
        self._leave = run_uncompiled(self)

    def append(self, record: Record) -> None:
        """A backward pass has gone through the layer."""
        self.extend([record])

    def extend(self, records: Iterable[Record]) -> None:
        """A backward pass has gone through the layer, in several pieces."""
        if not self._within_pass:
            self._within_pass = True
            if not self._gradient_goes_on():
                self.clear()
        super().extend(records)

    def pass_over(self) -> None:
        """The backward pass has added to the gradient, which it does once, after it has gone through the layer."""
        self._within_pass = False
        self._note_gradient()

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

    def end(self) -> None:
        """Nothing is recorded any more."""
        self._handle.remove()
        self._leave()
        self.clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()  # a copy of the layer records nothing


class _PassOver:
    """Tells records of the end of a backward pass. It holds them weakly: torch keeps such hooks where Python's collector of
    garbage does not see them."""

    def __init__(self, records: WindowRecords) -> None:
        self._records = ref(records)

    def __call__(self, _: Tensor) -> None:
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
        """Switch the records of a layer on or off; those that are on go on. One that is frozen meanwhile has none."""
        if not wanted:
            end_records([layer])
        elif layer.records is None and layer.values.requires_grad:
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


def saved_records(open_records: Mapping[str, Sequence[Record]]) -> SavedRecords:
    """Copies of the records of this process in a window that is open, by parameter name.

    Args:
        open_records: the records of each layer that has a window of them.
    """
    found = {name: records for name, records in open_records.items() if records}
    return {name: [[tensor.clone() for pair in records for tensor in pair]] for name, records in found.items()}


def gathered_records(open_records: Mapping[str, Sequence[Record]]) -> SavedRecords:
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
        if not lists or layer.records is None:
            continue
        alone = len(lists) == distributed.world_size()
        chosen, share = ([lists[distributed.rank()]], 1.0) if alone else (lists, 1 / len(lists))
        for tensors in chosen:
            moved = [tensor.to(layer.values.device) for tensor in tensors]
            list.extend(layer.records, ((x, dy * share) for x, dy in zip(moved[::2], moved[1::2], strict=True)))
