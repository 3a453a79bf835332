"""Scores of weights at the start of training: SNIP, GraSP, CroP, SynFlow, Fisher and others.

Each function gives scores by parameter name; weights with the largest scores are kept. A parameter that the loss does not
depend on is missing there. Scores of the loss are derivatives of its mean over all samples, so that the absolute value is taken
after the mean over batches: a loss counts as the mean over the samples of its batch.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_callbacks.core.calibration import BatchLoss, differentiable_kernels, requiring_grad
from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.inspection import run, tensors_in
from sparse_callbacks.core.largest import widened
from sparse_callbacks.core.randomness import uniform_like
from sparse_callbacks.core.replaced_parameters import in_double_and_positive
from sparse_callbacks.core.undisturbed import undisturbed

Scores = dict[str, Tensor]
"""Scores by parameter name, of the parameter's shape and at least float32."""
Params = Mapping[str, nn.Parameter]
Masks = Mapping[str, Tensor]
Losses = Callable[[int], AbstractContextManager[Any]]
"""Gives the losses of the batches, to be differentiated so many times, within a ``with`` block: see
:meth:`~sparse_callbacks.core.calibration.Calibration.losses`. It may be called more than once, and gives the same ones."""


class GradientFlow(NamedTuple):
    """What one step along the gradient does to the gradient.

    Attributes:
        gradients: g, the gradient of the mean loss by each parameter, 0 where a weight is pruned.
        products: H g, its product with the Hessian of the mean loss: the derivative of <stopgrad(g), g>.
    """

    gradients: Scores
    products: Scores


def snip_scores(losses: Losses, params: Params) -> Scores:
    """\\|w * g\\| with the gradient g of the mean loss (Lee et al.: SNIP. ICLR 2019, equation 6).

    The paper divides by the sum of all of them, which changes no ranking.

    Args:
        losses: the losses of the calibration batches.
        params: the weights by name.

    Raises:
        ValueError: the loss depends on none of them.
    """
    found = mean_gradients(losses, params)
    return {name: (_values(params[name]) * g).abs() for name, g in found.items()}


def grasp_scores(losses: Losses, params: Params, masks: Masks | None = None) -> Scores:
    """w * (H g): the largest are kept, with their sign (Wang et al.: Picking Winning Tickets Before Training by Preserving
    Gradient Flow. ICLR 2020, equation 8, whose score is the negative of it).

    Differs from the released code: outputs of the network are not divided by a temperature of 200.

    Args:
        losses, params, masks: as in :func:`gradient_flow`.
    """
    return {n: _values(params[n]) * h for n, h in gradient_flow(losses, params, masks).products.items()}


def crop_scores(losses: Losses, params: Params, masks: Masks | None = None) -> Scores:
    """\\|w * (H g)\\| (Rachwan et al.: Winning the Lottery Ahead of Time. ICML 2022, equation 6).

    Args:
        losses, params, masks: as in :func:`gradient_flow`.
    """
    return {name: score.abs() for name, score in grasp_scores(losses, params, masks).items()}


def fisher_scores(losses: Losses, params: Params) -> Scores:
    """w^2 / 2 * mean over batches of the squared gradient of a batch's loss: what the loss would rise by without the weight,
    by a diagonal Fisher matrix (Theis et al.: Faster gaze prediction with dense networks and Fisher pruning. 2018, equation 5).

    Args:
        losses, params: as in :func:`snip_scores`.
    """
    squares, batches = Scores(), 0
    with requiring_grad(params.values()), losses(1) as batch_losses:
        for batch in batch_losses:
            batches += 1
            for name, g in _gradients(batch.loss, params).items():
                squares[name] = squares.get(name, 0) + g.detach().to(_wide(params[name])).square()
    _refuse_none(squares)
    return {name: 0.5 * _values(params[name]).square() * s / batches for name, s in squares.items()}


def magnitude_scores(params: Params) -> Scores:
    """\\|w\\|."""
    return {name: _values(p).abs() for name, p in params.items()}


def random_scores(params: Params, generator: Callable[[str], torch.Generator]) -> Scores:
    """Uniform numbers in [0, 1), in float64.

    Args:
        params: the weights by name.
        generator: gives the generator of a parameter's numbers.
    """
    return {name: uniform_like(p.detach(), generator(name)) for name, p in params.items()}


