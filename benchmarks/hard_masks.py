"""SMCP with hard masks, which `channels.py` compares with SMCP.

Under hard masks pruned weights learn nothing, so channels never come back.
"""

from sparse_callbacks import SMCP


class HardSMCP(SMCP):
    """SMCP with zeros for pruned weights in the dense copy too, which makes their Taylor importance zero."""

    def before_step(self) -> None:
        hidden = [n for n in self.names if self.store.hides(n)]
        # before the importance is computed, which multiplies weights of the dense copy with gradients
        for name in hidden:
            self.store.dense(name).mul_(self.masks[name])
        super().before_step()
        # after it, so that the optimizer leaves pruned weights alone
        for name in hidden:
            gradient = self.params[name].grad
            if gradient is not None:
                gradient.mul_(self.masks[name])
