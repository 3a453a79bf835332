"""A method, its weights and the random generators as they were before a run that is refused."""

import copy
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.progress import Progress
from sparse_callbacks.core.randomness import random_states, restore_random_states
from sparse_callbacks.core.reinitialised import LayersBefore
from sparse_callbacks.core.scored_start import renews_weights

# What hosts keep on a method: the run that is refused goes on to need it until it is over.
_OF_HOSTS = ("attachment", "engine", "fit_state")


class BeforeRun:
    """What a run that begins is about to change, for a run that is refused before its first batch.

    Args:
        method: the method of the run; its fields are kept as they are now.
    """

    def __init__(self, method: Method) -> None:
        self._model = method.attachment.model
        self._fields = {name: _kept(value) for name, value in vars(method).items() if name not in _OF_HOSTS}
        self.values: dict[str, Tensor] = {}
        """Values of the sparse parameters before masks were written."""
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        self._layers: LayersBefore | None = None
        self._random: dict[str, Any] = {}

    def keep_weights(self, method: Method) -> None:
        """Masks are written next: keep the values of the sparse parameters, and which gradients there are."""
        self.values = {name: p.detach().clone() for name, p in method.params.items()}
        self._gradients = [(p, p.grad) for p in method.model.parameters()]
        if renews_weights(method):
            self._layers = LayersBefore(method.model, method.params)

    def keep_random_states(self) -> None:
        """Random generators may be seeded next."""
        self._random = random_states()

    def bring_back(self, method: Method) -> None:
        """The run was refused: give everything back."""
        method.weights.write_values(self.values)
        if self._layers is not None:
            self._layers.bring_back()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        if self._random:
            restore_random_states(self._random)
        fields = vars(method)
        for name in fields.keys() - self._fields.keys() - set(_OF_HOSTS):
            del fields[name]
        fields.update(self._fields)
        method.attachment.forget()
        if self._model is not None:
            method.attachment.know(self._model)


def _kept(value: Any) -> Any:
    """A field that a run may write into: its containers are copied, and what they hold is the same."""
    if isinstance(value, dict | list | set):
        return value.copy()
    return copy.deepcopy(value) if isinstance(value, Progress) else value
