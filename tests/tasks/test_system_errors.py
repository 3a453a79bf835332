"""A full disk, a folder that is gone or read-only, two runs in one folder, a clock that jumps: what was saved stays whole,
and a run that cannot go on says so in words."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec.implementations.local as local_files
import pytest
import torch
from conftest import ROOT, SHORT

from sparse_callbacks.tasks import summary
from sparse_callbacks.tasks.classifier import Classifier
from sparse_callbacks.tasks.system_errors import why_ended
from sparse_callbacks.testing.comparison import differences

Run = Callable[..., dict[str, float]]
OPTIONS = (*SHORT, "method=rigl", "logger=[csv]", "checkpoint_every=4", "trainer.max_epochs=6")


def program(folder: Path, *more: str, limit: int | None = None) -> subprocess.Popen[str]:
    """train.py in the folder; with a ``limit`` no file may be longer than so many bytes."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *OPTIONS, f"hydra.run.dir={folder}", *more],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=None if limit is None else limited,
    )


def assert_whole(folder: Path) -> None:
    """Every file that a run is read from is whole."""
    for path in folder.rglob("*.ckpt"):
        assert "state_dict" in torch.load(path, weights_only=True), path
    for path in folder.rglob("metrics.json"):
        json.loads(path.read_text())


def weights(folder: Path) -> Any:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


# ---------------------------------------------------------------------- full disks


