"""AllReLU: the activation of truly sparse multilayer perceptrons."""

import math
from numbers import Integral, Real

from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.core.state_layout import shown_short


class AllReLU(nn.Module):
    """All-ReLU: negative inputs times -alpha in even and +alpha in odd hidden layers (Curci et al., 2021)::

        f(x) = x            where x > 0
        f(x) = -alpha * x   else, in an even layer
        f(x) = +alpha * x   else, in an odd layer

    Hidden layers are counted from 0, so that the first one has the slope -alpha, as in the released code. There are no
    parameters and no state. Elementwise: the output has the shape of the input.

    Args:
        alpha: the magnitude of the slope of negative inputs, at least 0; 0 is ReLU.
        layer: the number of the hidden layer that it follows, from 0.

    Raises:
        ValueError: ``alpha`` is not a finite number of at least 0, or ``layer`` not a whole number of at least 0.

    Example:
        >>> import torch
        >>> from sparse_callbacks import AllReLU
        >>> AllReLU(layer=0)(torch.tensor([-2.0, 1.5])), AllReLU(layer=1)(torch.tensor([-2.0, 1.5]))
        (tensor([1.2000, 1.5000]), tensor([-1.2000,  1.5000]))

    Reference: Curci, Mocanu, Pechenizkiy: Truly Sparse Neural Networks at Scale. arXiv 2102.01732, 2021, section 3.
    """

    def __init__(self, alpha: float = 0.6, *, layer: int) -> None:
        super().__init__()
        _refuse(alpha, layer)
        self.alpha, self.layer = float(alpha), int(layer)

    @property
    def slope(self) -> float:
        """The factor of negative inputs."""
        return self.alpha if self.layer % 2 else -self.alpha

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with its negative entries times :attr:`slope`.

        Args:
            x: a tensor of any shape.
        """
        return functional.leaky_relu(x, self.slope)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, layer={self.layer}"


def _refuse(alpha: object, layer: object) -> None:
    number = isinstance(alpha, Real) and not isinstance(alpha, bool) and math.isfinite(alpha)
    if not (number and float(alpha) >= 0):  # type: ignore[arg-type]
        raise ValueError(
            f"alpha={shown_short(alpha)} is not the magnitude of a slope: a finite number of at least 0. The published one is 0.6."
        )
    if isinstance(layer, bool) or not isinstance(layer, Integral) or int(layer) < 0:
        raise ValueError(
            f"layer={shown_short(layer)} is not the number of a hidden layer. Give 0 for the first one, 1 for the second, and so on."
        )
