"""What a run gives back to a sweeper."""

from collections.abc import Callable

import pytest
from omegaconf import DictConfig

from sparse_callbacks.tasks.objective import objective_names, objective_values

METRICS = {"val/acc": 0.9, "sparsity/model": 0.8}


def test_one_metric_is_a_number_and_a_list_a_tuple(composed: Callable[..., DictConfig]) -> None:
    assert objective_names(composed()) == "val/acc"
    names = objective_names(composed("objective=[val/acc,sparsity/model]"))
    assert objective_values(METRICS, "val/acc", required=True) == 0.9
    assert objective_values(METRICS, names, required=True) == (0.9, 0.8)
    assert objective_values(METRICS, ["val/acc"], required=True) == (0.9,)


@pytest.mark.parametrize("given", ["[]", "''", "null", "3", "[val/acc,val/acc]", "[val/acc,null]", "{a: b}"])
def test_what_names_no_metric_is_refused(given: str, composed: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match=r"names no metric of a run\. Give one, such as objective=val/acc"):
        objective_names(composed(f"objective={given}"))


def test_a_metric_that_the_run_does_not_have_is_refused_where_somebody_reads_it() -> None:
    with pytest.raises(
        ValueError, match=r"objective=val/f1 is not among the metrics of the run: sparsity/model, val/acc"
    ):
        objective_values(METRICS, "val/f1", required=True)
    assert objective_values(METRICS, ["val/acc", "val/f1"], required=False) is None
