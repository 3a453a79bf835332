"""Hard-concrete gates: samples and their slopes, medians, the probability to be open, multipliers.

A gate z in [0, 1] has one learned number, log_alpha. With u uniform in (0, 1)::

    z = clip(1.2 * sigmoid((logit(u) + log_alpha) / BETA) - 0.1, 0, 1)

so it is exactly 0 with a probability of its own, and exactly 1 with another (Louizos, Welling, Kingma 2018). The gate
of the trained network is its median (Gallego-Posada et al. 2022), which is 0 exactly where the gate is open at most
half of the time.

``out=`` and further tensors with a default of None are memory to compute in, as in torch: with a gate for every weight,
each result is as large as the weights.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# temperature of the sigmoid, and the interval that it is stretched to before it is clipped to [0, 1], as published
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
EPS = 1e-6  # u is clipped to [EPS, 1 - EPS], where its logit is finite
# P(z != 0) is sigmoid(log_alpha + SHIFT). The median is 0 up to log_alpha = -SHIFT, and 1 from +SHIFT on
SHIFT = -BETA * math.log(-GAMMA / ZETA)
# largest |log_alpha|, the clamp of the released code: beyond it the sigmoid is so flat that gates hardly move
LIMIT = math.log(100.0)
BETAS = (0.9, 0.999)  # of Adam for gates: torch's defaults


def sample(log_alpha: Tensor, u: Tensor, out: Tensor | None = None) -> Tensor:
    """Gates for noise ``u`` in (0, 1) of the same shape: the u-quantile of each gate.

    >>> sample(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.05, 0.5, 0.95]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    # one buffer is changed in place all the way; it may be that of u
    z = torch.logit(u, EPS, out=out).add_(log_alpha).mul_(1 / BETA)
    return z.sigmoid_().mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def slope(z: Tensor, out: Tensor | None = None, sign: Tensor | None = None) -> Tensor:
    """d z / d log_alpha of a sample ``z``, computed from ``z`` alone; 0 where the sample was clipped.

    With the sigmoid s = (z - GAMMA) / (ZETA - GAMMA), the slope is (ZETA - GAMMA) s (1 - s) / BETA, and the product
    (z - GAMMA) (ZETA - z) in it is z (1 - z) - GAMMA ZETA, as GAMMA + ZETA = 1.
    """
    inside = torch.addcmul(
        z, z, z, value=-1, out=out
    )  # z * (1 - z) is 0 exactly at the clips, so its sign tells the two apart
    # the sign in place of a bool mask: a comparison and torch.where would take three times as long
    return inside.add_(torch.sign(inside, out=sign), alpha=-GAMMA * ZETA).mul_(1 / (BETA * (ZETA - GAMMA)))


