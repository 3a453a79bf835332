"""Least squares on a mask's support: a layer's inputs as second moments, and the normal equations."""

import torch
from torch import Tensor, nn

from sparse_callbacks.core.conversion.layer_products import input_rows, samples_of

RIDGE = 1e-8
"""What is added to the diagonal of normal equations that are scaled to a diagonal of ones."""
REFINEMENTS = 3
"""Solutions that are added up, each of the equations' rest: the ridge would else bend directions that are well known."""
SOLVED = 2**25
"""Entries of the matrices that are solved at once: 256 MB in float64."""


class Moments:
    """Sums of products of a layer's inputs, of which every error of its outputs follows.

    Convolutions are products with unfolded inputs. Where the layer has a bias, the last input is always 1.

    Args:
        layer: a linear layer, or a convolution that is not transposed.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._sums: Tensor | None = None
        self.rows = 0
        """Rows that were added: positions of samples."""

    @property
    def matrix(self) -> Tensor:
        """The sum over rows of ``x x^T``, in float64: ``[groups, size, size]``."""
        assert self._sums is not None
        return self._sums

    @property
    def kept(self) -> list[Tensor]:
        """All that is kept of the inputs."""
        return [self.matrix]

    def add(self, x: Tensor) -> None:
        """Add what the layer has read in one call."""
        # squares of ill-conditioned inputs need float64, which some devices lack
        x = samples_of(self._layer, x.cpu() if x.device.type == "mps" else x)
        for rows in input_rows(self._layer, x.double()):
            if self._layer._parameters.get("bias") is not None:
                rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
            products = rows.mT @ rows
            self._sums = products if self._sums is None else self._sums.add_(products)
            self.rows += rows.shape[1]

    def mean_square(self, weight: Tensor) -> float:
        """The mean square of outputs with given weights, over rows and outputs.

        Args:
            weight: ``[outputs, size]``, float64: a difference of weights gives the mean squared error.
        """
        by_group = weight.view(len(self.matrix), -1, weight.shape[1])
        return float(((by_group @ self.matrix) * by_group).sum()) / (self.rows * len(weight))


def refit(matrix: Tensor, weight: Tensor, active: Tensor, damping: float = 0.0) -> Tensor:
    """Weights on a mask's support whose outputs are closest to those of the dense weights, in the mean square.

    For each output with support S, removed inputs R and second moments H of the inputs::

        v_S = w_S + d,    (H_SS + damping diag(H_SS)) d = H_SR w_R

    Damping keeps weights close to what they were along directions that the rows hardly show: without it outputs on other data are far
    off where there are about as many rows as weights. Where the equations leave d open (inputs that are always zero, or depend on each
    other; fewer rows than weights) it is the smallest one, each input being measured by its root mean square: what the data does not
    say stays as it was.

    Args:
        matrix: second moments, float64, ``[groups, size, size]``, positive semidefinite.
        weight: dense weights, float64, ``[outputs, size]``; the outputs of a group follow each other.
        active: bool, of the shape of ``weight``, True on the support.
        damping: a share of each input's own second moment; 0 is the optimum on these rows.

    Returns:
        The weights, ``[outputs, size]``, zero off the support.

    References:
        Hubara et al. 2021, "Accelerated Sparse Neural Training" (AdaPrune), whose objective this is; the authors take steps of
        Adam.
    """
    most = int(active.sum(1).max())
    if most == 0:
        return torch.zeros_like(weight)
    groups, size = len(matrix), weight.shape[1]
    group = torch.arange(len(weight), device=weight.device) // (len(weight) // groups)
    sought = (weight.masked_fill(active, 0).view(groups, -1, size) @ matrix).view_as(weight)
    # outputs with fewer active weights are filled up with others, each of which gets an equation of its own
    support = active.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    known, sought = active.gather(1, support), sought.gather(1, support)
    at_once = max(1, SOLVED // most**2)
    parts = zip(*(torch.split(t, at_once) for t in (group, support, known, sought)), strict=True)
    change = torch.cat([_changes(matrix, damping, *part) for part in parts])
    return weight.masked_fill(~active, 0).scatter_add(1, support, change)


def _changes(matrix: Tensor, damping: float, group: Tensor, support: Tensor, known: Tensor, sought: Tensor) -> Tensor:
    """The changes of the weights at ``support``, zero where it is not ``known`` to be active."""
    moments = matrix[group[:, None, None], support[:, :, None], support[:, None, :]]
    return _smallest_solution(moments * (known[:, :, None] & known[:, None, :]), sought * known, damping)


def _smallest_solution(moments: Tensor, sought: Tensor, damping: float) -> Tensor:
    """The smallest x in scaled units with damped ``moments x = sought``: ``[batch, k, k]``, ``[batch, k]`` to ``[batch, k]``."""
    scale = moments.diagonal(dim1=1, dim2=2)
    scale = torch.where(scale > 0, scale, 1).rsqrt()
    moments, sought = moments * scale[:, :, None] * scale[:, None, :], (sought * scale)[..., None]
    unit = torch.eye(moments.shape[1]).to(moments)
    moments = moments + damping * unit
    factor = torch.linalg.cholesky(moments + RIDGE * unit)
    x = torch.zeros_like(sought)
    for _ in range(REFINEMENTS):
        x = x + torch.cholesky_solve(sought - moments @ x, factor)
    return x[..., 0] * scale
