"""Constant propagation through forward passes: which constants arrive at layers for all inputs.

A dispatch mode sees every aten operation and what the table knows of it, as the trace of channels does. Parameters and
buffers are constants, inputs are not. What Python code decides by sizes shows in passes over inputs of other sizes only, so
these belong to the samples; behind code that reads values of activations only zeros count that come from those of parameters.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils.weak import WeakIdKeyDictionary

from sparse_callbacks.channels.constant_propagation import along, entrywise, products, shapes
from sparse_callbacks.channels.constant_propagation.lasting import is_lasting
from sparse_callbacks.channels.constant_propagation.table import CONSTANT_RULES, Known, Step, everywhere, varying
from sparse_callbacks.channels.recording import (
    TAKES_NUMBERS,
    NumbersTaken,
    Recorder,
    named_arguments,
    operation_name,
    told_of_modules,
)
from sparse_callbacks.core.inspection import (
    attention_in_steps,
    map_tensors,
    run,
    tensors_in,
    training,
    training_branches,
)

PROPAGATED_KINDS = (entrywise, along, shapes, products)
"""The modules whose import fills the table."""
MAKE_CHANNELS = (
    *("aten.convolution", "aten._convolution", "aten.mkldnn_convolution", "aten.cudnn_convolution", "aten.mm"),
    *("aten.bmm", "aten.addmm", "aten.baddbmm", "aten._addmm_activation", "aten.cat", "aten.stack"),
)
"""Operations whose outputs are other channels than their inputs, or more of them."""
PLAIN_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
ROUNDING_STEPS = 1e3
"""How far numbers may differ by rounding, in steps of their precision at the layer's largest input.

