"""`slim=true`: what a run leaves of the slim network, and what is refused before the first batch."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer

from sparse_callbacks.channels.compact import load_compact
from sparse_callbacks.tasks import data, models

Run = Callable[..., dict[str, float]]
SMCP = ("method=smcp", "method.round_to=4", "method.start=2", "method.stop=15", "method.every=3", "slim=true")


def slim_model(folder: Path) -> torch.nn.Module:
    digits = data.digits()
    return load_compact(models.mlp(digits.input_shape, 10, [24]), folder / "slim.safetensors").eval()


@pytest.mark.parametrize("tested", ["last", "best"])
def test_the_tested_network_is_made_smaller_tested_again_and_saved(
    tested: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(*SMCP, f"test={tested}", "optim.lr=0.3", "trainer.max_epochs=5")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    # 64 x 24 and 24 x 10 multiply-adds, half of which is 12 of 24 hidden units
    assert metrics["smcp/cost"] == metrics["slim/flops_share"] == 0.5
    assert metrics["smcp/kept/model.1"] == metrics["slim/removed"] == 12
    assert metrics["slim/parameters"] == 64 * 12 + 12 + 12 * 10 + 10
    assert metrics["slim/flops"] == 2 * (64 * 12 + 12 * 10)  # of one image
    assert metrics["slim/difference"] < 1e-6
    assert metrics["slim/latency"] > 0 < metrics["slim/latency_share"]
    assert metrics["slim/test/acc"] == metrics["test/acc"]
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == pytest.approx(metrics)
    for words in (
        "before after ratio parameters 1,810 910",
        "test accuracy, " + ("best epoch" if tested == "best" else "last epoch"),
        "the same, slim",
        "parameters 910 of 1,810 (50.3 %)",
        "FLOPs of one sample 1,776 of 3,552 (50.0 %)",
        "budget 0.5000 of the dense network's FLOPs (at most 0.5)",
        "model.1 12 of 24 units",
    ):
        assert words in shown
    assert "slim.safetensors" in shown
    small: Any = slim_model(tmp_path / "run")
    assert small[1].weight.shape == (12, 64)
    saved = torch.load(tmp_path / f"run/checkpoints/{tested}.ckpt", weights_only=True)["state_dict"]
    full = models.mlp((1, 8, 8), 10, [24]).eval()
    full.load_state_dict({k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")})
    x = torch.randn(20, 1, 8, 8)
    torch.testing.assert_close(small(x), full(x))


@pytest.mark.parametrize(
    "how",
    [
        ("method.criterion=taylor_fo", "method.start=2", "method.stop=15", "method.every=3"),
        ("method.criterion=l1", "method.ranking=layer", "method.start=0", "method.stop=0"),
    ],
    ids=["gradual", "before training"],
)
def test_channels_of_a_published_criterion_are_removed(how: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    metrics = run("method=channels", "method.round_to=4", *how, "slim=true")
    assert metrics["channels/cost"] == metrics["slim/flops_share"] == 0.5
    assert metrics["channels/kept/model.1"] == metrics["slim/removed"] == 12
    assert metrics["slim/difference"] < 1e-6
    small: Any = slim_model(tmp_path / "run")
    assert small[1].weight.shape == (12, 64)


def test_a_method_of_single_weights_loses_what_is_dead(run: Run, tmp_path: Path) -> None:
    metrics = run(
        "method=gmp", "method.stop=0.5", "method.every=1", "sparsity=0.98", "slim=true", "trainer.limit_test_batches=0"
    )
    assert metrics["slim/removed"] > 0
    assert "slim/test/acc" not in metrics
    assert slim_model(tmp_path / "run")[1].out_features == 24 - metrics["slim/removed"]


def test_layers_have_the_names_of_the_plan_in_reasons_too(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = models.mlp

    def tied(*given: Any, **options: Any) -> torch.nn.Module:
        network: Any = real(*given, **options)
        network[5].weight = network[3].weight
        return network

    monkeypatch.setattr(models, "mlp", tied)
    how = ("method=gmp", "method.stop=0.5", "method.every=1", "sparsity=0.5", "trainer.max_epochs=1")
    run(*how, "slim=true", "model.hidden=[16,16,16]")
    shown = capsys.readouterr().out
    assert "model.5.weight and model.3.weight are one parameter" in shown
    assert " 3.weight" not in shown


def test_a_run_tells_of_gates_and_of_targets_in_their_own_words(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run("method=l0", "method.density=0.3", "method.constraint=layer")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        f"expected density model.1.weight {metrics['l0/expected/model.1.weight']:.4f} (target 0.3) model.3.weight"
        in shown
    )
    assert "target ConstrainedL0 ended at an expected density of" in shown


def test_what_slimming_cannot_do_loses_nothing_of_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train

    def late(*_: Any) -> Any:
        raise TimeoutError("the search took too long")

    monkeypatch.setattr(train.slim, "slimmed", late)
    with pytest.raises(TimeoutError, match="the search took too long"):
        run(*SMCP)
    written = json.loads((tmp_path / "run/metrics.json").read_text())
    assert written["test/acc"] > 0
    assert not any(key.startswith("slim/") for key in written)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "slim: failed: the search took too long" in shown
    assert "test accuracy" in shown


def test_what_cannot_become_slim_is_refused_before_the_first_batch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=r"slim=true, but method=none has no masks.*method=smcp"):
        run("method=none", "slim=true")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'sparse-callbacks\[channels\]'"):
        run(*SMCP)
