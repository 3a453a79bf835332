"""How a target sparsity is shared out over layers: shapes by name in, sparsities by name out.

`sparsity` is the fraction of zeros. Shapes are torch's: (out, in, *kernel).
"""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from torch import Tensor

from sparse_callbacks.core.allocations.by_shape import erdos_renyi, erdos_renyi_kernel, uniform, uniform_plus
from sparse_callbacks.core.allocations.by_weight import GLOBAL, LAMP, global_magnitude, is_by_weight, lamp, shares_by
from sparse_callbacks.core.allocations.checks import Shapes, check_reachable, fraction, own_sparsities
from sparse_callbacks.core.allocations.epsilon import epsilon_in, epsilon_sparsity, is_epsilon, unclipped
from sparse_callbacks.core.allocations.sees_model import SeesModel, shown_object
from sparse_callbacks.core.argument_types import checked_after

__all__ = [
    "Distribution",
    "SeesModel",
    "Shapes",
    "clipped",
    "epsilon_sparsity",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "global_magnitude",
    "is_epsilon",
    "lamp",
    "resolve",
    "uniform",
    "uniform_plus",
]

Distribution = (
    str | Mapping[str, float | str] | Callable[[dict[str, tuple[int, ...]], float], Mapping[str, float]] | SeesModel
)


@checked_after
def clipped(distribution: Distribution, shapes: Shapes) -> list[str]:
    """Layers to which an epsilon distribution gives more weights than they have, so that they are dense.

    Args:
        distribution: what a `distribution` argument may be; of other kinds than epsilon there are no such layers.
        shapes: (out, in, *kernel) by layer name.

    Returns:
        The names of these layers.
    """
    if isinstance(distribution, Mapping):
        followed = {n: next((v for g, v in distribution.items() if _matches(n, g)), 0.0) for n in shapes}
        # each layer by itself: an epsilon has no budget that layers would share
        return [n for n, rule in followed.items() if isinstance(rule, str) and clipped(rule, {n: shapes[n]})]
    if not isinstance(distribution, str) or not is_epsilon(distribution):
        return []
    return [name for name, s in unclipped(shapes, epsilon_in(distribution)).items() if s < 0]


def why_all_active(distribution: Any, shapes: Shapes) -> str:
    """Which layers are dense because epsilon would make them denser, as a sentence for the user; empty for none."""
    full = clipped(distribution, shapes)
    return (
        f"{distribution} would make {', '.join(full)} denser than dense: all their weights are active." if full else ""
    )


def decides_total(distribution: Any) -> bool:
    """Whether a distribution decides how many weights there are, so that a target sparsity has nothing to say."""
    return is_epsilon(distribution) or isinstance(distribution, SeesModel)


_BY_SHAPE: dict[str, Callable[[Shapes, float], dict[str, float]]] = {
    "uniform": uniform,
    "uniform_plus": uniform_plus,
    "erdos_renyi": erdos_renyi,
    "erdos_renyi_kernel": erdos_renyi_kernel,
}
_NAMES = (*_BY_SHAPE, GLOBAL, LAMP)


