"""Where the weights of a model are used, found in its first batch by hooks that go afterwards."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.core.inspection import tensors_in
from sparse_callbacks.core.live.uncompiled import UNCOMPILED
from sparse_callbacks.core.record.find_chain import LayerCall
from sparse_callbacks.core.record.samples import samples_in
from sparse_callbacks.core.selection import is_norm
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.undisturbed import no_training

ROW_BY_ROW = (nn.Linear, SparseLinear, nn.Bilinear)  # each weight is used once for each row of the input
NOT_MULTIPLIED = (nn.Embedding, nn.EmbeddingBag)


@dataclass
class WeightUse:
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

    def of_a_sample(self, samples: int) -> "WeightUse":
        """The same for one sample, rounded up: what a batch computes once is charged to each sample as a position."""
        return WeightUse(
            *(-(-value // samples) for value in (self.inference, self.forward, self.by_input, self.by_weight))
        )


@dataclass(frozen=True)
class Uses:
    """What the first batch has shown.

    Attributes:
        of: the use of each parameter in the batch by name. Missing: nobody has seen what its weights are used for.
        order: names of the weights in the order in which their layers were called first.
        calls: the calls of the watched layers in the first forward pass.
    """

    of: Mapping[str, WeightUse]
    order: Sequence[str] = ()
    calls: Sequence[LayerCall] = ()


class FirstBatch:
    """Watches the layers of a model from here until :meth:`end`.

    Linear layers use each weight at every row of their input, convolutions at every place of their output (transposed ones
    of their input), recurrent layers at every step of a sequence, attention at every token. Passes without gradients are not
    training and not counted, nor is what a layer computes again in the backward pass, under activation checkpointing. Compiled
    models run eagerly meanwhile.

    Args:
        model: the model.
        watched: names of the weights whose calls are kept, with their places in autograd's graph.
        around: a wrapper of the model that a loop calls in its place; None where there is none.
        called: called with the module that is called first, the model as a rule, and the samples of its inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: Collection[str] = (),
        around: nn.Module | None = None,
        called: Callable[[nn.Module, int], object] | None = None,
    ) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._uses = {name: WeightUse() for name in _never_multiplied(model, self._names)}
        self._watched = frozenset(watched)
        self._calls: list[LayerCall] = []
        self._order: list[str] = []
        self._silent: dict[str, int] = {}  # positions of calls without gradients, which a checkpoint may repeat
        self._tell_first = called
        self._backward_began = False
        self._handles: list[Any] = []
        self._plant(model)
        if called is not None:
            modules = [*model.modules(), *([] if around is None else [around])]
            self._handles += [m.register_forward_pre_hook(self._begins, with_kwargs=True) for m in modules]
        # torch would compile once with these hooks and once without
        self._compile_again = finalize(self, UNCOMPILED.leave)
        UNCOMPILED.enter()

    def _plant(self, model: nn.Module) -> None:
        for module in model.modules():
            if rows_by_weight(module) is not None:
                self._handles.append(module.register_forward_hook(self._called, with_kwargs=True))
        for p in model.parameters():
            if p.requires_grad and p.is_leaf and not isinstance(p, nn.parameter.UninitializedParameter):
                hooked: Any = p  # the hook has no types in torch
                self._handles.append(hooked.register_post_accumulate_grad_hook(self._gradient_comes))

    def _begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._tell_first is not None and torch.is_grad_enabled() and not no_training():
            tell, self._tell_first = self._tell_first, None
            tell(module, samples_in([*args, *kwargs.values()]) or 0)

    def _gradient_comes(self, _: Tensor) -> None:
        self._backward_began = True

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if no_training():
            return
        find = rows_by_weight(module)
        assert find is not None  # only such modules have this hook
        again = torch._C._current_graph_task_id() != -1  # within a backward pass: the layer is computed again
        given, made = tensors_in([*args, *kwargs.values()]), tensors_in(output)
        learns = any(t.requires_grad for t in made)
        for local, rows in find(module, args, kwargs, made).items():
            holder, _, own = local.rpartition(".")
            p = module.get_submodule(holder)._parameters.get(own)
            if p is None or (name := self._names.get(id(p))) is None:
                continue  # reparametrised, or gathered from shards
            if name not in self._order:
                self._order.append(name)
            if not torch.is_grad_enabled():
                self._silent[name] = self._silent.get(name, 0) + rows
            elif not again or self._silent.get(name, 0) >= rows:
                self._silent[name] = self._silent.get(name, 0) - rows * again
                self._add(name, rows, learns, learns and p.requires_grad, again)
            if name in self._watched and not again and learns and not self._backward_began:
                self._calls.append(LayerCall.of(name, given[0], made[0]))

    def _add(self, name: str, rows: int, learns: bool, weight_learns: bool, again: bool) -> None:
        use = self._uses.setdefault(name, WeightUse())
        use.inference += rows if again or not self._backward_began else 0
        use.forward += rows
        use.by_input += rows * learns
        use.by_weight += rows * weight_learns

    @property
    def calls(self) -> Sequence[LayerCall]:
        """The calls of the watched layers in the first forward pass, as far as it has come."""
        return self._calls

    def end(self) -> Uses:
        """Look no more, and tell what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._compile_again()
        calls, self._calls = self._calls, []  # which hold the graph
        return Uses(self._uses, self._order, calls)


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
    found = {"in_proj_weight": joint, "q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}
    # a layer that is called is counted there
    return found if getattr(module, "calls_out_proj", False) else found | {"out_proj.weight": q}


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