def median(log_alpha: Tensor, out: Tensor | None = None) -> Tensor:
    """The u = 0.5 quantile of each gate.

    >>> median(torch.tensor([-1.6, 0.0, 1.6]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return torch.mul(log_alpha, 1 / BETA, out=out).sigmoid_().mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def trained(log_alpha: Tensor, out: Tensor | None = None) -> Tensor:
    """Gates of the trained network: the median of each, so that at least one gate of the layer is open.

    Where all medians of a layer are 0, the gate with the largest log_alpha (of equals the first) gets its P(z != 0) as
    its value. Nothing here waits for the device.

    >>> trained(torch.tensor([-1.6, 0.0, 1.6])), trained(torch.tensor([-4.0, -2.0, -3.0]))
    (tensor([0.0000, 0.5000, 1.0000]), tensor([0.0000, 0.4010, 0.0000]))
    """
    z, rows = median(log_alpha, out), log_alpha.view(log_alpha.shape[0], -1)
    # the largest row first, then the largest gate in it: argmax over all gates at once takes ten times as long
    row = rows.amax(1).argmax(0, keepdim=True)
    best = row * rows.shape[1] + rows.index_select(0, row).argmax(1)
    largest = z.view(-1).gather(0, best)  # if this one is closed, all are
    # torch.where and scatter_ in place of an if: whether the gate is closed is never read on the CPU
    z.view(-1).scatter_(0, best, torch.where(largest == 0, p_open(log_alpha.view(-1).gather(0, best)), largest))
    return z


def p_open(log_alpha: Tensor, out: Tensor | None = None) -> Tensor:
    """P(z != 0) of each gate."""
    return torch.add(log_alpha, SHIFT, out=out).sigmoid_()


def p_open_slope(log_alpha: Tensor) -> Tensor:
    """d P(z != 0) / d log_alpha of each gate."""
    return slope_at(p_open(log_alpha))


def slope_at(p: Tensor, out: Tensor | None = None) -> Tensor:
    """d P(z != 0) / d log_alpha of gates with P(z != 0) = p."""
    return torch.addcmul(p, p, p, value=-1, out=out)


def log_alpha_at(droprate: float) -> float:
    """The log_alpha of new gates, whose mean is about ``1 - droprate``."""
    return math.log((1 - droprate) / droprate)


def initial(shape: Sequence[int], droprate: float, generator: torch.Generator) -> Tensor:
    """log_alpha of new gates in float64: normal about that of ``droprate``, with a standard deviation of 0.01."""
    # the spread lets gates differ from the first step on; without it the gates of a layer would start as exact copies
    deviation = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    return (log_alpha_at(droprate) + 0.01 * deviation).clamp_(-LIMIT, LIMIT)


def expected_density(log_alphas: Iterable[Tensor], shares: Iterable[float]) -> Tensor:
    """Expected share of parameters behind an open gate, 0-d.

    Args:
        log_alphas: the gates of each layer; within a layer every gate multiplies the same number of parameters.
        shares: the share of each layer in all parameters of the constraint; the shares sum to 1.
    """
    return joint_density([mean_open(a) for a in log_alphas], shares)


def joint_density(means: Iterable[Tensor], shares: Iterable[float]) -> Tensor:
    """:func:`expected_density` of layers whose gates are open with the probabilities ``means``, 0-d each."""
    return torch.stack([share * mean for mean, share in zip(means, shares, strict=True)]).sum()


def ascend(multiplier: Tensor, defect: Tensor, rate: float, restarts: bool = True) -> Tensor:
    """The multiplier of ``density <= target`` after a step of ascent.

    Args:
        multiplier: the multiplier before the step, 0-d, not negative.
        defect: expected density minus target, 0-d.
        rate: learning rate of the ascent.
        restarts: whether the multiplier starts again from 0 as soon as the density is below its target (dual restarts).
    """
    risen = (multiplier + rate * defect).clamp_min(0)
    # without a restart the multiplier would go on closing gates for as many steps as it took to grow
    return torch.where(defect < 0, torch.zeros_like(risen), risen) if restarts else risen


def adam_direction(
    mean: Tensor, square: Tensor, step: Tensor, out: Tensor | None = None, root: Tensor | None = None
) -> Tensor:
    """The direction along which Adam takes a step (eps 1e-8).

    Args:
        mean, square: running means of the gradient and of its square, with :data:`BETAS`, the current gradient
            included.
        step: number of this step, counted from 1, 0-d.
    """
    root = torch.div(square, 1 - BETAS[1] ** step, out=root).sqrt_().add_(1e-8)
    return torch.div(mean, 1 - BETAS[0] ** step, out=out).div_(root)


def noise(like: Tensor, generator: torch.Generator, out: Tensor | None = None, bits: Tensor | None = None) -> Tensor:
    """Uniform numbers in (0, 1) of the shape, dtype and device of ``like``, in steps of 2^-16, symmetric about 0.5.

    With sixteen bits the probability of an open gate is wrong by less than 1e-5, in a third of the time that
    ``torch.rand`` takes. A generator of another device than that of ``like`` gives its seed only.

    Args:
        like: what the numbers resemble.
        generator: where they come from.
        out: memory for them, contiguous.
        bits: memory for int64 numbers, [ceil(n / 4)] for n elements of ``like``.
    """
    if generator.device.type != like.device.type:
        # numbers for single weights would take longer to carry to the device than to draw there
        generator = torch.Generator(like.device).manual_seed(generator.initial_seed())
    # each random int64 is read as four int16; 2^15 makes them positive, and 0.5 keeps them away from 0 and 1
    if bits is None:
        bits = torch.empty(math.ceil(like.numel() / 4), dtype=torch.int64, device=like.device)
    bits.random_(-(2**63), None, generator=generator)
    drawn = bits.view(torch.int16)[: like.numel()]
    found = drawn.to(like.dtype) if out is None else out.view(-1).copy_(drawn)
    return found.add_(2**15 + 0.5).mul_(2**-16).view(like.shape)


def channel_shape(shape: Sequence[int], transposed: bool = False) -> tuple[int, ...]:
    """Shape of a weight's gates, which broadcasts against it.

    A matrix has one gate for each of its inputs, a kernel one for each of its output channels.

    >>> channel_shape((20, 30)), channel_shape((8, 3, 5, 5)), channel_shape((3, 8, 5, 5), transposed=True)
    ((1, 30), (8, 1, 1, 1), (1, 8, 1, 1))
    """
    dimension = 1 if len(shape) == 2 or transposed else 0
    return tuple(n if i == dimension else 1 for i, n in enumerate(shape))


def mean_open(log_alpha: Tensor) -> Tensor:
    """Mean of P(z != 0) over all gates, 0-d."""
    return p_open(log_alpha).mean()


def log_alpha_gradient(
    gradient: Tensor, dense: Tensor, z: Tensor, out: Tensor | None = None, memory: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """d loss / d log_alpha of the gates of one parameter, in the shape of ``z``.

    Args:
        gradient: d loss / d (z * dense), in the parameter's shape.
        dense: the dense weights, in the parameter's shape; a vector is a bias of a convolution.
        z: the sample that multiplied the parameter; its gates repeat for a bias that is longer than ``z``.
        out: memory in the parameter's shape, which holds the result where ``z`` has that shape too.
        memory: two more in the shape of ``z``, used where it is the parameter's.
    """
    product = torch.mul(gradient.to(z), dense, out=out)
    if product.shape == z.shape:
        return product.mul_(slope(z, *(memory or ())))
    if z.ndim == product.ndim:
        return product.sum_to_size(z.shape) * slope(z)
    # a bias beside a kernel: in a transposed convolution with groups it holds several rounds of the kernel's gates
    return product.view(-1, z.numel()).sum(0).view(z.shape) * slope(z)
