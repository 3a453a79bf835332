"""CTRE: when it updates, what it drops and grows, and with which weights."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.ctre import GROWTH_INIT, UPDATE_SCHEDULE
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins import MixedPrecision
from support.ctre import FIRST, Net, Watch, ctre, run
from support.data import loader
from support.inside import parameters_of
from support.nets import Regression, mlp
from support.rig import copied_masks
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparse_callbacks.core.ops import drop_count, keep_largest
from sparse_callbacks.methods.ctre.activations import measure_similarity
from sparse_callbacks.methods.ctre.growth import propose_growth, replace_regrown
from sparse_callbacks.methods.ctre.similarity import cosine_similarity
from sparse_callbacks.testing.runs import trainer_for

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
            kept, proposed = propose_growth(before, weights, similarity, drop_count(active, 0.4))
            assert torch.equal(kept, keep_largest(weights, active - drop_count(active, 0.4), among=before))
            if variant == "sim":
                accepted, drawn = replace_regrown(before, kept, proposed, torch.rand(before.shape))
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
                    sums = measure_similarity(module, parameters_of(callback), (module.net(x) for _ in range(1)))
                seen.append((found, {n: cosine_similarity(s) for n, s in sums.items()}))

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
                kept = keep_largest(
                    last["weights"][FIRST], int(last["before"][FIRST].sum()) // 2, among=last["before"][FIRST]
                )
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
            self.net = nn.Sequential(
                nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 6)
            )

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
