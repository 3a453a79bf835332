"""What a method is attached to: the model of its latest run and, during a run, the training loop."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor, nn

from sparse_callbacks.core.host import Host


@dataclass(frozen=True)
class Choice:
    """The storage of one parameter.

    Attributes:
        storage: ``"masked"``, ``"sparse"``, ``"grouped"``, or ``"auto"`` until times decide.
        note: why it stays masked, or what speaks for its storage; empty where nothing needs to be said.
        refused: whether ``note`` is a reason to refuse the run, unless the layer stays dense.
        group: the output rows that read the same inputs, of ``"grouped"`` storage.
        live: the live weights of a layer that is exchanged already, and keeps their number.
        as_given: the user has made the layer so, with values for so many inputs.
    """

    storage: str
    note: str = ""
    refused: bool = False
    group: int = 1
    live: int | None = None
    as_given: bool = False


class Attachment:
    """The model of a method's latest run, held weakly, and the host of the run that is going on.

    The engine attaches and detaches. Neither is pickled: a copy of a method belongs to no run.
    """

    def __init__(self) -> None:
        self.host: Host | None = None
        """The training loop; None outside of a run."""
        self.beginning: Host | None = None
        """The host of a run that is about to begin, and knows its data; see :meth:`begins`."""
        self.in_training = False
        """A run is going on: everything is restored and the masks are written."""
        self.choices: Mapping[str, Choice] = {}
        """The storage of each parameter of the latest model, by name; empty where all are masked."""
        self.shares: Mapping[str, float] = {}
        """Sparsities by layer that a distribution which sees the model has found, for whoever is asked for targets next."""
        self.scored: Mapping[str, Tensor] | None = None
        """Masks that a score has made for the run that begins, until they are taken; see :meth:`scores`."""
        self._chosen_for: Callable[[], nn.Module | None] = _no_model
        self._shared_for: Callable[[], nn.Module | None] = _no_model
        self._model: Callable[[], nn.Module | None] = _no_model

    @property
    def model(self) -> nn.Module | None:
        """The model of the latest run; None before one and where the model is gone."""
        return self._model()

    def enter(self, model: nn.Module, host: Host) -> None:
        """A run with ``model`` begins."""
        self.know(model)
        self.host = host

    @contextmanager
    def begins(self, host: Host | None) -> Iterator[None]:
        """Within, a run of ``host`` begins: what follows from its data is found."""
        self.beginning = host
        try:
            yield
        finally:
            self.beginning = None

    @contextmanager
    def scores(self, masks: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, first masks are those that a score has made."""
        self.scored = masks
        try:
            yield
        finally:
            self.scored = None

    def know(self, model: nn.Module) -> None:
        """The latest run was one of ``model``."""
        self._model = ref(model)  # weakly: a method that is kept must not keep a large model alive

    def choose(self, model: nn.Module, choices: Mapping[str, Choice]) -> None:
        """These are the storages of ``model`` from here on."""
        self.choices, self._chosen_for = choices, ref(model)

    def choices_of(self, model: nn.Module) -> Mapping[str, Choice]:
        """The storages that were chosen for ``model``; empty where none were."""
        return self.choices if self._chosen_for() is model else {}

    def share(self, model: nn.Module) -> None:
        """:attr:`shares` are those with which the next run of ``model`` begins, whatever becomes of its weights before."""
        self._shared_for = ref(model)

    def shares_of(self, model: nn.Module) -> Mapping[str, float]:
        """The shares with which the next run of ``model`` begins; empty where they are yet to be found."""
        return self.shares if self._shared_for() is model else {}

    def shares_are_taken(self) -> None:
        """A run has begun with its shares, and keeps them itself."""
        self._shared_for = _no_model

    @property
    def given_layers(self) -> set[str]:
        """Names of the weights whose layers the user has made with live weights alone."""
        return {name for name, choice in self.choices.items() if choice.as_given}

    def leave(self) -> None:
        """The run is over. Its model stays known: a second fit of the same model goes on with its masks."""
        self.host, self.in_training = None, False

    def forget(self) -> None:
        """The next run is a new one, also with the same model."""
        self._model = _no_model

    def __getstate__(self) -> dict[str, Any]:
        return {
            "host": None,
            "beginning": None,
            "scored": None,
            "_model": _no_model,
            "in_training": False,
            "choices": self.choices,
            "shares": self.shares,
            "_chosen_for": _no_model,
            "_shared_for": _no_model,
        }


def _no_model() -> None:
    return None
