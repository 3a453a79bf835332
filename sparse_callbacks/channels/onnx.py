"""Exports a model to ONNX, runs the file in onnxruntime and compares the outputs."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.errors import OnnxExporterError

from sparse_callbacks.channels.comparison import Difference, compare, outputs_on, why_not_equal
from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.inspection import copied, extra, map_tensors, quiet, tensors_in
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.storages.exchange import to_dense
from sparse_callbacks.core.storages.module_swap import holders_of, put_in


@checked
def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Any,
    tolerance: float | None = None,
    dynamic_batch: bool = True,
) -> Difference:
    """Write ``model`` in eval mode to ``path`` as ONNX, run it in onnxruntime and compare outputs on ``example_input``.

    A `SparseLinear` of storage "grouped" is written at the size of its live weights, as Gather and MatMul. One of storage
    "sparse" is written as a dense matrix with zeros, and a warning says so: ONNX has no product with a matrix in compressed
    rows, and what torch's kernel would be written as, a loop over the rows, took 14 to 60 times as long as the dense product.

    Args:
        model: a model, such as :func:`~sparse_callbacks.channels.slim.slim` returns; its modes stay as they are.
        path: the file to write.
        example_input: a tensor, a tuple of positional arguments or a mapping of named arguments.
        tolerance: largest relative difference that counts as equal. None: by the type of each output, 1e-8 for float64,
            1e-4 for float32, 5e-2 below. Integers and bools must be the same.
        dynamic_batch: whether the file takes batches of any size, where dimension 0 of every input is the batch. If the
            model cannot be exported like that, or computes something else, the file takes batches of the size of
            ``example_input``, and a warning says so.

    Returns:
        the largest difference of the outputs.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime (extra ``onnx``) is missing.
        ValueError: onnxruntime computes something else, or cannot run the file, for example as it has no convolutions
            of the model's type, or the model cannot be exported at all.

    Example:
        >>> import torch
        >>> from sparse_callbacks import export_onnx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> difference = export_onnx(net, "net.onnx", torch.randn(3, 4))
        >>> difference.relative < 1e-4
        True
    """
    # asked for before the export, which takes far longer
    for module in ("onnx", "onnxscript", "onnxruntime"):
        extra(module, "onnx")
    path = Path(path)
    if any(isinstance(m, SparseLinear) for m in model.modules()):
        model, rows = _without_rows(model)
        if rows:
            message = (
                f"{path} holds {', '.join(rows)} as dense matrices with zeros, as ONNX has no product with unstructured live "
                "weights that is faster. Layers of storage='grouped' are written at the size of their live weights."
            )
            warnings.warn(message, stacklevel=2)
    with quiet(model):
        if dynamic_batch:
            try:
                # at two sizes: a graph may hold the traced size as a constant, and fail only with another
                return _written(model, path, [example_input, _larger(example_input)], tolerance)
            except Exception as error:  # whatever the exporter makes of a model that is not made for other sizes
                # some errors quote whole tensors, so only the beginning is shown
                reason = with_class(_cause(error))[:300]
        try:
            found = _written(model, path, [example_input], tolerance)
        except OnnxExporterError as error:
            raise ValueError(
                f"{type(model).__name__} cannot be exported to ONNX ({with_class(_cause(error))[:300]}). A forward pass in "
                "which Python code decides by values of tensors, such as how many tokens an expert gets, has no graph of its "
                "own: write it with operations on whole tensors. The exporter's whole report is the cause of this error."
            ) from error
    if dynamic_batch:
        message = f"{path} takes batches of the size of example_input only. With another size: {reason}"
        warnings.warn(message, stacklevel=2)
    return found


def _without_rows(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy of ``model`` whose layers of storage "sparse" are dense, and their names."""
    model = copied(model)
    holders, found = holders_of(model), []
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SparseLinear) and layer.storage == "sparse":
            dense = to_dense(layer)
            put_in(holders.get(id(layer), []), dense)
            model = dense if layer is model else model
            found.append(name or "the model")
    return model, found


