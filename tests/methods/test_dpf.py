"""DPF: the reference trajectories through a real Trainer, feedback, refreshes, fine-tuning, filters, refusals."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.dpf import CUBIC, GLOBAL_LAYERS, GLOBAL_MASKS, GOAL, HARD, START, TRAJECTORIES
from support.inside import around_updates, copied_names, dense_values, give_calendar, held_tensors
from torch import Tensor, nn

from sparse_callbacks import DPF, GMP, Static
from sparse_callbacks.core.ops import keep_largest_jointly, zeros_for
from sparse_callbacks.methods.dpf import filters
from sparse_callbacks.testing.comparison import assert_effective, differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, conv_net, double_mlp
from sparse_callbacks.testing.runs import fit, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# ---------------------------------------------------------------------- the oracles


@pytest.mark.parametrize("curve", CUBIC, ids=str)
def test_the_curve(curve: tuple[float, float, int, int]) -> None:
    initial, final, start, stop = curve
    callback = DPF(f"cubic({initial}, {final})" if initial else final)
    give_calendar(callback, 16, start, stop)
    for step, expected in CUBIC[curve].items():
        assert callback.sparsity_at(step) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(("sparsity", "pruned", "masks"), GLOBAL_MASKS)
def test_the_global_mask(sparsity: float, pruned: int, masks: list[Any]) -> None:
    layers = [torch.tensor(values) for values in GLOBAL_LAYERS]
    found = keep_largest_jointly(layers, 10 - zeros_for(sparsity, 10), least=1)
    assert [m.int().tolist() for m in found] == masks
    assert sum(int((~m).sum()) for m in found) == pruned


class Quadratic(pl.LightningModule):
    """0.5 * ||w - goal||^2 in float64, by SGD with lr 0.1."""

    def __init__(self, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False).double()
        self.layer.weight.data.copy_(torch.tensor([START], dtype=torch.float64))
        self.options = {"momentum": momentum, "weight_decay": weight_decay}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * (self.layer.weight - torch.tensor([GOAL]).double()).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, **self.options)


@pytest.mark.parametrize("distribution", ["global", "uniform"])
@pytest.mark.parametrize("case", TRAJECTORIES, ids=str)
def test_the_trajectory(case: tuple[float, float, int], distribution: str) -> None:
    momentum, decay, period = case
    callback = DPF("constant(0.5)", distribution=distribution, every=period, stop=4, print_plan=False)
    module = Quadratic(momentum, decay)
    found: list[tuple[list[int], list[float], list[float]]] = []
    seen: dict[str, Any] = {}

    def before(*_: Any) -> None:
        seen.update(
            mask=callback.masks["layer.weight"].int()[0].tolist(), masked=module.layer.weight.detach()[0].tolist()
        )

    begin = pl.callbacks.LambdaCallback(on_train_batch_start=before)
    after = watch(
        lambda *_: found.append((seen["mask"], seen["masked"], dense_values(callback, "layer.weight")[0].tolist()))
    )
    fit(module, callback, begin, after, max_steps=4)
    for (mask, masked, dense), (expected_mask, expected_masked, expected_dense) in zip(
        found, TRAJECTORIES[case], strict=True
    ):
        assert mask == expected_mask
        assert masked == pytest.approx(expected_masked, abs=1e-11)
        assert dense == pytest.approx(expected_dense, abs=1e-11)


def test_masked_gradients_would_not_bring_the_weight_back() -> None:
    callback, module = GMP("constant(0.5)", every=1, stop=4, print_plan=False), Quadratic()
    found: list[tuple[list[int], list[float]]] = []

    def before(*_: Any) -> None:
        found.append((callback.masks["layer.weight"].int()[0].tolist(), module.layer.weight.detach()[0].tolist()))

    fit(module, callback, pl.callbacks.LambdaCallback(on_train_batch_start=before), max_steps=4)
    for (mask, masked), (expected_mask, expected) in zip(found, HARD, strict=True):
        assert mask == expected_mask
        assert masked == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------- feedback


def refreshes(callback: DPF) -> list[int]:
    """Steps at which the masks are made anew, filled while the callback runs."""
    steps: list[int] = []
    around_updates(callback, before=lambda update: steps.append(update.step))
    return steps


def test_refreshes_come_every_16_steps_to_the_end_and_at_stop() -> None:
    callback = DPF(0.8, every=16, stop=50, print_plan=False)
    steps = refreshes(callback)
    fit(Classifier(), callback, max_epochs=12)
    assert steps == [16, 32, 48, 50, 64, 80, 96]


def test_the_default_interval_is_the_published_one() -> None:
    callback = DPF(0.8, print_plan=False)
    fit(Classifier(), callback, max_epochs=40)
    assert callback.times.every == 16


def test_pruned_weights_learn_between_refreshes_and_come_back() -> None:
    """Dense values at pruned positions move while the effective ones are zero; the count of those that return is what
    is logged."""
    callback, module = DPF(0.8, every=4, stop=24, print_plan=False), Classifier()
    last: dict[str, Any] = {}
    back, moved = [0], [0]

    def check(trainer: pl.Trainer, module: Classifier, index: int) -> None:
        assert_effective(module, callback)
        dense = {n: dense_values(callback, n).clone() for n in callback.masks}
        for name, mask in callback.masks.items():
            weight = module.get_parameter(name)
            assert torch.equal(weight[mask], dense[name][mask])
            if last:
                hidden = ~mask & ~last["masks"][name]
                moved[0] += int((dense[name][hidden] != last["dense"][name][hidden]).sum())
                back[0] += int((mask & ~last["masks"][name]).sum())
        last.update(dense=dense, masks={n: m.clone() for n, m in callback.masks.items()})

    fit(module, callback, watch(check), max_epochs=6)
    assert moved[0] > 10_000
    assert back[0] > 20
    assert int(callback.aux["reactivated/total"]) == back[0]
    assert callback.at_target
    assert callback.measured_sparsity()["sparsity/total"] == 0.8
    hidden = sum(float((d * ~callback.masks[n]).square().sum()) for n, d in last["dense"].items()) ** 0.5
    assert hidden > 0.5


def test_the_figures_of_a_refresh(tmp_path: Path) -> None:
    callback = DPF(0.8, every=4, stop=8, print_plan=False)
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(Classifier(), callback, logger=logger, log_every_n_steps=1000)
    rows = [r for r in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines() if r]
    assert {"dpf/reactivated", "dpf/reactivated_total", "dpf/pruned_dense_norm"} <= set(rows[0].split(","))
    final = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    hidden = sum(float((dense_values(callback, n) * ~m).square().sum()) for n, m in callback.masks.items()) ** 0.5
    assert float(final["dpf/pruned_dense_norm"]) == pytest.approx(hidden, rel=1e-5)
    assert float(final["dpf/reactivated_total"]) == int(callback.aux["reactivated/total"])


def test_resumed_at_step_7_the_masks_of_steps_16_and_32_are_the_same(tmp_path: Path) -> None:
    class Keep(pl.Callback):
        def __init__(self, callback: DPF, save: bool) -> None:
            self.callback, self.save, self.masks = callback, save, {}

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 7 and self.save:
                trainer.save_checkpoint(tmp_path / "7.ckpt")
            if trainer.global_step in (16, 32):
                self.masks[trainer.global_step] = {n: m.clone() for n, m in self.callback.masks.items()}

    whole, resumed = (DPF(0.9, every=16, stop=32, print_plan=False) for _ in range(2))
    first, second = Keep(whole, True), Keep(resumed, False)
    fit(Classifier(), whole, first, max_epochs=5)
    fit(Classifier(conv_net(9)), resumed, second, max_epochs=5, ckpt_path=tmp_path / "7.ckpt")
    assert set(first.masks) == {16, 32}
    assert differences(first.masks, second.masks) == []
    assert differences(first.masks[16], first.masks[32]) != []


def test_a_checkpoint_holds_the_target_sparsity_and_beside_it_the_dense_weights(tmp_path: Path) -> None:
    callback, module = DPF(0.75, every=2, stop=8, print_plan=False), Classifier()
    fit(module, callback).save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    zeros = sum(int((saved["state_dict"][n] == 0).sum()) for n in callback.masks)
    assert zeros == 0.75 * sum(m.numel() for m in callback.masks.values())
    dense = saved["callbacks"][callback.state_key]["dense"]
    assert all(bool(d.all()) for d in dense.values())


def test_memory_is_one_dense_copy_and_the_address_of_a_weight_never_changes() -> None:
    callback, module = DPF(0.8, every=2, stop=8, print_plan=False), Classifier()
    addresses: list[int] = []
    held: list[int] = []

    def look(*_: Any) -> None:
        addresses.append(module.net[4].weight.data_ptr())
        held.append(sum({t.data_ptr(): t.numel() * t.element_size() for t in held_tensors(callback)}.values()))

    see = pl.callbacks.LambdaCallback(on_train_batch_start=look)
    fit(module, callback, see, watch(look))
    assert len(set(addresses)) == 1
    size = sum(m.numel() for m in callback.masks.values())
    # the dense copy, the mask, and the integers to mask with, which end with the run
    assert max(held) == held[-1] == size * (4 + 4 + 1)
    own = {t.data_ptr(): t.numel() * t.element_size() for t in held_tensors(callback)}
    assert sum(own.values()) == size * (4 + 1)


def test_what_the_user_writes_into_the_weights_is_kept() -> None:
    class Clamps(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                for p in self.net.parameters():
                    p.clamp_(-0.05, 0.05)

    callback, module = DPF(0.5, every=4, stop=8, print_plan=False), Clamps()
    fit(module, callback)
    for name, mask in callback.masks.items():
        assert dense_values(callback, name)[mask].abs().max() < 0.2


def test_a_step_that_nobody_announced_moves_the_active_dense_weights() -> None:
    class Twice(Classifier):
        def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
            super().optimizer_step(epoch, index, optimizer, closure)
            torch.optim.SGD.step(optimizer.optimizer)

    callback, module = DPF("constant(0.5)", every=100, stop=200, print_plan=False), Twice()
    fit(module, callback, watch(lambda *_: assert_effective(module, callback)))
    for name, mask in callback.masks.items():
        assert torch.equal(dense_values(callback, name)[mask], module.get_parameter(name)[mask])


# ---------------------------------------------------------------------- thresholds


def test_one_threshold_for_all_layers_or_one_for_each() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, 24), nn.Tanh(), nn.Linear(24, 4)).double()
    net[3].weight.data.mul_(10)
    joint, own = DPF("constant(0.9)", print_plan=False), DPF("constant(0.9)", distribution="uniform", print_plan=False)
    for callback in (joint, own):
        fit(Classifier(net), callback, fast_dev_run=1)
    pruned = [[int((~m).sum()) for m in c.masks.values()] for c in (joint, own)]
    assert sum(pruned[0]) == int(0.9 * 1296)
    assert pruned[0][1] < 30
    assert pruned[1] == [1080, 86]


def test_a_layer_is_never_emptied() -> None:
    net = double_mlp()
    net[3].weight.data.mul_(1e-6)
    callback = DPF("constant(0.95)", print_plan=False)
    fit(Classifier(net), callback, fast_dev_run=1)
    assert int(callback.masks["net.3.weight"].sum()) == 1
    assert sum(int((~m).sum()) for m in callback.masks.values()) == int(0.95 * 1296)


def test_the_plan_of_a_global_threshold_gives_the_total() -> None:
    plan = DPF(0.9).plan(double_mlp())
    assert plan.joint == plan.zeros == int(0.9 * 1296)
    assert {r.zeros for r in plan if r.name in plan.selected} == {None}
    assert plan["1.weight"].sparsity is None
    assert "joint" in str(plan)
    assert plan.total == int(0.9 * 1296) / 1296
    assert DPF(0.9, distribution="uniform").plan(double_mlp()).joint is None


# ---------------------------------------------------------------------- fine-tuning


def test_fine_tuning_freezes_the_masks_and_trains_like_a_static_mask() -> None:
    callback, module = DPF(0.8, every=2, stop=6, finetune=9, print_plan=False), Classifier()
    masks: list[dict[str, Tensor]] = []
    held: list[int] = []
    handover: dict[str, Any] = {}

    def check(trainer: pl.Trainer, module: Classifier, index: int) -> None:
        masks.append({n: m.clone() for n, m in callback.masks.items()})
        held.append(len(copied_names(callback)))
        if index == 8:
            handover.update(snapshot(trainer, module, callback))

    fit(module, callback, watch(check))
    assert held == [3] * 8 + [0] * 8
    assert all(differences(masks[8], m) == [] for m in masks[8:])
    assert differences(masks[7], masks[8]) != []  # at the start of fine-tuning the mask is made once more
    assert callback.state_dict()["dense"] == {}

    plain, weights = Classifier(), handover["weights"]
    plain.load_state_dict(weights)
    optimizer = plain.configure_optimizers()["optimizer"]
    optimizer.load_state_dict(handover["optimizers"][0])
    rest = Batches().all(2)[9:]
    for index, batch in enumerate(rest):
        optimizer.zero_grad()
        plain.loss(batch).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.97 ** (9 + index)
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks[8].items():
                plain.get_parameter(name).mul_(mask)
    assert differences(dict(module.state_dict()), dict(plain.state_dict()), bitwise=False) == []


@pytest.mark.parametrize("after", [5, 9, 10, 12])
def test_resume_before_at_and_in_fine_tuning(after: int, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == after:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    one, other = (DPF(0.8, every=2, stop=6, finetune=9, print_plan=False) for _ in range(2))
    module, resumed = Classifier(optimizer="adamw"), Classifier(conv_net(7), "adamw")
    expected = snapshot(fit(module, one, Save()), module, one)
    assert differences(expected, snapshot(fit(resumed, other, ckpt_path=tmp_path / "run.ckpt"), resumed, other)) == []
    assert bool(torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"][one.state_key]["dense"]) == (
        after < 9
    )


def test_the_masks_of_a_run_serve_static_fine_tuning(tmp_path: Path) -> None:
    callback, module = DPF(0.8, every=2, stop=6, print_plan=False), Classifier()
    fit(module, callback).save_checkpoint(tmp_path / "run.ckpt")
    static = Static(from_checkpoint=tmp_path / "run.ckpt", print_plan=False)
    fit(module, static)
    assert differences(callback.masks, static.masks) == []


@pytest.mark.parametrize("resumed", [True, False])
def test_fine_tuning_that_has_begun_goes_on_in_a_longer_run(resumed: bool, tmp_path: Path) -> None:
    callback, module = DPF(0.8, every=2, stop=0.5, finetune=0.75, print_plan=False), Classifier()
    fit(module, callback).save_checkpoint(tmp_path / "run.ckpt")
    masks = {n: m.clone() for n, m in callback.masks.items()}
    if resumed:
        callback, module = DPF(0.8, every=2, stop=0.5, finetune=0.75, print_plan=False), Classifier()
    fit(module, callback, max_epochs=8, ckpt_path=tmp_path / "run.ckpt" if resumed else None)
    assert copied_names(callback) == []
    assert differences(masks, callback.masks) == []


def test_a_layer_that_is_thawed_for_a_second_fit_has_feedback_too() -> None:
    callback, module = DPF(0.8, every=2, stop=6, print_plan=False), Classifier()
    module.net[4].weight.requires_grad_(False)
    fit(module, callback)
    assert "net.4.weight" not in callback.masks
    module.net[4].weight.requires_grad_(True)
    fit(module, callback)
    assert set(copied_names(callback)) == set(callback.masks) == {"net.0.weight", "net.4.weight", "net.7.weight"}


# ---------------------------------------------------------------------- filters


def weakest_filters(layers: list[Tensor], zeros: int) -> list[set[int]]:
    """By hand: filters that go, weakest first, while their weights fit; the strongest of a layer stays."""
    ranked = sorted((float(f.norm()), -i, -j) for i, layer in enumerate(layers) for j, f in enumerate(layer))
    best = {
        (i, max(range(len(layer)), key=lambda j, layer=layer: (float(layer[j].norm()), -j)))
        for i, layer in enumerate(layers)
    }
    gone: list[set[int]] = [set() for _ in layers]
    for _, i, j in ranked:
        if (-i, -j) in best:
            continue
        zeros -= layers[-i][-j].numel()
        if zeros < 0:
            break
        gone[-i].add(-j)
    return gone


@pytest.mark.parametrize("seed", range(5))
def test_whole_filters_go_with_the_smallest_norms_first(seed: int) -> None:
    torch.manual_seed(seed)
    layers = [torch.randn(8, 2, 3, 3), 0.5 * torch.randn(16, 12), torch.randn(5, 16)]
    layers[2][3] = layers[2][1]
    size = sum(t.numel() for t in layers)
    for sparsity in (0.0, 0.3, 0.77, 0.99):
        scores = [filters.norms(t, len(t)) for t in layers]
        kept = filters.keep_filters_jointly(scores, [18, 12, 16], int(sparsity * size))
        assert [{i for i, k in enumerate(mask.tolist()) if not k} for mask in kept] == weakest_filters(
            layers, int(sparsity * size)
        )


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_a_transposed_convolution_are_its_outputs(groups: int) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    kept = (
        filters.norms(layer.weight.detach(), 6, transposed=True)
        > filters.norms(layer.weight.detach(), 6, transposed=True).median()
    )
    mask = filters.mask_of(kept, layer.weight, transposed=True)
    assert mask.shape == layer.weight.shape
    with torch.no_grad():
        layer.weight.mul_(mask)
        out = layer(torch.randn(1, 4, 5, 5))
    assert [bool(channel.any()) for channel in out[0]] == kept.tolist()


@pytest.mark.parametrize("distribution", ["global", "uniform"])
def test_filters_in_training(distribution: str) -> None:
    callback = DPF(0.6, unit="filter", distribution=distribution, keep_dense="last", every=2, stop=8, print_plan=False)
    module = Classifier()
    fit(module, callback)
    for mask in callback.masks.values():
        rows = mask.flatten(1)
        assert torch.equal(rows.any(1), rows.all(1))
        assert rows.any()
    assert set(callback.masks) == {"net.0.weight", "net.4.weight"}
    zeros = [int((~m).sum()) for m in callback.masks.values()]
    if distribution == "uniform":
        assert zeros == [int(0.6 * 8) * 18, int(0.6 * 16) * 72] == [callback.plan()[n].zeros for n in callback.masks]
    else:
        assert int(0.6 * 1296) - 72 < sum(zeros) <= int(0.6 * 1296)
    assert callback.at_target


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"unit": "channel"}, "unit='channel' is not known"),
        ({"sparsity": 1.0}, "sparsity=1.0 is not in"),
        ({"finetune": 0.5, "stop": 0.75}, "finetune=0.5 comes before stop=0.75"),
        ({"finetune": 100, "stop": 200}, "finetune=100 comes before stop=200"),
        ({"finetune": 1.5}, "finetune=1.5 is outside"),
        ({"finetune": True}, "finetune=True is not a time"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DPF(**arguments)


def test_fine_tuning_that_the_run_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"finetune=17 lies behind the run's 16 steps"):
        fit(Classifier(), DPF(0.5, every=2, stop=8, finetune=17, print_plan=False))
    with pytest.raises(ValueError, match=r"finetune=7 comes before stop=0.5 \(7 steps against 8\)"):
        fit(Classifier(), DPF(0.5, every=2, stop=0.5, finetune=7, print_plan=False))
