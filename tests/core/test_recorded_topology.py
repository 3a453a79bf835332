"""The topology in the rows of a record: one meaning from the first row to the last."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks import sparsify
from sparse_callbacks.core.record.record_file import read_record
from sparse_callbacks.methods import SET, SNFS, ConstrainedL0, RigL, Static

pytestmark = pytest.mark.filterwarnings("ignore")  # of runs that are shorter than their calendars


def dead_between(masks: Mapping[str, Tensor]) -> int:
    """Hidden units of a chain without an input or without an output, counted by another way than the record's."""
    pairs = pairwise(masks.values())
    return sum(int((~(read.any(1) & written.any(0))).sum()) for read, written in pairs)


AT_ONCE: dict[str, Any] = {"every": 2, "start": 0, "stop": 12}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SET, AT_ONCE),
        (SET, {**AT_ONCE, "start": 6}),
        (SET, {**AT_ONCE, "storage": "sparse"}),
        (RigL, AT_ONCE),
        (RigL, {**AT_ONCE, "storage": "sparse"}),
        (SNFS, AT_ONCE),
        (Static, {}),
    ],
)
def test_dead_units_have_one_meaning_from_the_first_row_on(
    tmp_path: Path, kind: type[Any], options: dict[str, Any]
) -> None:
    """Also where the first step moves the masks, when nobody knows yet that the layers are a chain."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = kind(0.95, distribution="uniform", print_plan=False, **options)
    with sparsify(method, model, optimizer, steps=16) as run:
        run.report(tmp_path, every=1, page=False)
        expected = {0: dead_between(run.masks)}
        for number in range(1, 17):
            model(torch.randn(8, 20)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            expected[number] = dead_between(run.masks)
    rows = [row for row in read_record(tmp_path).rows if row["event"] != "log"]
    assert len(rows) > (1 if kind is Static else 4)
    assert [row["topology/dead_units"] for row in rows] == [expected[row["step"]] for row in rows]
    assert all(row["topology/paths"] >= 0 and "on_no_path" in row["layers"]["0.weight"] for row in rows)
    assert expected[0] > 0


def test_a_chain_whose_first_masks_were_gone_before_it_was_known_has_no_dead_units_of_another_meaning(
    tmp_path: Path,
) -> None:
    """Gates are drawn anew before the first step."""
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with sparsify(ConstrainedL0(density=0.5, print_plan=False), model, optimizer, steps=4) as run:
        run.report(tmp_path, every=1, page=False)
        for _ in range(4):
            with run.batch():
                model(torch.randn(8, 20)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    found = read_record(tmp_path)
    assert found.run.chain
    rows = [row for row in found.rows if row["event"] != "log"]
    assert all(("topology/dead_units" in row) == ("topology/paths" in row) for row in rows)
    assert "topology/paths" in rows[-1]
