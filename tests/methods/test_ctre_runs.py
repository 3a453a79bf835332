"""CTRE in a run: densities, patience, resume, and input that is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.ctre import ER_DENSITY, SEQ_SWITCH
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from support.ctre import FIRST, SECOND, Net, Watch, ctre, run
from support.data import loader
from support.inside import waits_for
from support.nets import Regression, mlp
from support.rig import fit_steps
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sparse_callbacks import CTRE, distributions, saved_masks
from sparse_callbacks.core.ops import keep_largest
from sparse_callbacks.methods.ctre.patience import Patience, judged
from sparse_callbacks.testing.runs import trainer_for

# ---------------------------------------------------------------------- density


@pytest.mark.parametrize(
    "case", ER_DENSITY, ids=lambda c: f"{c['dim']}-{c['n_hidden']}-{c['n_classes']} eps {c['epsilon']}"
)
def test_counts_of_epsilon_as_in_the_reference(case: dict[str, Any]) -> None:
    hidden = case["n_hidden"]
    with torch.device("meta"):
        net = mlp(case["dim"], hidden, hidden, hidden, case["n_classes"])
    for callback in (CTRE(epsilon=case["epsilon"]), CTRE(distribution=f"epsilon({case['epsilon']})")):
        rows = [r for r in callback.plan(net) if r.name.endswith("weight")]
        assert [r.size - r.zeros for r in rows] == case["n_active"]
        assert sum(r.size for r in rows) == case["total_dense"]
        assert sum(r.size - r.zeros for r in rows) / case["total_dense"] == pytest.approx(
            case["density"], abs=5e-9
        )  # 8 digits


def test_a_run_with_epsilon_has_its_counts(tmp_path: Path) -> None:
    callback = ctre(epsilon=1, sparsity=..., distribution=...)
    run(tmp_path, callback)
    expected = distributions.epsilon_sparsity({FIRST: (20, 12), SECOND: (6, 20)}, 1)
    for name, mask in callback.masks.items():
        assert int(mask.sum()) == mask.numel() - math.floor(expected[name] * mask.numel())


# ---------------------------------------------------------------------- patience


def growth_of(path: Path, script: list[float], epochs: int, **options: Any) -> list[str]:
    """How each epoch's update grew, from the second epoch on."""
    callback = ctre(variant="seq", monitor="score", drop_fraction=0.4, **options)
    watch, _, _ = run(path, callback, Net(script=script), epochs=epochs)
    for update in watch.updates:
        random = update["events"]["ctre/phase"] == 1.0
        assert update["events"]["update/at_random"] == float(random)
        assert update["events"]["update/by_similarity"] == float(not random)
        assert ("update/mean_similarity" in update["events"]) == (not random)
        assert bool(update["similarity"]) == (not random)
    assert len(watch.passes) == sum(u["events"]["ctre/phase"] == 0 for u in watch.updates)
    return ["random" if u["events"]["ctre/phase"] else "cos" for u in watch.updates]


def test_growth_is_random_after_patience_as_in_the_reference(tmp_path: Path) -> None:
    example = SEQ_SWITCH["example"]
    found = growth_of(tmp_path, example["val"], len(example["val"]) + 1, patience=example["patience"])
    assert found == example["growth_by_epoch_after"]  # that of epoch 1 to 6; an improvement in epoch 5 changes nothing


def test_a_smaller_metric_may_be_better(tmp_path: Path) -> None:
    assert growth_of(tmp_path, [0.5, 0.4, 0.3, 0.2], 4, patience=1, mode="min") == ["cos"] * 3
    assert growth_of(tmp_path, [0.5, 0.4, 0.3, 0.2], 4, patience=1) == ["cos", "random", "random"]


