"""Calls every public constructor and function with a wrong value for each of its arguments, and counts what comes of it.

``PYTHONPATH=tests python -m support.bad_arguments --show`` prints the table and every call that was not refused in words.
What is called, and with what, is found by inspection: a new method or argument is tried without an entry here.
"""

import argparse
import collections.abc
import contextlib
import inspect
import math
import operator
import re
import signal
import tempfile
import traceback
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

import sparse_callbacks
from sparse_callbacks import testing
from sparse_callbacks.core import distributions, ops, schedules
from sparse_callbacks.core.data_pass import NoPassError
from sparse_callbacks.core.method import Method, Options
from support import loops

REFUSED, BARE, WRONG, RIGHT = OUTCOMES = (
    "refused in words",
    "bare error",
    "accepted though wrong",
    "accepted and right",
)


class Thing:
    """An object of no use."""

    def __repr__(self) -> str:
        return "<a thing>"


VALUES: Mapping[str, Any] = {
    "None": None,
    "text": "no such word",
    "empty text": "",
    "True": True,
    "list": [1, 2],
    "empty list": [],
    "list of None": [None],
    "empty mapping": {},
    "mapping without texts": {1: 0.5},
    "mapping of None": {"*": None},
    "mapping of NaN": {"*": math.nan},
    "mapping of infinite": {"*": math.inf},
    "tensor": torch.tensor([0.5, 0.25]),
    "0-d tensor": torch.tensor(0.5),
    "numpy number": np.float32(0.5),
    "numpy array": np.array([1, 2]),
    "fraction": Fraction(1, 2),
    "decimal": Decimal("0.5"),
    "complex": 1j,
    "bytes": b"0.5",
    "thing": Thing(),
    "class": Thing,
    "NaN": math.nan,
    "infinite": math.inf,
    "negative": -1,
    "negative part": -0.5,
    "zero": 0,
    "zero part": 0.0,
    "part": 0.5,
    "above one": 1.5,
    "huge": 10**30,
    "huge negative": -(10**30),
    "huge part": 1e300,
}
SLOW = ("export_onnx", "slim")
"""Names of functions that take seconds where nothing is wrong: only what is not of the annotated type is tried."""
LONGEST = 3.0
"""Seconds that a call may take: a wrong value is refused at once."""


# ---------------------------------------------------------------------- what is called


