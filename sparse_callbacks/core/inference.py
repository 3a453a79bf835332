"""Sparse layers for inference: products without gradients, by the fastest kernel for each batch."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.clock import milliseconds
from sparse_callbacks.core.inspection import copied
from sparse_callbacks.core.sparse_layers.live_places import GroupPlaces, LivePlaces, RowPlaces
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.storages.module_swap import enter_fast_paths, holders_of, leave_fast_paths, put_in, take_over
from sparse_callbacks.core.storages.storage_choice import linear_layers, why_not_exchanged
from sparse_callbacks.core.storages.storage_timing import MARGIN, PATIENCE, READINGS, are_clear

LEAST_SPARSITY = 0.5  # below it no product of live weights is faster than the dense one


class ForwardPlaces(RowPlaces):
    """Compressed rows alone, without the transposed form, which only gradients read."""

    def set_rows(self, crow: Tensor, col: Tensor, rows: Tensor) -> None:
        empty = torch.empty(0, dtype=torch.int32, device=col.device)
        self.replace(crow=crow, col=col, crow_t=empty, col_t=empty, perm=empty)


class InferenceLinear(SparseLinear):
    """A `SparseLinear` that gives no gradients and multiplies by the faster of two kernels; made by `to_inference`.

    Train mode changes nothing in it. ``state_dict`` is that of a `SparseLinear`.

    Attributes:
        crossing: The number of rows from which on a batch goes through the kernel of training; smaller ones are
            multiplied by torch's product of compressed rows.
    """

    crossing = 0

    def product(self, x: Tensor) -> Tensor:
        """What `forward` returns.

        Raises:
            ValueError: Gradients are asked for.
        """
        if torch.is_grad_enabled() and (x.requires_grad or self.values.requires_grad):
            raise ValueError(
                f"{self.name or 'a layer'} was made by to_inference and gives no gradients: take the module that it was made "
                "from, or run this one under torch.no_grad()"
            )
        if x.numel() >= self.crossing * self.in_features or torch.compiler.is_compiling():
            return super().product(x)
        return self.compressed_product(x)

    def compressed_product(self, x: Tensor) -> Tensor:
        """The product by torch's own kernel of compressed rows, which reads each live weight once for the whole batch."""
        places, values = self.places, self.values.detach()
        assert isinstance(places, RowPlaces)
        size = (self.out_features, self.in_features)
        # a view of three tensors, made in microseconds: the layer holds plain ones, which can be saved and moved
        matrix = torch.sparse_csr_tensor(places.crow, places.col, values[0], size, check_invariants=False)
        y = (matrix @ x.reshape(-1, self.in_features).to(values.dtype).t()).t()
        if self.bias is not None:
            y = y + self.bias
        if not self.feature_major:
            y = y.contiguous()
        return y.reshape(*x.shape[:-1], self.out_features)


@checked
def to_inference(module: nn.Module, rows: int | Sequence[int] = (1, 128)) -> nn.Module:
    """A copy of ``module`` in eval mode whose sparse layers are made for inference: faster, without gradients.

    Each `SparseLinear` becomes a layer that multiplies small batches by torch's product of compressed rows and larger
    ones by the kernel of training; from how many rows on is found out by timing, once for each kind of layer. An
    `nn.Linear` whose weights have at least half zeros, as after training with masks, becomes such a layer where that is
    faster for each of ``rows`` by a tenth at least. Nothing becomes slower than it is dense: where an `nn.Linear` with the
    same weights is faster, that is what stands there. Layers that `nn.Linear` subclasses or tied weights make stay as they
    are, and so does everything else.

    Call it on the machine and with the number of threads (`torch.set_num_threads`) with which the model will run. The
    copy has no gradients: ``requires_grad`` is False everywhere, and a backward pass through its sparse layers is refused.
    ``train()`` does no harm: it changes other layers, such as dropout, as ever. ``load_state_dict`` takes what the original
    module's ``state_dict`` holds, as long as weights live in the same places.

    Args:
        module: The module; it stays as it is.
        rows: The numbers of rows of its flattened input (the batch, times the length of its sequences) for which each
            layer is to be fast, such as 1 for single samples.

    Returns:
        The copy. Where ``module`` is a `SparseLinear` itself, it is of the class `InferenceLinear` or `nn.Linear`.

    Raises:
        ValueError: ``rows`` has no number, or one below 1.

    Example:
        >>> import torch
        >>> from sparse_callbacks import SparseLinear, to_inference
        >>> model = torch.nn.Sequential(SparseLinear.random(64, 128, fan_in=8), torch.nn.ReLU(), torch.nn.Linear(128, 4))
        >>> served = to_inference(model, rows=1)
        >>> x = torch.randn(1, 64)
        >>> torch.allclose(served(x), model(x), atol=1e-5)
        True
    """
    sizes = [rows] if isinstance(rows, int) else sorted(set(rows))
    if not sizes or sizes[0] < 1:
        raise ValueError(
            f"rows={rows!r}: give the numbers of rows for which layers are to be fast, such as 1 or (1, 128)"
        )
    made = copied(module).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.grad = None
    holders, known = holders_of(made), dict[tuple[object, ...], int | None]()
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in list(_candidates(made)):
            new = _fastest(layer, name, sizes, known)
            if new is not layer:
                take_over(layer, new)
                put_in(holders.get(id(layer), []), new)
                made = new if layer is made else made
    leave_fast_paths(made)
    enter_fast_paths(made)
    return made


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Linear | SparseLinear]]:
    """Sparse layers, and dense ones whose weights are mostly zeros, by name."""
    for weight, layer in linear_layers(model).items():
        module, name = layer.module, weight.rpartition(".")[0]
        if isinstance(module, SparseLinear):
            yield name, module
        elif isinstance(module, nn.Linear) and not why_not_exchanged(layer) and module.weight.device.type == "cpu":
            zeros = module.weight.numel() - int(module.weight.count_nonzero())
            if zeros >= LEAST_SPARSITY * module.weight.numel():
                yield name, module


