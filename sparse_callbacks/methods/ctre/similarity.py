"""How alike the two neurons of every possible connection fire: cosine similarity of activations over samples.

Sums first, cosines last: dot products and squared norms add up over batches and ranks, cosines do not.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparse_callbacks.core.largest import widened
from sparse_callbacks.core.ops import keep_largest

SMALLEST = 1e-12  # squared norms below count as this (Atashgahi et al. 2022, the code's l2_normalize)


@dataclass
class CosineSums:
    """Dot products and squared norms of a layer's input and output activations, summed over samples.

    For a kernel the samples are the positions of its output, and each of its offsets is an input neuron of its own (our
    extension: the paper has matrices only).

    Attributes:
        dots: [out, in / groups, *kernel], the weight's shape (a transposed convolution's: [in, out / groups, *kernel]).
        rows: [out], float64; squared norms of what dimension 0 of the weight stands for.
        columns: [groups, in / groups, *kernel], float64.
        batches: how many were added, 0-dimensional float64.
    """

    dots: Tensor
    rows: Tensor
    columns: Tensor
    batches: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What adds up over ranks."""
        return self.dots, self.rows, self.columns, self.batches


def empty_sums(module: nn.Module, weight: Tensor) -> CosineSums:
    """Sums over no sample, in at least float32, on the device of ``weight``."""
    groups = module.groups if isinstance(module, _ConvNd) else 1
    double = {"dtype": torch.float64, "device": weight.device}
    return CosineSums(
        torch.zeros(weight.shape, dtype=widened(weight.dtype), device=weight.device),
        torch.zeros(weight.shape[0], **double),  # type: ignore[call-overload]
        torch.zeros(groups, *weight.shape[1:], **double),  # type: ignore[call-overload]
        torch.zeros((), **double),  # type: ignore[call-overload]
    )


@torch.no_grad()
def add_batch(sums: CosineSums, module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
    """Add a batch to ``sums``, in place.

    Args:
        sums: of the layer.
        module: an ``nn.Linear`` or a convolution.
        inputs: [*, in] or [batch, in, *space], as they enter the layer.
        outputs: [*, out] or [batch, out, *space], after the activation, in the shape that the layer's output has.
    """
    x, a = inputs.to(sums.dots.dtype), outputs.to(sums.dots.dtype)
    sums.batches += 1
    if not isinstance(module, _ConvNd):
        x, a = x.reshape(-1, x.shape[-1]), a.reshape(-1, a.shape[-1])
        sums.dots.addmm_(a.t(), x)
        sums.rows += _square_sum(a, 1)
        sums.columns += _square_sum(x, 1)
        return
    space = len(module.kernel_size)
    x, a = (t if t.dim() == space + 2 else t.unsqueeze(0) for t in (x, a))
    geometry: dict[str, Any] = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    if isinstance(module, _ConvTransposeNd):  # it scatters what a convolution gathers: the two sides change places
        x, a = a, x
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        geometry["padding"] = (0,) * space
    else:
        geometry["padding"] = module.padding
    # the dot products over positions are what the gradient of a kernel is made of
    sums.dots += _kernel_gradient(x, a, sums.dots.shape, **geometry)
    sums.rows += _square_sum(a, 1)
    squares = x.double().square().sum(0, keepdim=True)
    ones = torch.ones_like(a[:1, :1], dtype=torch.float64).expand(1, squares.shape[1], *a.shape[2:])
    geometry["groups"] = squares.shape[1]
    sums.columns += _kernel_gradient(squares, ones, (squares.shape[1], 1, *sums.dots.shape[2:]), **geometry).view_as(sums.columns)


def _square_sum(t: Tensor, keep: int) -> Tensor:
    """Squared norms [size of dimension ``keep``] in float64; a batch's share is summed in the type that it has."""
    others = [d for d in range(t.dim()) if d != keep]
    return t.square().sum(others).double()


def _kernel_gradient(x: Tensor, grad: Tensor, shape: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """sum over n, p of grad[n, o, p] x[n, i, stride p + dilation k - padding], of ``shape`` [o, i / groups, *k]."""
    kernel = x.new_empty(1).expand(tuple(shape))
    zeros = [0] * (x.dim() - 2)
    found: Tensor = torch.ops.aten.convolution_backward(
        grad.contiguous(), x, kernel, None, stride, padding, dilation, False, zeros, groups, (False, True, False)
    )[1]
    return found


@torch.no_grad()
def cosine(sums: CosineSums) -> Tensor:
    """|<a_p, b_q>| / (|a_p| |b_q|) of the weight's shape, in [0, 1]; a neuron that never fires is like no other (0, never NaN).

    The result takes the place of ``sums.dots``, so that one layer's similarity needs no second buffer.
    """
    result, rows, columns = sums.dots, sums.rows, sums.columns
    groups, space = columns.shape[0], (1,) * (result.dim() - 2)
    grouped = result.view(groups, -1, *result.shape[1:])
    grouped /= rows.clamp(min=SMALLEST).sqrt_().to(result.dtype).view(groups, -1, 1, *space)
    grouped /= columns.clamp(min=SMALLEST).sqrt_().to(result.dtype).unsqueeze(1)
    return result.abs_().nan_to_num_(0.0, 0.0, 0.0).clamp_(max=1.0)


def as_probabilities(outputs: Tensor, dimension: int) -> Tensor:
    """Activations of an output layer from the network's ``outputs``: softmax of logits along ``dimension``.

    Probabilities stay as they are (nonnegative, with sum 1), and so does a single output, of which softmax would make a constant.
    """
    if outputs.shape[dimension] == 1:
        return outputs
    sums = outputs.float().sum(dimension)
    if bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2):  # bfloat16 has 3 digits
        return outputs
    return outputs.softmax(dimension, dtype=widened(outputs.dtype))


def feature_dimension(module: nn.Module, outputs: Tensor) -> int:
    """Which dimension of a layer's output counts its neurons."""
    return outputs.dim() - 1 - len(module.kernel_size) if isinstance(module, _ConvNd) else outputs.dim() - 1


def layers_of(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, nn.Module]]:
    """(parameter's name, module) for every module that holds one of ``params`` as its weight; tied weights have several.

    Raises:
        ValueError: a parameter of a module that is neither linear nor a convolution.
    """
    names = {id(p): name for name, p in params.items()}
    held = [(names[id(p)], m) for m in model.modules() for p in m._parameters.values() if p is not None and id(p) in names]
    unknown = {n: m for n, m in held if not isinstance(m, nn.Linear | _ConvNd) or isinstance(m, NonDynamicallyQuantizableLinear)}
    if unknown:
        raise ValueError(
            f"{', '.join(f'{n} ({_kind(m)})' for n, m in unknown.items())}: the activations on both sides are not known, as similarity "
            f"is defined for linear layers and convolutions. Leave them out: exclude={sorted(unknown)}, or a glob that matches them."
        )
    yield from held


