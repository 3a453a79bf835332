"""What a run of a method may have saved for a model: counts of masks, and tensors of its own."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core.awaited import names_awaited
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.live.ever_live import why_not_former
from sparse_callbacks.core.live.saved_patterns import units_of
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.patterns import why_other_pattern
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.selection import entries as all_entries
from sparse_callbacks.core.state_layout import damaged, shown_short

PLAN_CHANGED = "plan/changed"
"""Key in ``aux`` of a run that went on from one with other layers, so that its masks may count other than planned."""


@dataclass(frozen=True)
class Zeros:
    """The zeros that the masks of some parameters together may have.

    Attributes:
        names: names of the parameters.
        allowed: every number that a run may have saved.
    """

    names: tuple[str, ...]
    allowed: Collection[int]


@dataclass(frozen=True)
class Kept:
    """What a tensor in ``aux`` must be.

    Attributes:
        shape: its shape; None: any.
        dtype: ``"bool"``, ``"int"`` or ``"float"``; empty: any.
        required: a run that has saved anything has saved it.
        finite: whether NaN and infinite values are excluded.
        low: the least value; None: any.
    """

    shape: tuple[int, ...] | None = ()
    dtype: str = "float"
    required: bool = False
    finite: bool = True
    low: float | None = None


def planned_otherwise(saved: SavedRun, entries: Iterable[Entry]) -> SavedRun:
    """``saved``, marked as a run that was planned otherwise where it was saved before layers could join a run: then the
    target was shared out without those that wait."""
    if saved.awaited is not None or not names_awaited(entries):
        return saved
    return replace(saved, aux={**saved.aux, PLAN_CHANGED: torch.tensor(True)})


@singledispatch
def possible_zeros(method: Method, saved: SavedRun, planned: Mapping[str, int]) -> Iterable[Zeros]:
    """What the masks of a run of ``method`` may count. A method of another package registers a function of its own, or
    has none and claims nothing.

    Args:
        method: the method that goes on.
        saved: the saved run, for methods whose counts depend on how far they have come.
        planned: planned zeros by parameter name.
    """
    return ()


@singledispatch
def expected_aux(method: Method, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    """What the tensors in ``aux`` of a run of ``method`` must be, by key or by a glob on keys. Others may be anything.

    Args:
        method: the method that goes on.
        saved: the saved run, for tensors that only some stages of a run have.
        model: the model of the run.
    """
    return {}


@singledispatch
def copied_names(method: Method, saved: SavedRun) -> Collection[str]:
    """Names of the parameters that a saved run of ``method`` must have dense values of."""
    return ()


def as_planned(planned: Mapping[str, int]) -> list[Zeros]:
    """For :func:`possible_zeros`: the counts never change."""
    return [Zeros((name,), (zeros,)) for name, zeros in planned.items()]


def rises_to(planned: Mapping[str, int]) -> list[Zeros]:
    """For :func:`possible_zeros`: pruned weights never come back until the plan is reached."""
    # Not as many as the curve says, nor any: a run that was made shorter may be saved before its next update, and then
    # its masks are of the longer curve.
    return [Zeros((name,), range(zeros + 1)) for name, zeros in planned.items()]


def refuse_impossible(
    method: Method, saved: SavedRun, model: nn.Module, planned: Mapping[str, int], optimizers: int
) -> None:
    """Refuse a saved run that no run of ``method`` with this model can have written; the masks have the parameters'
    shapes.

    Args:
        method: the method that would go on.
        saved: the saved run.
        model: the model that the method goes on with.
        planned: planned zeros by parameter name.
        optimizers: the number of optimizers of the run.

    Raises:
        ValueError: says what is wrong.
    """
    shapes = {e.name: e.full_shape for e in all_entries(model)}
    why = (
        _why_other_optimizers(saved, optimizers)
        or _why_no_calendar(method, saved)
        or _why_other_patterns(saved, shapes)
        or _why_other_shapes(saved, model)
        or _why_no_dense_values(method, saved)
        or _why_other_aux(_all_aux(method, saved, model), saved)
        or _why_other_counts(method, saved, planned, shapes)
        or _why_other_pattern(method, saved, model)
    )
    if why:
        raise damaged(why, saved.path)


def _why_other_optimizers(saved: SavedRun, optimizers: int) -> str:
    missing = [i for i in map(str, range(optimizers)) if i not in saved.progress["steps"]]
    return f"it has no count of steps for optimizer {missing[0]}" if missing else ""


def _why_no_calendar(method: Method, saved: SavedRun) -> str:
    stepped = any(saved.progress["steps"].values())
    return "it has no times of updates" if stepped and method.start is not None and not saved.times else ""


def _why_other_patterns(saved: SavedRun, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if foreign := [name for name in saved.records if name not in saved.patterns]:
        return f"it has records of {shown_short(foreign[0])}, and no pattern"
    for name, pattern in saved.patterns.items():
        try:
            keys, units, group = units_of(pattern, shapes[name])
        except ValueError as error:
            return f"of the live weights of {name}, {error}"
        if not all(
            _are_records(tensors, shapes[name], keys.numel() * group) for tensors in saved.records.get(name, ())
        ):
            return (
                f"its records of {name} are not of a layer with {shapes[name][1]} inputs and {shapes[name][0]} outputs"
            )
        former = saved.aux.get(f"once_active/{name}")
        if former is not None and (why := why_not_former(former, keys, units)):
            return f"its once_active/{name} {why}"
    return ""


def _are_records(tensors: Sequence[Tensor], shape: tuple[int, ...], live: int) -> bool:
    """Whether they are inputs and output gradients of a layer in turn, and perhaps at the end a gradient of live values."""
    pairs = len(tensors) // 2
    expected = [*(n for _ in range(pairs) for n in reversed(shape)), *([1] if len(tensors) % 2 else [])]
    return [t.shape[0] for t in tensors] == expected and (len(tensors) % 2 == 0 or tensors[-1].shape[1] == live)


def _why_other_counts(
    method: Method, saved: SavedRun, planned: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    # version 0.1 did not write down that layers had changed, after which only equal shares are as planned
    changed = PLAN_CHANGED in saved.aux or not (saved.of_loop or method.distribution == "uniform")
    # asked last: some methods read the tensors in aux for it
    for claim in () if changed else possible_zeros(method, saved, planned):
        zeros = sum(saved.zeros(n, shapes[n]) for n in claim.names)
        if zeros not in claim.allowed:
            some = sorted(claim.allowed)
            right = f"{some[0]}" if len(some) == 1 else f"{some[0]} to {some[-1]}"
            name = type(method).__name__
            return f"its masks have {zeros} zeros in {', '.join(claim.names)}, and a run of {name} has {right} there"
    return ""


def _why_other_pattern(method: Method, saved: SavedRun, model: nn.Module) -> str:
    why = why_other_pattern(method, saved.masks, all_entries(model))
    return f"its mask of {why}" if why else ""


def _why_other_shapes(saved: SavedRun, model: nn.Module) -> str:
    """Dense values or gradients that are not of the parameters' shapes, or dense values that are not finite."""
    parameters = dict(model.named_parameters())
    for what, tensors in (
        ("dense values", saved.dense),
        ("gradients", saved.grads),
        ("dense gradients", saved.dense_grads),
    ):
        for name, tensor in tensors.items():
            if name not in parameters:
                return f"it has {what} of {shown_short(name)}, which the model lacks"
            if tensor.shape != parameters[name].shape:
                here = list(parameters[name].shape)
                return f"its {what} of {name} are {shown_short(tensor)}, and the parameter is {here}"
    for name, tensor in saved.dense.items():
        # a run that has diverged has NaN in its weights as well
        if not bool(tensor.isfinite().all()) and bool(parameters[name].detach().isfinite().all()):
            return f"its dense values of {name} are not finite, and the weights are"
    return ""