Below float32 that would be as much as the numbers themselves, so there only exact ones count.
"""


@dataclass(frozen=True)
class ArrivingConstants:
    """The constants that arrive at a weight, by the channels that it sums over, [channels].

    Attributes:
        proved: bool: whether a constant arrives that the layer's bias can stand for, or that is 0, whatever the inputs are.
        value: that constant; elsewhere any number.
        reason: why constants on the way are none here; empty where nothing was found to change them.
    """

    proved: Tensor
    value: Tensor
    reason: str = ""


def arriving_constants(
    model: nn.Module, weights: Collection[str], samples: Sequence[Any], others: Iterable[Sequence[Any]] = ()
) -> dict[str, ArrivingConstants]:
    """What arrives at weights in every pass, by their names. A weight that no pass reads is not there.

    Args:
        model: in the state of :func:`~sparse_callbacks.core.inspection.quiet`.
        weights: names of parameters. Where some are read in train mode alone, a pass over the first sample in that mode is
            looked at, too.
        samples: inputs that the model runs on.
        others: further inputs, such as of other sizes, on which it may fail: the first that it takes of each sequence.
    """
    search, others = _Propagation(model), list(others)
    while True:  # once more where a pass wrote to a buffer that it, or an earlier one, had read as a constant
        known = set(search.written)
        search.found = {}
        for sample in samples:
            search.look(sample)
        if not search.found.keys() >= set(weights):
            branches = training_branches(model, samples[0])
            with training(model.get_submodule(n) for n in branches):
                search.look(samples[0])
        for alternatives in others:
            any(search.try_out(sample) for sample in alternatives)
        if search.written == known:
            return {name: search.found[name] for name in weights if name in search.found}


class _Propagation:
    """Passes of a model, and what arrives at its weights in them.

    Attributes:
        found: what arrives, by the names of weights.
        written: names of the parameters and buffers that passes write to.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        named = [*model.named_buffers(), *model.named_parameters()]
        self._names = {id(t): n for n, t in named}
        self._tensors = [t for _, t in named]  # held, so that no other tensor gets the id of one
        self._module_names = {m: n for n, m in model.named_modules()}
        self._of_weights: dict[str, Known] = {}
        self._is_looking = False
        self.found: dict[str, ArrivingConstants] = {}
        self.written: set[str] = set()

    def look(self, sample: Any) -> None:
        """Follow the constants through one pass."""
        self._others: Any = WeakIdKeyDictionary()
        self._modules: list[tuple[str, str]] = [("", type(self._model).__name__)]
        self._read_values = ""
        inputs = map_tensors(lambda t: t.detach().clone(), sample)  # a model may write to its inputs
        modules = told_of_modules(self._enter, self._leave)
        with attention_in_steps(), modules, NumbersTaken(self._take), Recorder(self._record):
            run(self._model, inputs)

    def try_out(self, sample: Any) -> bool:
        """:meth:`look`, of which nothing stays where the model fails; whether it did not."""
        before = dict(self.found)
        try:
            self.look(sample)
        except Exception:  # whatever a forward pass does with sizes that it does not expect
            self.found = before
            return False
        return True

    # ------------------------------------------------------------------ during a pass

    def _enter(self, module: nn.Module) -> None:
        self._modules.append((self._module_names.get(module, ""), type(module).__name__))

    def _leave(self, module: nn.Module, output: Any) -> None:
        self._modules.pop()
        # torch makes one norm over batch times channels of it, in which the channels can no longer be told apart
        if type(module) in PLAIN_INSTANCE_NORMS and isinstance(module.weight, Tensor) and isinstance(output, Tensor):
            places = int(type(module).__name__[-2])
            channels = output.ndim - places - 1
            gone = self._known(module.weight).zero.view([-1 if d == channels else 1 for d in range(output.ndim)])
            known = self._with_zeros(output, gone)
            self._others[output] = replace(known, dead=known.zero)

    def _record(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        if self._is_looking:
            return
        name, named = operation_name(operation), named_arguments(operation, args, kwargs)
        inputs, made = tensors_in(named), tensors_in(output)
        before = [self._known(t) for t in inputs]
        if _tells_values(operation, named):
            self._take(inputs, name)
        found = self._constants(Step(name, named, output, self._known, self._read))
        dead = [varying(t) for t in made]
        if is_lasting(name, any(isinstance(named.get(n), int | float | complex) for n in ("self", "other"))):
            dead = self._constants(Step(name, named, output, self._dead, lambda *_: None))
        found = dead if self._read_values else found
        self._forget_written(operation, named)
        reason, sources = self._reason(name, before, found), _sources(before)
        is_turned = name in ("aten.t", "aten.transpose") and len(before) == 1 and inputs[0].ndim == 2
        for tensor, constant, lasting in zip(made, found, dead, strict=True):
            if id(tensor) in self._names:
                continue
            known = self._with_zeros(tensor, constant, reason, sources)
            if is_turned and before[0].weight:
                known = Known(known.constant, known.zero, "", before[0].weight, not before[0].transposed, sources)
            self._others[tensor] = replace(known, dead=self._with_zeros(tensor, lasting).zero)

    def _take(self, tensors: Sequence[Tensor], name: str) -> None:
        """Python code gets to know values, and may do anything with them."""
        if self._is_looking:
            return
        # where a function of Python takes them, what is looked at here is recorded as well
        self._is_looking, was_looking = True, self._is_looking
        if not all(bool(self._known(t).constant.all()) for t in tensors):
            self._read_values = self._read_values or self._where(name)
        # memory may be written to; that of parameters is asked for as an address
        if name in TAKES_NUMBERS and any(id(t) not in self._names for t in tensors):
            self._forget([t for t in tensors if id(t) not in self._names])
        self._is_looking = was_looking

    def _constants(self, step: Step) -> list[Tensor]:
        made = tensors_in(step.output)
        rule = CONSTANT_RULES.get(step.name)
        nothing = [varying(t) for t in made]
        if rule is None or not made:
            return nothing
        try:
            found = rule(step)
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError):  # a call that its rule does not expect
            return nothing
        found += [varying(t) for t in made[len(found) :]]
        fits = all(
            f.ndim == t.ndim and all(a in (1, b) for a, b in zip(f.shape, t.shape, strict=True))
            for f, t in zip(found, made, strict=True)
        )
        return found if fits else nothing

    def _forget_written(self, operation: Any, named: Mapping[str, Any]) -> None:
        """Nothing is known any more of what an operation writes to, nor of what shares its memory."""
        arguments = operation._schema.arguments
        changed = [
            t for a in arguments if a.alias_info and a.alias_info.is_write for t in tensors_in(named.get(a.name))
        ]
        if changed and torch.Tag.inplace_view not in operation.tags:
            self._forget(changed)

    def _forget(self, changed: Sequence[Tensor]) -> None:
        # it is no code of the model that asks for memory here
        self._is_looking, was_looking = True, self._is_looking
        places = {t.untyped_storage().data_ptr() for t in changed}
        for other in list(self._others):
            if other.untyped_storage().data_ptr() in places:
                self._others[other] = _unknown(other)
        for tensor in self._tensors:
            if tensor.untyped_storage().data_ptr() in places:
                self.written.add(self._names[id(tensor)])
        self._is_looking = was_looking

    def _known(self, tensor: Tensor) -> Known:
        """What is known of a tensor, or was before values were read; the code may have made it by them since."""
        return self._dead(tensor) if self._read_values and id(tensor) not in self._names else self._unread(tensor)

    def _dead(self, tensor: Tensor) -> Known:
        """Its zeros that come from those of parameters, as constants; others are none."""
        known = self._unread(tensor)
        zero = varying(tensor) if known.dead is None else known.dead
        return replace(known, constant=zero, zero=zero)

    def _unread(self, tensor: Tensor) -> Known:
        name = self._names.get(id(tensor))
        if name is None:
            # an input, or a tensor that the model holds somewhere
            return self._others[tensor] if tensor in self._others else _unknown(tensor)
        if name in self.written:
            return _unknown(tensor)
        if name not in self._of_weights:
            constant = everywhere(tensor).expand(tensor.shape)
            self._of_weights[name] = Known(constant, tensor == 0, "", name, False, frozenset([name]), tensor == 0)
        return self._of_weights[name]

    def _with_zeros(
        self, tensor: Tensor, constant: Tensor, reason: str = "", sources: frozenset[str] = frozenset()
    ) -> Known:
        if not tensor.numel() or not bool(constant.any()):
            return Known(varying(tensor), varying(tensor), reason, sources=sources)
        zero = tensor == 0
        for dim in (d for d in range(tensor.ndim) if constant.shape[d] == 1):
            zero = zero.all(dim, keepdim=True)
        return Known(constant, zero & constant, reason, sources=sources)

    def _where(self, name: str) -> str:
        module, kind = self._modules[-1]
        return f"it runs into {name.removeprefix('aten.')} in {module or 'the forward'} ({kind})"

    def _reason(self, name: str, before: Sequence[Known], found: Sequence[Tensor]) -> str:
        activations = [k for k in before if not k.sources]
        if name in MAKE_CHANNELS[:-2]:
            return ""
        known = next((k.reason for k in activations if k.reason), "")
        if known or name in MAKE_CHANNELS or not found:
            return known
        share = max((float(k.constant.float().mean()) for k in activations), default=0.0)
        return self._where(name) if float(found[0].float().mean()) < share else ""

    def _read(self, weight: Tensor, over: int, tensor: Tensor, dim: int, with_zeros: bool) -> None:
        """Note what a product with a weight reads, for every parameter that the weight was computed from."""
        known, of_weight = self._known(tensor), self._known(weight)
        if not tensor.numel():  # as of a detector that finds no box
            return
        others = [d for d in range(tensor.ndim) if d != dim]
        value = tensor.movedim(dim, 0).flatten(1)[:, 0] if tensor.ndim > 1 else tensor
        rounding = _rounding(tensor)
        for name in of_weight.sources:
            # the bias stands for a constant times the parameter itself, along its inputs
            stored = self._model.get_submodule(name.rpartition(".")[0])
            turned = isinstance(stored, _ConvTransposeNd)
            is_itself = of_weight.weight == name and over == (1 if turned == of_weight.transposed else 0)
            constant, zero = known.constant, known.zero
            reason = known.reason or self._read_values
            if not is_itself or with_zeros or any(constant.shape[d] != 1 for d in others):
                near = (value.abs() <= rounding).view([-1 if d == dim else 1 for d in range(tensor.ndim)])
                constant = constant & near if all(constant.shape[d] == 1 for d in others) else zero
            for d in others:
                constant = constant.all(d, keepdim=True)
            proved = constant.flatten().expand(tensor.shape[dim]).cpu()
            self._note(name, ArrivingConstants(proved, value.detach().cpu(), reason), rounding)

    def _note(self, name: str, new: ArrivingConstants, rounding: float) -> None:
        old = self.found.get(name)
        if old is not None and old.proved.shape != new.proved.shape:
            new = ArrivingConstants(torch.zeros_like(old.proved), old.value, old.reason)
        if old is not None:
            # a layer that is used twice may get two constants
            same = (old.value - new.value).abs() <= rounding
            both = old.proved & new.proved
            another = "it is another number at another size, or where the layer is used again"
            reason = old.reason or new.reason or ("" if bool(same[both].all()) else another)
            new = ArrivingConstants(both & same, old.value, reason)
        self.found[name] = new


def _tells_values(operation: Any, named: Mapping[str, Any]) -> bool:
    """Whether an operation gives Python code values of its tensors, or sizes that go by them."""
    if torch.Tag.data_dependent_output in operation.tags:
        return True
    chosen_by = named.get("indices")
    if isinstance(chosen_by, list | tuple):
        # by numbers there are as many as are given; bools have to be counted
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in chosen_by)
    return torch.Tag.dynamic_output_shape in operation.tags


def _unknown(tensor: Tensor) -> Known:
    return Known(varying(tensor), varying(tensor))


def _sources(inputs: Sequence[Known]) -> frozenset[str]:
    every = [k.sources for k in inputs]
    return frozenset[str]().union(*every) if all(every) else frozenset()


def _rounding(tensor: Tensor) -> float:
    if tensor.is_complex() or not tensor.is_floating_point():
        return 0.0
    precision = torch.finfo(tensor.dtype).eps
    if precision > torch.finfo(torch.float32).eps:
        return 0.0
    return float(tensor.abs().max()) * ROUNDING_STEPS * precision
