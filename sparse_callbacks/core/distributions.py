"""How a target sparsity is shared out over layers: shapes by name in, sparsities by name out.

`sparsity` is the fraction of zeros. Shapes are torch's: (out, in, *kernel).
"""

import math
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from sparse_callbacks.core.allocations.sees_model import SeesModel, shown_object
from sparse_callbacks.core.argument_types import checked_after
from sparse_callbacks.core.ops import zeros_for

__all__ = [
    "Distribution",
    "Shapes",
    "clipped",
    "epsilon_sparsity",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "is_epsilon",
    "resolve",
    "uniform",
]

Shapes = Mapping[str, tuple[int, ...]]
Distribution = (
    str | Mapping[str, float | str] | Callable[[dict[str, tuple[int, ...]], float], Mapping[str, float]] | SeesModel
)


@checked_after
def uniform(shapes: Shapes, sparsity: float, custom: Mapping[str, float] | None = None) -> dict[str, float]:
    """The same sparsity in every layer, except those in `custom`.

    Raises:
        ValueError: a sparsity outside [0, 1), or a name in `custom` that is not a layer.

    >>> uniform({"a": (4, 4), "b": (2, 2)}, 0.5, custom={"b": 0.0})
    {'a': 0.5, 'b': 0.0}
    """
    own = _checked(shapes, sparsity, custom)
    return {name: own.get(name, float(sparsity)) for name in shapes}


@checked_after
def erdos_renyi(
    shapes: Shapes, sparsity: float, custom: Mapping[str, float] | None = None, power: float = 1.0
) -> dict[str, float]:
    """Density in proportion to (in + out) / (in * out) (Mocanu et al. 2018); otherwise as `erdos_renyi_kernel`."""
    # the first two dimensions: the rule counts neurons or channels, whatever the kernel between them
    return _in_proportion({name: tuple(shape[:2]) for name, shape in shapes.items()}, shapes, sparsity, custom, power)


@checked_after
def erdos_renyi_kernel(
    shapes: Shapes, sparsity: float, custom: Mapping[str, float] | None = None, power: float = 1.0
) -> dict[str, float]:
    """Density in proportion to sum(shape) / prod(shape) (Evci et al. 2020, section 3), the reference code's rule.

    The factor is such that the layers together have the target's number of weights. While some layer would need a
    density above 1, all layers with the largest one become dense together and the rest is shared out anew.

    Args:
        shapes: (out, in, *kernel) by layer name.
        sparsity: target over the layers that are not in `custom`, in [0, 1).
        custom: sparsity of layers that leave the budget.
        power: exponent of the proportion; 0 makes it uniform.

    Raises:
        ValueError: a sparsity outside [0, 1), an empty layer, or a name in `custom` that is not a layer.

    >>> found = erdos_renyi_kernel({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}, 0.9)
    >>> {name: round(s, 4) for name, s in found.items()}
    {'fc1': 0.9204, 'fc2': 0.7698, 'fc3': 0.0}
    """
    return _in_proportion(shapes, shapes, sparsity, custom, power)


def _in_proportion(
    counted: Shapes, shapes: Shapes, sparsity: float, custom: Mapping[str, float] | None, power: float
) -> dict[str, float]:
    """Densities factor * (sum / product of the `counted` dimensions) ** power, capped at 1."""
    own = _checked(shapes, sparsity, custom)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = _powers(counted, power)
    shared = [name for name in shapes if name not in own]
    dense: set[str] = set()
    factor = 0.0
    # A factor that asks for a density above 1 is of no use. The layers that ask for most become dense; the others get
    # what these cannot take, which may lift the next ones above 1, so the factor is found anew.
    while rest := [name for name in shared if name not in dense]:
        # the reference floors each layer's zeros before it sums, so the budget is not floor(sparsity * total)
        budget = sum(size[n] - zeros_for(sparsity, size[n]) for n in rest) - sum(
            zeros_for(sparsity, size[n]) for n in dense
        )
        factor = budget / sum(raw[n] * size[n] for n in rest)
        largest = max(raw[n] for n in rest)
        if factor * largest <= 1.0:
            break
        # equality of floats is meant: layers of one shape have the same value to the last bit
        dense |= {n for n in rest if raw[n] == largest}
    found = {n: 0.0 if n in dense else 1.0 - factor * raw[n] for n in shared}
    return {name: own[name] if name in own else found[name] for name in shapes}


