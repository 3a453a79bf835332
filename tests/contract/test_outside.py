"""Methods from outside under the contract: Top-KAST, and one whose masks are not effective."""

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import pytest
from torch import Tensor

from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.gradient_mask import MasksGradients
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.core.ops import keep_largest, zeros_for
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods import GMP
from sparse_callbacks.testing import PROMISES, Settings, contract

pytestmark = pytest.mark.combinations


class TopKAST(MasksGradients, Method):
    """Top-KAST: forward with the largest D of each layer, gradients on the largest D + M (Jayakumar et al., 2020)."""

    keeps_dense: ClassVar[bool] = True

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        more: float = 0.1,
        distribution: Distribution = "uniform",
        every: Time | None = None,
        start: Time = 0,
        stop: Time = 1.0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(sparsity, distribution=distribution, include=include, exclude=exclude, seed=seed, **options)
        self.more = more  # M, as a share of the layer
        self.set_times(every, start, stop)

    def initial_masks(self) -> dict[str, Tensor]:
        return self.choose(self.params)

    def gradient_mask(self, name: str) -> Tensor:
        return self.aux[f"backward/{name}"]

    def after_step(self, step: Step) -> Update | None:
        return Update(self.choose(step.names)) if step.due else None

    def choose(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Masks of the forward pass; those of the backward pass go to ``aux``."""

        def largest(layer: str, weight: Tensor, more: float) -> Tensor:
            kept = weight.numel() - zeros_for(self.targets[layer], weight.numel()) + int(more * weight.numel())
            return keep_largest(weight, min(kept, weight.numel()))

        def masks(name: str, more: float) -> Tensor:
            return self.weights.by_layer(name, lambda x, w: largest(x, w, more), self.weights.dense_values(name))

        self.aux |= {f"backward/{name}": masks(name, self.more) for name in names}
        return {name: masks(name, 0.0) for name in names}


def backward_set(mask: Tensor, dense_gradient: Tensor, aux: Mapping[str, Tensor]) -> Tensor:
    return dense_gradient * aux["backward"]


SHORT: dict[str, Any] = {"sparsity": 0.8, "every": 3, "stop": 14, "print_plan": False}

TestTopKAST = contract(
    TopKAST,
    Settings(
        SHORT,
        gradients=backward_set,
        promises_not_made={
            "growth": "weights of the backward set come back by themselves",
            "pruned weights rest": "a dense copy takes the step",
        },
    ),
)


class Leaking(GMP):
    """A wrong method: it has masks and does not write them into the weights."""

    def write(self, names: Sequence[str] | None, finite: bool) -> None:
        pass


def test_a_method_whose_masks_are_not_effective_fails() -> None:
    cases = contract(Leaking, Settings(SHORT))()
    with pytest.raises(AssertionError, match="pruned weights are not zero") as caught:
        cases.test_weights_are_effective_after_every_batch(optimizer="sgd")
    (note,) = caught.value.__notes__
    assert note.startswith("Contract of Leaking: After every batch each sparse weight is what its mask leaves of it.")
    assert note.endswith("cannot be waived: change Leaking.")


def test_a_promise_that_is_not_kept_is_named() -> None:
    cases = contract(GMP, Settings(SHORT))()
    with pytest.raises(AssertionError) as caught:
        cases.test_updates_move_masks_and_nothing_else(optimizer="sgd")
    (note,) = caught.value.__notes__
    assert "'growth' (updates grow connections)" in note
    assert "give that promise and the reason in Settings(promises_not_made={...})" in note


def test_wrong_gradients_are_found() -> None:
    cases = contract(TopKAST, Settings(SHORT, gradients="masked", promises_not_made={"growth": "by themselves"}))()
    with pytest.raises(AssertionError, match="gradients at the clip that gradients= in the settings says are zero"):
        cases.test_gradients_are_masked_before_they_are_clipped()


def test_cases_without_their_promise_are_left_out() -> None:
    made = contract(GMP, Settings(SHORT, promises_not_made={"planned counts": "a budget decides"}))
    assert not hasattr(made, "test_counts_are_exactly_the_planned_ones")
    assert hasattr(made, "test_resume_is_bitwise")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"promises_not_made": {"speed": "slow"}},
            r"\['speed'\] names promises that the contract does not have.*'growth'",
        ),
        ({"promises_not_made": {"growth": " "}}, r"no reason for \['growth'\]"),
        ({"gradients": "dense"}, "gradients='dense' is not known"),
    ],
)
def test_settings_refuse_what_they_do_not_know(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(SHORT, **wrong)
    assert "growth" in PROMISES


def test_pytest_is_imported_by_a_call_alone() -> None:
    program = "import sys, sparse_callbacks.testing; print({'pytest', 'pytorch_lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_contract_needs_a_class() -> None:
    with pytest.raises(TypeError, match="needs a class: a Method, or its callback"):
        contract(GMP(0.5), Settings(SHORT))  # type: ignore[arg-type]
