"""The choices of the root key `report`."""

from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., dict[str, float]]


def test_a_record_without_its_page_is_enough_for_comparisons(run: Run, tmp_path: Path) -> None:
    run("method=set", "report=record", "trainer.max_epochs=1")
    assert (tmp_path / "run/record/run.json").is_file()
    assert not (tmp_path / "run/report.html").exists()


def test_another_choice_is_refused_before_the_first_batch(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report='page' is not known\. Use report=true, report=record"):
        run("report=page")
    assert not (tmp_path / "run/checkpoints").exists()
