"""Where each weight of a run is used, and whether its layers are a chain, since its first batch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.record.find_chain import Chain, LayerCall, find_chain
from sparse_callbacks.core.record.first_batch import FirstBatch, WeightUse


class KnownUses:
    """Where the weights of a model are used, by one sample.

    Args:
        model: the model.
        methods: the methods of the run.
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method]) -> None:
        self.of: dict[str, WeightUse] = {}
        """The use of each parameter by name; empty before the first batch."""
        self.chain = Chain((), "no batch has come yet")
        """The sparse layers from input to output, or why they are no chain."""
        self.order: list[str] = []
        """Names of weights in the order in which their layers were called first."""
        self._model, self._methods = model, methods
        self._batch: FirstBatch | None = None
        self._counts = False  # whether what the batch shows counts, or is known already

    @property
    def measures(self) -> bool:
        """The coming batch shows where weights are used."""
        return self._batch is not None

    def measure(self, again: bool, **options: Any) -> None:
        """Look in the coming batch; see :meth:`~sparse_callbacks.core.record.recorder.RunRecorder.measure`."""
        self._counts = again or not self.of
        if self._batch is None:
            watched = [name for method in self._methods for name in method.params]
            self._batch = FirstBatch(self._model, watched, **options)

    def end_batch(self, samples: int) -> bool:
        """The batch is over, of so many samples: whether it has shown anything new."""
        if self._batch is None:
            return False
        found, self._batch = self._batch.end(), None
        if not self._counts:
            return False
        self.of = {name: use.of_a_sample(max(1, samples)) for name, use in found.of.items()}
        self.order = list(found.order)
        self.chain = self._chain_of(found.calls)
        return True

    def chain_shown(self) -> Chain:
        """The chain that the batch has shown so far: asked in its optimizer step, before the masks move."""
        return self.chain if self._batch is None else self._chain_of(self._batch.calls)

    def _chain_of(self, calls: Sequence[LayerCall]) -> Chain:
        return find_chain(calls, [m.weights.entries[n] for m in self._methods for n in m.params])

    def stop(self) -> None:
        """No batch will show anything."""
        if self._batch is not None:
            self._batch.end()
            self._batch = None

    def state(self) -> dict[str, Any]:
        """Numbers and texts for a checkpoint."""
        uses = {name: list(asdict(use).values()) for name, use in self.of.items()}
        return {"uses": uses, "order": list(self.order), "chain": [list(self.chain.names), self.chain.reason]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.of = {name: WeightUse(*use) for name, use in state["uses"].items()}
        self.order, self.chain = list(state["order"]), Chain(tuple(state["chain"][0]), state["chain"][1])
