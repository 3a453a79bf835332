"""Dense gradients of the current step, kept for methods after the gradients are masked or taken away."""

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core.weights import SparseWeights

# For each optimizer the latest step in which a mask update took its gradients away, and these gradients by id of the
# parameter. One table for the process, because several callbacks may share an optimizer.
_withheld: WeakKeyDictionary[Optimizer, tuple[int, dict[int, Tensor]]] = WeakKeyDictionary()


class DenseGradients:
    """The dense gradient of each sparse parameter in the current step, from whichever place holds it.

    That is ``p.grad`` as a rule, a copy made before masking in manual optimization, or the gradients that a mask update
    took away from the optimizer.
    """

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self._params = params
        # by name: the masked ``p.grad``, its version after masking (torch counts writes in place), its dense copy
        self._kept: dict[str, tuple[Tensor, int, Tensor]] = {}

    def of(self, name: str, optimizer: Optimizer, tick: int) -> Tensor | None:
        """Dense gradient of a sparse parameter in step ``tick`` of its optimizer; None if it has no gradient."""
        if name in self._kept:
            return self._kept[name][2]
        p = self._params[name]
        return p.grad if p.grad is not None else self.withheld(optimizer, tick).get(id(p))

    def has_kept(self, name: str) -> bool:
        """A dense copy of the parameter's gradient was made before masking."""
        return name in self._kept

    @staticmethod
    def withheld(optimizer: Optimizer, tick: int) -> dict[int, Tensor]:
        """Gradients, by ``id`` of the parameter, that any callback took away from ``optimizer`` in step ``tick``."""
        when, taken = _withheld.get(optimizer, (-1, {}))
        return taken if when == tick else {}

    def take_away(self, optimizer: Optimizer, tick: int) -> None:
        """Leave ``optimizer`` without gradients, so that its step changes no value, momentum or step counter."""
        taken = self.withheld(optimizer, tick)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None:
                taken[id(p)] = p.grad
                p.grad = None  # zeros would not do: momentum and decay would still move the weight
        _withheld[optimizer] = (tick, taken)

    def keep_and_mask(self, name: str, weights: SparseWeights, scale: float) -> None:
        """Copy a gradient and mask it; over several backward passes, add what was masked after the earlier passes.

        Args:
            name: the name of a sparse parameter.
            weights: the sparse weights that hold the parameter's mask.
            scale: the loss scale by which the gradient is divided in the copy.
        """
        if (gradient := self._params[name].grad) is None:
            return
        seen, version, dense = self._kept.get(name, (None, 0, gradient))
        if seen is gradient and gradient._version == version:
            return  # masked already, with no backward pass since
        # Exactly one write in place since the copy: a backward pass added to the masked gradient. After a zero_grad in
        # between it is another tensor, or was written twice (zeroed, then added to), and the copy is out of date.
        added = weights.at_pruned(name, dense) if seen is gradient and gradient._version == version + 1 else 0.0
        dense = gradient / scale + added
        weights.close_gradient(name)
        self._kept[name] = (gradient, gradient._version, dense)

    def give_back(self, name: str, weights: SparseWeights) -> None:
        """Undo :meth:`keep_and_mask`, for a parameter whose pruned weights take the coming step too."""
        gradient, version, dense = self._kept.pop(name, (None, 0, None))
        if gradient is None or dense is None or self._params[name].grad is not gradient:
            return
        if gradient._version == version:
            gradient.copy_(dense)
            return
        # clipped since by its norm: what was taken out is clipped by the same factor
        pruned = weights.at_pruned(name, dense)
        clipped = (gradient.norm() / (dense - pruned).norm()).nan_to_num(1.0)
        gradient.add_(pruned * clipped)

    def forget(self, names: Iterable[str]) -> None:
        """Drop the copies of the named gradients, once the step that they were made for is over."""
        for name in names:
            self._kept.pop(name, None)

    @staticmethod
    def free(optimizers: Iterable[Optimizer]) -> None:
        """Free the gradients that were taken away from ``optimizers``."""
        for optimizer in optimizers:
            _withheld.pop(optimizer, None)
