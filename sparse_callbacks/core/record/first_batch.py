"""Where the weights of a model are used, found in its first batch by hooks that go afterwards."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.core.inspection import tensors_in
from sparse_callbacks.core.live.uncompiled import UNCOMPILED
from sparse_callbacks.core.record.samples import samples_in
from sparse_callbacks.core.selection import is_norm
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

ROW_BY_ROW = (nn.Linear, SparseLinear, nn.Bilinear)  # each weight is used once for each row of the input
NOT_MULTIPLIED = (nn.Embedding, nn.EmbeddingBag)


@dataclass
class Use:
    """At how many positions a batch uses each weight of a parameter, all calls of its layer together.

    Attributes:
        inference: up to the first backward pass: what one forward pass of the network needs.
        forward: in the whole batch, which may pass through the network several times.
        by_input, by_weight: positions at which the backward pass takes the gradient by the layer's input, and by its weight.
    """

    inference: int = 0
    forward: int = 0
    by_input: int = 0
    by_weight: int = 0

    def of_a_sample(self, samples: int) -> "Use":
        """The same for one sample, rounded up: what a batch computes once is charged to each sample as a position."""
        return Use(*(-(-value // samples) for value in (self.inference, self.forward, self.by_input, self.by_weight)))


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer in the forward pass.

    Attributes:
        name: name of its weight.
        module: the layer.
        input, output: the tensors that it has taken and given.
    """

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class Uses:
    """What the first batch has shown.

    Attributes:
        of: the use of each parameter in the batch by name. Missing: nobody has seen what its weights are used for.
        samples: samples of the module that was called first; None where no tensor tells.
        first: the module that was called first; None where none was.
        order: names of the weights in the order in which their layers were called first.
    """

    of: Mapping[str, Use]
    samples: int | None
    first: nn.Module | None
    order: list[str] = field(default_factory=list)


