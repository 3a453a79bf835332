"""Pure functions on hard-concrete gates: samples and their slopes, medians, the chance to be open, multipliers.

A gate z in [0, 1] has one learned number, log_alpha. With u uniform in (0, 1)::

    z = clip(1.2 * sigmoid((logit(u) + log_alpha) / BETA) - 0.1, 0, 1)

so it is exactly 0 with a probability of its own, and exactly 1 with another (Louizos, Welling, Kingma 2018). The gate of the trained
network is its median (Gallego-Posada et al. 2022), which is 0 exactly where the gate is open at most half of the time.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
EPS = 1e-6  # samples of u keep this distance from 0 and 1
SHIFT = -BETA * math.log(-GAMMA / ZETA)  # the median is 0 up to log_alpha = -SHIFT, and 1 from +SHIFT on
LIMIT = math.log(100.0)  # of |log_alpha|
BETAS = (0.9, 0.999)  # of Adam


def sample(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Gates for noise ``u`` in (0, 1), of one shape; the u-quantile of each gate.

    >>> sample(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.05, 0.5, 0.95]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    z = torch.logit(u, EPS).add_(log_alpha).mul_(1 / BETA)
    return z.sigmoid_().mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def slope(z: Tensor) -> Tensor:
    """d z / d log_alpha of a sample, which the sample alone tells: 0 where it was clipped."""
    inside = torch.addcmul(z, z, z, value=-1)  # z * (1 - z), which is 0 at the clips alone; bools would take three times as long
    return inside.add_(inside.sign(), alpha=-GAMMA * ZETA).mul_(1 / (BETA * (ZETA - GAMMA)))


def median(log_alpha: Tensor) -> Tensor:
    """The u = 0.5 quantile of each gate.

    >>> median(torch.tensor([-1.6, 0.0, 1.6]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (log_alpha * (1 / BETA)).sigmoid_().mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def trained(log_alpha: Tensor) -> Tensor:
    """The gates of the trained network: medians, or, where all of a layer's are 0, P(z != 0) of the likeliest alone, the first of equals.

    No number is read from the device.

    >>> trained(torch.tensor([-1.6, 0.0, 1.6])), trained(torch.tensor([-4.0, -2.0, -3.0]))
    (tensor([0.0000, 0.5000, 1.0000]), tensor([0.0000, 0.4010, 0.0000]))
    """
    z, rows = median(log_alpha), log_alpha.view(log_alpha.shape[0], -1)
    row = rows.amax(1).argmax(0, keepdim=True)  # argmax of all at once takes ten times as long
    best = row * rows.shape[1] + rows.index_select(0, row).argmax(1)
    most = z.view(-1).gather(0, best)  # if this one is closed, so are all
    z.view(-1).scatter_(0, best, torch.where(most == 0, p_open(log_alpha.view(-1).gather(0, best)), most))
    return z


def p_open(log_alpha: Tensor) -> Tensor:
    """P(z != 0)."""
    return (log_alpha + SHIFT).sigmoid_()


def p_slope(log_alpha: Tensor) -> Tensor:
    """d P(z != 0) / d log_alpha."""
    p = p_open(log_alpha)
    return torch.addcmul(p, p, p, value=-1)


def p_one(log_alpha: Tensor) -> Tensor:
    """P(z = 1)."""
    return torch.sigmoid(log_alpha - SHIFT)


def log_alpha_for(density: float) -> float:
    """The log_alpha of a gate that is open with probability ``density``."""
    return math.log(density / (1 - density)) - SHIFT


def log_alpha_at(droprate: float) -> float:
    """The log_alpha of new gates, whose mean is about ``1 - droprate``."""
    return math.log((1 - droprate) / droprate)


def initial(shape: Sequence[int], droprate: float, generator: torch.Generator) -> Tensor:
    """log_alpha of new gates about that of ``droprate``, with a standard deviation of 0.01, in float64."""
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    return (log_alpha_at(droprate) + 0.01 * noise).clamp_(-LIMIT, LIMIT)


def expected_density(log_alphas: Iterable[Tensor], shares: Iterable[float]) -> Tensor:
    """Expected share of parameters behind an open gate, 0-d.

    Args:
        log_alphas: of each layer; within a layer every gate has as many parameters as any other.
        shares: of each layer in all parameters of the constraint; they sum to 1.
    """
    return torch.stack([share * mean_open(a) for a, share in zip(log_alphas, shares, strict=True)]).sum()


def expected_l2(weight: Tensor, log_alpha: Tensor) -> Tensor:
    """Half the expected squared norm of a gated weight, 0-d: ``0.5 * sum over gates of P(z != 0) * ||w||^2``.

    Gates broadcast against ``weight``: [1, in] for the inputs of a linear layer, [out, 1, 1, 1] for the outputs of a convolution. No
    gradient reaches ``log_alpha``.
    """
    return 0.5 * (weight.square() * p_open(log_alpha).detach()).sum()


def ascend(multiplier: Tensor, defect: Tensor, rate: float, restarts: bool = True) -> Tensor:
    """The multiplier of ``density <= target`` after a step of ascent.

    Args:
        multiplier: before, 0-d, not negative.
        defect: expected density minus target, 0-d.
        rate: of the ascent.
        restarts: start again from 0 wherever the constraint is met with room to spare.
    """
    risen = (multiplier + rate * defect).clamp_min(0)
    return torch.where(defect < 0, torch.zeros_like(risen), risen) if restarts else risen


def adam(mean: Tensor, square: Tensor, step: Tensor) -> Tensor:
    """What Adam takes a step along (eps 1e-8).

    Args:
        mean, square: running means of the gradient and of its square, with :data:`BETAS`, this step's included.
        step: number of this step, from 1, 0-d.
    """
    root = (square / (1 - BETAS[1] ** step)).sqrt_().add_(1e-8)
    return (mean / (1 - BETAS[0] ** step)).div_(root)


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers in (0, 1) of the shape, dtype and device of ``like``, in steps of 2^-16, symmetric about 0.5.

    Sixteen bits make the chance of a gate to be open wrong by less than 1e-5, and take a third of the time of ``torch.rand``.
    """
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None, generator=generator)
    return bits.view(torch.int16)[: like.numel()].to(like.dtype).add_(2**15 + 0.5).mul_(2**-16).view(like.shape)


def channel_shape(shape: Sequence[int], transposed: bool = False) -> tuple[int, ...]:
    """Shape of a weight's gates, which broadcasts against it: an input unit of a matrix, an output channel of a convolution.

    >>> channel_shape((20, 30)), channel_shape((8, 3, 5, 5)), channel_shape((3, 8, 5, 5), transposed=True)
    ((1, 30), (8, 1, 1, 1), (1, 8, 1, 1))
    """
    dimension = 1 if len(shape) == 2 or transposed else 0
    return tuple(n if i == dimension else 1 for i, n in enumerate(shape))


def mean_open(log_alpha: Tensor) -> Tensor:
    """Mean of P(z != 0), 0-d."""
    return p_open(log_alpha).mean()


def pull(gradient: Tensor, dense: Tensor, z: Tensor) -> Tensor:
    """d loss / d log_alpha of the gates of one parameter, in the shape of ``z``.

    Args:
        gradient: d loss / d (z * dense), of the parameter's shape.
        dense: of that shape too; a vector is one of a convolution's outputs, for which the gates repeat.
        z: the sample that broadcasts against the parameter.
    """
    product = gradient.to(z) * dense
    if product.shape == z.shape:
        return product.mul_(slope(z))
    total = product.sum_to_size(z.shape) if z.ndim == product.ndim else product.view(-1, z.numel()).sum(0).view(z.shape)
    return total * slope(z)
