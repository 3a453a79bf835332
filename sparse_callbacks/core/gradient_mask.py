"""Gradient masks of a method's own: the optimizer sees other weights than the forward pass uses."""

from torch import Tensor

from sparse_callbacks.core.hooks import Hooks
from sparse_callbacks.core.step import Step


class MasksGradients(Hooks):
    """A method with a mask of its own for gradients, such as Top-KAST, whose backward pass covers a larger set.

    Gradients are masked by it wherever others are masked by the masks of the weights: before clipping in automatic
    optimization and in loops, and right after each backward pass in manual optimization, where the user clips. List it
    before the method's base. An optimizer of two passes perturbs active weights alone, and steps by this mask.
    """

    def gradient_mask(self, name: str) -> Tensor:
        """Where the optimizer sees the gradient of a sparse parameter: bool, of its shape.

        It changes in an update only, and survives a resume: keep it in ``aux``.
        """
        raise NotImplementedError

    def mask_gradient(self, name: str) -> None:
        """Zero the gradient of a parameter outside of :meth:`gradient_mask`, if it has one."""
        if (gradient := self.weights.params[name].grad) is not None:
            gradient.detach().masked_fill_(~self.gradient_mask(name), 0)

    def before_step(self, step: Step) -> None:
        for name in step.names:
            self.mask_gradient(name)


def refuse_lost_gradients(method: Hooks) -> None:
    """Refuse a method that wants gradients which its own mask has zeroed.

    Raises:
        ValueError: the method masks gradients by a mask of its own, and overrides ``wants_dense_gradients``.
    """
    if isinstance(method, MasksGradients) and type(method).wants_dense_gradients is not Hooks.wants_dense_gradients:
        raise ValueError(
            f"{type(method).__name__} overrides wants_dense_gradients() and derives from MasksGradients, whose mask leaves "
            "no dense gradients in manual optimization. Leave one of them out, or let gradient_mask() cover the weights "
            "whose gradients are wanted."
        )


def refuse_unannounced_mask(method: Hooks, step: Step) -> None:
    """Refuse a step whose gradients were masked after the backward pass, and whose method does not mask them itself.

    Raises:
        ValueError: the method neither masks gradients by the masks of its weights nor replaces the step.
    """
    if not (step.masking or step.replaced or isinstance(method, MasksGradients)):
        name = type(method).__name__
        raise ValueError(
            f"before_step() of {name} does not call step.mask_gradients(). In manual optimization, and with an optimizer of "
            "two passes, gradients of pruned weights are zero by then, so that it would train otherwise than in automatic "
            "optimization. Call it; or, for a mask of its own for gradients, derive from "
            "sparse_callbacks.core.gradient_mask.MasksGradients and override gradient_mask(name)."
        )