class FirstBatch:
    """Watches the layers of a model from here until :meth:`end`.

    Linear layers use each weight at every row of their input, convolutions at every place of their output (transposed ones
    of their input), recurrent layers at every step of a sequence, attention at every token. What a layer computes again in
    the backward pass, as under activation checkpointing, is not counted. Compiled models run eagerly meanwhile.

    Args:
        model: the model.
        watched: names of the weights whose calls are handed to ``forward_over``.
        forward_over: called with the calls of the watched layers when the first forward pass is over and its graph alive.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: frozenset[str] = frozenset(),
        forward_over: Callable[[list[LayerCall]], object] | None = None,
    ) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._uses = {name: Use() for name in _never_multiplied(model, self._names)}
        self._watched, self._forward_over = watched, forward_over
        self._calls: list[LayerCall] = []
        self._order: list[str] = []
        self._first: nn.Module | None = None
        self._samples: int | None = None
        self._backward_began = False
        self._handles: list[Any] = []
        self._plant(model)
        # torch would compile once with these hooks and once without
        self._compile_again = finalize(self, UNCOMPILED.leave)
        UNCOMPILED.enter()

    def _plant(self, model: nn.Module) -> None:
        for module in model.modules():
            self._handles.append(module.register_forward_pre_hook(self._begins, with_kwargs=True))
            if rows_by_weight(module) is not None:
                self._handles.append(module.register_forward_hook(self._called, with_kwargs=True))
        for p in model.parameters():
            if p.requires_grad and p.is_leaf:
                hooked: Any = p  # the hook has no types in torch
                self._handles.append(hooked.register_post_accumulate_grad_hook(self._gradient_comes))

    def _begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._first is None and torch.is_grad_enabled():
            self._first, self._samples = module, samples_in([*args, *kwargs.values()])
            if self._forward_over is not None:
                self._handles.append(module.register_forward_hook(self._first_is_over))

    def _first_is_over(self, *_: object) -> None:
        if self._watched <= {call.name for call in self._calls}:  # otherwise the network is more than this module
            self._tell()

    def _tell(self) -> None:
        if self._forward_over is not None:
            tell, self._forward_over = self._forward_over, None
            tell(self._calls)
        self._calls = []  # which hold activations

    def _gradient_comes(self, _: Tensor) -> None:
        if not self._backward_began:
            self._backward_began = True
            self._tell()

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        find = rows_by_weight(module)
        assert find is not None  # only such modules have this hook
        again = torch._C._current_graph_task_id() != -1  # within a backward pass: the layer is computed again
        given, made = tensors_in([*args, *kwargs.values()]), tensors_in(output)
        learns = any(t.requires_grad for t in made)
        for local, rows in find(module, args, kwargs, made).items():
            owner = module.out_proj if local == "out_proj.weight" else module
            p = owner._parameters.get(local.rpartition(".")[2])
            if p is None or (name := self._names.get(id(p))) is None:
                continue  # reparametrised, or gathered from shards
            use = self._uses.setdefault(name, Use())
            if name not in self._order:
                self._order.append(name)
            if again:
                # a checkpoint may have run the layer without gradients before
                use.by_input = min(use.forward, use.by_input + rows * learns)
                use.by_weight = min(use.forward, use.by_weight + rows * (learns and p.requires_grad))
                continue
            use.inference += 0 if self._backward_began else rows
            use.forward += rows
            use.by_input += rows * learns
            use.by_weight += rows * (learns and p.requires_grad)
            if self._forward_over is not None and name in self._watched and given and made:
                self._calls.append(LayerCall(name, module, given[0], made[0]))

    def end(self) -> Uses:
        """Look no more, and tell what was seen."""
        self._tell()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._compile_again()
        return Uses(self._uses, self._samples, self._first, self._order)


def rows_by_weight(module: nn.Module) -> Callable[..., dict[str, int]] | None:
    """A function that finds at how many positions a call uses each weight of a module; None for a module of another kind.

    It takes the module, the positional and the named arguments of the call and the tensors of its output, and gives
    positions by the local name of the weight.
    """
    if isinstance(module, _ConvNd):
        return _of_convolution
    if isinstance(module, ROW_BY_ROW):
        return lambda _, args, kwargs, __: {"weight": _rows(tensors_in([*args, *kwargs.values()])[0])}
    if isinstance(module, nn.MultiheadAttention):
        return _of_attention
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _of_recurrent
    return None


def _rows(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def _of_convolution(module: Any, args: Any, kwargs: Any, made: list[Tensor]) -> dict[str, int]:
    if module.transposed:  # its kernel is applied at every place of the input
        return {"weight": tensors_in([*args, *kwargs.values()])[0].numel() // module.in_channels}
    return {"weight": made[0].numel() // module.out_channels}


def _of_attention(module: Any, args: Any, kwargs: Any, made: list[Tensor]) -> dict[str, int]:
    given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    q, k, v = (_rows(given[name]) for name in ("query", "key", "value"))
    # the three projections lie in one parameter, where keys may be more tokens than queries
    joint = -(-(q + k + v) // 3)
    return {"in_proj_weight": joint, "q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v, "out_proj.weight": q}


def _of_recurrent(module: Any, args: Any, kwargs: Any, made: list[Tensor]) -> dict[str, int]:
    steps = _rows(tensors_in([*args, *kwargs.values()])[0])  # of a packed sequence the tensor of all steps comes first
    return {name: steps for name in module._parameters if name.startswith("weight")}


def _never_multiplied(model: nn.Module, names: Mapping[int, str]) -> list[str]:
    """Names of parameters that are looked up, added, or multiplied once for each element of an activation."""
    found = []
    for module in model.modules():
        for local, p in module._parameters.items():
            if p is None or id(p) not in names or isinstance(p, nn.parameter.UninitializedParameter):
                continue
            if p.ndim < 2 or "bias" in local or is_norm(module) or isinstance(module, NOT_MULTIPLIED):
                found.append(names[id(p)])
    return found
