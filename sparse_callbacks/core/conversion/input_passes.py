"""Passes over data that record the inputs of layers, as many at once as memory is meant to hold."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core import data_pass
from sparse_callbacks.core.conversion.layer_fits import InputRecorder, bytes_of, recorder_for
from sparse_callbacks.core.conversion.least_squares import Moments
from sparse_callbacks.core.given_batches import iterated_apart
from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.inspection import attention_in_steps, tensors_in
from sparse_callbacks.core.state_layout import shown_short

AT_ONCE = 2**30
"""Bytes of sums of products that one pass collects: 1 GiB."""


def recorded_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Any], forward: Forward | None
) -> Iterator[tuple[dict[str, InputRecorder], int]]:
    """What the layers of each pass over the data have read, by name, and the number of batches of the pass.

    Args:
        model: the network, which the passes leave as it was.
        layers: layers of it by the name of their weight.
        data: the batches, for each pass anew.
        forward: runs the network on a batch; see :func:`~sparse_callbacks.core.data_pass.outputs`.

    Raises:
        ValueError: the network does not accept the batches, there are none, or a layer reads inf or NaN.
    """
    for names in _passes(layers):
        recorders = {name: recorder_for(layers[name]) for name in names}
        with ExitStack() as hooks, attention_in_steps(), iterated_apart(data) as batches:
            for name, recorder in recorders.items():
                hooks.enter_context(layers[name].register_forward_pre_hook(_hook_of(recorder), with_kwargs=True))
            # bound here, as the function below is called within this round of the loop alone
            passed = data_pass.outputs(model, lambda found=batches: (found, None), forward=forward)  # type: ignore[misc]
            count = sum(1 for _ in passed)
        if not count:
            raise ValueError(
                f"data={shown_short(data)} holds no batch, so nothing is known of the inputs of layers. Give at least one batch "
                "that the network runs on."
            )
        for name, recorder in recorders.items():
            _refuse_non_finite(name, recorder)
        yield recorders, count


def _passes(layers: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Names of layers whose inputs are recorded together: sums of products up to a limit, whole inputs of one layer."""
    together: list[str] = []
    size = 0
    for name, layer in layers.items():
        if not isinstance(recorder_for(layer), Moments):
            yield [name]
            continue
        if together and size + bytes_of(layer) > AT_ONCE:
            yield together
            together, size = [], 0
        together.append(name)
        size += bytes_of(layer)
    if together:
        yield together


def _hook_of(recorder: InputRecorder) -> Callable[[nn.Module, Any, Mapping[str, Any]], None]:
    def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        recorder.add(tensors_in([*args, *kwargs.values()])[0].detach())

    return hook


def _refuse_non_finite(name: str, recorder: InputRecorder) -> None:
    kept: list[Tensor] = [] if not recorder.rows else recorder.kept
    if not all(bool(torch.isfinite(tensor).all()) for tensor in kept):
        raise ValueError(
            f"the layer of {name} reads inf or NaN on the data, so no weights fit its outputs. Look at the data and at the layers in "
            "front of it, or leave it dense with exclude=."
        )