def _powers(counted: Shapes, power: float) -> dict[str, float]:
    """(sum / product of the dimensions) ** power of each layer."""
    try:
        raw = {name: (sum(dims) / math.prod(dims)) ** power for name, dims in counted.items()}
    except OverflowError:
        raw = {}
    # a float has no room for what a huge power makes of a proportion
    if len(raw) < len(counted) or not all(0.0 < value < math.inf for value in raw.values()):
        raise ValueError(f"power={power!r} leaves no proportion between the layers' densities. Give for example 1.")
    return raw


@checked_after
def epsilon_sparsity(shapes: Shapes, epsilon: float | str) -> dict[str, float]:
    """Sparsity 1 - epsilon (n_in + n_out) / (n_in n_out), Erdos-Renyi as published (Mocanu et al. 2018, equation 1).

    No layer asks for a target: epsilon says it all. A layer that would be denser than dense is dense (see `clipped`).
    For kernels n_in counts inputs times kernel positions (our extension; the papers have matrices only).

    Raises:
        ValueError: epsilon is not a positive number, or leaves a layer less than one connection.

    >>> found = epsilon_sparsity({"fc1": (1000, 500), "fc2": (2, 1000), "fc3": (2, 2)}, 1)
    >>> {name: round(s, 4) for name, s in found.items()}
    {'fc1': 0.997, 'fc2': 0.499, 'fc3': 0.0}
    """
    return {name: max(0.0, s) for name, s in _unclipped(shapes, epsilon).items()}


@checked_after
def clipped(distribution: Distribution, shapes: Shapes) -> list[str]:
    """Layers of `shapes` that an epsilon distribution would make denser than dense, so that they are dense."""
    if isinstance(distribution, Mapping):
        followed = {n: next((v for g, v in distribution.items() if _matches(n, g)), 0.0) for n in shapes}
        # each layer by itself: an epsilon has no budget that layers would share
        return [n for n, rule in followed.items() if isinstance(rule, str) and clipped(rule, {n: shapes[n]})]
    if not isinstance(distribution, str) or not is_epsilon(distribution):
        return []
    return [name for name, s in _unclipped(shapes, _epsilon(distribution)).items() if s < 0]


def why_all_active(distribution: Any, shapes: Shapes) -> str:
    """Which layers are dense because epsilon would make them denser, as a sentence for the user; empty for none."""
    full = clipped(distribution, shapes)
    return (
        f"{distribution} would make {', '.join(full)} denser than dense: all their weights are active." if full else ""
    )


def is_epsilon(distribution: Any) -> bool:
    """Whether an epsilon decides, so that a target sparsity has nothing to say: "epsilon(1)", or a mapping that sends
    all layers without a sparsity of their own ("*" included) to one."""
    if isinstance(distribution, Mapping):
        # layers without a match are uniform and need a target; "*" makes sure that there are none
        named = [v for v in distribution.values() if isinstance(v, str)]
        return is_epsilon(distribution.get("*")) and all(map(is_epsilon, named))
    return isinstance(distribution, str) and distribution.strip().startswith("epsilon")


def decides_total(distribution: Any) -> bool:
    """Whether a distribution decides how many weights there are, so that a target sparsity has nothing to say."""
    return is_epsilon(distribution) or isinstance(distribution, SeesModel)


def _epsilon(text: str) -> float | str:
    """The number in "epsilon(1)"; other text as it is."""
    inside = re.fullmatch(r"\s*epsilon\(\s*((\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*\)\s*", text)
    # text that is not such a call goes on as it is, for an error that quotes it
    return float(inside[1]) if inside else text


