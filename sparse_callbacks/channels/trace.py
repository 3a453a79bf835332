"""A trace of a forward pass: which axes of which parameters hold the same channels.

A dispatch mode sees every aten operation that the pass calls, with its tensors. The rules of
`~sparse_callbacks.channels.operations` say what becomes of their axes, and what meets anywhere is joined. What the
modules are called, and how operations are called above aten, does not matter.
"""

import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sparse_callbacks.channels.axes import AnyAxis, Concatenation, Product, Run, block, resolved, runs_in
from sparse_callbacks.channels.met_axes import leaves
from sparse_callbacks.channels.operations import along, entrywise, images, indexing, norms, products, recurrent, shapes
from sparse_callbacks.channels.operations.table import outputs, rule_of, unknown
from sparse_callbacks.channels.outputs import OpaqueOutputError, output_tensors
from sparse_callbacks.channels.reach import Reach
from sparse_callbacks.channels.recorded_call import Call
from sparse_callbacks.channels.recording import (
    GIVES_VALUES,
    NumbersTaken,
    Recorder,
    named_arguments,
    operation_name,
    told_of_modules,
)
from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.inspection import attention_in_steps, map_tensors, run, tensors_in, training

KINDS = (entrywise, along, indexing, shapes, images, products, norms, recurrent)
"""The modules whose import fills the table of operations."""
INPUT = "shares channels with the network's input"
OUTPUT = "these are outputs of the network"
TAKEN = "the network's code takes them out of torch by {}"