def _kind(module: nn.Module) -> str:
    # torch's attention holds its output projection in such a layer and never calls it
    return "an attention" if isinstance(module, NonDynamicallyQuantizableLinear | nn.MultiheadAttention) else type(module).__name__


def propose(mask: Tensor, weight: Tensor, similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions that stay, and the ``count`` most similar of all others (bool, of the weight's shape).

    The active weights with the largest magnitude stay, all but ``count``. Proposals may have been dropped just now. Of equal
    scores the lower index counts as the larger (Atashgahi et al. 2022, algorithm 1).

    Raises:
        ValueError: ``count`` exceeds the active positions.
    """
    kept = keep_largest(weight, int(mask.count_nonzero()) - count, among=mask)
    return kept, keep_largest(similarity, count, among=~kept)


def explore(mask: Tensor, kept: Tensor, proposed: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Proposals that were inactive, and as many others as were just dropped, drawn from neither kept nor accepted ones.

    Args:
        mask: before the update.
        kept, proposed: of :func:`propose`.
        draw: random numbers in [0, 1) of the weight's shape; the largest win.

    Returns:
        Accepted and drawn positions (Atashgahi et al. 2022, algorithm 2, CTRE_sim); with ``kept`` as many as ``mask`` has.
    """
    accepted = proposed & ~mask
    return accepted, keep_largest(draw, int((proposed & mask).count_nonzero()), among=~(kept | accepted))


@dataclass
class Grown:
    """What an update grew: counts by origin, and the sum of the similarities."""

    similar: int = 0
    drawn: int = 0
    similarity: float = 0.0

    def add(self, similarity: Tensor, grown: Tensor) -> None:
        self.similar += int(grown.count_nonzero())
        self.similarity += float(similarity[grown].sum())

    def figures(self) -> dict[str, float]:
        every = max(1, self.similar + self.drawn)
        mean = {"mean_similarity": self.similarity / self.similar} if self.similar else {}
        return {"by_similarity": self.similar / every, "at_random": self.drawn / every, **mean}


def growth_bound(shape: Sequence[int]) -> float:
    """b of U(-b, b) for new weights of a layer (out, in, *kernel): sqrt(6 / n_in), n_in counting kernel positions.

    >>> round(growth_bound((10, 600)), 6)
    0.1
    """
    return math.sqrt(6 / math.prod(shape[1:]))
