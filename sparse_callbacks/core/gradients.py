"""Dense gradients of the current step, wherever they are by then."""

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core.weights import SparseWeights

# Gradients that an update took away in a step (its number, gradients by id), for all callbacks on the same optimizer.
_withheld: WeakKeyDictionary[Optimizer, tuple[int, dict[int, Tensor]]] = WeakKeyDictionary()


class DenseGradients:
    """They are in ``p.grad``; or, in manual optimization, copies made before masking; or taken away by a mask
    update."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self._params = params
        self._kept: dict[str, tuple[Tensor, int, Tensor]] = {}

    def of(self, name: str, optimizer: Optimizer, tick: int) -> Tensor | None:
        """Dense gradient of a sparse parameter in step ``tick`` of its optimizer; None if it took no part."""
        if name in self._kept:
            return self._kept[name][2]
        p = self._params[name]
        return p.grad if p.grad is not None else self.withheld(optimizer, tick).get(id(p))

    @staticmethod
    def withheld(optimizer: Optimizer, tick: int) -> dict[int, Tensor]:
        """Gradients by ``id`` of parameter that some callback took away from ``optimizer`` in this very step."""
        when, taken = _withheld.get(optimizer, (-1, {}))
        return taken if when == tick else {}

    def take_away(self, optimizer: Optimizer, tick: int) -> None:
        """Leave ``optimizer`` without gradients, so that its step moves nothing: no value, no momentum, no counter."""
        taken = self.withheld(optimizer, tick)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None:
                taken[id(p)] = p.grad
                p.grad = None  # zeros would not do: momentum and decay would still move the weight
        _withheld[optimizer] = (tick, taken)

    def keep_and_mask(self, name: str, weights: SparseWeights, scale: float) -> None:
        """Copy a gradient before it is masked; over several backwards, what was masked before is added."""
        if (gradient := self._params[name].grad) is None:
            return
        seen, version, dense = self._kept.get(name, (None, 0, gradient))
        # one write since the copy: a backward that added to it; zero_grad in between is another tensor or two writes
        added = weights.at_pruned(name, dense) if seen is gradient and gradient._version == version + 1 else 0.0
        dense = gradient / scale + added
        weights.mask_gradient(name)
        self._kept[name] = (gradient, gradient._version, dense)

    def forget(self, names: Iterable[str]) -> None:
        """The step that the copies were made for is over."""
        for name in names:
            self._kept.pop(name, None)

    @staticmethod
    def free(optimizers: Iterable[Optimizer]) -> None:
        """Free what was taken away."""
        for optimizer in optimizers:
            _withheld.pop(optimizer, None)
