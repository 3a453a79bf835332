"""Dense gradients of the current step, kept for methods after the gradients are masked or taken away."""

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core import distributed
from sparse_callbacks.core.local_parts import local, whole_of
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
        # names whose copies are those of this rank alone, because its latest backward pass was not reduced
        self._of_this_rank: set[str] = set()

    def of(self, name: str, optimizer: Optimizer, tick: int) -> Tensor | None:
        """Dense gradient of a sparse parameter in step ``tick`` of its optimizer; None if it has no gradient."""
        if name in self._kept:
            return self._kept[name][2]
        p = self._params[name]
        if p.grad is not None:
            return p.grad
        taken = self.withheld(optimizer, tick).get(id(whole_of(p)))
        return None if taken is None else local(taken)

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

    def keep_and_mask(self, names: Iterable[str], weights: SparseWeights, scale: float, reduced: bool) -> None:
        """Copy gradients and mask them; over several backward passes, add what was masked after the earlier passes.

        :meth:`drop_outdated` must have been called before the backward pass.

        Args:
            names: the names of sparse parameters, the same and in the same order on every rank.
            weights: the sparse weights that hold the masks.
            scale: the loss scale by which gradients are divided in the copies.
            reduced: whether the backward pass has reduced the gradients over ranks.
        """
        masked = {}
        for name in names:
            if self._is_as_masked(name):
                continue  # no backward pass has run since
            earlier = self._masked_earlier(name, weights, reduced)
            if (gradient := self._params[name].grad) is not None:
                masked[name] = gradient, gradient / scale + (0.0 if earlier is None else earlier)
                weights.close_gradient(name)
        # the versions last: DistributedDataParallel's views of one bucket count the writes to all of them
        self.put_back(masked)

    def _masked_earlier(self, name: str, weights: SparseWeights, reduced: bool) -> Tensor | None:
        """What was masked in a gradient after the earlier backward passes, reduced over ranks like the gradient."""
        kept = self._kept.get(name)
        earlier = None if kept is None else weights.at_pruned(name, kept[2])
        if not reduced:
            self._of_this_rank.add(name)
        elif name in self._of_this_rank:  # the gradient holds the mean over ranks of the earlier passes too
            self._of_this_rank.remove(name)
            # also where this rank has had no gradient yet: the others wait for it
            mine = torch.zeros_like(self._params[name]) if earlier is None else earlier
            (earlier,) = distributed.mean([mine])
        return earlier

    def put_back(self, gradients: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Keep dense copies that were made before, such as those of a checkpoint.

        Args:
            gradients: the masked ``p.grad`` and its dense copy, by parameter name.
        """
        self._kept |= {name: (masked, masked._version, dense) for name, (masked, dense) in gradients.items()}

    @property
    def kept(self) -> dict[str, Tensor]:
        """Dense copies by parameter name, of the gradients that are still as masking left them."""
        return {name: dense for name, (_, _, dense) in self._kept.items() if self._is_as_masked(name)}

    def take_over(self, other: "DenseGradients") -> None:
        """Keep what ``other`` has kept of the same parameters, in the middle of a window."""
        self._kept, self._of_this_rank = other._kept, other._of_this_rank

    def _is_as_masked(self, name: str) -> bool:
        """The gradient is still as masking left it."""
        masked, version, _ = self._kept.get(name, (None, 0, None))
        return masked is not None and self._params[name].grad is masked and masked._version == version

    def drop_outdated(self) -> None:
        """A backward pass begins: drop the copies of gradients that were set to zero, or written to, since they were
        masked."""
        if self._kept:
            self.forget(self._kept.keys() - self.kept.keys())

    def drop_replaced(self) -> None:
        """A backward pass has run, and nobody has called :meth:`drop_outdated` before it: drop the copies of gradients
        that were set to zero since they were masked."""
        # Exactly one write in place since the copy: a backward pass added to the masked gradient. After a zero_grad in
        # between it is another tensor, or was written twice (zeroed, then added to).
        self.forget(
            [
                name
                for name, (masked, version, _) in self._kept.items()
                if self._params[name].grad is not masked or masked._version > version + 1
            ]
        )

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
            self._of_this_rank.discard(name)

    @staticmethod
    def free(optimizers: Iterable[Optimizer]) -> None:
        """Free the gradients that were taken away from ``optimizers``."""
        for optimizer in optimizers:
            _withheld.pop(optimizer, None)