@checked_after
def resolve(
    distribution: Distribution, shapes: Shapes, sparsity: float, weights: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Sparsity by layer name for what a `distribution` argument may be.

    Args:
        distribution: a name, of which "global" and "lamp" read `weights`; "epsilon(1)" (`epsilon_sparsity`: `sparsity`
            does not count); a mapping {glob: sparsity or name}, where a layer follows its first matching glob, layers with
            a sparsity leave the budget, layers that follow one name share the target among themselves, and layers without
            a match are uniform; or a callable(shapes, sparsity) -> {name: sparsity}.
        shapes: (out, in, *kernel) by layer name.
        sparsity: target, in [0, 1).
        weights: the weights by layer name, where the distribution reads them.

    Raises:
        ValueError: an unknown name, one that reads weights where none are given, a glob that decides no layer, a
            callable's result that does not fit the layers, a sparsity outside [0, 1), or a target that no mask reaches
            because every layer keeps at least one weight.
        TypeError: `distribution` is none of the three.

    >>> resolve({"head*": 0.5, "*": "uniform"}, {"body": (8, 8), "head": (2, 8)}, 0.75)
    {'body': 0.75, 'head': 0.5}
    """
    own_sparsities(shapes, sparsity, None)
    if isinstance(distribution, str):
        return _by_name(distribution, shapes, sparsity, weights)
    if isinstance(distribution, Mapping):
        return _by_glob(distribution, shapes, sparsity, weights)
    if isinstance(distribution, SeesModel):
        raise ValueError(
            f"distribution={shown_object(distribution)} looks at a model, and here are shapes alone. Ask plan(model) of a "
            "method with this distribution, or its shares(model, entries)."
        )
    if callable(distribution):
        check_reachable(shapes, sparsity)  # first, or an error would blame the callable for the target
        return checked_shares(distribution(dict(shapes), sparsity), shapes)
    raise TypeError(
        f"distribution={distribution!r} is neither a name ({', '.join(_NAMES)}), a mapping from globs to sparsities or "
        "names, nor a callable(shapes, sparsity). Give one of these."
    )


def _by_name(name: str, shapes: Shapes, sparsity: float, weights: Mapping[str, Tensor] | None) -> dict[str, float]:
    if is_epsilon(name):
        return epsilon_sparsity(shapes, epsilon_in(name))
    if is_by_weight(name):
        if weights is None:
            raise ValueError(
                f"distribution={name!r} reads weights, and here are shapes alone. Give weights=, or ask plan(model) of a "
                "method with this distribution."
            )
        return shares_by(name, {layer: weights[layer] for layer in shapes}, sparsity)
    _check_name(name)
    check_reachable(shapes, sparsity)
    return _BY_SHAPE[name](shapes, sparsity)


def _check_name(name: str) -> None:
    """Refuse the name of a rule that there is not.

    Raises:
        ValueError: says which there are.
    """
    if is_epsilon(name):
        unclipped({}, epsilon_in(name))
    elif not is_by_weight(name) and name not in _BY_SHAPE:
        raise ValueError(
            f"distribution={name!r} is not known. Use {', '.join(_NAMES)}, a mapping from globs to sparsities, "
            "epsilon(1), or a callable(shapes, sparsity)."
        )


def _by_glob(
    rules: Mapping[str, float | str], shapes: Shapes, sparsity: float, weights: Mapping[str, Tensor] | None
) -> dict[str, float]:
    followed = _followed(rules, shapes)
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
            found[name] = fraction(value, f"distribution: the sparsity {value!r} of {match!r}")
    # all layers that follow one name in one call, because they share the target among themselves
    for value, members in groups.items():
        found |= _by_name(value, members, sparsity, weights)
    return {name: found[name] for name in shapes}


def _followed(rules: Mapping[str, Any], layers: Iterable[str]) -> dict[str, str | None]:
    """The first glob that matches each layer; None where none does."""
    return {name: next((glob for glob in rules if _matches(name, glob)), None) for name in layers}


def weight_rules(distribution: Any, layers: Iterable[str]) -> dict[str, str]:
    """The rule that reads weights, by its name, for each of those layers that follow one.

    Args:
        distribution: a `distribution` argument.
        layers: names of layers.
    """
    if isinstance(distribution, Mapping):
        rules = {
            layer: distribution[glob] for layer, glob in _followed(distribution, layers).items() if glob is not None
        }
        return {layer: rule for layer, rule in rules.items() if is_by_weight(rule)}
    return dict.fromkeys(layers, distribution) if is_by_weight(distribution) else {}


def reads_weights(distribution: Any) -> bool:
    """Whether some layers may follow a rule that reads weights."""
    named = distribution.values() if isinstance(distribution, Mapping) else [distribution]
    return any(map(is_by_weight, named))


def check_distribution(distribution: Any) -> None:
    """Refuse what no layers can make a distribution, before there are any: names that are not known, a mapping that says
    nothing of any layer, or a sparsity in it that no layer may have, and the class of an object that looks at models.

    Args:
        distribution: a `distribution` argument; what is neither a name nor a mapping is not looked at.
    """
    if isinstance(distribution, type) and isinstance(distribution, SeesModel):  # a class has the methods of its objects
        name = distribution.__name__
        raise ValueError(f"distribution={name} is a class, and it is an object that looks at the model. Give {name}().")
    if isinstance(distribution, Mapping):
        _check_rules(distribution)
    for name in distribution.values() if isinstance(distribution, Mapping) else [distribution]:
        if isinstance(name, str):
            _check_name(name)


def _check_rules(rules: Mapping[Any, Any]) -> None:
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
        name: fraction(result[name], f"distribution: {whose}'s sparsity {result[name]!r} of {name}") for name in shapes
    }