def synflow_scores(module: nn.Module, inputs: Any, names: Mapping[str, Any], masks: Masks | None = None) -> Scores:
    """\\|w\\| * dR / d\\|w\\|, where R is the sum of the outputs for an input of ones, and the network has the absolute values of
    its parameters and of the statistics of its norms (Tanaka et al.: Pruning neural networks without any data by iteratively
    conserving synaptic flow. NeurIPS 2020, equation 2).

    In float64, as R is a product over layers; in eval mode. No parameter is written.

    Args:
        module: the network.
        inputs: what its forward takes, of the shapes that count: floats become ones, whole numbers stay.
        names: names of the parameters that are scored.
        masks: bool masks by name of the weights that are left; None: all.

    Raises:
        ValueError: the outputs depend on none of the parameters, or the network does not compute in float64.
    """
    with (
        undisturbed(module),
        torch.inference_mode(False),
        in_double_and_positive(module, masks or {}) as (params, ones),
        torch.enable_grad(),
        differentiable_kernels(module, 1),
    ):
        module.eval()
        outputs = _outputs_in_double(module, ones(inputs))
        total = torch.stack([t.sum() for t in tensors_in(outputs) if t.is_floating_point()]).sum()
        mine = {name: params[name] for name in names}
        gradients = _gradients(total, mine) if total.requires_grad else {}
        scores = {name: (mine[name].detach() * g).abs() for name, g in gradients.items()}
    _refuse_none(scores, "sum of the outputs")
    return scores


def _outputs_in_double(module: nn.Module, ones: Any) -> Any:
    try:
        return run(module, ones)
    except (RuntimeError, TypeError, ValueError) as error:  # such as a kernel that there is for float32 alone
        raise ValueError(
            f"SynFlow passes ones through {type(module).__name__} in float64, which its forward does not take "
            f"({with_class(error)}). Give another score, such as 'snip', which looks at batches in the network's own precision."
        ) from error


# ---------------------------------------------------------------------- derivatives of the mean loss


def gradient_flow(losses: Losses, params: Params, masks: Masks | None = None) -> GradientFlow:
    """The gradient g of the mean loss, and its product H g with the Hessian of the mean loss.

    Two passes over the batches, of which the second one is differentiated twice: the product of a batch's Hessian is one with
    the gradient of all batches.

    Args:
        losses: the losses of the calibration batches.
        params: the weights by name; g and H are those of these weights alone.
        masks: bool masks by name of the weights that are left, as the gradient flow of a pruned network has no part in others;
            of parameters without one, all are.

    Raises:
        ValueError: the loss depends on none of them.
    """
    gradients = mean_gradients(losses, params)
    params = {name: params[name] for name in gradients}
    if masks is not None:
        gradients = {name: g * masks[name] if name in masks else g for name, g in gradients.items()}
    sums = {name: torch.zeros_like(g) for name, g in gradients.items()}
    total = 0.0
    with requiring_grad(params.values()), losses(2) as batch_losses:
        for batch in batch_losses:
            share = _weight(batch)
            found = _gradients(batch.loss, params, create_graph=True)
            # one number a parameter, on the CPU: parameters may lie on several devices
            along = torch.stack([(g.to(gradients[n]) * gradients[n]).sum().cpu() for n, g in found.items()]).sum()
            # a loss that is linear in the weights has no second derivative, and its gradient no graph
            second = _gradients(along, params) if along.requires_grad else {}
            for name, h in second.items():
                sums[name] += share * h.to(sums[name])
            total += share
    return GradientFlow(gradients, {name: s / total for name, s in sums.items()})


def mean_gradients(losses: Losses, params: Params) -> Scores:
    """The gradient of the mean loss over all samples of the batches, by each parameter.

    Args:
        losses, params: as in :func:`snip_scores`.

    Raises:
        ValueError: the loss depends on none of them.
    """
    sums, total = Scores(), 0.0
    with requiring_grad(params.values()), losses(1) as batch_losses:
        for batch in batch_losses:
            share = _weight(batch)
            for name, g in _gradients(batch.loss, params).items():
                sums[name] = sums.get(name, 0) + share * g.detach().to(_wide(params[name]))
            total += share
    _refuse_none(sums)
    return {name: sums[name] / total for name in params if name in sums}


def _weight(batch: BatchLoss) -> float:
    """The weight of a batch's loss in the mean over samples."""
    return float(batch.samples or 1)


def _gradients(of: Tensor, params: Params, create_graph: bool = False) -> dict[str, Tensor]:
    """The gradient of a scalar by those parameters that it depends on."""
    found = torch.autograd.grad(of, [*params.values()], create_graph=create_graph, allow_unused=True)
    return {name: g for name, g in zip(params, found, strict=True) if g is not None}


def _wide(parameter: Tensor) -> torch.dtype:
    return widened(parameter.dtype)


def _values(parameter: Tensor) -> Tensor:
    return parameter.detach().to(_wide(parameter))


def _refuse_none(found: Mapping[str, Any], what: str = "loss") -> None:
    if not found:
        raise ValueError(
            f"the {what} does not depend on any of the sparse weights, so they have no score. Give include= the weights that it "
            "depends on, or masks by magnitude."
        )