class Trace:
    """One traced forward pass of a model, and a second one with some modules in train mode.

    Args:
        model: in the state of :func:`~sparse_callbacks.core.inspection.quiet`.
        example_input: see :func:`~sparse_callbacks.core.inspection.run`.
        seconds: time limit.
        branches: gives the names of modules that are in train mode in the second pass, once the first one is over.

    Raises:
        TimeoutError: the limit is exceeded.
        ValueError: the model cannot be traced, or its outputs cannot be looked at.

    Attributes:
        axes: of every parameter and buffer, by its first name, one for each dimension.
        called: names of the parameters and buffers that some operation has read.
        filled: names of those out of which an operation computes a weight that is not 0 where they are 0, and its name.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        seconds: float,
        branches: Callable[["Trace"], Sequence[str]] = lambda _: (),
    ) -> None:
        # not the time of day, which may be set while a search runs
        self.seconds, self._deadline = seconds, time.monotonic() + seconds
        self._names: dict[int, str] = {}
        self._tensors: list[Tensor] = []  # held, so that no other tensor gets the id of one
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if id(tensor) not in self._names:
                self._names[id(tensor)] = name
                self._tensors.append(tensor)
        self.axes: dict[str, list[AnyAxis]] = {self._names[id(t)]: [Run(s) for s in t.shape] for t in self._tensors}
        self.called: set[str] = set()
        self.filled: dict[str, str] = {}
        self._products: dict[str, dict[str, list[AnyAxis]]] = {}
        self._of_others: Any = WeakIdKeyDictionary()
        self._reach = Reach()
        self._blocks: list[tuple[AnyAxis, str, int]] = []
        self._heads: list[tuple[AnyAxis, str, int]] = []
        self._scores: Any = WeakIdKeyDictionary()
        self._filled_by: Any = WeakIdKeyDictionary()
        self._parameters = {name for name, _ in model.named_parameters()}
        self._multiplied_by = ""
        self._count = 0
        self._grouped = {f"{n}.weight" for n, m in model.named_modules() if getattr(m, "groups", 1) != 1}
        self._readers: list[tuple[AnyAxis, str]] = []
        self._modules: list[tuple[str, str]] = [("", type(model).__name__)]
        self._module_names = {m: n for n, m in model.named_modules()}
        try:
            self._pass(model, example_input)
            if in_training := branches(self):
                with training(model.get_submodule(n) for n in in_training):
                    self._pass(model, example_input)
        except (TimeoutError, OpaqueOutputError):
            raise
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced ({with_class(error)}). "
                "Give an example_input that the model takes: a tensor, a tuple of positional or a mapping of named "
                "arguments."
            ) from error

    def _pass(self, model: nn.Module, example_input: Any) -> None:
        # a model may write to its inputs
        inputs = map_tensors(lambda t: t.detach().clone(), example_input)
        for tensor in tensors_in(inputs):
            for axis in self._axes_of(tensor):
                block(axis, INPUT, 0)
        modules, numbers = told_of_modules(self._enter, self._leave), NumbersTaken(self._take)
        with attention_in_steps(), modules, numbers, Recorder(self._record):
            output = run(model, inputs)
        made = output_tensors(output, model)
        reached = self._reach.reached(made)
        for axis, reason, call in self._blocks:
            if call in reached:
                block(axis, reason, call)
        self._keep_heads_whole(reached)
        self._blocks.clear()
        self._heads.clear()
        for tensor in made:
            for axis in self._axes_of(tensor):
                block(axis, OUTPUT, self._count)

    def check_time(self) -> None:
        """Raise TimeoutError once the time limit is exceeded."""
        if time.monotonic() > self._deadline:
            raise TimeoutError(
                f"The search for channel groups took more than {float(self.seconds):g} s. Give a smaller example_input, a "
                "longer seconds=, or leave the model's channels alone."
            )

    # ------------------------------------------------------------------ during a pass

    def _enter(self, module: nn.Module) -> None:
        self._modules.append((self._module_names.get(module, ""), type(module).__name__))

    def _leave(self, module: nn.Module, output: Any) -> None:
        self._modules.pop()

    def _take(self, tensors: Sequence[Tensor], name: str) -> None:
        """Numbers that leave torch are as outputs: nobody sees what they are used for."""
        self._reach.note_taken(tensors)
        for tensor in tensors:
            # code may ask where a parameter lies, and read nothing
            if id(tensor) not in self._names or name in GIVES_VALUES:
                for axis in self._axes_of(tensor):
                    block(axis, TAKEN.format(name), self._count)

    def _record(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Follow the axes through one operation that was carried out."""
        self.check_time()
        self._count += 1
        named, name = named_arguments(operation, args, kwargs), operation_name(operation)
        call = Call(
            name, named, output, self._axes_of, self._is_weight, self._is_own, self._is_score, self._note_product,
            self._note_scores, self._note_heads, self._note_block, self._count, self._modules[-1],
        )  # fmt: skip
        inputs, made = call.tensors(), outputs(call)
        self.called |= {self._names[id(t)] for t in inputs if id(t) in self._names}
        sources = [self._sources(t) for t in inputs]
        weights = frozenset[str]().union(*sources) if all(sources) else frozenset[str]()
        self._multiplied_by = ""
        try:
            found = rule_of(name, inputs)(call)
        except (IndexError, KeyError, TypeError, ValueError):  # a call that its rule does not expect
            found = unknown(call)
        self._reach.note(self._count, inputs, made)
        if self._multiplied_by == "activations" or (not self._multiplied_by and any(map(self._is_score, inputs))):
            self._scores.update((tensor, True) for tensor in made)
        if weights & self._parameters and not self._multiplied_by:
            by = self._fills(operation, args, kwargs) if rule_of(name, inputs) is entrywise.entry_by_entry else ""
            by = by or next((self._filled_by[t] for t in inputs if t in self._filled_by), "")
            self._filled_by.update((tensor, by) for tensor in made if by)
        for tensor, axes in zip(made, found, strict=True):
            written = any(tensor is t for t in inputs)
            if written and torch.Tag.inplace_view in operation.tags:  # the same tensor in another shape
                self._of_others[tensor] = (axes, weights)
            elif written:  # in place: it keeps the axes that it has, joined with the new ones
                for old, new in zip(self._axes_of(tensor), axes, strict=True):
                    call.join(old, new)
            elif id(tensor) not in self._names:
                self._of_others[tensor] = (axes, weights)

    def _axes_of(self, tensor: Tensor) -> list[AnyAxis]:
        if (name := self._names.get(id(tensor))) is not None:
            return self.axes[name]
        if tensor not in self._of_others:
            # a tensor that the model holds somewhere, or made where nobody saw it
            self._of_others[tensor] = ([Run(s) for s in tensor.shape], frozenset[str]())
        found: list[AnyAxis] = self._of_others[tensor][0]
        return found

    def _sources(self, tensor: Tensor) -> frozenset[str]:
        """The parameters and buffers out of which alone a tensor was computed; none where activations went into it."""
        if (name := self._names.get(id(tensor))) is not None:
            return frozenset([name])
        return self._of_others[tensor][1] if tensor in self._of_others else frozenset()

    def _is_weight(self, tensor: Tensor) -> bool:
        return bool(self._sources(tensor))

    def _is_own(self, tensor: Tensor) -> bool:
        return any(name.rpartition(".")[0] == self._modules[-1][0] for name in self._sources(tensor))

    def _is_score(self, tensor: Tensor) -> bool:
        return tensor in self._scores

    def _note_scores(self) -> None:
        self._multiplied_by = "activations"

    def _note_heads(self, axis: AnyAxis, reason: str, call: int) -> None:
        self._heads.append((axis, reason, call))

    def _note_block(self, axis: AnyAxis, reason: str, call: int) -> None:
        self._blocks.append((axis, reason, call))

    def _note_product(self, weight: Tensor, read: Sequence[AnyAxis], made: Sequence[AnyAxis]) -> None:
        self._multiplied_by = "weights"
        if id(weight) not in self._names:
            self._readers += [(axis, name) for axis in read for name in self._sources(weight)]
        sources = self._sources(weight)
        # a buffer that goes into a weight beside a parameter, as a mask does, goes by it
        makers = sources & self._parameters or sources
        if weight in self._filled_by:
            self.filled |= dict.fromkeys(makers, self._filled_by[weight])
        for name in makers:
            noted = self._products.setdefault(name, {"in": [], "out": []})
            noted["in"] += read
            noted["out"] += made

    def _fills(self, operation: Any, args: Any, kwargs: Any) -> str:
        """The name of an operation on weights that makes something else of parameters that are 0; empty where it does not."""
        if operation._schema.is_mutable:
            return ""
        given = map_tensors(lambda t: t if self._sources(t).isdisjoint(self._parameters) else t * 0, [args, kwargs])
        made = tensors_in(operation(*given[0], **given[1]))
        return operation._schema.name.removeprefix("aten::") if any(t.any() for t in made) else ""

    def _keep_heads_whole(self, reached: Container[int]) -> None:
        """What makes channels in several factors makes heads: neither a channel of each nor one of several queries goes."""
        inner: dict[int, Run] = {}
        for made in (
            resolved(a) for n, noted in self._products.items() if n not in self._grouped for a in noted["out"]
        ):
            for part in made.parts if isinstance(made, Concatenation) else [made]:
                if isinstance(part, Product):
                    inner |= {id(run): run for factor in part.factors[1:] for run in runs_in(factor)}
        for axis, reason, call in self._heads:
            for held in runs_in(axis):
                if call in reached and id(held) in inner:
                    held.stay(reason, call)
        for held in inner.values():
            if held.copies:
                held.stay(products.SHARED, self._count)

    # ------------------------------------------------------------------ what it has found

    def sides(self, name: str, dim: int) -> set[str]:
        """``"in"`` where an axis of a parameter is summed over in a product, ``"out"`` where it makes channels; empty where it
        has one entry for each channel."""
        products = self._products.get(name, {})
        own = self.axes[name]
        if all(any(axis is one for one in own) for axes in products.values() for axis in axes):
            # the parameter itself went into every product: its axes tell apart what a skip connection joins
            return {side for side, axes in products.items() if any(axis is own[dim] for axis in axes)}
        own_leaves = {id(leaf) for leaf in leaves(self.axes[name][dim])}
        found = {side for side, axes in products.items() if any(id(r) in own_leaves for a in axes for r in leaves(a))}
        if found:
            return found
        # a product with what was computed from the parameter, or cut out of it
        now = {id(run) for run in runs_in(self.axes[name][dim])}
        return {side for side, axes in products.items() if any(id(r) in now for a in axes for r in runs_in(a))}

    def sources_of_readers(self, run: Run) -> list[str]:
        """The parameters and buffers from which weights are computed that read the channels of a run."""
        return list(dict.fromkeys(name for axis, name in self._readers if any(run is r for r in runs_in(axis))))

    def is_called(self, layer: str) -> bool:
        """Whether some operation has read the weight of a layer, or what it is computed from."""
        computed = f"{layer}.parametrizations.weight.".lstrip(".")
        return f"{layer}.weight" in self.called or any(name.startswith(computed) for name in self.called)

    def uses(self) -> dict[int, list[tuple[str, int]]]:
        """The parameters and buffers, with the dimension, in whose axes each run occurs, by the id of the run."""
        found: dict[int, list[tuple[str, int]]] = {}
        for name, axes in self.axes.items():
            for dim, axis in enumerate(axes):
                for leaf in {id(r): r for r in runs_in(axis)}:
                    found.setdefault(leaf, []).append((name, dim))
        return found
