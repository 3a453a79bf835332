"""Erdos-Renyi as published: an epsilon decides the density of each layer, and so the total."""

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

from sparse_callbacks.core.allocations.checks import Shapes, own_sparsities
from sparse_callbacks.core.argument_types import checked_after


@checked_after
def epsilon_sparsity(shapes: Shapes, epsilon: float | str) -> dict[str, float]:
    """Sparsity 1 - epsilon (n_in + n_out) / (n_in n_out), Erdos-Renyi as published (Mocanu et al. 2018, equation 1).

    No layer asks for a target: epsilon says it all. A layer that would be denser than dense is dense (see `clipped`).
    For kernels n_in counts inputs times kernel positions (our extension; the papers have matrices only).

    Args:
        shapes: (out, in, *kernel) by layer name.
        epsilon: factor on the density (n_in + n_out) / (n_in n_out) of each layer, above 0.

    Raises:
        ValueError: epsilon is not a positive number, or leaves a layer less than one connection.

    >>> found = epsilon_sparsity({"fc1": (1000, 500), "fc2": (2, 1000), "fc3": (2, 2)}, 1)
    >>> {name: round(s, 4) for name, s in found.items()}
    {'fc1': 0.997, 'fc2': 0.499, 'fc3': 0.0}
    """
    return {name: max(0.0, s) for name, s in unclipped(shapes, epsilon).items()}


def is_epsilon(distribution: Any) -> bool:
    """Whether an epsilon decides how many weights there are, so that no target sparsity is needed.

    Args:
        distribution: what a `distribution` argument may be. An epsilon decides in "epsilon(1)", and in a mapping that sends all
            layers without a sparsity of their own ("*" included) to one.
    """
    if isinstance(distribution, Mapping):
        # layers without a match are uniform and need a target; "*" makes sure that there are none
        named = [v for v in distribution.values() if isinstance(v, str)]
        return is_epsilon(distribution.get("*")) and all(map(is_epsilon, named))
    return isinstance(distribution, str) and distribution.strip().startswith("epsilon")


def epsilon_in(text: str) -> float | str:
    """The number in "epsilon(1)"; other text as it is."""
    inside = re.fullmatch(r"\s*epsilon\(\s*((\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*\)\s*", text)
    # text that is not such a call goes on as it is, for an error that quotes it
    return float(inside[1]) if inside else text


def unclipped(shapes: Shapes, epsilon: float | str) -> dict[str, float]:
    """:func:`epsilon_sparsity`, with negative sparsities of layers that would be denser than dense."""
    own_sparsities(shapes, 0.0, None)  # for its errors about shapes alone: there is no target here
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