def test_a_file_limit_ends_the_run_in_words_and_leaves_the_checkpoint_before(run: Run, tmp_path: Path) -> None:
    run("method=rigl", "logger=[csv]")
    last = tmp_path / "run/checkpoints/last.ckpt"
    before = last.read_bytes()
    process = program(tmp_path / "run", f"ckpt_path={last}", limit=len(before) // 2)
    error = process.communicate()[1]
    assert process.returncode == 1
    assert "Run ended by the system: File too large" in error
    assert f"{last} is whole: it holds the run up to step 27." in error
    assert "Resume with:\n  python " in error
    assert "Traceback" not in error
    assert last.read_bytes() == before
    assert_whole(tmp_path)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of one megabyte; skips where none can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_survived_by_the_last_checkpoint_which_resumes_bitwise(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        folder = disk / "run"
        long = "trainer.max_epochs=60"
        process = program(folder, long)
        while not (folder / "checkpoints/last.ckpt").exists() and process.poll() is None:
            time.sleep(0.01)
        with pytest.raises(OSError, match="No space left"):
            (disk / "filler").write_bytes(b"0" * 2**20)
        error = process.communicate()[1]
        assert process.returncode == 1
        assert "No space left on device" in error
        assert "is whole: it holds the run up to step" in error
        assert_whole(folder)
        (disk / "filler").unlink()
        resumed = program(folder, long, f"ckpt_path={folder}/checkpoints/last.ckpt")
        whole = program(tmp_path / "whole", long)
        assert [resumed.communicate() and resumed.returncode, whole.communicate() and whole.returncode] == [0, 0]
        assert differences(weights(folder), weights(tmp_path / "whole")) == []


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_disk_that_fills_while_a_checkpoint_is_copied_to_its_place_leaves_the_one_before(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Lightning writes to the folder of temporary files, which may lie on another disk: moving is copying then."""
    run("method=rigl")
    path, copied = tmp_path / f"run/checkpoints/{name}.ckpt", []
    before = path.read_bytes()

    def copy_half(source: str, target: str) -> None:
        if name in Path(target).name:
            copied.append(target)
            Path(target).write_bytes(Path(source).read_bytes()[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)
        shutil.copy(source, target)

    monkeypatch.setattr(local_files, "shutil", SimpleNamespace(move=copy_half, copyfileobj=shutil.copyfileobj))
    with pytest.raises(OSError, match="No space left") as caught:
        run("method=rigl", "checkpoint_every=4")
    assert len(copied) == 1
    assert path.read_bytes() == before
    assert f"No space left on device at {copied[0]}." in why_ended(caught.value, path)
    assert_whole(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_metrics_that_cannot_be_written_leave_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    summary.write_metrics(tmp_path / "metrics.json", {"test/acc": 0.5})

    def half(path: Path, text: str) -> None:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match=os.strerror(number)):
        summary.write_metrics(tmp_path / "metrics.json", {"test/acc": 0.75})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"test/acc": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


# ---------------------------------------------------------------------- folders


def at_step(step: int, do: Callable[[], object]) -> Any:
    """A hook of the module that does something once, after that step."""

    def on_train_batch_end(self: Classifier, *_: object) -> None:
        if self.trainer.global_step == step:
            do()

    return on_train_batch_end


def test_a_folder_that_becomes_read_only_ends_the_run_and_keeps_its_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised where files are opened: root may write into any folder."""
    real = local_files.LocalFileOpener.__init__

    def refused(self: Any, path: str, mode: str, *args: Any, **more: Any) -> None:
        if "w" in mode and path.startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        real(self, path, mode, *args, **more)

    def close() -> None:
        monkeypatch.setattr(local_files.LocalFileOpener, "__init__", refused)

    monkeypatch.setattr(Classifier, "on_train_batch_end", at_step(10, close))
    with pytest.raises(OSError, match="Read-only file system"):
        run("method=rigl", "checkpoint_every=4")
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
    assert_whole(tmp_path)


def test_a_folder_that_is_deleted_is_made_again_for_the_next_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "on_train_batch_end", at_step(10, lambda: shutil.rmtree(tmp_path / "run")))
    run("method=rigl", "checkpoint_every=4", "logger=[]")
    assert_whole(tmp_path)
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 27


def test_a_folder_that_cannot_come_back_ends_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace_by_a_file() -> None:
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("in the way")

    monkeypatch.setattr(Classifier, "on_train_batch_end", at_step(10, replace_by_a_file))
    with pytest.raises(OSError) as caught:  # noqa: PT011  which one depends on the system
        run("method=rigl", "checkpoint_every=4")
    words = why_ended(caught.value, tmp_path / "run/checkpoints/last.ckpt")
    assert "Run ended by the system: " in words
    assert "No checkpoint was written yet" in words


@pytest.mark.slow
def test_two_runs_in_one_folder_leave_whole_files_that_resume(tmp_path: Path) -> None:
    both = [program(tmp_path / "run", f"seed={seed}") for seed in (0, 1)]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(errors)[-3000:]
    assert_whole(tmp_path)
    for seed in (0, 1):
        alone = program(tmp_path / f"alone{seed}", f"seed={seed}")
        alone.communicate()
        assert alone.returncode == 0
    alone_weights = [weights(tmp_path / f"alone{seed}") for seed in (0, 1)]
    assert any(differences(weights(tmp_path / "run"), w) == [] for w in alone_weights)


# ---------------------------------------------------------------------- words


def test_a_checkpoint_that_is_not_whole_is_not_called_whole(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "metrics.csv")
    path = tmp_path / "last.ckpt"
    assert "at metrics.csv. No checkpoint was written yet. Free space" in why_ended(full, path)
    torch.save({"global_step": 3, "weights": torch.zeros(1000)}, path)
    assert f"{path} is whole: it holds the run up to step 3. Free space" in why_ended(full, path)
    path.write_bytes(path.read_bytes()[:2000])
    assert f"{path} cannot be read, so the run starts over." in why_ended(full, path)


# ---------------------------------------------------------------------- clocks


def test_a_clock_that_jumps_back_changes_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour back after the tenth step: everything comes out as without, and no duration is negative."""
    options = ("method=rigl", "checkpoint_every=4", "logger=[csv]")
    run(*options, folder="steady")
    real, jump = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() - jump[0])
    monkeypatch.setattr(Classifier, "on_train_batch_end", at_step(10, lambda: jump.__setitem__(0, 3600.0)))
    metrics = run(*options, folder="jumped")
    assert jump == [3600.0]
    assert metrics["seconds"] >= 0
    assert_whole(tmp_path)
    steady, jumped = (
        torch.load(tmp_path / f / "checkpoints/last.ckpt", weights_only=True) for f in ("steady", "jumped")
    )
    for key in ("state_dict", "optimizer_states", "global_step"):
        assert differences(steady[key], jumped[key]) == []
    assert (tmp_path / "jumped/checkpoints/best.ckpt").exists()
