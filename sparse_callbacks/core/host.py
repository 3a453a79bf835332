"""What an engine and its method may ask of whoever runs the training loop."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from sparse_callbacks.core.calibration import Calibration, Loss

Forward = Callable[[nn.Module, Any], Any]
"""A function of the module and a batch that gives the network's output."""


class Host(Protocol):
    """The training loop, as far as a method may use it. A method never sees a Trainer."""

    @property
    def announces_steps(self) -> bool:
        """Whether the host announces every step of the run by itself.

        A step that it has not announced is then not of the run (a tuner's, for example) and is only kept masked. False
        where the user's code announces steps: one that was not announced is an error.
        """

    def data_pass(
        self,
        fraction: float = 1.0,
        *,
        forward: Forward | None = None,
        loader: Any | None = None,
        train: Sequence[nn.Module] = (),
        values: bool = True,
    ) -> Generator[Any, None, None]:
        """The network's output for each batch of one pass over the training data, in eval mode and without gradients.

        Each rank passes over its share of the data. The pass leaves no trace: flags, random states, buffers and other
        tensors of the module are put back, besides those of ``train``.

        Args:
            fraction: the share of the batches, in (0, 1], that is used, beginning with the first.
            forward: a function of the module and a batch that gives the network's output. None: the module is called,
                with arguments that follow from the type of the batch.
            loader: a loader of the batches to pass over. None: the training data in order.
            train: the modules that stay in train mode and keep what the pass makes of them.
            values: whether the outputs depend on what is in the data and count for something, so that data which differs each time
                that it is fetched is warned of. False where one batch shows how the network is called.
        """

    def calibration(
        self,
        batches: int | Iterable[Any],
        *,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> Calibration:
        """The loss of the network on a fixed list of batches, the same on every rank, to be differentiated.

        Nothing runs until the losses are asked for.

        Args:
            batches: how many batches of the training data, whose samples are drawn with ``seed``; or the batches.
            loss: a function of the module and a batch that gives the loss, a scalar. None: that of the training step.
            seed: of the draw, and of what is random in data and loss.

        Raises:
            ValueError: there is no loss or no data to take, or ``batches`` can be iterated only once.
        """

    def request_restart(self) -> None:
        """Configure optimizers and schedules anew before the next batch that opens an accumulation window."""

    def inform(self, text: str) -> None:
        """Show the user a sentence, on rank 0."""

    def warn(self, text: str, category: type[Warning] = UserWarning) -> None:
        """Warn the user, on rank 0."""


@runtime_checkable
class TurnsHost(Host, Protocol):
    """A host of several networks that train in turn, or one on each rank."""

    def average_gradients(self, on: bool) -> None:
        """Whether backward averages gradients over ranks from here on."""

    def loader_states(self) -> list[Any]:
        """What the training loaders of this rank resume from."""

    def load_loader_states(self, states: Sequence[Any]) -> None:
        """Put back what :meth:`loader_states` found."""


class TrainsInTurns:
    """A method of several networks that train in turn, or one on each rank."""

    host: Host

    @property
    def turns_host(self) -> TurnsHost:
        """The host of the run, with the operations for networks that train in turn.

        Raises:
            ValueError: the host has none, as a hand-written loop.
        """
        if not isinstance(self.host, TurnsHost):
            raise ValueError(self.why_not_in_a_loop())
        return self.host

    def why_not_in_a_loop(self) -> str:
        """Why a hand-written loop cannot be the host, as a sentence for the user."""
        return (
            f"{type(self).__name__} trains several networks, each with an order of the data of its own, and needs a "
            "Trainer for that. Give it to Trainer(callbacks=[...]), or use GaP in a loop of your own."
        )
