"""A trained network, dense or unstructured, becomes one of N:M (AdaPrune)."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.conversion.candidates import chosen_weights
from sparse_callbacks.core.conversion.input_passes import recorded_inputs
from sparse_callbacks.core.conversion.layer_fits import FitName, LayerFit, fitted
from sparse_callbacks.core.conversion.report import Conversion, ConvertedLayer
from sparse_callbacks.core.given_batches import iterated_apart
from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.inspection import copied
from sparse_callbacks.core.nm_masks import NMPattern, nm_pattern
from sparse_callbacks.core.nm_selection import chosen_in_groups
from sparse_callbacks.core.running_statistics import norms_with_statistics, recalibrate_batchnorm
from sparse_callbacks.core.selection import Entry, KeepDense, patterns
from sparse_callbacks.core.state_layout import shown_short


@checked
def convert(
    model: nn.Module,
    pattern: str = "2:4",
    *,
    data: Iterable[Any],
    fit: FitName = "adaprune",
    damping: float = 0.01,
    norms: bool = True,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    keep_dense: KeepDense | None = "both",
    forward: Forward | None = None,
) -> tuple[nn.Module, Conversion]:
    """A copy of a trained network, dense or unstructured, whose layers have N:M weights, and what that did to each layer.

    The N largest ``|w|`` of each group stay. Then, layer by layer and on the inputs X that the network as given has there, the
    weights V on the mask's support, and the bias, are those with the smallest ::

        ||X V^T + c - (X W^T + b)||^2

    plus ``damping`` times the squared changes of kept weights, each in units of its input's mean square.
    Up to 4,096 inputs of an output (those of all kernel positions) the normal equations are solved, for each output on its own
    support; wider layers and transposed convolutions take 1,000 steps of Adam, from the masked weights or from those with absorbed
    means, whichever have the smaller error. A layer keeps the masked weights if nothing has a smaller error than they. At the end batch
    norms are estimated anew.

    Differs from the paper: it takes Adam's steps in all layers, without damping, and starts from absorbed means always. Positions that
    were zero before may become active where a group had more zeros than it needs.

    Args:
        model: the network, in eval mode; it stays as it is, also where this fails.
        pattern: ``"N:M"``, groups of M consecutive inputs (input channels at one kernel position) of which N stay; or
            ``"transposable N:M"``, where N of M consecutive outputs of an input stay too.
        data: batches that the network runs on, without labels or with: a loader, or a list. It is iterated several times. A few
            hundred samples do for convolutions; a linear layer needs more rows than an output has weights.
            Kept in memory are sums of products, up to 1 GiB at a time, and all inputs of one layer that takes steps.
        fit: ``"adaprune"``, as above; or for comparison ``"masked"``, the masked weights as they are, or ``"absorbed"``, where each
            kept weight takes its share of what its group has lost.
        damping: how strongly normal equations hold weights back, from 0; without it a layer with about as many rows of data as an output
            has weights is fitted to the rows and to nothing else. Layers that are fitted by steps of Adam do not use it.
        norms: whether the running statistics of batch norms are estimated anew at the end.
        include: globs over names of weights that are converted; None: those of all supported layers except embeddings.
        exclude: globs over names of weights that stay dense.
        keep_dense: ``"both"``, the first and the last layer stay dense; ``"first"``, ``"last"`` or None.
        forward: a function of the network and a batch that runs it. None: it is called with the tensor, the first part of a
            tuple or list, or the entries of a mapping by name.

    Returns:
        The converted copy, in eval mode, and a :class:`~sparse_callbacks.core.conversion.report.Conversion`: print it for the
        table. Its ``checkpoint(copy)`` holds the masks too, and ``Static(from_checkpoint=...)`` trains on under them.

    Raises:
        ValueError: an unknown pattern, or a glob without a match; a network in train mode or that cannot be copied; no data, or an
            iterator, which ends after one pass; data that the network does not take; inputs that are not finite; no layer that fits. Single
            layers that do not fit stay dense, and the table says why.

    Example:
        >>> import torch
        >>> from sparse_callbacks import convert
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 2))
        >>> smaller, report = convert(net.eval(), "2:4", data=[torch.randn(64, 8)])
        >>> int((smaller[2].weight != 0).sum()), report["2.weight"].after < report["2.weight"].before
        (128, True)

    References:
        Hubara et al. 2021, "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks".
    """
    wanted = nm_pattern(pattern)
    if wanted is None:
        raise ValueError(
            f"pattern={pattern!r} names no pattern that a network is converted to. Give 'N:M' with N below M, such as '2:4', or "
            "'transposable N:M'."
        )
    if not 0 <= damping < math.inf:
        raise ValueError(
            f"damping={damping!r} is not a number from 0 on, so weights would not be held back. Give 0.01, or 0 for none."
        )
    _refuse_train_mode(model)
    _refuse_no_collection(data)
    globs = patterns(include, "include"), patterns(exclude, "exclude")
    with torch.inference_mode(False), torch.no_grad():
        made = copied(model)
        entries, layers = chosen_weights(made, wanted, *globs, keep_dense)
        masks = {name: _mask_of(name, layer, wanted) for name, layer in layers.items()}
        # the inputs are those of the network as given, so all layers see them as they were
        given = {name: model.get_submodule(name.rpartition(".")[0]) for name in layers}
        fits: dict[str, LayerFit] = {}
        batches = 0
        for recorders, count in recorded_inputs(model, given, data, forward):
            batches = count
            called = {name: recorder for name, recorder in recorders.items() if recorder.rows}
            fits |= {
                n: fitted(layers[n], recorder, masks[n], wanted, fit, float(damping)) for n, recorder in called.items()
            }
        _refuse_no_calls(fits, layers)
        for name, found in fits.items():
            new = {"weight": found.weight} | ({} if found.bias is None else {"bias": found.bias})
            layers[name].load_state_dict(new, strict=False)
    estimated = norms_with_statistics(made) if norms else []
    if estimated:
        with iterated_apart(data) as apart:
            recalibrate_batchnorm(made, apart, forward=forward)
    rows = tuple(_row(entry, masks.get(entry.name), fits.get(entry.name)) for entry in entries)
    converted = {name: masks[name] for name in fits}
    return made, Conversion(pattern, rows, converted, batches, _sparsity_of(given, fits), len(estimated))


def _refuse_train_mode(model: nn.Module) -> None:
    if training := [path or "it" for path, module in model.named_modules() if module.training]:
        raise ValueError(
            f"model={type(model).__name__} is in train mode ({', '.join(training[:3])}), in which norms and dropout give layers "
            "other inputs than those of the trained network. Call model.eval() first."
        )


def _refuse_no_collection(data: Iterable[Any]) -> None:
    if isinstance(data, Tensor | str | bytes | Mapping):
        raise ValueError(f"data={shown_short(data)} is not a collection of batches. Give a loader, or a list: [batch].")
    if isinstance(data, Iterator):
        raise ValueError(
            f"data={shown_short(data)} is an iterator, which gives its batches once, and several passes are needed. Give a loader, "
            "or list(...) of it."
        )


def _refuse_no_calls(fits: Mapping[str, LayerFit], layers: Mapping[str, nn.Module]) -> None:
    if not fits:
        raise ValueError(
            f"data= calls none of the layers that fit the pattern: {', '.join(layers)}. Give batches that the network runs on, or "
            "forward=, a function of the network and a batch."
        )


def _mask_of(name: str, layer: nn.Module, pattern: NMPattern) -> Tensor:
    """The mask of the largest magnitudes, with N in each group; if transposable, with N in each row and column of a tile.

    Raises:
        ValueError: a weight is inf or NaN.
    """
    weight = layer.get_parameter("weight").detach()
    if not bool(weight.isfinite().all()):
        raise ValueError(
            f"{name} holds inf or NaN, so nobody knows which of its weights are the largest. Give a network that was trained without."
        )
    axis = 0 if isinstance(layer, _ConvTransposeNd) else 1
    return chosen_in_groups(weight.abs(), pattern, axis)


def _row(entry: Entry, mask: Tensor | None, fit: LayerFit | None) -> ConvertedLayer:
    if mask is None or fit is None:
        reason = entry.reason or "not called on the data"
        return ConvertedLayer(entry.name, entry.full_shape, entry.size, entry.size, reason=reason)
    kept = int(mask.sum())
    return ConvertedLayer(
        entry.name,
        entry.full_shape,
        entry.size,
        kept,
        before=fit.before,
        after=fit.after,
        power=fit.power,
        how=fit.how,
        rows=fit.rows,
        active=kept // entry.shape[0],
    )


def _sparsity_of(layers: Mapping[str, nn.Module], names: Iterable[str]) -> float:
    weights = [layers[name].get_parameter("weight") for name in names]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
