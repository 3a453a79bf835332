"""What an engine and its method may ask of whoever runs the training loop."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

from torch import nn

Forward = Callable[[nn.Module, Any], Any]
"""A function of the module and a batch that gives the network's output."""


class Host(Protocol):
    """The training loop, as far as a method may use it. A method never sees a Trainer."""

    @property
    def announces_steps(self) -> bool:
        """Every step that the host knows of is announced, so others (a tuner's) are only kept masked. False: all must
        be."""

    def data_pass(
        self,
        fraction: float = 1.0,
        *,
        forward: Forward | None = None,
        loader: Any | None = None,
        train: Sequence[nn.Module] = (),
    ) -> Generator[Any, None, None]:
        """The network's output for each batch of one pass over the training data, in eval mode and without gradients.

        Each rank passes over its share of the data. The pass leaves no trace: flags and random states are put back.

        Args:
            fraction: share of the batches, from the first on, in (0, 1].
            forward: gives the network's output for a batch; None: by the batch's type.
            loader: batches to pass over; None: the training data in order.
            train: modules that stay in train mode.
        """

    def request_restart(self) -> None:
        """Configure optimizers and schedules anew before the next batch that opens an accumulation window."""

    def inform(self, text: str) -> None:
        """Show the user a sentence, on rank 0."""


class TurnsHost(Host, Protocol):
    """A host of several networks that train in turn, or one on each rank."""

    def average_gradients(self, on: bool) -> None:
        """Whether backward averages gradients over ranks from here on."""

    def loader_states(self) -> list[Any]:
        """What the training loaders of this rank resume from."""

    def load_loader_states(self, states: Sequence[Any]) -> None:
        """Put back what :meth:`loader_states` found."""