def _why_no_dense_values(method: Method, saved: SavedRun) -> str:
    if saved.dense and not method.keeps_dense:
        return f"it has dense values of {next(iter(saved.dense))}, which {type(method).__name__} never keeps"
    missing = [name for name in copied_names(method, saved) if name not in saved.dense]
    return f"it has no dense values of {missing[0]}" if missing else ""


def _all_aux(method: Method, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    ever = (
        {
            **{f"ever_active/{n}": Kept(tuple(m.shape), "bool", required=True) for n, m in saved.masks.items()},
            **{f"once_active/{n}": Kept(None, "int", required=True) for n in saved.patterns},
        }
        if method.explores
        else {}
    )
    return {**ever, **expected_aux(method, saved, model)}


def _why_other_aux(expected: Mapping[str, Kept], saved: SavedRun) -> str:
    for key, kept in expected.items():
        if kept.required and key not in saved.aux:
            return f"it has no {key}"
    for key, tensor in saved.aux.items():
        # exact keys first: a parameter's name may hold the signs of a glob
        found = expected.get(key) or next((k for glob, k in expected.items() if fnmatchcase(key, glob)), None)
        if found is not None and (why := _why_not_kept(tensor, found)):
            return f"its {key} {why}"
    return ""


def _why_not_kept(tensor: Tensor, kept: Kept) -> str:
    if kept.shape is not None and tuple(tensor.shape) != kept.shape:
        return f"is {shown_short(tensor)}, and should be {list(kept.shape)}"
    kinds: dict[str, Any] = {
        "bool": str(tensor.dtype) == "torch.bool",
        "float": tensor.is_floating_point(),
        "int": not tensor.is_floating_point() and not tensor.is_complex() and str(tensor.dtype) != "torch.bool",
    }
    if kept.dtype and not kinds[kept.dtype]:
        return f"is {shown_short(tensor)}, and should be of type {kept.dtype}"
    if kept.finite and not bool(tensor.isfinite().all()):
        return f"is {shown_short(tensor)} with values that are not finite"
    if kept.low is not None and not bool((tensor >= kept.low).all()):
        return f"is {shown_short(tensor)} with values below {kept.low:g}"
    return ""
