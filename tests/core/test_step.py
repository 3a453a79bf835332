"""One optimizer step: its number, whether an update is due, and what it does to gradients and state."""

from typing import Any

import pytest
import torch
from torch import nn

from sparse_callbacks.core.calendar import Calendar
from sparse_callbacks.core.gradients import DenseGradients
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.progress import Progress
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.weights import SparseWeights


class Parts:
    def __init__(self, read: bool = True, calendar: Calendar | None = None) -> None:
        self.p = nn.Parameter(torch.ones(3))
        params = {"p": self.p}
        self.optimizer = torch.optim.SGD([self.p], lr=0.1, momentum=0.9)
        self.weights = SparseWeights(params, {}, {"p": torch.tensor([True, False, True])})
        self.progress = Progress(1)
        self.progress.begin(1)
        self.owners = Ownership([self.optimizer], params)
        self.p.grad = torch.ones(3)
        self.step = Step(0, 0, self.owners, self.weights, self.progress, calendar, DenseGradients(params), read)


def test_number_counts_finite_steps_of_its_optimizer() -> None:
    parts = Parts()
    assert parts.step.number == 0
    for finite in (True, torch.tensor(False), torch.tensor(True), False):
        parts.progress.counts[0].add(finite)
    assert parts.step.number == 2
    assert list(parts.step.names) == ["p"]
    assert parts.step.optimizer is parts.optimizer


def test_due_on_the_calendar_only_once_and_only_with_finite_gradients() -> None:
    parts = Parts(calendar=Calendar(every=2, start=2, stop=4))
    found = []
    assert parts.step.may_be_due  # nobody has looked at the calendar yet
    for _ in range(6):
        parts.progress.counts[0].add(True)
        found.append(parts.step.due)
        if parts.step.due:
            parts.step.finite_flag = torch.tensor(False)
            assert not parts.step.due
            parts.step.finite_flag = True
            parts.progress.mark_done(0)
            assert not parts.step.due
        assert not parts.step.may_be_due  # not before the next update, and never again behind the last one
    assert found == [False, True, False, True, False, False]


def test_a_method_without_times_has_no_calendar() -> None:
    step = Parts().step
    with pytest.raises(RuntimeError, match=r"this method has no calendar: .*Method\.set_times"):
        _ = step.calendar
    with pytest.raises(RuntimeError, match="has no calendar"):
        _ = step.due


@pytest.mark.parametrize(
    ("read", "finite", "masked"),
    [(True, True, True), (False, True, False), (False, False, True), (False, torch.tensor(False), False)],
    ids=["read", "nobody reads", "known to be infinite", "not waited for"],
)
def test_gradients_are_masked_where_somebody_reads_them_or_one_is_infinite(
    read: bool, finite: Any, masked: bool
) -> None:
    parts = Parts(read)
    assert parts.p.grad is not None
    if finite is False:
        parts.p.grad[1] = torch.inf  # a product with the mask would leave NaN
    parts.step.finite_flag = finite
    parts.step.mask_gradients()
    assert parts.p.grad.tolist() == ([1, 0, 1] if masked else [1, 1, 1])
    assert parts.step.masked_gradients is masked


def test_gradients_of_a_dense_copy_stay() -> None:
    parts = Parts()
    parts.weights.start_copy({"p": torch.ones(3)})
    parts.step.mask_gradients()
    assert parts.p.grad is not None
    assert parts.p.grad.tolist() == [1, 1, 1]
    assert not parts.step.masked_gradients


def test_replace_leaves_the_gradients_to_the_host() -> None:
    parts = Parts()
    assert not parts.step.replaced
    parts.step.replace()
    assert parts.step.replaced
    assert parts.step.gradient("p") is parts.p.grad is not None


def test_clear_state_clears_where_it_is_asked_to() -> None:
    parts = Parts()
    parts.optimizer.step()
    parts.step.clear_state("p", torch.tensor([False, False, True]))
    assert parts.optimizer.state[parts.p]["momentum_buffer"].tolist() == [1, 1, 0]
