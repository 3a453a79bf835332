"""Every example runs, shortened, and does what its first lines say."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {
        "plain_loop",
        "fabric_loop",
        "dqn",
        "language_model",
        "hundred_million_neurons",
        "sharpness_aware",
        "transfer_learning",
    }


def test_a_plain_loop_learns_two_spirals(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("plain_loop").main(steps=400) > 0.9
    assert "with 90.0% of the weights at zero" in capsys.readouterr().out


def test_fabric_learns_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("fabric_loop").main(epochs=8) > 0.8
    assert "sparsity 0.9500" in capsys.readouterr().out


def test_sharpness_aware_minimization_learns_in_both_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    assert min(example("sharpness_aware").main(epochs=12)) > 0.75
    shown = capsys.readouterr().out
    assert "Trainer: 10 updates, sparsity 0.80" in shown
    assert "loop: 10 updates, sparsity 0.80" in shown


@pytest.mark.parametrize(
    ("epochs", "samples"), [(2, 64), pytest.param(4, 640, marks=pytest.mark.slow)], ids=["short", "whole"]
)
def test_a_thawed_network_ends_sparse_everywhere(epochs: int, samples: int, capsys: pytest.CaptureFixture[str]) -> None:
    layers = example("transfer_learning").main(epochs, samples)
    assert len(layers) == 21
    assert all(0.899 < sparsity <= 0.9 for sparsity in layers.values()), layers
    shown = capsys.readouterr().out
    assert "with 90.0% of the weights of 21 layers at zero" in shown
    if epochs == 4:
        assert float(shown.partition("accuracy ")[2].partition("%")[0]) > 80


def test_a_sparse_agent_learns(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("dqn").main(steps=1200) > 15  # a pole that nobody pushes well stands for some ten steps
    assert "with 80.0% of the weights at zero" in capsys.readouterr().out


def test_a_sparse_language_model_learns(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("language_model").main(steps=60) < 2.4  # ln 13 = 2.56 knows nothing
    assert "sparsity 90.0%" in capsys.readouterr().out


def test_a_million_neurons_hold_their_live_weights_alone() -> None:
    """A hundredth of the example, in fifty layers, in a process of its own."""
    command = [sys.executable, str(FOLDER / "hundred_million_neurons.py"), "--neurons", "1000000", "--width", "20000"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 update of SET" in done.stdout
    live, bytes_a_weight = (
        re.search(r"neurons, ([\d,]+) live", done.stdout),
        re.search(r"([\d.]+) bytes a live", done.stdout),
    )
    assert live is not None
    assert bytes_a_weight is not None
    assert int(live[1].replace(",", "")) > 5 * 10**6
    # value, gradient, momentum, pattern: 24; a fifth of a neuron with bias, activations and two row pointers
    assert float(bytes_a_weight[1]) <= 40
    assert "1/1" in done.stdout + done.stderr  # the progress bar
