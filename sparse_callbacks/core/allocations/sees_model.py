"""Distributions that look at a model and decide the sparsity of each layer themselves."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from sparse_callbacks.core.host import Host
from sparse_callbacks.core.selection import Entry


@runtime_checkable
class SeesModel(Protocol):
    """An object for ``distribution=`` that looks at the model and decides how sparse each layer becomes.

    It decides the total too, so a ``sparsity=`` other than the default is refused beside it. A run asks once, when it
    begins, and keeps what it was told in its checkpoints; :meth:`Method.plan` asks for the model that it is given.
    A resumed run compares distributions by their ``repr``: one without a ``__repr__`` of its own is known by the name of
    its class alone.
    """

    def shares(self, model: nn.Module, entries: Sequence[Entry]) -> Mapping[str, float]:
        """The fraction of zeros of every layer, in [0, 1).

        Args:
            model: the model, which stays as it is.
            entries: all of its parameters; those without a reason become sparse. A parameter may hold several layers,
                see :attr:`Entry.layers`.

        Returns:
            A sparsity for each layer of those parameters and for no other, by the layer's name.
        """
        ...


@runtime_checkable
class SeesData(SeesModel, Protocol):
    """An object for ``distribution=`` that looks at the data of a run too, where there is one."""

    def shares_in_run(self, model: nn.Module, entries: Sequence[Entry], host: Host) -> Mapping[str, float]:
        """What :meth:`shares` gives, when a run begins; every rank asks.

        Args:
            model, entries: see there.
            host: the training loop of the run, whose ``data_pass`` and ``calibration`` may be used.
        """
        ...


def shown_object(distribution: Any) -> str:
    """A distribution that sees models as text that is the same in every process."""
    # the repr that every object has holds its address in memory
    kind: Any = type(distribution)
    return str(kind.__qualname__) if kind.__repr__ is object.__repr__ else repr(distribution)
