"""Training without steps that anybody announces: found where weights change and no step is seen."""

from torch import Tensor

from sparse_callbacks.core.engine import Engine

LIMIT = 100  # batches until somebody must have stepped, unless the weights stay as they are


class StepWatch:
    """Looks whether sparse weights change while no step of their optimizer is seen.

    Masks would never move then, and pruned weights come back: silently, as nothing else depends on steps. It costs a
    pass over the sparse weights at its beginning and one at each look, and nothing once all optimizers have stepped.

    Args:
        engine: the engine of the run.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._batches = engine, 0
        self._began: dict[str, tuple[Tensor, Tensor]] = {}

    def batch_begins(self) -> None:
        """A batch begins: of the first one the weights are noted, whatever was written to them before."""
        self._began = self._began or {name: self._shown(name) for name in self._engine.method.params}

    def batch_over(self, epoch_over: bool = False) -> bool:
        """A batch is over.

        Args:
            epoch_over: whether an epoch is over too, and it is time to look.

        Returns:
            Whether there is still something to watch.

        Raises:
            RuntimeError: the weights of an optimizer have changed, and no step of it was seen.
        """
        self._batches += 1
        unseen = self._engine.unseen_optimizers()
        if not unseen:
            return False
        if self._batches % LIMIT and not epoch_over:
            return True
        # a step that a GradScaler has skipped leaves the dense values in, which its batch began without
        self._engine.method.weights.swap_out(self._engine.method.params)
        for optimizer, names in unseen:
            if changed := [n for n in names if self._has_changed(n)]:
                name = type(self._engine.method).__name__
                raise RuntimeError(
                    f"{', '.join(changed)} changed in the first {self._batches} batches, and {name} has seen no step of "
                    f"{optimizer}: masks do not move, and pruned weights may come back. Step through "
                    "self.optimizers(), or in a loop of your own through the optimizer that sparsify() was given. An "
                    "optimizer with steps of other names must hold the torch optimizer that takes them, as "
                    "self.base_optimizer."
                )
        return True

    def _shown(self, name: str) -> tuple[Tensor, Tensor]:
        """Two numbers that show whether a parameter changes, on its device: nobody waits for them yet."""
        # not by torch's counter of writes, which does not see those into `.data`
        values = self._engine.method.params[name].detach()
        return values.float().sum(), values.float().square().sum()

    def _has_changed(self, name: str) -> bool:
        return any(float(a) != float(b) for a, b in zip(self._began[name], self._shown(name), strict=True))