def test_random_growth_is_uniform_with_the_same_new_weights(tmp_path: Path) -> None:
    callback = ctre(variant="seq", monitor="score", patience=1, drop_fraction=0.5)
    watch, _, _ = run(tmp_path, callback, Net(script=[0.0]), epochs=30, batches=1)
    grown, free = torch.zeros(20, 12), torch.zeros(20, 12)
    for update in watch.updates[1:]:
        before, after = update["before"][FIRST], update["after"][FIRST]
        kept = keep_largest(update["weights"][FIRST], 60, among=before)
        assert int(after.sum()) == 120
        assert (after & kept).sum() == 60
        grown, free = grown + (after & ~kept), free + ~kept
        new = after & ~before
        assert 0 < float(update["new_weights"][FIRST][new].abs().max()) <= math.sqrt(6 / 12)
        assert not (update["new_weights"][FIRST][new] == 0).any()
    share = grown / free.clamp(min=1)
    assert float(share[free > 20].mean()) == pytest.approx(60 / 180, abs=0.03)
    assert float(share[free > 20].max()) < 0.8  # no position is preferred


def test_only_strict_improvement_counts() -> None:
    assert judged(0.5, 3, 0.5, "max") == (0.5, 4)
    assert judged(0.5, 3, 0.5, "min") == (0.5, 4)
    assert judged(0.5, 3, 0.6, "max") == (0.6, 0)
    assert judged(-math.inf, 0, math.nan, "max") == (-math.inf, 1)


def patience(limit: int = 3) -> Patience:
    return Patience({}, "score", "max", limit, torch.device("cpu"))


def test_an_epoch_is_judged_once_by_its_last_validation() -> None:
    one = patience()
    for value in (0.9, 0.2, 0.5):
        one.validated({"score": value}, 0)
    one.epoch_ended({"score": 0.5}, 0)
    assert float(one.aux["patience/best"]) == 0.5
    one.epoch_ended({"score": 0.5}, 1)  # no validation in this epoch
    one.epoch_started(2)
    assert int(one.aux["patience/count"]) == 0


def test_an_epoch_whose_end_was_cut_off_is_judged_at_the_next_start() -> None:
    one = patience()
    one.validated({"score": 0.5}, 0)
    one.epoch_started(0)  # resumed in the middle of the epoch
    assert "patience/best" not in one.aux
    one.epoch_started(1)
    assert float(one.aux["patience/best"]) == 0.5
    one.epoch_started(2)
    assert int(one.aux["patience/count"]) == 0


def test_a_metric_of_training_is_judged_at_the_end_of_the_epoch() -> None:
    one = patience(2)
    for epoch, value in enumerate((0.5, 0.4, 0.3)):
        one.epoch_ended({"score": value}, epoch)
    assert one.over
    assert float(one.aux["patience/best"]) == 0.5
    one.epoch_ended({"score": 0.9}, 3)
    assert one.over  # for good


def test_a_missing_metric_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"monitor='score' is not logged in the first epoch\. Metrics that are: a, b\. Give one of"
    ):
        patience().epoch_ended({"a": 1.0, "b": 2.0}, 0)
    with pytest.raises(ValueError, match=r"monitor='score' is not logged in validation\. Metrics that are: none"):
        patience().validated({}, 0)
    module = Net(script=[0.1])
    callback = ctre(variant="seq", monitor="accuracy")
    with pytest.raises(ValueError, match=r"monitor='accuracy' is not logged in validation\. Metrics that are: .*score"):
        run(tmp_path, callback, module)
    assert module.batches == 0  # the sanity check was enough


# ---------------------------------------------------------------------- resume


class Stop(Callback):
    """Saves where told, by (hook, epoch or step)."""

    def __init__(self, path: Path, hook: str, when: int) -> None:
        self.path, self.saved = path, False

        def save(trainer: Trainer, *_: Any) -> None:
            now = trainer.global_step if "batch" in hook else trainer.current_epoch
            if now == when and not trainer.sanity_checking and not self.saved:
                self.saved = True
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


