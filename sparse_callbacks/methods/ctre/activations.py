"""Which activations stand on the two sides of a layer, in any network: followed through a forward pass, operation by operation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_callbacks.core import distributed
from sparse_callbacks.methods.ctre.similarity import CosineSums, add_batch, as_probabilities, empty_sums, feature_dimension, layers_of
from sparse_callbacks.methods.ctre.tensor_history import ACTIVATED, SAME, Held, Step, Trail, Use, aligned, joined, tensors_in


@dataclass(eq=False)
class _Tensors:
    """Trails by tensor, for as long as the tensor lives."""

    trails: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def of(self, tensor: Tensor) -> dict[Use, Trail]:
        found: dict[Use, Trail] = self.trails.get(tensor, {})  # type: ignore[no-untyped-call]
        return found


class Flow(TorchDispatchMode):
    """Follows what becomes of the output of each sparse layer, up to the next layer or the network's output.

    The activations of a layer are what the next linear layer or convolution takes, or the latest tensor before that with the
    shape of the layer's output (so before a flattening or a pooling). Where a pooling comes before the activation function, each
    position counts with the value of the cell that it was pooled into. A layer whose output the next one takes as it is has the
    identity for an activation function. For the last layer they are the network's output: softmax of logits, anything else as
    it is. Layers are known by their ``forward``; functional ones cannot be followed.

    Args:
        model: the network.
        layers: (parameter's name, module) of the sparse ones; see ``similarity.layers_of``.
    """

    def __init__(self, model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {id(module): name for name, module in layers}
        self._modules = {id(m): (n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)}
        self._handles: list[Any] = []
        self._clear()

    def _clear(self) -> None:
        self._uses: list[Use] = []
        self._tensors = _Tensors()
        self._inside = 0
        self._activated = False

    def __enter__(self) -> "Flow":
        for _, module in self._modules.values():
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
        self._inside += 1
        x = _input(args, kwargs)
        for use, trail in self._tensors.of(x).items():
            self._consume(use, trail, x)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        self._inside -= 1
        if (name := self._names.get(id(module))) is not None:
            use = Use(name, module, _held(_input(args, kwargs)), output.shape)
            self._uses.append(use)
            self._tensors.trails[output] = {use: Trail(SAME, tuple(range(output.dim())))}

    def _consume(self, use: Use, trail: Trail, x: Tensor) -> None:
        """A layer takes ``x``, which comes from ``use``."""
        if use.activations is not None:
            return
        if trail.product:
            use.product = trail.product
            return
        found, level = aligned(use, trail, x)
        if found is None:
            use.product = "an operation that moves its neurons"
        elif level == SAME and trail.level == SAME:
            use.bare = _held(found)
        else:
            use.activations = _held(found)
            self._activated = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            sources = [(t, trails) for t in tensors_in(args) if (trails := self._tensors.of(t))]
            if sources:
                step = Step.of(func.overloadpacket.__name__, args)
                for out in tensors_in((result,)):
                    if out.is_floating_point():
                        self._tensors.trails[out] = joined(sources, step, out)
        return result

    # ------------------------------------------------------------------ after it

    def collect(self, output: Any) -> list[Use]:
        """The uses of one forward pass with that ``output``, each with its activations; forgets them here.

        Raises:
            ValueError: activations that are not known, and a network without any activation function between its layers.
        """
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                for use, trail in self._tensors.of(leaf).items():
                    _conclude(use, trail, leaf)
        uses, activated = self._uses, self._activated
        self._clear()
        bare = [u for u in uses if u.activations is None and u.bare is not None]
        if bare and not activated:
            raise ValueError(
                f"there is no activation between the layers: the next layer takes the output of {_listed(bare)} as it is, so the network "
                "is linear and similarity says nothing about it. Put an activation function between them."
            )
        for use in bare:
            use.activations = use.bare
        if lost := [u for u in uses if u.activations is None]:
            why = f" (they go through {lost[0].product})" if lost[0].product else " (they reach neither a layer nor the output)"
            raise ValueError(
                f"the activations of {_listed(lost)} are not known{why}. Leave them out with include= or exclude=, or give forward=, a "
                "function of module and batch that returns the network's output."
            )
        for use in uses:
            _check_untouched(use)
        return uses


def _listed(uses: Iterable[Use]) -> str:
    return ", ".join(dict.fromkeys(u.name for u in uses))


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["input"]
    return found


def _held(tensor: Tensor) -> Held:
    return tensor, -1 if tensor.is_inference() else tensor._version


def _check_untouched(use: Use) -> None:
    assert use.activations is not None
    for held in (use.inputs, use.activations):
        if held != _held(held[0]):
            raise ValueError(
                f"the network writes into the activations around {use.name} after a layer has used them, so they cannot be read. Use "
                f"operations that are not in place there (such as inplace=False), or exclude=[{use.name!r}]."
            )


def _conclude(use: Use, trail: Trail, output: Tensor) -> None:
    """The network returns ``output``, which comes from ``use``."""
    if use.activations is not None or trail.product:
        use.product = use.product or trail.product
        return
    found, level = aligned(use, trail, output)
    if found is None:
        use.product = "an operation that moves its neurons"
        return
    dimension = feature_dimension(use.module, found)
    if level < ACTIVATED or _are_logarithms(found, dimension):
        found = as_probabilities(found, dimension)
    use.activations = _held(found)


def _are_logarithms(outputs: Tensor, dimension: int) -> bool:
    """Outputs of a log-softmax: exponentials with sum 1."""
    sums = outputs.float().exp().sum(dimension)
    return bool((outputs <= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)  # bfloat16 has 3 digits


def measure(model: nn.Module, params: Mapping[str, nn.Parameter], outputs: Iterable[Any]) -> dict[str, CosineSums]:
    """Sums over a pass and over all ranks for each of ``params`` that the network used; tied weights count all their uses.

    Args:
        model: the network.
        params: its sparse parameters.
        outputs: runs the network batch by batch as it is iterated, and gives what it returns.

    Raises:
        ValueError: see :meth:`Flow.collect` and ``similarity.layers_of``.
    """
    layers = list(layers_of(model, params))
    sums = {name: empty_sums(module, params[name]) for name, module in layers}
    with Flow(model, layers) as flow:
        for output in outputs:
            for use in flow.collect(output):
                assert use.activations is not None
                add_batch(sums[use.name], use.module, use.inputs[0], use.activations[0])
    distributed.total(t for s in sums.values() for t in s.tensors())
    return {name: s for name, s in sums.items() if bool(s.batches)}
