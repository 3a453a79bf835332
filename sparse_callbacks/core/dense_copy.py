"""Dense values of pruned weights that learn on, and their exchange with the parameters."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparse_callbacks.core.local_parts import LocalPart


class DenseCopy:
    """A second buffer for each parameter whose pruned weights go on to learn.

    One buffer holds ``mask * dense`` and one the dense values. Between optimizer steps the first is the parameter's,
    during a step the second. They are exchanged and not copied, so at any forward pass a parameter has the same
    address. Of a sharded parameter the values are exchanged.

    Args:
        params: the sparse parameters by name.
    """

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self._params = params
        self._buffers: dict[str, Tensor] = {}
        self._in_step: set[str] = set()
        self._versions: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """Names of the parameters that have a copy."""
        return list(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def start(self, name: str, values: Tensor) -> None:
        """Keep ``values`` as dense values of a parameter from here on."""
        buffer = torch.empty_like(self._params[name].detach())  # of the parameter's memory format
        self._buffers[name] = buffer.copy_(values)

    def end(self, names: Iterable[str]) -> None:
        """Keep no dense values of these parameters any more."""
        names = list(names)
        # during a step the buffer holds the masked values, and these are to stay with the parameter
        self.swap_out(names)
        for name in names:
            self._buffers.pop(name, None)

    def values(self, name: str) -> Tensor:
        """Dense values of a parameter, in whichever buffer they are; the parameter's own where there is no copy."""
        p = self._params[name].detach()
        return p if name in self._in_step else self._buffers.get(name, p)

    def is_in_step(self, name: str) -> bool:
        """The parameter holds its dense values, for an optimizer step."""
        return name in self._in_step

    def waiting(self, name: str) -> Tensor | None:
        """Dense values that wait outside the parameter; None where there is no copy, or where a step is using it."""
        return None if name in self._in_step else self._buffers.get(name)

    def swap_in(self, names: Iterable[str]) -> None:
        """The parameters hold their dense values, for an optimizer step."""
        for name in names:
            if name in self._buffers and name not in self._in_step:
                self._exchange(name)
                self._in_step.add(name)

    def swap_out(self, names: Iterable[str]) -> None:
        """Undo :meth:`swap_in`; what the step did stays in the dense values."""
        for name in names:
            if name in self._in_step:
                self._exchange(name)
                self._in_step.remove(name)

    def _exchange(self, name: str) -> None:
        # `.data` and not copies: two pointers change places, so a step costs no pass over the weights, and optimizer
        # state, which goes by the identity of the Parameter, does not notice
        p = self._params[name]
        if isinstance(p, LocalPart):
            # torch gathers a sharded parameter from the memory that it has, so here the values change places
            values = p.detach()
            held = values.clone()
            values.copy_(self._buffers[name])
            self._buffers[name] = held
            return
        p.data, self._buffers[name] = self._buffers[name], p.data

    def mark_written(self, name: str) -> None:
        """The parameter now holds what belongs there; torch's version counter shows whether somebody writes to it
        later."""
        self._versions[name] = self._params[name]._version

    def was_written(self, name: str) -> bool:
        """Somebody else has written to the parameter since :meth:`mark_written`, and torch saw it."""
        return name in self._buffers and self._params[name]._version != self._versions.get(name)


def undone(weight: Tensor, gate: Tensor, dense: Tensor) -> Tensor:
    """Dense values of a ``weight`` that should be ``gate * dense`` and may have been written to since.

    ``dense`` wherever the weight is what it should be, rounded to its dtype, and where the gate is closed; elsewhere
    the weight over its gate.
    """
    # the quotient is inf or NaN where the gate is closed, which `where` leaves out
    return torch.where((weight == (gate * dense).to(weight)) | (gate == 0), dense, weight / gate)
