"""A copy of an optimizer over small stand-in parameters, which can be stepped without a trace."""

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core.optimizer_copy import deep_copied, emptied, like_new, note_dictionaries, note_tensors
from sparse_callbacks.core.optimizer_state import by_weight, members, tensors_within
from sparse_callbacks.core.undisturbed import undisturbed

# A stand-in has the shape of its parameter, and of a larger one at least this many elements: some optimizers keep other
# state from 4096 elements on.
_LARGE = 4096
# used where a schedule begins with a rate of 0: step sizes that start at the rate would all be 0
_SMALL_RATE = 1e-3


class Shadow:
    """A copy of an optimizer, with the arguments of its groups and with stand-ins for its parameters.

    The constructor is not called, as its arguments are not known. The optimizer, its parameters, their gradients and all
    random generators stay as they are.

    Args:
        optimizer: the optimizer to copy.
        seed: 0 or 1: which elements of the stand-ins are zero, and which of :meth:`give_gradients` have none.
        decays: whether weight decay is kept.
        exact: ids of the parameters whose stand-ins have their size however large they are.
        whole: all stand-ins have the shape of their parameters, also large and square ones.
        idle_values: factor of the values of the elements to which :meth:`give_gradients` gives no gradient.
        corner: how many elements every tensor keeps of each dimension, on the CPU, where neither the size nor the
            precision matters; stand-ins are in float32 then. None: stand-ins are like their parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        seed: int,
        decays: bool = True,
        exact: frozenset[int] = frozenset(),
        whole: bool = False,
        idle_values: float = 1.0,
        corner: int | None = None,
    ) -> None:
        self._real, self._seed, self._corner = optimizer, seed, corner
        self._whole, self._idle_values = whole, idle_values
        self._given_of: dict[tuple[torch.Size, torch.device], Tensor] = {}  # by shape, of which many are alike
        self._members = [member for _, member in members(optimizer)]
        self._parameters = {id(p): p for m in self._members for group in m.param_groups for p in group["params"]}
        self.stand_ins = {i: self._stand_in(p, i in exact) for i, p in self._parameters.items()}
        """Stand-ins by ``id`` of the parameter."""
        self.needs_closure = False
        """The optimizer cannot step without a closure."""
        self.taken = 0
        """Steps that were begun."""
        self.before: dict[int, Tensor] = {}
        """Values of the stand-ins before the latest step."""
        # one for all copies, as optimizers share groups and state with those that they hold
        self._memo: dict[int, Any] = dict(self.stand_ins)
        self.optimizer = self._copied()
        """The copy."""
        for group in self.optimizer.param_groups:
            if not decays:
                group.update({k: v * 0 for k, v in group.items() if "weight_decay" in str(k) and _is_number(v)})
            if _is_number(group.get("lr")) and float(group["lr"]) == 0:
                group["lr"] = group["lr"] + _SMALL_RATE

    def _stand_in(self, parameter: Tensor, exact: bool) -> nn.Parameter:
        if self._corner is not None:
            like = self._cut(parameter)
            like = like.float() if like.dtype.is_floating_point else like
            return self._made(parameter, list(like.shape), like)
        shape = list(parameter.shape)
        if self._whole:
            return self._made(parameter, shape, parameter)
        while not exact and torch.Size(shape).numel() >= 2 * _LARGE:
            # even sizes first, so that blocks of elements still fit
            largest = max(range(len(shape)), key=lambda d: (shape[d] % 2 == 0, shape[d]))
            shape[largest] = -(-shape[largest] // 2)
        if len(shape) == 2 and shape[0] == shape[1] > 1:
            # the matrices that some optimizers keep for rows and for columns shall not have the shape of the weights
            shape = [2 * shape[0], -(-shape[1] // 2)]
        return self._made(parameter, shape, parameter)

    def _made(self, parameter: Tensor, shape: list[int], like: Tensor) -> nn.Parameter:
        index = torch.arange(torch.Size(shape).numel(), device=like.device)
        # half of a sparse layer's weights are zero; 0.02 to 0.08, of both signs
        values = (index % 7 - 3.5) * 0.02 * (index % 2 == self._seed)
        if self._idle_values != 1:
            values = torch.where(self._given(index), values, self._idle_values * values)
        made = nn.Parameter(values.to(like.dtype).view(shape), parameter.requires_grad)
        vars(made).update(vars(parameter))  # by which some optimizers choose what to do
        return made

    def _copied(self) -> Any:
        memo = self._memo
        copies = [object.__new__(type(m)) for m in self._members]
        for member, made in zip(self._members, copies, strict=True):
            memo[id(member)] = made
            if "state" in vars(member):
                memo[id(member.state)] = emptied(member.state)
        if self._corner is None:
            held = [
                {n: v for n, v in vars(m).items() if n != "state" and not n.endswith("_hooks")} for m in self._members
            ]
            note_tensors(held, self._parameters, memo)
            note_dictionaries(held, self._parameters, memo)
        for member, made in zip(self._members, copies, strict=True):
            for name, value in vars(member).items():
                if name.endswith("_hooks"):
                    vars(made)[name] = emptied(value)
                # what hides a method of the class, such as the step that a schedule counts, belongs to the original
                elif not (callable(value) and hasattr(type(member), name)):
                    vars(made)[name] = self._copy(value)
        self._copies = dict(zip(map(id, self._members), copies, strict=True))
        if callable(train := getattr(copies[0], "train", None)):
            train()  # schedule-free ones step in this mode alone
        return copies[0]

    def _cut(self, tensor: Tensor) -> Tensor:
        return tensor.detach()[tuple(slice(self._corner) for _ in tensor.shape)].cpu().clone()

    def _copy(self, value: Any) -> Any:
        if self._corner is not None and id(value) not in self._memo:
            tensors = {id(t): t for _, t in tensors_within(value, ()) if id(t) not in self._memo}
            self._memo |= {i: self._cut(t) for i, t in tensors.items()}
        return deep_copied(value, self._memo)

    def copy_of(self, optimizer: Optimizer) -> Any:
        """The copy of an optimizer that the copied one holds."""
        return self._copies[id(optimizer)]

    def take_state(self) -> None:
        """Begin with the corners of the state that the optimizer has, whatever steps have made of it."""
        for real in self._members:
            for key, state in real.state.items():
                self.copy_of(real).state[self._memo.get(id(key), key)] = self._copy(state)

    def start_from_state(self) -> bool:
        """Begin with the state that the optimizer has, made by its constructor; False where it has none, or where steps
        have changed it."""
        begun = False
        for (_, real), (_, made) in zip(members(self._real), members(self.optimizer), strict=True):
            for key, parameter in self._parameters.items():
                if parameter not in real.state:
                    continue
                memo: dict[int, Any] = {id(parameter): self.stand_ins[key]}
                for _, tensor in tensors_within(real.state[parameter], ()):
                    if by_weight((), tensor, parameter) and tensor is not parameter:
                        small = like_new(tensor, parameter, self.stand_ins[key])
                        if small is None:
                            return False
                        memo[id(tensor)] = small
                made.state[self.stand_ins[key]] = copy.deepcopy(real.state[parameter], memo)
                begun = True
        return begun

    def start_from_constructor(self) -> bool:
        """Begin with the state that the constructor makes, where its arguments are known; False where they are not."""
        known = {**vars(self._real), **self._real.defaults}
        names = list(inspect.signature(type(self._real)).parameters)[1:]
        made = type(self._real)(self.optimizer.param_groups, **{n: known[n] for n in names if n in known})
        self.optimizer.state.update(made.state)
        return bool(made.state)

    def give_gradients(self, scale: float) -> None:
        """Gradients of this size for one half of the elements, and 0 for the others; with 0 for all."""
        for p in self.stand_ins.values():
            if p.requires_grad:
                index = torch.arange(p.numel(), device=p.device)
                # of both signs and several sizes, and around another middle for each seed
                values = (index % 5 - 2.5 + 1.7 * self._seed) * scale * self.has_gradient(p).flatten()
                p.grad = values.to(p.dtype).view(p.shape)

    def take_gradients(self) -> None:
        """No gradient for anything, as in a step that an update replaces."""
        for p in self.stand_ins.values():
            p.grad = None

    @torch.no_grad()
    def prune(self) -> None:
        """Make the elements zero that :meth:`give_gradients` gives no gradient."""
        for stand_in in self.stand_ins.values():
            stand_in.mul_(self.has_gradient(stand_in))

    def has_gradient(self, stand_in: Tensor) -> Tensor:
        """Which elements :meth:`give_gradients` gives one."""
        key = stand_in.shape, stand_in.device
        if key not in self._given_of:
            index = torch.arange(stand_in.numel(), device=stand_in.device)
            self._given_of[key] = self._given(index).view(stand_in.shape)
        return self._given_of[key]

    def _given(self, index: Tensor) -> Tensor:
        return (index // 2) % 2 == self._seed

    def step(self, within: Callable[[], object] = lambda: None) -> None:
        """Take a step, with a closure where ``needs_closure`` says so.

        Args:
            within: called before the step or, where it has a closure, by that. The closure gives a loss.
        """
        self.before = {i: p.detach().clone() for i, p in self.stand_ins.items()}
        self.taken += 1

        def closure() -> Tensor:
            within()
            return torch.zeros((), requires_grad=True)

        arguments = [closure] if self.needs_closure else []
        if not arguments:
            within()
        with without_traces():
            type(self.optimizer).step(self.optimizer, *arguments)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int | Tensor) and not isinstance(value, bool)


@contextmanager
def without_traces() -> Iterator[None]:
    """Random generators stay as they are, nothing is compiled for small shapes, and nobody is warned."""
    with undisturbed(nn.Module()), _eager(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _eager() -> AbstractContextManager[Any]:
    """Nothing is compiled for the small shapes."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