def _fastest(
    layer: nn.Linear | SparseLinear, name: str, rows: Sequence[int], known: dict[tuple[object, ...], int | None]
) -> nn.Linear | InferenceLinear:
    """The layer for inference that is the fastest for batches of each of ``rows``.

    Args:
        layer: a sparse layer, or a dense one with zeros.
        name: its name.
        rows: ascending numbers of rows.
        known: what was found out for layers of the same kind: `InferenceLinear.crossing`, or None where dense is faster.
    """
    sparse = _inference_layer(layer, name)
    dense = layer if isinstance(layer, nn.Linear) else None if layer.is_too_large else layer.to_dense()
    kind = (sparse.storage, sparse.group, *sparse.places.values_shape, sparse.in_features, sparse.out_features)
    key = (*kind, sparse.live, sparse.values.dtype, sparse.values.device, sparse.bias is None)
    if key not in known:
        sparse.crossing = _crossing(sparse, rows[0], rows[-1])
        known[key] = sparse.crossing if dense is None or _is_faster(sparse, dense, rows) else None
    crossing = known[key]
    if crossing is None:
        assert dense is not None
        return dense
    sparse.crossing = crossing
    return sparse


def _inference_layer(layer: nn.Linear | SparseLinear, name: str) -> InferenceLinear:
    """The layer with the pattern of forward passes alone."""
    if isinstance(layer, nn.Linear):
        keys = layer.weight.reshape(-1).nonzero().flatten()
        places: LivePlaces = ForwardPlaces(layer.out_features, layer.in_features, keys)
        # modules around it may call .view on its outputs, as they could before
        return _named(InferenceLinear(places, places.read(layer.weight), layer.bias, feature_major=False), name)
    if layer.storage == "sparse":
        places = ForwardPlaces(layer.out_features, layer.in_features, layer.keys())
    else:
        places = GroupPlaces(layer.out_features, layer.in_features, layer.group, layer.keys())
    made = InferenceLinear(places, layer.values, layer.bias, feature_major=layer.feature_major)
    made.compact_state = layer.compact_state
    return _named(made, name)


def _named(layer: InferenceLinear, name: str) -> InferenceLinear:
    layer.name = name
    return layer.requires_grad_(False).eval()


# ---------------------------------------------------------------------- timing


def _crossing(layer: InferenceLinear, fewest: int, most: int) -> int:
    """The number of rows, in powers of two from ``fewest`` to ``most``, from which on the kernel of training is faster."""
    if layer.storage == "grouped" or not _has_compressed_product(layer):
        return 0
    sizes = [fewest]
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    low, high = 0, len(sizes)
    while low < high:  # the more rows, the better for it: its cost of a live weight's index is shared by them
        middle = (low + high) // 2
        layer.crossing = 0
        bag, compressed = _timed(_batch(layer, sizes[middle]), layer, layer.compressed_product)
        low, high = (low, middle) if bag <= compressed else (middle + 1, high)
    return sizes[low] if low < len(sizes) else sys.maxsize


def _is_faster(layer: InferenceLinear, dense: nn.Linear, rows: Sequence[int]) -> bool:
    """Whether a layer is faster than a dense one by a tenth at each number of rows."""
    for count in rows:
        mine, other = _timed(_batch(layer, count), layer, dense)
        if mine > MARGIN * other:
            return False
    return True


def _timed(x: Tensor, *products: Callable[[Tensor], Any]) -> list[float]:
    """Milliseconds that each of ``products`` takes for the batch."""
    calls = [partial(product, x) for product in products]
    own = x.device.type == "cpu" and torch.get_num_threads() == 1
    return milliseconds(calls, READINGS, [x.device], patience=PATIENCE, settled=are_clear, cpu_time=own)


def _batch(layer: InferenceLinear, rows: int) -> Tensor:
    """A batch that is drawn without a trace on the global random generators."""
    source = torch.Generator().manual_seed(0)
    return torch.rand(rows, layer.in_features, generator=source, device="cpu").to(layer.values)


def _has_compressed_product(layer: InferenceLinear) -> bool:
    """Whether torch has the product of compressed rows for the layer's type on this machine; it comes with MKL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once in a process that its compressed rows are in beta
        try:
            layer.compressed_product(_batch(layer, 1))
        except RuntimeError:
            return False
    return True