def _unclipped(shapes: Shapes, epsilon: float | str) -> dict[str, float]:
    _checked(shapes, 0.0, None)  # for its errors about shapes alone: there is no target here
    # a bool is a Real in Python, and True would pass for epsilon=1
    if isinstance(epsilon, bool | str) or not isinstance(epsilon, Real) or not 0.0 < float(epsilon) < math.inf:
        scaled = "It scales the density (n_in + n_out) / (n_in * n_out)"
        raise ValueError(
            f'epsilon={epsilon!r} is not a positive number. {scaled}: give epsilon=1, or distribution="epsilon(1)".'
        )
    found = {}
    for name, (n_out, *rest) in shapes.items():
        n_in = math.prod(rest)
        # the number of connections: the density times n_in * n_out
        if epsilon * (n_in + n_out) < 1:
            least = f"Give at least {1 / (n_in + n_out):.3g}."
            raise ValueError(
                f"epsilon={epsilon!r} leaves {name} with shape {tuple(shapes[name])} less than one connection. {least}"
            )
        found[name] = 1 - epsilon * (n_in + n_out) / (n_in * n_out)
    return found


_NAMED: dict[str, Callable[[Shapes, float], dict[str, float]]] = {
    "uniform": uniform,
    "erdos_renyi": erdos_renyi,
    "erdos_renyi_kernel": erdos_renyi_kernel,
}


