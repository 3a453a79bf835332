"""The table of operations: every row is probed by calls of its operation."""

from collections import defaultdict

import pytest
from support.operation_probe import Sample, faults, probed
from support.operation_table import OTHER_DEVICES, SAMPLES, missing_here

from sparse_callbacks.channels import trace  # noqa: F401 - fills the table
from sparse_callbacks.channels.operations.table import RULES

BY_NAME: dict[str, list[Sample]] = defaultdict(list)
for _sample in SAMPLES:
    BY_NAME[_sample.name].append(_sample)


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_rule_says_what_the_operation_does(name: str) -> None:
    if name in OTHER_DEVICES or missing_here(name):
        assert name not in BY_NAME or missing_here(name)
        return
    assert BY_NAME[name], f"{name} has no sample: write one in tests/support, so that its rule is compared with torch"
    found = []
    for sample in BY_NAME[name]:
        probe = probed(sample)
        assert name in probe.reached, f"a sample of {name} calls {sorted(probe.reached)}"
        found += faults(probe)
    assert not found, "\n".join(found)


def test_every_sample_has_a_row() -> None:
    assert set(BY_NAME) <= set(RULES)
