"""Random networks, methods, arguments, optimizers, precisions and hosts: what must hold in every run.

``pytest -m slow tests/properties`` trains a thousand; ``PYTHONPATH=tests python -m properties.survey`` counts them.
"""

import os

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.methods import METHODS

from properties.arguments import DRAWN, NOT_DRAWN, names_of
from properties.cases import cases
from properties.checks import is_documented_refusal
from properties.runs import run
from properties.survey import survey

settings.register_profile(
    "properties", max_examples=5, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
PROFILE = settings.get_profile("properties")


@pytest.mark.parametrize("method", METHODS)
@settings(PROFILE)
@given(data=st.data())
def test_random_runs_keep_what_is_promised(method: str, data: st.DataObject) -> None:
    """Five of each method; ``--hypothesis-show-statistics`` counts how they ended."""
    case = data.draw(cases(method))
    event(f"{case.method} by {case.host}: {run(case).kind}")


@pytest.mark.slow
def test_a_thousand_random_runs_keep_what_is_promised() -> None:
    """Their number and seed can be given: PROPERTY_EXAMPLES=5000 PROPERTY_SEED=7 pytest -m slow tests/properties."""
    found = survey(int(os.environ.get("PROPERTY_EXAMPLES", "1000")), int(os.environ.get("PROPERTY_SEED", "0")))
    print(found.table())
    assert not found.failures, "\n\n".join(f"{case}\n{trace}" for case, trace in found.failures)
    assert found.share("refused") < 0.2
    assert all(found.outcomes[m, "trainer", "trained"] for m in METHODS)


def test_every_argument_of_every_method_is_drawn_or_left_out_for_a_reason() -> None:
    known = {name for method in METHODS for name in names_of(method)}
    assert known == DRAWN.keys() | NOT_DRAWN.keys()


@given(st.sampled_from(["of", "for", ""]))
@settings(PROFILE)
def test_what_counts_as_a_documented_refusal(word: str) -> None:
    told = f"every=0 is not an interval {word}. Give 1 or more."
    assert is_documented_refusal(ValueError(told), batches=0)
    assert not is_documented_refusal(ValueError(told), batches=1)
    assert not is_documented_refusal(RuntimeError(told), batches=0)
    assert not is_documented_refusal(ValueError("Expected more than 1 value per channel"), batches=0)
    assert not is_documented_refusal(ValueError("x"), batches=0)
