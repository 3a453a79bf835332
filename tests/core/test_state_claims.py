"""States that a run has really saved are never refused for the number of zeros in their masks."""

from typing import Any

import pytest
from support import loops

from sparse_callbacks import DPF, GMP, RigL, sparsify
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.saved_bits import with_truths


def begun(method: Method, steps: int, state: Any = None) -> Any:
    model = loops.net()
    return sparsify(method, model, loops.sgd(model), steps, state=state)


@pytest.mark.parametrize("make", [GMP, DPF])
def test_a_run_that_was_made_shorter_goes_on_before_its_next_update(make: Any) -> None:
    """Masks are then of the longer curve, of which so little may be over that nothing is pruned."""

    def method() -> Any:
        return make(0.5, every=1, start=0.0, stop=1.0, print_plan=False)

    model = loops.net()
    optimizer = loops.sgd(model)
    run = sparsify(method(), model, optimizer, 10**6)
    loops.train(run, model, optimizer, last=3)
    state = with_truths(run.state_dict())
    run.close()
    assert sum(int((~mask).sum()) for mask in state["masks"].values()) == 0
    shorter = begun(method(), 8, state)
    saved_again = shorter.state_dict()
    shorter.close()
    begun(method(), 8, saved_again).close()


def test_a_mask_that_was_changed_in_a_state_is_refused() -> None:
    run = begun(GMP(0.5, every=1, print_plan=False), 20)
    state = with_truths(run.state_dict())
    run.close()
    name = next(iter(state["masks"]))
    state["masks"][name].view(-1)[0] = False
    with pytest.raises(ValueError, match="has 1 zeros, and 0 were counted when it was saved"):
        begun(GMP(0.5, every=1, print_plan=False), 20, state)


def test_a_state_of_version_0_1_may_have_other_counts_where_layers_have_changed() -> None:
    """That version did not write down that they had, and its states have no count of zeros."""

    def method() -> Any:
        return RigL(0.5, distribution="erdos_renyi", every=2, print_plan=False)

    run = begun(method(), 20)
    state = with_truths(run.state_dict())
    run.close()
    del state["method"], state["zeros"]
    mask = next(m for m in state["masks"].values() if not m.all())
    mask.view(-1)[int(mask.view(-1).int().argmin())] = True
    ever = state["aux"]
    ever.update({k: t | True for k, t in ever.items() if k.startswith("ever_active/")})
    begun(method(), 20, state).close()