@checked_after
def resolve(distribution: Distribution, shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Sparsity by layer name for what a `distribution` argument may be.

    Args:
        distribution: a name; "epsilon(1)" (`epsilon_sparsity`: `sparsity` does not count); a mapping {glob: sparsity or
            name}, where a layer follows its first matching glob, layers with a sparsity leave the budget, layers that
            follow one name share the target among themselves, and layers without a match are uniform; or a
            callable(shapes, sparsity) -> {name: sparsity}.
        shapes: (out, in, *kernel) by layer name.
        sparsity: target, in [0, 1).

    Raises:
        ValueError: an unknown name, a glob that decides no layer, a callable's result that does not fit the layers, a
            sparsity outside [0, 1), or a target that no mask reaches because every layer keeps at least one weight.
        TypeError: `distribution` is none of the three.

    >>> resolve({"head*": 0.5, "*": "uniform"}, {"body": (8, 8), "head": (2, 8)}, 0.75)
    {'body': 0.75, 'head': 0.5}
    """
    _checked(shapes, sparsity, None)
    if isinstance(distribution, str):
        return _by_name(distribution, shapes, sparsity)
    if isinstance(distribution, Mapping):
        return _by_glob(distribution, shapes, sparsity)
    if isinstance(distribution, SeesModel):
        raise ValueError(
            f"distribution={shown_object(distribution)} looks at a model, and here are shapes alone. Ask plan(model) of a "
            "method with this distribution, or its shares(model, entries)."
        )
    if callable(distribution):
        _check_reachable(shapes, sparsity)  # first, or an error would blame the callable for the target
        return checked_shares(distribution(dict(shapes), sparsity), shapes)
    raise TypeError(
        f"distribution={distribution!r} is neither a name ({', '.join(_NAMED)}), a mapping from globs to sparsities or "
        "names, nor a callable(shapes, sparsity). Give one of these."
    )


def _by_name(name: str, shapes: Shapes, sparsity: float) -> dict[str, float]:
    if is_epsilon(name):
        return epsilon_sparsity(shapes, _epsilon(name))
    if name not in _NAMED:
        raise ValueError(
            f"distribution={name!r} is not known. Use {', '.join(_NAMED)}, a mapping from globs to sparsities, "
            "epsilon(1), or a callable(shapes, sparsity)."
        )
    _check_reachable(shapes, sparsity)
    return _NAMED[name](shapes, sparsity)


def _by_glob(rules: Mapping[str, float | str], shapes: Shapes, sparsity: float) -> dict[str, float]:
    followed = {name: next((glob for glob in rules if _matches(name, glob)), None) for name in shapes}
    for glob in rules:
        # "*" may decide nothing: it is for all other layers, and there may be none
        if glob != "*" and glob not in followed.values():
            _refuse_idle(glob, shapes)
    found: dict[str, float] = {}
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, match in followed.items():
        value = "uniform" if match is None else rules[match]
        if isinstance(value, str):
            groups.setdefault(value, {})[name] = shapes[name]
        else:
            found[name] = _fraction(value, f"distribution: the sparsity {value!r} of {match!r}")
    # all layers that follow one name in one call, because they share the target among themselves
    for value, members in groups.items():
        found |= _by_name(value, members, sparsity)
    return {name: found[name] for name in shapes}


def check_rules(rules: Mapping[Any, Any]) -> None:
    """Refuse a mapping that says nothing of any layer, or a sparsity in it that no layer may have.

    Args:
        rules: a `distribution` argument that is a mapping; values that are not numbers are not looked at.
    """
    if not rules:
        raise ValueError(
            "distribution={} says nothing of any layer. Give globs and sparsities, such as {'*': 0.9}, or the name of "
            "a distribution."
        )
    for glob, value in rules.items():
        if isinstance(value, Real) and not isinstance(value, bool) and not 0.0 <= float(value) < 1.0:
            raise ValueError(
                f"distribution: the sparsity {value!r} of {glob!r} is not a number between 0 and 1 (without 1): "
                "it is the fraction of zeros. For 90 % zeros write 0.9."
            )


def _matches(name: str, glob: str) -> bool:
    # equality, because names of stacked layers such as "in_proj_weight[0]" are character classes as globs
    return glob == name or fnmatchcase(name, glob)


def _refuse_idle(glob: str, shapes: Shapes) -> None:
    if any(fnmatchcase(name, glob) for name in shapes):
        raise ValueError(
            f"distribution: {glob!r} decides no layer, because earlier patterns take all its matches and the first "
            "match wins. Put it before them, or remove it."
        )
    raise ValueError(
        f"distribution: {glob!r} matches no sparse layer. Candidates: {', '.join(shapes)}. Use '*' for all the others."
    )


def checked_shares(result: Any, shapes: Shapes, whose: str = "the callable") -> dict[str, float]:
    """The sparsities that a distribution of the user's has given, in the order of the layers.

    Args:
        result: what it returned.
        shapes: (out, in, *kernel) by layer name.
        whose: what returned it, for the error.

    Raises:
        ValueError: it is not a sparsity in [0, 1) for each layer and for no other.
    """
    if not isinstance(result, Mapping):
        raise ValueError(f"distribution: {whose} returned {result!r}. It must return a dict {{layer name: sparsity}}.")
    if set(result) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(result)), sorted(map(str, set(result) - set(shapes)))
        raise ValueError(
            f"distribution: {whose}'s result does not fit the layers: missing {missing}, unknown {unknown}. "
            "Return a sparsity for each name that it was given and for no other."
        )
    return {
        name: _fraction(result[name], f"distribution: {whose}'s sparsity {result[name]!r} of {name}") for name in shapes
    }


def _fraction(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) < 1.0:
        raise ValueError(f"{what} is not in [0, 1): it is the fraction of zeros. For 90 % zeros write 0.9.")
    return float(value)


def _checked(shapes: Shapes, sparsity: float, custom: Mapping[str, float] | None) -> dict[str, float]:
    """The custom sparsities as floats, after all arguments were found good."""
    _fraction(sparsity, f"sparsity={sparsity!r}")
    for name, shape in shapes.items():
        if math.prod(shape) < 1:
            raise ValueError(
                f"{name} with shape {tuple(shape)} has no weight to prune. Leave it out, e.g. by exclude=[{name!r}]."
            )
    own = dict(custom or {})
    if unknown := [name for name in own if name not in shapes]:
        raise ValueError(f"custom names layers that do not exist: {', '.join(unknown)}. Layers: {', '.join(shapes)}.")
    return {name: _fraction(value, f"custom: the sparsity {value!r} of {name}") for name, value in own.items()}


def _check_reachable(shapes: Shapes, sparsity: float) -> None:
    total = sum(math.prod(shape) for shape in shapes.values())
    if zeros_for(sparsity, total) > total - len(shapes):
        highest = (total - len(shapes)) / total
        raise ValueError(
            f"sparsity={sparsity!r} cannot be reached: each of the {len(shapes)} layers keeps at least "
            f"one of their {total} weights. The highest reachable sparsity is {highest:.6g}: lower the "
            "target, or exclude small layers."
        )
