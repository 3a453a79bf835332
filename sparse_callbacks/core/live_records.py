"""Inputs and output gradients of exchanged layers, kept for an update that looks at gradients of pruned weights."""

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from sparse_callbacks.core import distributed
from sparse_callbacks.core.sparse_linear import SparseLinear

Record = tuple[Tensor, Tensor]
"""Inputs ``[in, n]`` and output gradients ``[out, n]`` of one pass through a layer."""


class Records(list[Record]):
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
        # weakly: torch keeps such hooks where Python's collector of garbage does not see them
        mine = ref(self)
        self._handle = self._values.register_post_accumulate_grad_hook(lambda _: (r := mine()) and r.pass_over())

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
        self.clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()  # a copy of the layer records nothing


def record(layer: SparseLinear, wanted: bool) -> None:
    """Switch the records of a layer on or off; those that are on go on."""
    if wanted and layer.records is None:
        layer.records = Records(layer)
    elif not wanted and isinstance(layer.records, Records):
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


def saved_records(layers: Mapping[str, SparseLinear]) -> dict[str, list[Tensor]]:
    """The records of a window that is open, by parameter name: inputs and output gradients in turn."""
    return {
        name: [tensor.clone() for pair in layer.records for tensor in pair]
        for name, layer in layers.items()
        if layer.records
    }
