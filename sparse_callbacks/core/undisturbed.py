"""Keeps what a forward pass may change in a module besides its parameters, and puts it back."""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparse_callbacks.core.randomness import random_states, restore_random_states

# Parameters, children and hooks, which a pass does not change or which its caller adds and removes; buffers are state.
_STRUCTURE = frozenset(vars(nn.Module())) - {"_buffers"}
# Exactly these types: a class of somebody else may do more than hold what is put into it.
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_SEQUENCES = (list, deque)
_ATOMS = frozenset({str, int, float, bool, type(None)})
_running: list[nn.Module] = []  # modules that run undisturbed now


@contextmanager
def undisturbed(module: nn.Module, changing: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Put the states of all random generators, every ``training`` flag and :class:`ModuleState` back at the end.

    Args:
        module: the module that runs.
        changing: modules inside of it that are run in order to change, such as norms whose running statistics are
            collected; they and the modules inside of them keep what they have become, besides their flags.
    """
    flags = [(m, m.training) for m in module.modules()]
    excepted = {inner for part in changing for inner in part.modules()}
    state = ModuleState(m for m in module.modules() if m not in excepted)
    states = random_states()
    _running.append(module)
    try:
        yield
    finally:
        _running.remove(module)
        state.restore()
        for m, training in flags:
            m.training = training
        restore_random_states(states)


def no_training() -> bool:
    """Whether a module runs undisturbed now: what its hooks see is not of the training, also where gradients are on."""
    return bool(_running)


class ModuleState:
    """What modules hold besides parameters, children and hooks, as it is when this is made.

    That is every buffer, persistent or not, whether the pass writes to it, replaces, resizes or registers it, and every
    tensor and ``torch.Generator`` in an attribute, or in a list, tuple or dictionary of one, such as the states of a
    torchmetrics ``Metric``; those that the pass adds go. Everything else stays as the pass leaves it: numbers, such as
    a count of passes, what other objects hold, numpy arrays among them, and parameters that a forward pass writes
    itself. All of these tensors are copied once.

    Args:
        modules: the modules; those inside of them are not looked at.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        # for each tensor its storage and shape, and its values
        self._tensors: list[tuple[Tensor, Tensor, Tensor]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._seen: set[int] = set()  # tied buffers, and lists that hold themselves
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):  # its buffers are in no attribute
                for _, buffer in module.named_buffers(recurse=False):
                    self._keep(buffer)
            attributes = vars(module)
            kept = {name: value for name, value in attributes.items() if name not in _STRUCTURE}
            self._attributes.append((attributes, kept))
            for value in kept.values():
                if type(value) not in _ATOMS:  # asked here, as they are most of what modules hold
                    self._keep(value)

    def _keep(self, value: Any) -> None:
        if type(value) in _ATOMS or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            # results of an earlier pass are replaced and not written to, and a tensor without a shape has no values
            if not (isinstance(value, nn.Parameter) or value.grad_fn is not None or is_lazy(value) or value.is_meta):
                self._tensors.append((value, value.detach(), value.detach().clone()))
        elif isinstance(value, torch.Generator):
            self._generators.append((value, value.get_state()))
        elif type(value) in _MAPPINGS + _SEQUENCES:
            self._containers.append((value, copy.copy(value)))
            self._keep_parts(value)
        elif isinstance(value, tuple):
            self._keep_parts(value)

    def _keep_parts(self, container: Any) -> None:
        for part in _parts(container):
            self._keep(part)

    @torch.inference_mode()  # the only mode in which tensors that were made in it may be written to
    def restore(self) -> None:
        """Put everything back, in place where it is the same object still."""
        for attributes, kept in self._attributes:
            for name in [n for n, v in attributes.items() if n not in kept and n not in _STRUCTURE and _has_tensors(v)]:
                del attributes[name]
            for name, value in kept.items():
                now = attributes.get(name)
                if now is not value and (_has_tensors(value) or _has_tensors(now)):
                    attributes[name] = value
        for container, contents in self._containers:
            _refill(container, contents)
        for tensor, place, values in self._tensors:
            _rewrite(tensor, place, values)
        for generator, state in self._generators:
            generator.set_state(state)


def _parts(container: Any) -> Collection[Any]:
    """What a container holds; of a mapping the values."""
    return container.values() if isinstance(container, dict) else container


def _has_tensors(value: Any) -> bool:
    """Whether ``value`` is a tensor or a container with one."""
    if type(value) in _MAPPINGS + _SEQUENCES or isinstance(value, tuple):
        return any(isinstance(part, Tensor) for part in _parts(value))
    return isinstance(value, Tensor)


def _refill(container: Any, contents: Any) -> None:
    """Give a container of tensors its contents again, in their order; leave any other as it is."""
    now, before = _parts(container), _parts(contents)
    if list(map(id, now)) == list(map(id, before)) and list(container) == list(contents):
        return
    if not (_has_tensors(container) or _has_tensors(contents)):
        return
    container.clear()
    if isinstance(container, dict):
        container.update(contents)
    else:
        container.extend(contents)


def _rewrite(tensor: Tensor, place: Tensor, values: Tensor) -> None:
    """Give a tensor its values again.

    A tensor that still has them is not written to, as autograd counts every write.

    Args:
        tensor: the tensor.
        place: a tensor on the storage, and with the shape and strides, that it had.
        values: a copy of its values.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized:
        tensor.copy_(values)  # these cannot be compared, and nothing gives them another shape
        return
    if not tensor.is_set_to(place):  # the pass has resized it, or moved it to another storage
        tensor.set_(place)  # type: ignore[call-overload]
    if not torch.equal(tensor, values):
        tensor.copy_(values)
