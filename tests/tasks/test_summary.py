"""The table at the end of a run, on a terminal and in a log file."""

import pytest

from sparse_callbacks.tasks import summary

METRICS = {"test/acc": 0.5, "epochs": 3.0, "steps": 27.0, "seconds": 1.0}
PLACES = {"folder": "/a" * 70, "wandb": "offline; to upload it: wandb sync " + "b c" * 40}


@pytest.mark.parametrize("columns", [40, 300])
@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_there_to_be_copied_is_never_broken(
    columns: int, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    summary.show(summary.summary_table(METRICS, None), PLACES)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(tuple(PLACES))] == [f"{k}: {v}" for k, v in PLACES.items()]
    rows = [line for line in lines if not line.startswith(tuple(PLACES))]
    assert all(len(row) <= columns for row in rows) or not terminal
    assert any("3, 27 in 1.0 s" in row for row in rows)
    # a frame costs columns that a narrow terminal needs
    assert any(row.startswith("│") for row in rows) == (columns == 300 or not terminal)
