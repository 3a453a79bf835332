"""Whether a slim model gives the outputs of the masked one in the model's own precision too.

A forward pass may go by the type of its tensors, as with ``torch.finfo(h.dtype).eps``. It then computes other constants in
the float64 copy in which cuts are accepted, and nothing but a comparison in the model's own precision shows that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_callbacks.channels.comparison import COARSE_TOLERANCE, TOLERANCES, compare, outputs_on, why_not_equal
from sparse_callbacks.channels.proof import Compared
from sparse_callbacks.core.inspection import copied, quiet

ROUNDING_FACTOR = 10.0
"""How many times the effect of one rounding of every weight counts as rounding. A model rounds every sum and activation too,
about as many times as a layer has operations behind it, and these are a few."""


def exceeded_limit(masked: nn.Module, samples: Sequence[Any], compared: Compared) -> dict[torch.dtype, float] | None:
    """The relative differences that count as rounding, by type, where the outputs differ by more; None where they do not.

    They are the tolerances of the types. Only where that is exceeded, more is asked, as it takes two passes: rounding may
    go further in a model that is deep, or casts to half precision. So every weight of the masked model is moved by one
    unit of its lowest precision, up or down at random, and :data:`ROUNDING_FACTOR` times the effect allowed.

    Args:
        masked: the masked model.
        samples: the inputs that the outputs belong to.
        compared: outputs of the masked and the slim model. Integers and bools are left out: one is rounded to another
            wherever a score lies on the edge.
    """
    pairs = [_floating(*compared.given), _floating(*compared.random)]
    if not any(why_not_equal(a, b) for a, b in pairs):
        return None
    least = ROUNDING_FACTOR * _effect_of_rounding(masked, samples)
    types = {t.dtype for expected, _ in pairs for t in expected}
    limits = {t: max(TOLERANCES.get(t, COARSE_TOLERANCE), least) for t in types}
    return limits if any(why_not_equal(a, b, limits) for a, b in pairs) else None


def refuse_differing(compared: Compared, limits: Mapping[torch.dtype, float]) -> None:
    """Refuse a slim model whose outputs differ by more than ``limits`` although its cuts were tried in its own precision.

    Raises:
        ValueError: they do.
    """
    for pair in (compared.given, compared.random):
        problem = why_not_equal(*_floating(*pair), limits)
        if problem:
            raise ValueError(
                f"In the precision of the model the {problem} from those of the masked model, and in float64 they do not: the "
                "forward pass goes by the type of its tensors, as with torch.finfo(h.dtype).eps or `if h.dtype == "
                "torch.float32`. Give a model without that, keep the layers around it with exclude=, or slim model.double()."
            )


def _floating(expected: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of both lists that rounding changes."""

    def kept(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t for t in tensors if t.is_floating_point() or t.is_complex()]

    return kept(expected), kept(found)


def _effect_of_rounding(masked: nn.Module, samples: Sequence[Any]) -> float:
    """Largest relative difference of outputs when every weight is moved by one unit of the lowest precision in the model.

    Zeros stay zeros, so that what is dead stays so.
    """
    with quiet(masked), _Lowest() as seen:
        expected = outputs_on(masked, samples)
    generator = torch.Generator().manual_seed(0)
    moved: dict[int, Any] = {}
    for p in masked.parameters():
        if p.is_floating_point():
            signs = torch.randint(2, p.shape, generator=generator).to(p.device) * 2 - 1
            values = p.detach() * (1 + seen.eps * signs).to(p.dtype)
            moved[id(p)] = nn.Parameter(values, requires_grad=p.requires_grad)
    model = copied(masked, moved)
    with quiet(model):
        return compare(*_floating(expected, outputs_on(model, samples))).relative


class _Lowest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest ``eps`` of the floating-point tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eps = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for t in tree_leaves(output):
            if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()):
                self.eps = max(self.eps, torch.finfo(t.dtype).eps)
        return output