@pytest.mark.parametrize(
    ("hook", "when"),
    [("on_validation_end", 1), ("on_validation_end", 2), ("on_train_epoch_end", 2), ("on_validation_end", 4)],
)
def test_a_resumed_run_goes_on_in_its_phase(hook: str, when: int, tmp_path: Path) -> None:
    script = [0.5, 0.6, 0.6, 0.6, 0.7, 0.8, 0.9]  # random from the epoch after the fourth on
    options = {"variant": "seq", "monitor": "score", "patience": 2, "drop_fraction": 0.4}
    whole, module = ctre(**options), Net(script=script)
    seen, _, _ = run(tmp_path, whole, module, epochs=7, more=[Stop(tmp_path / "mid.ckpt", hook, when)])
    assert [u["events"]["ctre/phase"] for u in seen.updates] == [0, 0, 0, 1, 1, 1]
    again, resumed = ctre(**options), Net(mlp(12, 20, 6, seed=5), script)
    watch = Watch(again)
    made = trainer_for([again, watch], tmp_path, max_epochs=7)
    made.fit(resumed, loader(5), loader(1), ckpt_path=tmp_path / "mid.ckpt")
    assert watch.steps == seen.steps[-len(watch.steps) :]
    assert [u["events"] for u in watch.updates] == [u["events"] for u in seen.updates[-len(watch.updates) :]]
    assert all(torch.equal(again.masks[n], whole.masks[n]) for n in whole.masks)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters(), strict=True))
    for key in ("patience/best", "patience/count"):
        assert torch.equal(again.aux[key], whole.aux[key])


def test_similarities_wait_in_the_checkpoint_and_are_freed_after_the_update(tmp_path: Path) -> None:
    class Looks(Callback):
        def __init__(self) -> None:
            self.held: list[int] = []

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.held.append(sum(k.startswith("similarity/") for k in callback.state_dict()["aux"]))

    callback, looks = ctre(), Looks()
    run(tmp_path, callback, more=[looks], epochs=2, batches=2)
    assert looks.held == [0, 0, 2, 0]


def test_a_run_resumed_inside_a_window_has_the_similarity_of_its_start(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}

    class Saves(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:
                assert sum(k.startswith("similarity/") for k in whole.aux) == 2
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    class Batches(DataLoader):
        """Goes on where it was, as Lightning asks of a loader with state."""

        done, skip = 0, 0

        def state_dict(self) -> dict[str, int]:
            return {"done": self.done}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.skip = state["done"]

        def __iter__(self) -> Any:
            skip, self.skip = self.skip, 0
            for self.done, batch in enumerate(super().__iter__(), 1):
                if self.done > skip:
                    yield batch

    def source() -> Batches:
        return Batches(loader(4).dataset, batch_size=4)

    whole, module = ctre(), Net()
    seen = Watch(whole)
    trainer_for([whole, seen, Saves()], tmp_path, **options).fit(module, source())
    again, resumed = ctre(), Net(mlp(12, 20, 6, seed=5))
    watch = Watch(again)
    trainer_for([again, watch], tmp_path, **options).fit(resumed, source(), ckpt_path=tmp_path / "mid.ckpt")
    assert seen.steps == watch.steps == [3]
    assert watch.passes == []
    assert all(torch.equal(again.masks[n], whole.masks[n]) for n in whole.masks)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters(), strict=True))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "random"}, r"variant='random' is not known\. Give 'sim', 'seq' or 'pure'"),
        ({"variant": "seq"}, r"variant='seq' .* monitor= names none\. Give monitor="),
        ({"variant": "seq", "monitor": ""}, r"monitor= names none"),
        ({"mode": "up"}, r"mode='up' is not known\. Give 'max'"),
        ({"patience": 0}, r"patience=0 is not a number of epochs"),
        ({"patience": 2.5}, r"patience=2\.5 is not a number of epochs"),
        ({"data_fraction": 0}, r"data_fraction=0 is not a share"),
        ({"data_fraction": 1.5}, r"data_fraction=1\.5 is not a share"),
        ({"epsilon": 1}, r"sparsity=0\.5 and epsilon\(1\) both say how many weights there are"),
        ({"distribution": "epsilon(2)"}, r"sparsity=0\.5 and epsilon\(2\) both say"),
        ({"epsilon": 0, "sparsity": None}, r"epsilon=0 is not a positive number"),
        (
            {"epsilon": 1, "sparsity": None, "distribution": "uniform"},
            r"epsilon=1 and distribution='uniform' both share out",
        ),
        ({"distribution": "epsilon(x)", "sparsity": None}, r"epsilon='epsilon\(x\)' is not a positive number"),
        ({"drop_fraction": 1.5}, r"drop_fraction=1\.5 leaves \[0, 1\]"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"sparsity": 0.5, "distribution": "erdos_renyi"} | options
    with pytest.raises(ValueError, match=message):
        CTRE(**given)


