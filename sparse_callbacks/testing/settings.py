"""What an author says of a method to the contract: short arguments, gradients, and promises not made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from sparse_callbacks.core.constructors import argument_names
from sparse_callbacks.core.method import Method, Options

PROMISES: Mapping[str, str] = {
    "one network": "one network trains from the first step to the last, the same in every process",
    "planned counts": "masks have as many zeros as plan() announces",
    "several updates": "masks move several times in a short run",
    "updates at an interval": "updates go on at their interval until stop, also in a second fit",
    "growth": "updates grow connections",
    "grown weights start from zero": "a grown weight is zero until its first step",
    "pruned weights rest": "a pruned weight has no value besides zero, and no step moves it",
    "gradients ready for a clip by hand": "in manual optimization gradients are what the optimizer sees before the user "
    "clips them",
    "runs of a step": "a run of a single step trains as a longer one does",
    "any layer": "weights of every supported layer can be sparse",
    "any share": "every layer, whatever its shape, may have the share of its weights that a distribution gives it",
}
"""What a method promises unless its settings say why not: the name of each promise, and what it says.

Everything else in the contract holds for every method and cannot be waived: weights are what their masks leave of them
after every batch, a resumed run is bitwise the same, a skipped step changes nothing, nothing is added to the model.
"""

Gradients = Literal["masked", "free"] | Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Inner:
    """An argument that is itself a method, made anew for each case: what the case changes goes to it where it takes it.

    Attributes:
        method: its class.
        arguments: its constructor arguments.
    """

    method: type[Method]
    arguments: Mapping[str, Any]

    def made(self, changes: Mapping[str, Any]) -> Method:
        """The method with the ``changes`` that its constructor takes."""
        known = argument_names(self.method, Options)
        return self.method(**{**self.arguments, **{k: v for k, v in changes.items() if k in known}})


@dataclass(frozen=True)
class Settings:
    """How the contract runs a method, and what the method promises.

    Args:
        arguments: constructor arguments with which a run of 16 optimizer steps has several updates, such as
            ``{"sparsity": 0.8, "every": 3, "stop": 14, "print_plan": False}``. The cases change single arguments where
            the constructor takes them: ``every``, ``start``, ``stop``, ``include``, ``exclude``, ``sparsity``,
            ``distribution`` (these two not without the promise ``"any share"``), ``keep_dense``, ``seed``.
        gradients: what the optimizer sees of the dense gradient. ``"masked"``: gradients of pruned weights are zero;
            ``"free"``: they are as the loss made them, and a dense copy takes the step; or a function ``(mask, dense
            gradient, aux) -> gradient`` of one parameter, for a method with a mask of its own. ``aux`` holds the
            tensors that the method keeps for this parameter in ``self.aux``, by key without the parameter's name:
            ``self.aux["backward/net.0.weight"]`` is ``aux["backward"]``.
        promises_not_made: names from :data:`PROMISES`, each with the reason why it does not hold. Cases that need
            such a promise are left out or ask for less.

    Raises:
        ValueError: a promise or a way to treat gradients that is not known, or a promise without a reason.
    """

    arguments: Mapping[str, Any]
    gradients: Gradients = "masked"
    promises_not_made: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.promises_not_made) - set(PROMISES))
        if unknown:
            raise ValueError(
                f"promises_not_made={unknown} names promises that the contract does not have. It has: "
                f"{', '.join(map(repr, PROMISES))}. Take the name from there."
            )
        silent = [name for name, reason in self.promises_not_made.items() if not reason.strip()]
        if silent:
            raise ValueError(f"promises_not_made gives no reason for {silent}. Say why each does not hold.")
        if self.gradients not in ("masked", "free") and not callable(self.gradients):
            raise ValueError(
                f"gradients={self.gradients!r} is not known. Give 'masked', 'free', or a function (mask, dense "
                "gradient, aux) -> gradient."
            )
