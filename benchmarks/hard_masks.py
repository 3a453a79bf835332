"""SMCP with hard masks, for `channels.py` to compare with: what is pruned learns nothing and never comes back."""

from sparse_callbacks import SMCP


class HardSMCP(SMCP):
    """Pruned weights are zero in the dense copy too, so their Taylor importance is, and their gradients are masked."""

    def before_step(self) -> None:
        hidden = [n for n in self.names if self.store.hides(n)]
        for name in hidden:
            self.store.dense(name).mul_(self.masks[name])
        super().before_step()
        for name in hidden:
            if (gradient := self.params[name].grad) is not None:
                gradient.mul_(self.masks[name])
