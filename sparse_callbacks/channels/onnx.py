"""Writing one ONNX file, and running it beside the model that it was made of."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.comparison import Difference, compare, outputs_on, why_not_equal
from sparse_callbacks.core.inspection import extra, map_tensors, tensors_in


def written(model: nn.Module, path: Path, samples: Sequence[Any], tolerance: float | None) -> Difference:
    """Export ``model``, in the state of :func:`~sparse_callbacks.core.inspection.quiet`, and compare on every one of ``samples``.

    Args:
        samples: inputs; if there are several, of different batch sizes, the last is traced with a dynamic batch, otherwise the only one
            with the sizes that it has.
        tolerance: see :func:`~sparse_callbacks.channels.comparison.why_not_equal`.

    Returns:
        the largest difference.

    Raises:
        ValueError: onnxruntime computes something else, or cannot run the file.
    """
    expected = [t.cpu() for t in outputs_on(model, samples)]  # before the exporter, whose errors are longer
    traced = samples[-1]
    named = dict(traced) if isinstance(traced, Mapping) else None
    positional = () if named is not None else tuple(traced) if isinstance(traced, tuple | list) else (traced,)
    shapes = None if len(samples) == 1 else _dynamic(positional if named is None else named)
    if positional and isinstance(positional[-1], dict):
        positional += ({},)  # torch.onnx.export takes a last mapping for named arguments
    torch.onnx.export(model, positional, str(path), kwargs=named, dynamo=True, external_data=False, verbose=False, dynamic_shapes=shapes)
    try:
        found = _run(path, samples)
    except Exception as error:  # onnxruntime has classes of its own
        raise ValueError(
            f"onnxruntime cannot run {path} ({type(error).__name__}: {error}). On the CPU it lacks operations for some types, such as "
            "convolutions in float64 and bfloat16: give the model and example_input in float32."
        ) from error
    difference = compare(expected, found)
    if why_not_equal(expected, found, tolerance):
        allowed = "the default of each type" if tolerance is None else f"tolerance={tolerance:g}"
        raise ValueError(
            f"onnxruntime computes something else from {path}: {difference}, and {allowed} is allowed. Compare on inputs of real data, or "
            "give a larger tolerance=."
        )
    return difference


def larger(example_input: Any) -> Any:
    """``example_input`` with one more entry in the batch, the first one again.

    Raises:
        ValueError: its tensors have no common batch size.
    """
    sizes = {len(t) for t in tensors_in(example_input) if t.ndim}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"the inputs have no common size of dimension 0, but {sorted(sizes)}")
    return map_tensors(lambda t: torch.cat([t, t[:1]]) if t.ndim else t, example_input)


def _run(path: Path, samples: Sequence[Any]) -> list[Tensor]:
    session = extra("onnxruntime", "onnx").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for sample in samples:
        fed = zip(session.get_inputs(), tensors_in(sample), strict=True)
        found += session.run(None, {slot.name: tensor.detach().cpu().numpy() for slot, tensor in fed})
    return [torch.from_numpy(array) for array in found]


def _dynamic(nest: Any) -> Any:
    """What torch.export is told of the sizes of inputs: dimension 0 of every tensor may be another."""
    if isinstance(nest, Tensor):
        return {0: torch.export.Dim.AUTO} if nest.ndim else None
    if isinstance(nest, Mapping):
        return {k: _dynamic(v) for k, v in nest.items()}
    return type(nest)(_dynamic(v) for v in nest) if type(nest) in (tuple, list) else None
