"""CTRE: when it moves, what it grows and from which values, its phases, and its arguments."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.ctre import ER_DENSITY, GROWTH_INIT, SEQ_SWITCH, UPDATE_SCHEDULE
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from support.data import loader
from support.inside import Moment, around_updates, before_measuring, parameters_of, waits_for
from support.nets import Regression, mlp, sgd
from support.rig import copied_masks, fit_steps, trainer_for
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sparse_callbacks import CTRE, distributions
from sparse_callbacks.core.ops import drop_count, keep_largest
from sparse_callbacks.methods.ctre.activations import measure
from sparse_callbacks.methods.ctre.patience import Patience, judged
from sparse_callbacks.methods.ctre.similarity import cosine, explore, propose

FIRST, SECOND = "net.0.weight", "net.2.weight"


class Net(Regression):
    """With a forward, and a validation whose metric follows ``script``, one value an epoch."""

    def __init__(self, net: nn.Module | None = None, script: list[float] | None = None, configure: Any = sgd) -> None:
        super().__init__(mlp(12, 20, 6) if net is None else net, configure)
        self.script = script

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.script is not None:
            self.log("score", self.script[min(self.current_epoch, len(self.script) - 1)])
        self.log("loss", 1.0)


class Watch(Callback):
    """State before and after each update."""

    def __init__(self, callback: CTRE) -> None:
        self.updates: list[dict[str, Any]] = []
        self.passes: list[int] = []
        self.callback = callback
        around_updates(callback, self.before, self.after)
        before_measuring(callback, lambda: self.passes.append(callback.step))

    def weights(self, names: list[str]) -> dict[str, Tensor]:
        return {n: parameters_of(self.callback)[n].detach().clone() for n in names}

    def before(self, moment: Moment) -> None:
        similarity = {n: t.clone() for n, t in self.callback.aux.items() if n.startswith("similarity/")}
        self.last = {
            "step": moment.step, "weights": self.weights(moment.names), "before": copied_masks(self.callback),
            "similarity": {n.partition("/")[2]: t for n, t in similarity.items()},
        }  # fmt: skip

    def after(self, moment: Moment) -> None:
        self.last |= {"new_weights": self.weights(moment.names), "after": copied_masks(self.callback), "events": moment.figures}
        self.updates.append(self.last)

    @property
    def steps(self) -> list[int]:
        return [u["step"] for u in self.updates]


def ctre(**options: Any) -> CTRE:
    given = {"sparsity": 0.5, "distribution": "uniform", "print_plan": False} | options
    return CTRE(**{k: v for k, v in given.items() if v is not ...})


def run(
    path: Path, callback: CTRE, module: LightningModule | None = None, epochs: int = 3, batches: int = 5, **options: Any
) -> tuple[Watch, LightningModule, Trainer]:
    watch, module = Watch(callback), module or Net()
    made = trainer_for([callback, watch, *options.pop("more", [])], path, max_epochs=epochs, **options)
    made.fit(module, loader(batches), loader(1) if getattr(module, "script", None) is not None else None)
    return watch, module, made


# ---------------------------------------------------------------------- when


def test_updates_follow_the_first_step_of_each_epoch_from_the_second_on(tmp_path: Path) -> None:
    watch, _, _ = run(tmp_path, ctre(), epochs=UPDATE_SCHEDULE["epochs"], batches=UPDATE_SCHEDULE["num_batches"])
    assert watch.steps == UPDATE_SCHEDULE["required_mask_update_after_iterations"]
    assert watch.passes == [i - 1 for i in UPDATE_SCHEDULE["cosine_recomputed_before_iteration"]]


@pytest.mark.parametrize(
    ("times", "steps"),
    [
        ({"every": 4}, [5, 9, 13]),
        ({"every": 4, "start": 3, "stop": 12}, [3, 7, 11]),
        ({"every": 4, "start": 1}, [5, 9, 13]),
        ({"stop": 0.5}, [6]),
        ({"every": 0.2, "stop": 14}, [4, 7, 10, 13]),
    ],
)
def test_other_times(times: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    watch, _, _ = run(tmp_path, ctre(**times))
    assert watch.steps == steps
    assert watch.passes == [s - 1 for s in steps]


def test_an_epoch_in_steps_counts_accumulation(tmp_path: Path) -> None:
    watch, _, _ = run(tmp_path, ctre(), accumulate_grad_batches=2)  # three steps an epoch
    assert watch.steps == [4, 7]
    assert watch.passes == [3, 6]


def test_a_step_that_is_skipped_is_followed_by_another_pass(tmp_path: Path) -> None:
    skipped = []

    class Overflows(Callback):
        def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
            if trainer.global_step == 3:
                parameters_of(callback)[FIRST].grad[callback.masks[FIRST]] = math.inf

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                skipped.append((callback.step, sum(k.startswith("similarity/") for k in callback.aux)))

    callback = ctre(every=3)
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    watch, _, _ = run(tmp_path, callback, more=[Overflows()], epochs=2, plugins=[precision])
    assert skipped == [(3, 0)]  # the fourth step was none, and left nothing behind
    assert watch.steps == [4, 7]
    assert watch.passes == [3, 3, 6]


def test_no_pass_is_made_where_no_update_follows(tmp_path: Path) -> None:
    calls = []

    class Counts(Net):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.global_step)
            return super().forward(x)

    run(tmp_path, ctre(every=7), Counts())
    assert calls == [0] + [7] * 5 + [14] * 5  # one batch tells before the first step whether activations can be found


def test_a_run_within_one_epoch_says_that_nothing_will_move(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"CTRE will not move a mask in this run: the first would be at step 6"):
        watch, _, _ = run(tmp_path, ctre(), epochs=1)
    assert watch.updates == []


# ---------------------------------------------------------------------- what


@pytest.mark.parametrize("variant", ["sim", "pure", "seq"])
def test_an_update_is_the_paper_s(variant: str, tmp_path: Path) -> None:
    options = {"monitor": "score"} if variant == "seq" else {}
    callback = ctre(variant=variant, drop_fraction=0.4, **options)
    watch, _, _ = run(tmp_path, callback, Net(script=[0.1, 0.2, 0.3, 0.4]), epochs=4)
    assert len(watch.updates) == 3
    for update in watch.updates:
        for name, before in update["before"].items():
            after, weights, similarity = (update[k][name] for k in ("after", "weights", "similarity"))
            active = int(before.sum())
            assert active == before.numel() // 2 == int(after.sum())
            kept, proposed = propose(before, weights, similarity, drop_count(active, 0.4))
            assert torch.equal(kept, keep_largest(weights, active - drop_count(active, 0.4), among=before))
            if variant == "sim":
                accepted, drawn = explore(before, kept, proposed, torch.rand(before.shape))
                assert (after & (kept | accepted)).sum() == (kept | accepted).sum()
                assert (after & ~kept & ~accepted).sum() == drawn.sum() > 0
            else:
                assert torch.equal(after, kept | proposed)


def test_the_similarity_is_that_of_the_whole_training_set_at_that_moment(tmp_path: Path) -> None:
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    class Compares(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            found = {k.partition("/")[2]: t.clone() for k, t in callback.aux.items() if k.startswith("similarity/")}
            if found:
                x = torch.cat([x for x, _ in loader(5)])
                with torch.no_grad():
                    sums = measure(module, parameters_of(callback), (module.net(x) for _ in range(1)))
                seen.append((found, {n: cosine(s) for n, s in sums.items()}))

    callback = ctre()
    run(tmp_path, callback, more=[Compares()])
    assert len(seen) == 2
    for found, expected in seen:
        for name in callback.masks:
            assert torch.allclose(found[name], expected[name], atol=3e-6)  # sums in float32


@pytest.mark.parametrize("variant", ["sim", "pure"])
def test_new_weights_are_uniform_in_their_bound_and_others_stay(variant: str, tmp_path: Path) -> None:
    callback = ctre(variant=variant, drop_fraction=0.5)
    module = Net(mlp(500, 100, 6))
    watch, drawn = Watch(callback), []
    made = trainer_for([callback, watch], tmp_path, max_epochs=4)
    made.fit(module, loader(3, inputs=500))
    bound = GROWTH_INIT["bounds"]["500"]
    for update in watch.updates:
        name = FIRST
        grown = update["after"][name] & ~update["before"][name]
        stayed = update["after"][name] & update["before"][name]
        assert torch.equal(update["new_weights"][name][stayed], update["weights"][name][stayed])
        assert not update["new_weights"][name][~update["after"][name]].any()
        drawn.append(update["new_weights"][name][grown])
    values = torch.cat(drawn).double()
    assert len(values) > 10_000
    assert 0.999 * bound < float(values.abs().max()) <= bound
    # mean 0 and standard deviation b / sqrt(3), within four standard errors
    assert abs(float(values.mean())) < 4 * bound / math.sqrt(3 * len(values))
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert all(not torch.equal(a[:50], b[:50]) for a, b in pairwise(drawn))


def test_new_weights_have_no_momentum_and_those_that_come_back_keep_theirs(tmp_path: Path) -> None:
    class Momenta(Callback):
        """Momentum when the update is over."""

        def __init__(self) -> None:
            self.seen: list[tuple[Tensor, Tensor]] = []

        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            if watch.updates and len(self.seen) < len(watch.updates):
                last = watch.updates[-1]
                grown = last["after"][FIRST] & ~last["before"][FIRST]
                kept = keep_largest(last["weights"][FIRST], int(last["before"][FIRST].sum()) // 2, among=last["before"][FIRST])
                back = last["after"][FIRST] & last["before"][FIRST] & ~kept
                momentum = trainer.optimizers[0].state[parameters_of(callback)[FIRST]]["momentum_buffer"]
                self.seen.append((momentum[grown], momentum[back]))
                assert torch.equal(last["new_weights"][FIRST][back], last["weights"][FIRST][back])

    callback, momenta = ctre(drop_fraction=0.5, variant="pure"), Momenta()
    watch = Watch(callback)
    trainer_for([callback, watch, momenta], tmp_path, max_epochs=4).fit(Net(), loader(5))
    assert len(momenta.seen) == 3
    assert all(len(grown) > 0 and not grown.any() for grown, _ in momenta.seen)
    assert any(len(back) > 0 for _, back in momenta.seen)
    assert all(bool(back.all()) for _, back in momenta.seen)


def test_figures_of_every_update(tmp_path: Path) -> None:
    watch, _, _ = run(tmp_path, ctre(drop_fraction=0.4))
    for update in watch.updates:
        events = update["events"]
        assert events["update/drop_fraction"] == 0.4
        assert events["update/by_similarity"] + events["update/at_random"] == pytest.approx(1)
        assert 0 < events["update/by_similarity"] < 1
        assert events["ctre/phase"] == 0.0
        grown = [(update["after"][n] & ~update["before"][n], update["similarity"][n]) for n in update["after"]]
        assert 0 < events["update/mean_similarity"] <= max(float(s[g].max()) for g, s in grown)


def test_one_seed_gives_one_topology_whatever_the_global_generator(tmp_path: Path) -> None:
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        callback, module = ctre(seed=seed), Net()
        torch.manual_seed(noise)
        run(tmp_path, callback, module)
        runs.append((copied_masks(callback), {n: p.detach().clone() for n, p in module.named_parameters()}))
    assert all(torch.equal(runs[0][0][n], runs[1][0][n]) for n in runs[0][0])
    assert all(torch.equal(runs[0][1][n], runs[1][1][n]) for n in runs[0][1])
    assert not any(torch.equal(runs[0][0][n], runs[2][0][n]) for n in runs[0][0])


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0}])
def test_gradients_of_pruned_weights_are_never_read(options: dict[str, Any], tmp_path: Path) -> None:
    class Poison(Callback):
        def __init__(self, poisonous: bool) -> None:
            self.poisonous = poisonous

        def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
            for name, mask in callback.masks.items() if self.poisonous else ():
                parameters_of(callback)[name].grad[~mask] = math.nan

    ends = []
    for poisonous in (False, True):
        callback, module = ctre(drop_fraction=0.4), Net()
        watch, _, made = run(tmp_path, callback, module, more=[Poison(poisonous)], **options)
        assert len(watch.updates) == 2
        assert callback.step == 15
        state, masks = made.optimizers[0].state, callback.masks
        moments = [state[p]["momentum_buffer"] * masks.get(n, torch.tensor(True)) for n, p in module.named_parameters()]
        ends.append([*masks.values(), *(p.detach() for p in module.parameters()), *moments])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_training_is_the_same_with_and_without_a_pass(tmp_path: Path) -> None:
    """Neither batch norm, dropout nor the order of the data notices it."""

    class Shuffled(Net):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 6))

    ends = []
    for start in (14, 10**6):  # the update comes after the last step but one of fourteen, or never
        callback, module = ctre(every=1, start=start, stop=10**6 + 1, drop_fraction=0.0), Shuffled()
        torch.manual_seed(1)
        source = DataLoader(loader(5).dataset, batch_size=4, shuffle=True)
        watch = Watch(callback)
        trainer_for([callback, watch], tmp_path, max_epochs=3).fit(module, source)
        assert watch.passes == ([13, 14] if start == 14 else [])
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_forward_and_the_data_may_be_given(tmp_path: Path) -> None:
    given, seen = DataLoader(loader(2, seed=3).dataset, batch_size=8), []

    def forward(module: Any, batch: Any) -> Tensor:
        seen.append(batch[0][0, 0].item())
        return module.net(batch[0])

    run(tmp_path, ctre(forward=forward, statistics_dataloader=given), Regression())
    assert seen == [given.dataset[0][0][0].item()] * 3


def test_a_share_of_the_data_is_enough(tmp_path: Path) -> None:
    count = []

    def forward(module: Any, batch: Any) -> Tensor:
        count.append(len(batch[0]))
        return module.net(batch[0])

    run(tmp_path, ctre(forward=forward, data_fraction=0.4), epochs=2)
    assert count == [4] + [4] * 2


def test_a_layer_that_the_network_does_not_use_stays_as_it_is(tmp_path: Path) -> None:
    module = Net()
    module.unused = nn.Linear(4, 4)
    callback = ctre(drop_fraction=0.5)
    watch, _, _ = run(tmp_path, callback, module)
    assert all(torch.equal(u["before"]["unused.weight"], u["after"]["unused.weight"]) for u in watch.updates)
    assert not all(torch.equal(u["before"][FIRST], u["after"][FIRST]) for u in watch.updates)


# ---------------------------------------------------------------------- density


@pytest.mark.parametrize("case", ER_DENSITY, ids=lambda c: f"{c['dim']}-{c['n_hidden']}-{c['n_classes']} eps {c['epsilon']}")
def test_counts_of_epsilon_as_in_the_reference(case: dict[str, Any]) -> None:
    hidden = case["n_hidden"]
    with torch.device("meta"):
        net = mlp(case["dim"], hidden, hidden, hidden, case["n_classes"])
    for callback in (CTRE(epsilon=case["epsilon"]), CTRE(distribution=f"epsilon({case['epsilon']})")):
        rows = [r for r in callback.plan(net) if r.name.endswith("weight")]
        assert [r.size - r.zeros for r in rows] == case["n_active"]
        assert sum(r.size for r in rows) == case["total_dense"]
        assert sum(r.size - r.zeros for r in rows) / case["total_dense"] == pytest.approx(case["density"], abs=5e-9)  # 8 digits


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
    with pytest.raises(ValueError, match=r"monitor='score' is not logged in the first epoch\. Metrics that are: a, b\. Give one of"):
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
    ("hook", "when"), [("on_validation_end", 1), ("on_validation_end", 2), ("on_train_epoch_end", 2), ("on_validation_end", 4)]
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
    assert watch.steps == seen.steps[-len(watch.steps):]
    assert [u["events"] for u in watch.updates] == [u["events"] for u in seen.updates[-len(watch.updates):]]
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
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
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
        ({"patience": 0}, r"patience=0 is no number of epochs"),
        ({"patience": 2.5}, r"patience=2\.5 is no number of epochs"),
        ({"data_fraction": 0}, r"data_fraction=0 is no share"),
        ({"data_fraction": 1.5}, r"data_fraction=1\.5 is no share"),
        ({"epsilon": 1}, r"sparsity=0\.5 and epsilon\(1\) both say how many weights there are"),
        ({"distribution": "epsilon(2)"}, r"sparsity=0\.5 and epsilon\(2\) both say"),
        ({"epsilon": 0, "sparsity": None}, r"epsilon=0 is no positive number"),
        ({"epsilon": 1, "sparsity": None, "distribution": "uniform"}, r"epsilon=1 and distribution='uniform' both share out"),
        ({"distribution": "epsilon(x)", "sparsity": None}, r"epsilon='epsilon\(x\)' is no positive number"),
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
    with pytest.raises(ValueError, match=r"every=None is one update an epoch, and the training loader has no length\. Give every="):
        trainer_for(ctre(), tmp_path, max_steps=4).fit(Net(), source)
    with pytest.raises(ValueError, match=r"DataLoader over an IterableDataset\. Give statistics_dataloader="):
        trainer_for(ctre(every=2), tmp_path, max_steps=4).fit(Net(), source)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 6)), r"there is no activation between the layers: .*net\.0\.weight"),
        (nn.Sequential(nn.Unflatten(1, (3, 4)), nn.LSTM(4, 6)), r"net\.1\.weight_ih_l0 \(LSTM\).*exclude="),
    ],
)
def test_networks_without_activations_to_compare_are_refused_before_the_first_step(net: nn.Module, message: str, tmp_path: Path) -> None:
    module = Net(net)
    with pytest.raises(ValueError, match=message):
        fit_steps(tmp_path, ctre(), module, 3)
    assert module.batches == 0


def test_a_module_without_a_forward_is_told_of_the_argument(tmp_path: Path) -> None:
    module = Regression()
    with pytest.raises(ValueError, match=r"Regression\.forward failed .*NotImplementedError.*forward=lambda module, batch"):
        fit_steps(tmp_path, ctre(), module, 3)
    assert module.batches == 0


def test_the_best_epoch_is_kept_like_in_any_run(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="best")
    callback = ctre(variant="seq", monitor="score", patience=2)
    run(tmp_path, callback, Net(script=[0.1, 0.5, 0.2]), more=[keep], enable_checkpointing=True)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    masks = saved["callbacks"][callback.state_key]["masks"]
    for name, mask in masks.items():
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
