"""Every mistake on the command line is answered by one sentence alone, before data is read."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mistakes
import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from sparse_callbacks.reporting.compared_runs import FAILURE
from sparse_callbacks.tasks import plain_errors

Refused = Callable[..., str]
QUIET = ("report=false", "trainer.enable_progress_bar=false")


def never_mind(*args: object, **kwargs: object) -> None:
    return None


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What `python train.py ...` prints as it ends with 1, in a folder with two files that are not checkpoints, one of weights, and a
    folder of pictures.
    """
    import train

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.chdir(tmp_path)
    # composes once more to find out whether it is a multirun; None says that the flag decides
    monkeypatch.setattr("hydra._internal.hydra.Hydra.get_mode", never_mind)
    monkeypatch.setattr("sklearn.datasets.load_digits", never)
    Path("text.ckpt").write_text("words")
    torch.save(torch.zeros(3), "tensor.ckpt")
    Path("pictures").mkdir()
    torch.save({"layer.weight": torch.zeros(3)}, "other.pth")

    def go(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *arguments])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as caught:
            train.main()
        printed = capsys.readouterr()
        assert caught.value.code == 1, printed.err
        return printed.err

    return go


ALL = [
    (given if isinstance(given, tuple) else (given,), sentence)
    for part in (mistakes.NAMES, mistakes.CHOICES, mistakes.GRAMMAR, mistakes.VALUES)
    for given, sentence in part
]


# a value of a key that is there is set in a configuration; everything else goes through the command line
VALUES = {given if isinstance(given, tuple) else (given,) for given, _ in mistakes.VALUES}
IN_GROUPS = {
    given for given in VALUES if any(text.split("=")[0] in ("method", "model", "data", "objective") for text in given)
}
SET = [entry for entry in ALL if entry[0] in VALUES - IN_GROUPS]
COMPOSED = [entry for entry in ALL if entry not in SET]


def test_there_are_enough_mistakes() -> None:
    assert len({given for given, _ in ALL}) >= 85


@pytest.mark.parametrize(("given", "sentence"), COMPOSED, ids=[" ".join(given) for given, _ in COMPOSED])
def test_a_mistake_is_answered_by_its_sentence_alone(refused: Refused, given: tuple[str, ...], sentence: str) -> None:
    quiet = [text for text in QUIET if text.partition("=")[0] not in " ".join(given)]
    no_logger = [] if any("logger" in text for text in given) else ["logger=[]"]
    printed = refused(*quiet, *no_logger, *given)
    assert sentence in printed
    (line,) = printed.strip().splitlines()
    assert not any(word in line for word in ("Traceback", "hydra.cc", "HYDRA_FULL_ERROR", " +", "object_type"))


@pytest.fixture(scope="module")
def base() -> DictConfig:
    """The configuration that the wrong values are set in: composing it for each takes the most time by far."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("train", overrides=["logger=[]", *QUIET])


@pytest.mark.parametrize(("given", "sentence"), SET, ids=[" ".join(given) for given, _ in SET])
@pytest.mark.usefixtures("refused")
def test_a_wrong_value_is_answered_by_its_sentence(base: DictConfig, given: tuple[str, ...], sentence: str) -> None:
    import train

    cfg = base.copy()
    for override in OverridesParser.create().parse_overrides(list(given)):
        OmegaConf.update(cfg, override.key_or_group, override.value())
    with pytest.raises(Exception) as caught:  # noqa: PT011  the sentence decides
        train.train(cfg)
    printed = plain_errors.refusal(caught.value, train.CONF, given)
    assert printed is not None
    assert sentence in printed


def child(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "logger=[]", "report=false", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_the_process_prints_the_sentence_alone(tmp_path: Path) -> None:
    done = child(tmp_path, "sparsity=90")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "sparsity=90 is not in [0, 1): it is the fraction of zeros. For 90 % zeros write 0.9.\n"


def test_the_frames_are_there_where_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "sparsity=90", "logger=[]"])
    with pytest.raises(ValueError, match="sparsity=90 is not in") as caught:
        train.main()
    assert len(caught.traceback) > 10


def test_a_fault_of_the_program_keeps_its_frames(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: object) -> None:
        [][0]  # type: ignore[misc]

    monkeypatch.setattr("train.run_folder", fault)
    printed = refused("logger=[]")
    assert "IndexError: list index out of range" in printed
    assert "in fault" in printed


def test_a_failed_run_says_why_in_its_folder(refused: Refused, tmp_path: Path) -> None:
    refused("sparsity=90", "logger=[]", "hydra.run.dir=run")
    assert "ValueError: sparsity=90 is not in [0, 1)" in (tmp_path / "run" / FAILURE).read_text()


def test_a_job_of_a_multirun_ends_it_with_the_sentence_behind_the_table(refused: Refused) -> None:
    printed = refused("-m", "sparsity=80,90", "logger=[]", *QUIET)
    assert "Traceback" not in printed
    assert printed.strip().splitlines()[-1].startswith("sparsity=80 is not in [0, 1)")
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert "SPARSE_CALLBACKS_PLAIN_ERRORS" not in os.environ
