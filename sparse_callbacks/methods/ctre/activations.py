"""Activations on the two sides of each sparse layer, found by following a forward pass."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_callbacks.core import distributed
from sparse_callbacks.core.inspection import tensors_in
from sparse_callbacks.methods.ctre.similarity import (
    CosineSums,
    add_batch,
    as_probabilities,
    empty_sums,
    feature_dimension,
    layers_of,
)
from sparse_callbacks.methods.ctre.tensor_history import (
    ACTIVATED,
    UNCHANGED,
    LayerCall,
    Operation,
    TensorHistory,
    VersionedTensor,
    histories_after,
    in_output_shape,
)


class ActivationTracer(TorchDispatchMode):
    """Follows what becomes of the output of each sparse layer, up to the next layer or the network's output.

    The activations of a layer are what the next linear layer or convolution takes, or the latest tensor before that
    with the shape of the layer's output (so before a flattening or a pooling). Where a pooling comes before the
    activation function, each position counts with the value of the cell that it was pooled into. A layer whose output
    the next one takes as it is has the identity for an activation function. For the last layer the activations are the
    network's output: softmax of logits, anything else as it is. Layers are known by their ``forward``; functional ones
    cannot be followed.

    Args:
        model: the network.
        layers: (parameter's name, module) of the sparse layers; see ``similarity.layers_of``.
    """

    def __init__(self, model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {id(module): name for name, module in layers}
        self._modules = [m for m in model.modules() if isinstance(m, nn.Linear | _ConvNd)]
        self._handles: list[Any] = []
        self._forget()

    def _forget(self) -> None:
        """Start anew, for another forward pass."""
        self._calls: list[LayerCall] = []
        # weak keys: a history goes as soon as its tensor does, and the ids of dead tensors cannot be mistaken
        self._histories = WeakTensorKeyDictionary()
        self._layers_entered = 0
        self._has_activations = False

    def _histories_of(self, tensor: Tensor) -> dict[LayerCall, TensorHistory]:
        found: dict[LayerCall, TensorHistory] = self._histories.get(tensor, {})  # type: ignore[no-untyped-call]
        return found

    def __enter__(self) -> "ActivationTracer":
        # hooks tell where one layer ends and the next begins, the dispatch mode sees every operation between them
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    # ------------------------------------------------------------------ during the forward pass

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A layer is called: its input ends the way of the outputs that the input was made of."""
        self._layers_entered += 1
        x = _input(args, kwargs)
        for call, history in self._histories_of(x).items():
            self._end_at_layer(call, history, x)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        """A layer has run: its output is followed from here on, if the layer is sparse."""
        self._layers_entered -= 1
        name = self._names.get(id(module))
        if name is not None:
            call = LayerCall(name, module, _versioned(_input(args, kwargs)), output.shape)
            self._calls.append(call)
            self._histories[output] = {call: TensorHistory(UNCHANGED, tuple(range(output.dim())))}

    def _end_at_layer(self, call: LayerCall, history: TensorHistory, x: Tensor) -> None:
        """A layer takes ``x``, which was made of the output of ``call``."""
        if call.activations is not None:
            return
        if history.mixed_by:
            call.mixed_by = history.mixed_by
            return
        found, level = in_output_shape(call, history, x)
        if found is None:
            call.mixed_by = "an operation that moves its neurons"
        elif level == UNCHANGED and history.level == UNCHANGED:
            # no verdict yet: another layer may take the same output behind an activation function
            call.unactivated = _versioned(found)
        else:
            call.activations = _versioned(found)
            self._has_activations = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._layers_entered:  # operations inside a layer are the layer's own; its hooks know what goes in and out
            return result
        sources = [(t, self._histories_of(t)) for t in tensors_in(args)]
        sources = [(t, histories) for t, histories in sources if histories]
        if sources:
            operation = Operation.of(func.overloadpacket.__name__, args)
            for out in tensors_in(result):
                if out.is_floating_point():  # comparisons and indices carry no activations
                    self._histories[out] = histories_after(sources, operation, out)
        return result

    # ------------------------------------------------------------------ after the forward pass

    def collect(self, output: Any) -> list[LayerCall]:
        """The calls of one forward pass that returned ``output``, each with its activations; the tracer forgets them.

        Raises:
            ValueError: activations that are not known, and a network without any activation function between its
                layers.
        """
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                for call, history in self._histories_of(leaf).items():
                    _end_at_output(call, history, leaf)
        calls, has_activations = self._calls, self._has_activations
        self._forget()
        unactivated = [c for c in calls if c.activations is None and c.unactivated is not None]
        if unactivated and not has_activations:
            raise ValueError(
                f"there is no activation between the layers: the next layer takes the output of {_listed(unactivated)} "
                "as it is, so the network is linear and similarity says nothing about it. Put an activation function "
                "between them."
            )
        # elsewhere in the network there are activation functions: these layers have the identity, as bottlenecks do
        for call in unactivated:
            call.activations = call.unactivated
        lost = [c for c in calls if c.activations is None]
        if lost:
            reason = "they reach neither a layer nor the output"
            if lost[0].mixed_by:
                reason = f"they go through {lost[0].mixed_by}"
            raise ValueError(
                f"the activations of {_listed(lost)} are not known ({reason}). Leave them out with include= or "
                "exclude=, or give forward=, a function of module and batch that returns the network's output."
            )
        for call in calls:
            _check_unwritten(call)
        return calls


def _listed(calls: Iterable[LayerCall]) -> str:
    return ", ".join(dict.fromkeys(call.name for call in calls))


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["input"]
    return found


def _versioned(tensor: Tensor) -> VersionedTensor:
    return tensor, -1 if tensor.is_inference() else tensor._version  # inference tensors have no version counter


def _check_unwritten(call: LayerCall) -> None:
    """Refuse activations that the network wrote into after a layer took them: they are read only now."""
    assert call.activations is not None
    for tensor, version in (call.inputs, call.activations):
        if _versioned(tensor)[1] != version:
            raise ValueError(
                f"the network writes into the activations around {call.name} after a layer has used them, so they "
                "cannot be read. Use operations that are not in place there (such as inplace=False), or "
                f"exclude=[{call.name!r}]."
            )


def _end_at_output(call: LayerCall, history: TensorHistory, output: Tensor) -> None:
    """The network returns ``output``, which was made of the output of ``call``."""
    if call.activations is not None or history.mixed_by:
        call.mixed_by = call.mixed_by or history.mixed_by
        return
    found, level = in_output_shape(call, history, output)
    if found is None:
        call.mixed_by = "an operation that moves its neurons"
        return
    dimension = feature_dimension(call.module, found)
    # logits become probabilities, also those under a log-softmax, whose softmax is the probabilities again
    if level < ACTIVATED or _are_logarithms(found, dimension):
        found = as_probabilities(found, dimension)
    call.activations = _versioned(found)


def _are_logarithms(outputs: Tensor, dimension: int) -> bool:
    """Whether these are outputs of a log-softmax: their exponentials sum up to 1."""
    sums = outputs.float().exp().sum(dimension)
    # bfloat16 has 3 digits
    return bool((outputs <= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)


def measure_similarity(
    model: nn.Module, params: Mapping[str, nn.Parameter], outputs: Iterable[Any]
) -> dict[str, CosineSums]:
    """Sums over a pass and over all ranks for each of ``params`` that the network used; shared weights count all calls.

    Args:
        model: the network.
        params: the network's sparse parameters by name.
        outputs: runs the network batch by batch as it is iterated, and gives what the network returns.

    Raises:
        ValueError: see :meth:`ActivationTracer.collect` and ``similarity.layers_of``.
    """
    layers = list(layers_of(model, params))
    sums = {name: empty_sums(module, params[name]) for name, module in layers}
    with ActivationTracer(model, layers) as tracer:
        for output in outputs:
            for call in tracer.collect(output):
                assert call.activations is not None
                add_batch(sums[call.name], call.module, call.inputs[0], call.activations[0])
    # every rank takes part, also with a layer that its own batches did not use
    distributed.total(t for s in sums.values() for t in s.tensors())
    return {name: s for name, s in sums.items() if bool(s.batches)}
