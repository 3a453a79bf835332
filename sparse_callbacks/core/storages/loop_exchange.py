"""The exchange of layers in a hand-written loop, whose optimizers are there already."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.storages.auto_storage import RowsSeen
from sparse_callbacks.core.storages.exchange import exchange
from sparse_callbacks.core.storages.exchanged import Exchanged
from sparse_callbacks.core.storages.first_use import FirstUse

_BEFORE = "Call exchange_layers(method, model) before you make the optimizer, and before fabric.setup() or DistributedDataParallel."


def exchange_for_loop(
    method: Method,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    saved: SavedRun | None,
    *,
    wrapper: str = "",
    rows: RowsSeen = None,
) -> Exchanged:
    """Exchange layers for the run of a loop; the live Parameters take the places of the dense ones in its optimizers.

    Args:
        method: the method of the run.
        model: the user's model, without wrappers.
        optimizers: the torch optimizers of the loop, and those that they hold for their steps.
        saved: the run that goes on.
        wrapper: the class that has set up the model or an optimizer already; empty where none has.
        rows: see :func:`~sparse_callbacks.core.storages.exchange.exchange`.

    Raises:
        ValueError: a layer cannot be exchanged, or an optimizer knows the dense ones too well. Nothing was changed then.
    """
    done = exchange(method, model, rows=rows, saved=saved)
    try:
        if done.layers and wrapper:
            raise ValueError(
                f"{wrapper} has set up the model or its optimizer, and knows the layers that storage= would exchange. {_BEFORE}"
            )
        for optimizer in optimizers if done.layers else ():
            _hand_over(done, optimizer, saved is not None)
    except BaseException:
        done.undo()
        raise
    return done


def _hand_over(done: Exchanged, optimizer: Optimizer, resumes: bool) -> None:
    """Let an optimizer step the live values of exchanged layers in place of their dense weights."""
    new = {id(dense): (name, dense, done.layers[name].values) for name, dense in done.originals.items()}
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]} & new.keys()
    kind, moved = type(optimizer).__name__, dict[Tensor, tuple[Tensor, Any]]()
    if held := [new[key][0] for key in _held_elsewhere(optimizer) & new.keys()]:
        raise ValueError(f"{kind} keeps {', '.join(held)} outside of its parameter groups. {_BEFORE}")
    for key in mine:
        name, dense, values = new[key]
        state = optimizer.state.get(dense)
        made = _as_constructed(state, dense, values) if state else None
        if state and made is None and not (resumes and _fits(state, values)):
            raise ValueError(
                f"{kind} has a state for {name}, which is one of its dense weight, and storage= would exchange the layer. {_BEFORE}"
            )
        if state:  # or it was loaded for the run that goes on, before its layers were here
            moved[dense] = values, state if made is None else made
    if moved:
        states = list(optimizer.state.items())
        _set_states(optimizer, [moved.get(p, (p, state)) for p, state in states])
        done.on_undo(partial(_set_states, optimizer, states))
    for group in optimizer.param_groups:
        before = list(group["params"])
        group["params"][:] = [new[id(p)][2] if id(p) in new else p for p in before]
        done.on_undo(partial(group["params"].__setitem__, slice(None), before))


def _as_constructed(state: Mapping[str, Any], dense: Tensor, values: Tensor) -> dict[str, Any] | None:
    """The state that an optimizer's constructor would have made for live values, as Adagrad's does; None where steps were
    taken, or this one is of another kind."""
    if float(state.get("step", 1)) != 0:
        return None
    made = dict(state)
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if value.shape != dense.shape or bool((value != value.flatten()[0]).any()):
            return None
        made[key] = torch.full_like(values, value.flatten()[0].item(), dtype=value.dtype, requires_grad=False)
    return made


def _set_states(optimizer: Optimizer, states: Iterable[tuple[Any, Any]]) -> None:
    """Let an optimizer have these states, in this order, in the mapping that it has."""
    kept = list(states)
    optimizer.state.clear()
    optimizer.state.update(kept)


def _fits(state: Mapping[str, Any], values: Tensor) -> bool:
    """Whether an optimizer's state is one of live values."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    return all(t.shape == values.shape or t.numel() == 1 for t in tensors)


def _held_elsewhere(optimizer: Optimizer) -> set[int]:
    """``id`` of every Parameter in a list or mapping among the attributes of an optimizer, its groups and state aside."""
    found: set[int] = set()
    for name, value in vars(optimizer).items():
        if name in ("param_groups", "state"):
            continue
        inner = (
            value.values()
            if isinstance(value, Mapping)
            else value
            if isinstance(value, list | tuple | set)
            else [value]
        )
        found |= {id(one) for one in inner if isinstance(one, Tensor)}
    return found


class FirstBatchOfLoop:
    """Warns once, when all optimizers of a loop have stepped, of exchanged layers that the first batch makes no use of.

    Args:
        done: the exchange.
        optimizers: the optimizers that take the steps.
        warn: takes the warning.
    """

    def __init__(self, done: Exchanged, optimizers: Iterable[Optimizer], warn: Callable[[str], object]) -> None:
        self._use, self._warn = FirstUse(done.layers), warn
        looked_at = list(optimizers) if done.layers else []
        self._waits = set(map(id, looked_at))
        self._handles = [o.register_step_post_hook(self._stepped) for o in looked_at]

    def _stepped(self, optimizer: Optimizer, *_: object) -> None:
        self._use.step_over()
        # the hook stays: torch goes through the hooks of the optimizer now, and others may follow
        if id(optimizer) in self._waits:
            self._waits.remove(id(optimizer))
            if not self._waits and (text := self._use.warning()):
                self._warn(text)

    def end(self) -> None:
        """The run is over: look no more."""
        for handle in self._handles:
            handle.remove()
        self._waits = set()
        self._use.end()
