"""SMCP with hard masks, which `channels.py` compares with SMCP.

Under hard masks pruned weights learn nothing, so channels never come back.
"""

from sparse_callbacks import SMCP
from sparse_callbacks.core.step import Step


class HardSMCP(SMCP):
    """SMCP with zeros for pruned weights in the dense copy too, which makes their Taylor importance zero."""

    def before_step(self, step: Step) -> None:
        copied = [n for n in step.names if self.weights.has_copy(n)]
        # before the importance is computed, which multiplies weights of the dense copy with gradients
        for name in copied:
            self.weights.dense_values(name).mul_(self.masks[name])
        super().before_step(step)
        # after it, so that the optimizer leaves pruned weights alone
        for name in copied:
            gradient = self.params[name].grad
            if gradient is not None:
                gradient.mul_(self.masks[name])
