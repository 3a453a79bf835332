"""The command `python -m sparse_callbacks.latency`: what it measures, keeps and reuses, and what it refuses."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.latency_rig import Net, by_weights
from torch import nn

from sparse_callbacks.channels.latency import command
from sparse_callbacks.channels.latency import measure as measuring
from sparse_callbacks.channels.latency.command import main
from sparse_callbacks.channels.latency.table import Grid, Table

LINEAR = ["torch.nn:Linear", "--arguments", '{"in_features": 6, "out_features": 4}', "--input", "6", "--points", "1"]


def test_the_command_measures_keeps_and_reuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = by_weights(monkeypatch)
    out = tmp_path / "new" / "t.json"
    words = [*LINEAR, "--out", str(out)]
    main(words)
    shown = capsys.readouterr().out
    assert "all channels 24 ms (by the table 24); not fitted: no channels of this model can be removed" in shown
    assert f"1 kinds of layers in {out}" in shown
    table = Table.load(out)
    assert table.grids == {"linear map 1": Grid([1, 6], [1, 4], [[1.0, 4.0], [6.0, 24.0]])}
    assert table.about["model"] == 'torch.nn:Linear {"in_features": 6, "out_features": 4}'
    assert table.about["finished"]
    measured = len(seen)
    main(words)
    assert len(seen) == measured + 1  # the whole model; its layers were known
    main([*words, "--overwrite"])
    assert len(seen) == 2 * measured + 1
    main([*words, "--batch", "2", "--overwrite"])
    assert Table.load(out).about["batch"] == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--batch", "2"], "batch 1 (now 2)."),
        (["--points", "8"], "points 1 (now 8)."),
        (["--repeats", "3", "--channels-last"], "repeats 15 (now 3), channels_last False (now True)."),
        (
            ["--arguments", '{"in_features": 6}'],
            'model torch.nn:Linear {"in_features": 6, "out_features": 4} (now torch.nn:Linear {"in_f',
        ),
    ],
)
def test_a_file_of_other_settings_stays(
    more: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_weights(monkeypatch)
    out = tmp_path / "t.json"
    main([*LINEAR, "--out", str(out)])
    before = out.read_text()
    with pytest.raises(SystemExit, match="2"):
        main([*LINEAR, "--out", str(out), *more])
    shown = " ".join(capsys.readouterr().err.split())
    assert f"--out {out} holds a table of other settings: " in shown
    assert said in shown
    assert shown.endswith("Give another --out, or --overwrite to measure everything anew.")
    assert out.read_text() == before


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = by_weights(monkeypatch)
    count = measuring.milliseconds
    out = tmp_path / "t.json"
    monkeypatch.setitem(sys.modules, "mine", type("mine", (), {"net": Net}))
    words = ["mine:net", "--input", "3", "9", "9", "--points", "1", "--out", str(out)]

    def impatient(*given: Any) -> list[float]:
        if len(seen) == 7:  # 4 of the first kind, 2 of the second, 1 of the third
            raise KeyboardInterrupt
        return count(*given)

    monkeypatch.setattr(measuring, "milliseconds", impatient)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    part = Table.load(out)
    assert len(part.grids) == 2
    with pytest.raises(ValueError, match="was interrupted"):
        part.doubts([3, 9, 9])
    monkeypatch.setattr(measuring, "milliseconds", count)
    before = len(seen)
    main(words)
    table = Table.load(out)
    assert len(seen) - before == 3 * 4 + 1  # three kinds, and the whole
    assert len(table.grids) == 5
    assert all("is off by up to" in doubt for doubt in table.doubts([3, 9, 9]))  # the times are made up


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "0"], "argument --batch: '0' is not a whole number from 1 on"),
        (["--repeats", "0"], "argument --repeats: '0' is not a whole number from 1 on"),
        (["--points", "-1"], "argument --points: '-1' is not a whole number from 1 on"),
        (["--threads", "x"], "argument --threads: 'x' is not a whole number from 1 on"),
        (["--input", "3", "0"], "argument --input: '0' is not a whole number from 1 on"),
        (["--arguments", "{width: 2}"], "argument --arguments: '{width: 2}' is not JSON (Expecting"),
        (["--arguments", "[2]"], "argument --arguments: '[2]' has no names; write named arguments"),
        (["--arguments", "{}"], "model 'torch.nn:Linear' does not take {}: "),
        (["--device", "abacus"], "--device abacus cannot be used (Expected one of cpu"),
        (["--input", "7"], "the model fails with a float tensor of size [1, 7] (RuntimeError: "),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*LINEAR, "--out", str(tmp_path / "t.json"), *words])
    assert said in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("mynets", "model 'mynets' is not of the form module:callable, such as torchvision.models:resnet18."),
        (":net", "model ':net' is not of the form module:callable"),
        (
            "nonets:small",
            "model 'nonets:small': No module named 'nonets'. Install nonets, or run the command in the folder that it "
            "is in.",
        ),
        ("torch.nn:Lineal", "has no attribute 'Lineal'. Give a function or class of torch.nn that makes the model."),
        ("torch:zeros", "model 'torch:zeros' gives a Tensor, not a torch.nn.Module."),
    ],
)
def test_what_gives_no_model_is_refused(
    model: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--arguments", '{"size": [2]}'] if model == "torch:zeros" else []
    with pytest.raises(SystemExit, match="2"):
        main([model, "--input", "6", "--out", str(tmp_path / "t.json"), *words])
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_the_command_is_made_of_says_why_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model 'net' is not of the form module:callable"):
        command.built("net", {})
    with pytest.raises(
        ValueError, match=r"fails with a float tensor of size \[1, 3\] \(RuntimeError: no such thing\)\. Give --input"
    ):
        command.refuse_size(Odd(), [3])
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"--out holds something else: .* is not a latency table of version 2 .* or --overwrite"
    ):
        command.reusable(tmp_path / "t.json", {})


def test_the_place_of_the_file_is_looked_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for out, said in (
        (tmp_path / "file" / "t.json", "its folder cannot be made ("),
        (tmp_path, "is a folder, or in one that cannot be"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["nonets:small", "--input", "6", "--out", str(out)])
        assert f"--out {out}{':' if 'made' in said else ''} {said}" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(command.os, "access", lambda *_: False)  # what a folder of somebody else's gives
    assert "cannot be written to" in command.why_not_written(tmp_path / "t.json")


def test_the_help_says_which_inputs_there_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "one tensor of floating-point numbers" in " ".join(capsys.readouterr().out.split())
