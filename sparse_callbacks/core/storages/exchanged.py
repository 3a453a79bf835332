"""What an exchange of layers has done to a model, and how it is undone."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.storages.former_layers import reinstate, retire
from sparse_callbacks.core.storages.module_swap import enter_fast_paths, holders_of, put_in, take_over
from sparse_callbacks.core.storages.offloading import offload


class Exchanged:
    """What an exchange has done, so that a run that is refused can undo it.

    Until its first batch a run may still be refused, by another callback as well, and then the user's network is to be what
    it was, pruned values included. Nothing that is left in memory gives these back, and all checks made before the exchange
    would not help, as others refuse too. Kept in memory, they would make the beginning the peak of the whole run: all of the
    dense layers with all of the sparse ones. So each dense weight, and a gradient that it has, goes into a temporary file as
    soon as its layer is exchanged (`offload`), and one layer at a time has both forms in memory. It is the same Parameter
    all the while, with the same values, whoever holds it.

    Attributes:
        originals: the dense Parameters that were exchanged, by name; large ones lie in files.
        layers: the layers that have taken their place, by the same names.
        report: what times have decided, for the log; empty where they have decided nothing.
        foreign: names of the layers whose weights were not those of the saved run that goes on.
    """

    def __init__(self, method: Method, model: nn.Module) -> None:
        self.originals: dict[str, nn.Parameter] = {}
        self.layers: dict[str, SparseLinear] = {}
        self.report = ""
        self.foreign: list[str] = []
        self._model, self._undo = model, ExitStack()
        attachment, choices = method.attachment, method.attachment.choices
        self.on_undo(lambda: attachment.choose(model, choices))

    def on_undo(self, act: Callable[[], object]) -> None:
        """Let ``act`` be called where the exchange is undone, before what was done earlier is."""
        self._undo.callback(act)

    def put(self, name: str, linear: Any, layer: SparseLinear) -> None:
        """Let ``layer`` take the place of ``linear``, whose weight has this name."""
        weight = self.originals[name] = linear.weight
        self.layers[name] = layer
        layer.name = name.rpartition(".")[0]
        self._swap(linear, layer)
        self.on_undo(lambda: self._swap(layer, linear))
        retire(linear, layer.name)
        self.on_undo(lambda: reinstate(linear))
        for dense in (weight, weight.grad):
            if dense is not None:
                self.on_undo(offload(dense))  # undone first: a layer that is put back has its values in memory

    def _swap(self, old: nn.Module, new: nn.Module) -> None:
        take_over(old, new)
        # looked up anew: an undo comes later, when other modules may hold it
        put_in(holders_of(self._model)[id(old)], new)

    def move(self, layer: SparseLinear, keys: Tensor) -> None:
        """Let other places live in a layer that is exchanged already."""
        places, values = layer.keys(), layer.values.detach().clone()
        if torch.equal(places, keys):
            return
        layer.set_places(keys)
        self.on_undo(lambda: layer.set_places(places, values))

    def undo(self) -> None:
        """Put the dense layers back, and what the method knew of storages."""
        self._undo.close()
        enter_fast_paths(self._model)

    def forget(self) -> None:
        """The run has begun: let go of the dense layers."""
        self._undo.pop_all()
        self.originals = {}