def _written(model: nn.Module, path: Path, samples: Sequence[Any], tolerance: float | None) -> Difference:
    """Export ``model`` and compare outputs on every sample.

    Args:
        model: in the state of :func:`~sparse_callbacks.core.inspection.quiet`.
        path: the file to write.
        samples: inputs. If there are several, of different batch sizes, the last one is traced with a batch of any
            size; a single one is traced with the sizes that it has.
        tolerance: see :func:`~sparse_callbacks.channels.comparison.why_not_equal`.

    Returns:
        the largest difference.

    Raises:
        ValueError: onnxruntime computes something else, or cannot run the file.
    """
    # before the export: if the model fails on a sample, its own error is shorter than the exporter's
    expected = [t.cpu() for t in outputs_on(model, samples)]
    # the last and larger one: torch.export takes a batch of 1 for a constant
    _export(model, path, samples[-1], dynamic=len(samples) > 1)
    try:
        found = _run(path, samples)
    except Exception as error:  # onnxruntime has classes of its own
        raise ValueError(
            f"onnxruntime cannot run {path} ({type(error).__name__}: {error}). On the CPU it lacks operations for some "
            "types, such as convolutions in float64 and bfloat16: give the model and example_input in float32."
        ) from error
    difference = compare(expected, found)
    if why_not_equal(expected, found, tolerance):
        allowed = "the default of each type" if tolerance is None else f"tolerance={tolerance:g}"
        raise ValueError(
            f"onnxruntime computes something else from {path}: {difference}, and {allowed} is allowed. Compare on "
            "inputs of real data, or give a larger tolerance=."
        )
    return difference


def _export(model: nn.Module, path: Path, sample: Any, dynamic: bool) -> None:
    """Write the file, traced on ``sample``; ``dynamic``: it takes batches of any size."""
    named = dict(sample) if isinstance(sample, Mapping) else None
    positional: tuple[Any, ...] = ()
    if named is None:
        positional = tuple(sample) if isinstance(sample, tuple | list) else (sample,)
    # by the arguments of forward, as torch.export compares them: *args is a tuple in itself, **kwargs a mapping
    bound = inspect.signature(model.forward).bind(*positional, **(named or {})).arguments if dynamic else {}
    shapes = _dynamic_shapes(dict(bound)) if dynamic else None
    if positional and isinstance(positional[-1], dict):
        positional += ({},)  # torch.onnx.export takes a last mapping for named arguments
    torch.onnx.export(
        model,
        positional,
        str(path),
        kwargs=named,
        dynamo=True,
        external_data=False,
        verbose=False,
        dynamic_shapes=shapes,
    )


def _cause(error: Exception) -> Exception:
    """What went wrong in an export: the exporter's own errors, one in the other, say first of all how to report a bug."""
    while isinstance(error, OnnxExporterError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _larger(example_input: Any) -> Any:
    """``example_input`` with one more entry in the batch, the first one again.

    Raises:
        ValueError: its tensors have no common batch size.
    """
    sizes = {len(t) for t in tensors_in(example_input) if t.ndim}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"the inputs have no common size of dimension 0, but {sorted(sizes)}")
    return map_tensors(lambda t: torch.cat([t, t[:1]]) if t.ndim else t, example_input)


def _run(path: Path, samples: Sequence[Any]) -> list[Tensor]:
    """Outputs of the file on every sample, in one list."""
    # on the CPU, which every installation of onnxruntime supports
    session = extra("onnxruntime", "onnx").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for sample in samples:
        fed = zip(session.get_inputs(), tensors_in(sample), strict=True)
        found += session.run(None, {slot.name: tensor.detach().cpu().numpy() for slot, tensor in fed})
    return [torch.from_numpy(array) for array in found]


def _dynamic_shapes(nest: Any) -> Any:
    """What torch.export needs to know of the sizes of inputs: dimension 0 of every tensor may be another one."""
    if isinstance(nest, Tensor):
        # AUTO: where the model fixes the size, the export goes on, and the run at the other size finds it
        return {0: torch.export.Dim.AUTO} if nest.ndim else None
    if isinstance(nest, Mapping):
        return {k: _dynamic_shapes(v) for k, v in nest.items()}
    return type(nest)(_dynamic_shapes(v) for v in nest) if type(nest) in (tuple, list) else None