def test_defaults_and_what_is_shown() -> None:
    assert CTRE().target_sparsity == 0.9
    assert CTRE(epsilon=1, distribution="epsilon(1)").epsilon == 1
    assert "variant='sim'" in repr(CTRE(0.8))
    assert CTRE(0.8, drop_fraction="linear(0.4)").drop_fraction == "linear(0.4)"


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(12), torch.zeros(6)


def test_an_epoch_without_a_length_needs_an_interval(tmp_path: Path) -> None:
    source = DataLoader(Endless(), batch_size=4)
    with pytest.raises(
        ValueError, match=r"every=None is one update an epoch, and the training loader has no length\. Give every="
    ):
        trainer_for(ctre(), tmp_path, max_steps=4).fit(Net(), source)
    with pytest.raises(ValueError, match=r"DataLoader over an IterableDataset\. Give statistics_dataloader="):
        trainer_for(ctre(every=2), tmp_path, max_steps=4).fit(Net(), source)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 6)),
            r"there is no activation between the layers: .*net\.0\.weight",
        ),
        (nn.Sequential(nn.Unflatten(1, (3, 4)), nn.LSTM(4, 6)), r"net\.1\.weight_ih_l0 \(LSTM\).*exclude="),
    ],
)
def test_networks_without_activations_to_compare_are_refused_before_the_first_step(
    net: nn.Module, message: str, tmp_path: Path
) -> None:
    module = Net(net)
    with pytest.raises(ValueError, match=message):
        fit_steps(tmp_path, ctre(), module, 3)
    assert module.batches == 0


def test_a_module_without_a_forward_is_told_of_the_argument(tmp_path: Path) -> None:
    module = Regression()
    with pytest.raises(
        ValueError, match=r"Regression\.forward failed .*NotImplementedError.*forward=lambda module, batch"
    ):
        fit_steps(tmp_path, ctre(), module, 3)
    assert module.batches == 0


def test_the_best_epoch_is_kept_like_in_any_run(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="best")
    callback = ctre(variant="seq", monitor="score", patience=2)
    run(tmp_path, callback, Net(script=[0.1, 0.5, 0.2]), more=[keep], enable_checkpointing=True)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    for name, mask in saved_masks(saved).items():
        assert not saved["state_dict"][name][~mask].any()


def test_a_monitor_may_be_given_to_every_variant_so_that_variants_fit_one_sweep() -> None:
    assert not CTRE(variant="sim", monitor="score").at_random
    assert waits_for(CTRE(variant="sim", monitor="score")) is None


def test_a_refused_fit_leaves_flags_and_random_states_as_they_were(tmp_path: Path) -> None:
    """Also while the exception, and with it the frames of the pass, is kept."""

    class Odd(Regression):
        """Its last weight is used past its module, so its activations are not known."""

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) @ self.last.weight

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

    module, kept = Odd(), list[BaseException]()
    with pytest.raises(ValueError, match="exclude=") as caught:
        fit_steps(tmp_path, CTRE(print_plan=False), module, 4)
    kept.append(caught.value)
    assert all(m.training for m in module.modules())
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    kept.clear()
    del caught
    assert torch.equal(torch.rand(()), expected)