def subjects(*modules: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public class and function that takes arguments, by name."""
    for module in modules or (sparse_callbacks, ops, schedules, distributions, testing):
        for name in getattr(module, "__all__", vars(module)):
            found = getattr(module, name)
            own = getattr(found, "__module__", "").startswith("sparse_callbacks") and not name.startswith("_")
            if own and callable(found) and name not in NOT_CALLED and not typing.get_origin(found):
                yield f"{module.__name__.rpartition('.')[2]}.{name}", found
        for name in MADE_OTHERWISE if module is sparse_callbacks else ():
            yield name, operator.attrgetter(name)(module)


# Bases that are not made by users, what the library itself makes, and what a decorator or a class takes.
NOT_CALLED = (
    "Method", "DropAndGrow", "SparsityCallback", "SparseRun", "Plan", "Step", "Update", "Options", "Time",
    "Distribution", "SeesModel", "Shapes", "horizon", "contract", "Settings", "SparseLinear", "DoctorWarning",
)  # fmt: skip
MADE_OTHERWISE = ("SparseLinear.from_dense", "SparseLinear.random")
"""Class methods that users call in place of a constructor."""


def good(name: str) -> dict[str, Any]:
    """Arguments with which a subject works, where it has some without a default."""
    module, _, own = name.partition(".")
    if module == "SparseLinear":
        linear = torch.nn.Linear(4, 6)
        sizes = {"in_features": 4, "out_features": 6, "fan_in": 2}
        return {"linear": linear, "mask": linear.weight > 0} if own == "from_dense" else sizes
    if own == "Schedule":
        return {"curve": "linear", "initial": 0.5, "final": 0.0}
    if own == "AllReLU":
        return {"layer": 0}
    if own == "SlimAttention":
        return {"embed_dim": 8, "num_heads": 2}
    if own in ("BestAtTarget", "EarlyStoppingAtTarget"):
        return {"monitor": "val_loss"}
    if own == "Score":
        return {"name": "snip"}
    if own == "SupTickets":
        return {"base": sparse_callbacks.RigL(0.5, print_plan=False)}
    if own[0].isupper():
        return {}  # every argument of any other method has a default
    return _for_networks(own) if module == "sparse_callbacks" else _for_numbers(name)


def _for_networks(name: str) -> dict[str, Any]:
    model = loops.net()
    return {
        "sparsify": {
            "method": sparse_callbacks.RigL(0.5, every=2, print_plan=False),
            "model": model,
            "optimizer": loops.sgd(model),
            "steps": 20,
        },
        "exchange_layers": {"method": sparse_callbacks.RigL(0.5, storage="sparse"), "model": model},
        "to_dense": {"module": model},
        "to_inference": {"module": model},
        "slim": {"model": model, "masks": {}, "example_input": torch.ones(2, 12)},
        "channel_groups": {"model": model, "example_input": torch.ones(2, 12)},
        "export_onnx": {"model": model, "path": "/nowhere/a.onnx", "example_input": torch.ones(2, 12)},
        "save_compact": {"model": model, "path": "/nowhere/a.safetensors"},
        "load_compact": {"model": model, "path": "/nowhere/a.safetensors"},
        "combine": {
            "workers": [model.state_dict()] * 2,
            "owner": dict.fromkeys(model.state_dict(), 0),
        },
        "pruning_curve": {"sparsity": 0.5},
        "convert": {"model": loops.net().eval(), "data": [torch.ones(4, 12)]},
        "to_semi_structured": {"module": model},
        "recalibrate_batchnorm": {"module": loops.conv_net(), "batches": [torch.ones(4, 2, 6, 6)]},
    }.get(name, {})


def _for_numbers(name: str) -> dict[str, Any]:
    shapes = {"a": (4, 3), "b": (2, 4)}
    values = torch.arange(6.0)
    return {
        "ops.zeros_for": {"sparsity": 0.5, "size": 10},
        "ops.drop_count": {"active": 10, "fraction": 0.5},
        "ops.keep_largest": {"values": values, "count": 2},
        "ops.keep_largest_jointly": {"values": [values], "count": 2},
        "ops.kth_largest": {"values": values, "count": 2},
        "ops.drop_and_grow": {"mask": values > 2, "drop": values, "grow": values, "count": 1},
        "ops.random_mask": {"shape": (2, 3), "count": 2},
        "schedules.constant": {"value": 0.5},
        **{f"schedules.{c}": {"initial": 0.5} for c in ("cosine", "linear", "exponential", "cubic")},
        "schedules.polynomial": {"initial": 0.5, "final": 0.0, "power": 2.0},
        "schedules.parse": {"text": "linear(0.5)"},
        "schedules.with_curve": {"curve_name": "linear", "number": 0.5},
        "schedules.as_schedule": {"value": 0.5, "default_curve": "linear"},
        "schedules.pruning_curve": {"sparsity": 0.5},
        "schedules.to_steps": {"when": 0.5, "total": 100, "name": "stop"},
        **{f"distributions.{d}": {"shapes": shapes, "sparsity": 0.5} for d in distributions.__all__},
        "distributions.clipped": {"distribution": "uniform", "shapes": shapes},
        "distributions.resolve": {"distribution": "uniform", "shapes": shapes, "sparsity": 0.5},
        "distributions.epsilon_sparsity": {"shapes": shapes, "epsilon": 1.0},
        "distributions.is_epsilon": {"distribution": "uniform"},
        "distributions.global_magnitude": {"weights": {"a": values}, "sparsity": 0.5},
        "distributions.lamp": {"weights": {"a": values}, "sparsity": 0.5},
    }.get(name, {})


def parameters(subject: Callable[..., Any]) -> dict[str, Any]:
    """Annotation of every argument, those of :class:`Options` among them."""
    hints = typing.get_type_hints(subject.__init__ if isinstance(subject, type) else subject)  # type: ignore[misc]
    found = {}
    for name, parameter in inspect.signature(subject).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= typing.get_type_hints(Options)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            found[name] = hints.get(name, Any)
    return found


# ---------------------------------------------------------------------- what is right


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, as a person reads it: a bool is not a number, NaN is not one either."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if hint is None or hint is type(None):
        return value is None
    number = isinstance(value, int | float | Fraction | Decimal | np.number) and not isinstance(value, bool)
    if hint is float:
        return number and not math.isnan(value)
    if hint is int:
        whole = isinstance(value, int | np.integer)
        return not isinstance(value, bool) and (whole or (number and math.isfinite(value) and value == int(value)))
    if hint is str:
        return isinstance(value, str)
    if origin in (collections.abc.Callable, Callable):
        return callable(value)
    if origin in (collections.abc.Sequence, list, tuple):
        item = arguments[0] if arguments else Any
        return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(fits(v, item) for v in value)
    if origin in (collections.abc.Mapping, dict):
        key, item = arguments
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    return isinstance(value, hint) if isinstance(hint, type) else True


def tries(*modules: Any) -> Iterator[tuple[str, str, str, Callable[[], Any], bool]]:
    """(subject, argument, value, call, whether the value is of the annotated type) of every call."""
    for name, subject in subjects(*modules):
        for argument, hint in parameters(subject).items():
            for label, value in VALUES.items():
                if callable(value) and fits(value, hint):
                    continue  # what a user's own function does is theirs
                if name.endswith(SLOW) and fits(value, hint):
                    continue

                def call(
                    name: str = name, subject: Any = subject, argument: str = argument, value: Any = value
                ) -> None:
                    made = subject(**(good(name) | {argument: value}))
                    if isinstance(made, Method):
                        made.plan(loops.net())

                yield name, argument, label, call, fits(value, hint)


def outcome(argument: str, value: Any, call: Callable[[], Any], of_type: bool) -> tuple[str, str]:
    """One of :data:`OUTCOMES`, and the error's text."""
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        call()
    except (ValueError, TypeError, FileNotFoundError) as error:
        text = f"{type(error).__name__}: {error}"
        # not what Python says of a call that fails inside
        # a sentence that shows the value behind a name, of the argument or of what it becomes
        about = argument in str(error) or re.search(r"\w=", str(error)) is not None or _shows(error, value)
        of_a_kind = type(error) in (ValueError, TypeError, FileNotFoundError, NoPassError)
        named = about and of_a_kind and len(str(error)) > 20
        return (REFUSED if named else BARE), text
    except Exception as error:
        return BARE, f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return (RIGHT if of_type else WRONG), ""


def _shows(error: Exception, value: Any) -> bool:
    """Whether the package raised the error itself, and not what it called, and shows the value."""
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].line or "").startswith("raise ") and repr(value) in str(error)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {LONGEST} seconds")


def counted(*modules: Any) -> tuple[dict[str, Counter[str]], list[str]]:
    """How many calls of each subject came to which outcome, and a line for each that was not right."""
    found: dict[str, Counter[str]] = {}
    lines = []
    signal.signal(signal.SIGALRM, _too_long)
    # a text may be a path that is right, and a file is written there
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, argument, label, call, of_type in tries(*modules):
            result, text = outcome(argument, VALUES[label], call, of_type)
            found.setdefault(name, Counter())[result] += 1
            if result in (BARE, WRONG):
                lines.append(f"{result}: {name}({argument}={label}): {text[:200]!r}")
    return found, lines


def as_table(found: Mapping[str, Counter[str]]) -> str:
    rows = [["", *OUTCOMES], *([name, *(str(counts[o]) for o in OUTCOMES)] for name, counts in found.items())]
    total = sum(found.values(), Counter[str]())
    rows.append([f"{total.total()} in all", *(str(total[o]) for o in OUTCOMES)])
    return "\n".join(f"{name:34}" + "".join(f"{cell:>23}" for cell in cells) for name, *cells in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    found, lines = counted()
    print("\n".join(lines) if given.show else "", as_table(found), sep="\n")


if __name__ == "__main__":
    main()
