"""Random states in a checkpoint keep the format of older checkpoints and come back exactly."""

import csv
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from sparse_callbacks.core.randomness import random_states, restore_random_states
from sparse_callbacks.tasks.classifier import Classifier
from sparse_callbacks.tasks.run_state import begun_metrics, refuse_damaged, restore_saved_states, states_to_save
from sparse_callbacks.tasks.safe_stop import RunStopped


def draws() -> tuple[list[float], float, float, float]:
    """A few numbers of every generator; the normal ones leave a second number cached in numpy's and Python's."""
    return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), float(np.random.normal())


def test_saved_states_survive_a_file_and_come_back_exactly(tmp_path: Path) -> None:
    draws()
    torch.save(states_to_save(), tmp_path / "states.pt")
    expected = [draws() for _ in range(3)]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    restore_saved_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [draws() for _ in range(3)] == expected


def test_the_format_is_the_one_of_version_0_1() -> None:
    saved = states_to_save()
    assert saved.keys() == {"torch", "numpy", "python"} | ({"cuda"} if torch.cuda.is_available() else set())
    assert saved["torch"].dtype == torch.uint8
    assert saved["numpy"].keys() == {"name", "keys", "rest"}
    assert saved["numpy"]["name"] == "MT19937"
    assert (saved["numpy"]["keys"].dtype, saved["numpy"]["keys"].shape) == (torch.int64, (624,))
    assert [type(number) for number in saved["numpy"]["rest"]] == [int, int, float]
    assert saved["python"].keys() == {"version", "numbers", "gauss"}
    assert (saved["python"]["numbers"].dtype, saved["python"]["numbers"].shape) == (torch.int64, (625,))
    if torch.cuda.is_available():
        assert torch.equal(saved["cuda"], torch.cuda.get_rng_state())


def test_the_states_of_the_core_come_back_exactly() -> None:
    draws()
    states = random_states()
    expected = [draws() for _ in range(3)]
    restore_random_states(states)
    assert [draws() for _ in range(3)] == expected


def test_the_core_neither_imports_numpy_nor_initializes_cuda() -> None:
    """numpy appears later in the process: its state was not taken, so it is not put back either."""
    program = (
        "import sys\n"
        "import torch\n"
        "from sparse_callbacks.core.randomness import random_states, restore_random_states\n"
        "imported = sys.modules.pop('numpy', None)\n"
        "states = random_states()\n"
        "assert 'numpy' not in states and states['cuda'] == {} and not torch.cuda.is_initialized()\n"
        "sys.modules['numpy'] = imported\n"
        "restore_random_states(states)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_only_the_current_device_is_put_back() -> None:
    saved = states_to_save()
    expected = torch.rand(3, device="cuda")
    restore_saved_states(saved)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_the_training_accuracy_of_a_resumed_epoch_counts_all_its_batches(
    run: Callable[..., dict[str, float]], tmp_path: Path
) -> None:
    """Nine batches an epoch: the run stops after the fourth of the second one."""

    def accuracies(folder: str, version: int) -> list[str]:
        rows = csv.DictReader((tmp_path / folder / f"csv/version_{version}/metrics.csv").open())
        return [row["train/acc"] for row in rows if row["train/acc"]]

    def stop(self: Classifier, *_: object) -> None:
        if self.trainer.global_step == 13:
            os.kill(os.getpid(), signal.SIGTERM)

    run("method=rigl", "logger=[csv]", folder="whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "on_train_batch_end", stop)
        with pytest.raises(RunStopped) as stopped:
            run("method=rigl", "logger=[csv]", folder="stopped")
    run("method=rigl", "logger=[csv]", f"ckpt_path={stopped.value.checkpoint}", folder="stopped")
    assert accuracies("stopped", 0) + accuracies("stopped", 1) == accuracies("whole", 0)
    assert len(accuracies("whole", 0)) == 3


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda saved: saved.update(metrics=3), "has 3 as metrics of 1 processes"),
        (lambda saved: saved.update(metrics=[7]), "has 7 as metrics"),
        (lambda saved: saved["metrics"][0].update(seen=[]), r"has .* as the state of seen"),
        (lambda saved: saved["metrics"][0]["seen"].update(tp=torch.zeros(3)), r"has .* as tp of seen"),
        (lambda saved: saved["metrics"][0]["seen"].pop("fn"), r"has .* as the state of seen"),
    ],
)
def test_damaged_states_of_metrics_are_refused(damage: Callable[[Any], Any], words: str) -> None:
    module = nn.ModuleDict({"seen": MulticlassAccuracy(4, average="micro")})
    module["seen"].update(torch.tensor([0, 1]), torch.tensor([0, 2]))
    saved = {"random": [states_to_save()], "metrics": [begun_metrics(module)]}
    refuse_damaged(saved, module, "last.ckpt")
    damage(saved)
    with pytest.raises(ValueError, match=rf"ckpt_path=last.ckpt is damaged: its run_state {words}"):
        refuse_damaged(saved, module, "last.ckpt")
