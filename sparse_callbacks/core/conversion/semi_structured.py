"""Linear layers of 2:4 on the sparse tensor cores of a GPU, where a timing says that it pays."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.clock import milliseconds
from sparse_callbacks.core.conversion.candidates import holders_of_weights
from sparse_callbacks.core.error_text import first_line
from sparse_callbacks.core.inspection import copied
from sparse_callbacks.core.nm_masks import in_groups
from sparse_callbacks.core.plan import aligned
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.storages.storage_timing import MARGIN, PATIENCE, READINGS, are_clear

_TYPES = (torch.float16, torch.bfloat16)
_LEAST_CAPABILITY = (8, 0)
# torch reads the weights of layers inside them for kernels of its own
_READ_BY_TORCH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class CompressedLayer:
    """What became of one layer.

    Attributes:
        name: the name of its weight in ``named_parameters()``.
        shape: the shape of its weight.
        dense: milliseconds of its dense product; None where nothing was timed.
        compressed: milliseconds of the compressed one.
        reason: why it stays dense; empty where it is compressed.
    """

    name: str
    shape: tuple[int, ...]
    dense: float | None = None
    compressed: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class SemiStructured:
    """What `to_semi_structured` did. ``str()`` of it is the table.

    Attributes:
        layers: every linear layer and convolution, in the order of the network.
        rows: rows of the batch that was timed.
    """

    layers: tuple[CompressedLayer, ...]
    rows: int

    @property
    def compressed(self) -> list[str]:
        """Names of the weights that are compressed."""
        return [layer.name for layer in self.layers if not layer.reason]

    def __str__(self) -> str:
        head = ("parameter", "shape", "dense, ms", "2:4, ms", "why dense")
        body = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                *("" if ms is None else f"{ms:.4f}" for ms in (layer.dense, layer.compressed)),
                layer.reason,
            )
            for layer in self.layers
        ]
        title = f"2:4 products: {len(self.compressed)} of {len(self.layers)} layers, timed with {self.rows} rows"
        return "\n".join([title, *aligned([head, *body], rules=(1,), right=(2, 3))])


@checked
def to_semi_structured(module: nn.Module, rows: int = 1024) -> tuple[nn.Module, SemiStructured]:
    """A copy whose linear layers of 2:4 run on a GPU's sparse tensor cores, and what became of each.

    The weight of such an `nn.Linear`, in float16 or bfloat16, is compressed by torch's ``to_sparse_semi_structured``: half of the
    values, and two bits for each. A layer stays dense where its compressed product is not faster by a tenth at least with
    ``rows`` rows, and where torch or the device has none; the table says why. Convolutions stay: torch has no such product for
    them. On a CPU all layers stay.

    Call it on the GPU on which the model will run. The copy is in eval mode and gives no gradients.

    Args:
        module: the network, such as :func:`~sparse_callbacks.core.conversion.convert.convert` gives; it stays as it is.
        rows: rows of a layer's flattened input (the batch, times the length of its sequences) that are timed, at least 1.

    Returns:
        The copy and the table.

    Raises:
        ValueError: ``rows`` is below 1, or the module cannot be copied.

    Example:
        >>> import torch
        >>> from sparse_callbacks import to_semi_structured
        >>> served, table = to_semi_structured(torch.nn.Sequential(torch.nn.Linear(64, 32)))
        >>> table.layers[0].reason
        'on cpu: only GPUs of CUDA have 2:4 products'

    References:
        Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks"; torch.sparse, "semi-structured sparsity".
    """
    if rows < 1:
        raise ValueError(
            f"rows={rows!r} is no batch that could be timed. Give the rows of a layer's flattened input, such as 1024."
        )
    made = copied(module).eval().requires_grad_(False)
    holders = holders_of_weights(made)
    parents = {id(child): parent for parent in made.modules() for child in parent.children()}
    layers = []
    with torch.inference_mode(False), torch.no_grad():
        for name, parameter in list(made.named_parameters()):
            held = holders[id(parameter)]
            if name.rpartition(".")[2] != "weight" or not isinstance(held[0][1], nn.Linear | SparseLinear | _ConvNd):
                continue
            layer = held[0][1]
            row = CompressedLayer(
                name, tuple(parameter.shape), reason=_why_uncompressed(layer, len(held), parents.get(id(layer)))
            )
            layers.append(row if row.reason else _compressed(layer, row, rows))
    return made, SemiStructured(tuple(layers), rows)


def _why_uncompressed(layer: nn.Module, holders: int, parent: nn.Module | None) -> str:
    """Why a layer stays dense without a try; empty where one is made."""
    if isinstance(layer, _ConvNd):
        return "a convolution, for which torch has no 2:4 product"
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, which may compute otherwise than nn.Linear"
    if holders > 1:
        return "tied: several modules have this weight"
    if isinstance(parent, _READ_BY_TORCH):
        return f"inside of a {type(parent).__name__}, whose kernel reads the dense weight"
    weight = layer.get_parameter("weight")
    if why := why_not_on(weight.device):
        return why
    if weight.dtype not in _TYPES:
        kind = str(weight.dtype).removeprefix("torch.")
        return f"{kind}: 2:4 products are of float16 and bfloat16, which module.to(torch.bfloat16) makes it"
    return _why_not_two_of_four(weight)


def why_not_on(device: torch.device) -> str:
    """Why a device has no 2:4 products; empty where it has."""
    if device.type != "cuda":
        return f"on {device.type}: only GPUs of CUDA have 2:4 products"
    found = torch.cuda.get_device_capability(device)
    if found < _LEAST_CAPABILITY:
        return f"its GPU has compute capability {found[0]}.{found[1]}, and 2:4 products come with 8.0"
    return ""


def _why_not_two_of_four(weight: Tensor) -> str:
    if weight.shape[1] % 4:
        return f"{weight.shape[1]} inputs do not divide into groups of 4"
    full = int((in_groups(weight != 0, 4).sum(-1) > 2).sum())
    return f"not 2:4: {full:,} of {weight.numel() // 4:,} groups have more than two weights" if full else ""


def _compressed(layer: nn.Module, row: CompressedLayer, rows: int) -> CompressedLayer:
    """What became of a layer whose weight is compressed if that pays."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    x = torch.rand(rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        sparse = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
        calls: list[Callable[[], Any]] = [partial(functional.linear, x, w, bias) for w in (weight, sparse)]
        dense, compressed = milliseconds(calls, READINGS, [weight.device], patience=PATIENCE, settled=are_clear)
    except (RuntimeError, NotImplementedError) as error:  # sizes that the kernels lack, or a torch built without them
        return replace(row, reason=f"torch cannot compress it: {first_line(error)}")
    row = replace(row, dense=dense, compressed=compressed)
    if compressed > MARGIN * dense:
        return replace(row, reason="its 2:4 product is not faster by a tenth")
    layer.register_parameter("weight", nn.Parameter(sparse, requires_grad=False))
    return row
