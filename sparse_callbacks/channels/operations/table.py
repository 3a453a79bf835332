"""The table of aten operations by name, and what is done about one that is not in it.

An operation that is not in the table keeps nothing apart, and what runs into it stays. Each entry gives the axes of the
outputs, out of those of the inputs: an axis that is handed on keeps its channels apart (removing some from the input removes
these from the output, and changes no other); channels that are mixed are blocked.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from sparse_callbacks.channels.axes import AnyAxis, Run
from sparse_callbacks.channels.recorded_call import Call

Axes = list[AnyAxis]
Rule = Callable[[Call], list[Axes]]
"""Gives the axes of every tensor that an operation returns."""

RULES: dict[str, Rule] = {}
"""The rule of each operation by its name without overload and trailing underscore."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function into the table.

    Args:
        names: names of operations, several in one text with spaces between them; ``"add"`` stands for ``"aten.add"``.
    """

    def known(function: Rule) -> Rule:
        words = " ".join(names).split()
        RULES.update({f"aten.{name}" if "." not in name else name: function for name in words})
        return function

    return known


def outputs(call: Call) -> list[Tensor]:
    """The tensors that an operation returned."""
    made = call.output if isinstance(call.output, tuple | list) else [call.output]
    return [t for t in made if isinstance(t, Tensor)]


def fresh(call: Call) -> list[Axes]:
    """Axes that have nothing to do with those of the inputs."""
    return [[Run(s) for s in t.shape] for t in outputs(call)]


def unknown(call: Call) -> list[Axes]:
    """Nothing is known of an operation: whatever arrives stays."""
    name, kind = call.module
    where = f" ({name}, {kind})" if name else ""
    reason = f"runs into {call.name.removeprefix('aten.')}{where}, which is not known to keep channels apart"
    for tensor in call.tensors():
        call.block(call.axes_of(tensor), reason)
    return fresh(call)


def rule_of(name: str, tensors: Sequence[Tensor]) -> Rule:
    """The rule of an operation; of one that no tensor goes into, fresh axes.

    Args:
        name: its name without overload and trailing underscore.
        tensors: the tensors among its arguments.
    """
    return RULES.get(name, unknown if tensors else fresh)
