"""SMCP with hard masks and with the scores of version 0.1, which `channels.py` and `smcp_scores.py` compare with SMCP."""

from torch import Tensor, nn

from sparse_callbacks import SMCP
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.smcp.smcp import CORRECTED


class HardSMCP(SMCP):
    """SMCP with zeros for pruned weights in the dense copy too, which makes their Taylor importance zero.

    Pruned weights learn nothing, so channels never come back. What SMCP makes good for norms, and its hysteresis, have no effect
    here: the zeros are the dense weights, and their importance is zero.
    """

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


class FrozenSMCP(SMCP):
    """SMCP whose pruned weights stay as they were when they were pruned: no gradient, decay or momentum moves them.

    Their importance is that of the weights that they kept, so channels may come back.
    """

    def before_step(self, step: Step) -> None:
        super().before_step(step)
        self._frozen: dict[str, Tensor] = {
            n: self.weights.dense_values(n).clone() for n in step.names if self.weights.has_copy(n)
        }

    def after_step(self, step: Step) -> Update | None:
        for name, values in self._frozen.items():
            dense = self.weights.dense_values(name)
            dense.copy_(dense.where(self.masks[name], values))
        return super().after_step(step)


class UncorrectedSMCP(SMCP):
    """SMCP by the rule of runs that version 0.1 saved: no correction for norms, and no hysteresis."""

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        self.aux.pop(CORRECTED, None)
