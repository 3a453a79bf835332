"""Layers that a finetuning callback thaws in a Trainer's run become sparse from then on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import BackboneFinetuning, Callback, WeightAveraging
from support.thawing import (
    BACKBONE,
    EPOCH,
    HEAD,
    JOINING,
    SIZES,
    Records,
    Thaws,
    Transfer,
    assert_masked,
    planned,
    zeros,
)

from sparse_callbacks import SMCP, ConstrainedL0, ParallelGaP, RigL, Static
from sparse_callbacks.testing.runs import trainer_for, watch

every_joining_method = pytest.mark.parametrize("name", JOINING)
both_orders = pytest.mark.parametrize("thaws_first", [True, False])


@every_joining_method
@both_orders
def test_a_thawed_backbone_ends_as_sparse_as_planned(name: str, thaws_first: bool, tmp_path: Path) -> None:
    callback, module = JOINING[name](), Transfer()
    masked = watch(lambda _, module, __: assert_masked(module, callback))
    count = Records(callback, lambda c: (len(c.masks), c.measured_sparsity()["sparsity/total"]))
    both = [Thaws(1), callback] if thaws_first else [callback, Thaws(1)]
    trainer_for([*both, masked, count], tmp_path, max_epochs=4).fit(module)
    assert [masks for masks, _ in count.seen] == [1] * EPOCH + [3] * (3 * EPOCH)
    assert callback.at_target
    whole = planned(JOINING[name](), module)
    if name in ("dpf", "snip"):  # one threshold: the total
        assert sum(zeros(callback).values()) == int(0.8 * sum(SIZES.values()))
    else:
        assert zeros(callback) == whole
    assert not torch.equal(module.backbone[1].bias, Transfer().backbone[1].bias)  # it was trained


@every_joining_method
def test_what_waits_is_in_the_plan_and_in_no_sparsity(name: str, tmp_path: Path) -> None:
    callback, module = JOINING[name](), Transfer()
    trainer_for([Thaws(9), callback], tmp_path, max_epochs=4).fit(module)
    for layer in BACKBONE:
        assert callback.plan()[layer].reason == "dense until it is trained: frozen (requires_grad=False)"
        assert callback.plan()[layer].zeros == 0
    assert set(callback.masks) == {HEAD}
    assert f"{sum(SIZES[n] for n in BACKBONE)} have a share of the target" in callback.plan().note
    measured = callback.measured_sparsity()
    assert measured["sparsity/total"] == measured[f"sparsity/{HEAD}"]
    assert callback.at_target
    assert all(bool(p.all()) for n, p in module.named_parameters() if n in BACKBONE)
    # its share is that of the whole network, so that it need not change when the others join
    if name not in ("dpf", "snip"):
        assert zeros(callback)[HEAD] == planned(JOINING[name](), module)[HEAD]


def test_the_first_mask_keeps_the_largest_weights(tmp_path: Path) -> None:
    class Looks(Callback):
        """Already the first forward pass is one of the sparse network."""

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            assert_masked(pl_module, callback)

    callback, module = Static(0.8, print_plan=False), Transfer()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer_for([Thaws(1), callback, Looks()], tmp_path, max_epochs=2).fit(module)
    for name in BACKBONE:
        mask, weights = callback.masks[name], before[name].abs()
        assert weights[mask].min() >= weights[~mask].max()


@pytest.mark.parametrize(("name", "at", "share"), [("gmp", 1, (0, 1)), ("dpf by layer", 1, (0, 1)), ("gmp", 3, (1, 1))])
def test_a_layer_joins_where_the_curve_is(name: str, at: int, share: tuple[int, int], tmp_path: Path) -> None:
    callback, module = JOINING[name](), Transfer()
    values: list[float] = []

    class Looks(Thaws):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if len(callback.masks) == 3 and not values:
                values.extend([zeros(callback)[BACKBONE[0]], callback.sparsity_at(callback.step)])

    trainer_for([callback, Looks(at)], tmp_path, max_epochs=4).fit(module)
    found, sparsity = values
    assert share[0] * 0.8 <= sparsity <= share[1] * 0.8
    assert sparsity > 0
    assert found == int(sparsity * SIZES[BACKBONE[0]])


def test_lightnings_own_backbone_finetuning(tmp_path: Path) -> None:
    callback, module = RigL(0.8, every=2, stop=14, print_plan=False), Transfer()
    thaws = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 1.1)
    trainer_for([callback, thaws], tmp_path, max_epochs=4).fit(module)
    assert_masked(module, callback)
    assert zeros(callback) == planned(RigL(0.8, every=2, stop=14), module)


def test_a_layer_that_is_frozen_again_keeps_its_mask(tmp_path: Path) -> None:
    class Refreezes(Thaws):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            super().finetune_function(pl_module, min(epoch, 1), optimizer) if epoch < 2 else None
            if epoch == 2:
                pl_module.backbone.requires_grad_(False)

    callback, module = Static(0.8, print_plan=False), Transfer()
    seen = Records(callback, lambda c: {n: m.clone() for n, m in c.masks.items()})
    trainer_for([Refreezes(1), callback, seen], tmp_path, max_epochs=4).fit(module)
    assert_masked(module, callback)
    assert all(torch.equal(seen.seen[EPOCH][n], callback.masks[n]) for n in BACKBONE)


def test_a_layer_that_is_trained_from_the_second_fit_on_joins_by_its_magnitudes(tmp_path: Path) -> None:
    callback, module = JOINING["gmp"](), Transfer()
    module.backbone.requires_grad_(False)
    trainer_for([callback], tmp_path, max_epochs=3).fit(module)
    assert set(callback.masks) == {HEAD}
    before = module.backbone[1].weight.detach().abs()
    module.backbone.requires_grad_(True)
    joined = Records(callback, lambda c: c.masks[BACKBONE[0]])
    trainer_for([callback, joined], tmp_path, max_epochs=1).fit(module)
    mask = joined.seen[0]
    assert int((~mask).sum()) == int(0.8 * SIZES[BACKBONE[0]])  # the curve of the first fit is over
    assert before[mask].min() >= before[~mask].max()


def test_one_layer_after_another_and_weights_of_one_module_alone(tmp_path: Path) -> None:
    class OneByOne(Thaws):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch in (1, 2):
                weight = pl_module.backbone[3 * epoch - 2].weight
                weight.requires_grad_(True)
                optimizer.add_param_group({"params": [weight]})

    callback, module = RigL(0.8, every=2, stop=14, print_plan=False), Transfer()
    count = Records(callback, lambda c: len(c.masks))
    trainer_for([OneByOne(), callback, count], tmp_path, max_epochs=4).fit(module)
    assert count.seen == [1] * EPOCH + [2] * EPOCH + [3] * (2 * EPOCH)
    assert list(callback.masks) == [*BACKBONE, HEAD]  # in the order of the model, as in a resumed run
    assert_masked(module, callback)


def test_a_layer_that_was_in_the_optimizer_all_along(tmp_path: Path) -> None:
    class Requires(Thaws):
        def freeze_before_training(self, pl_module: Any) -> None:
            pl_module.backbone.requires_grad_(False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            pl_module.backbone.requires_grad_(epoch > 0)

    callback, module = RigL(0.8, every=2, stop=14, print_plan=False), Transfer()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.01)  # type: ignore[method-assign]
    trainer_for([callback, Requires()], tmp_path, max_epochs=4).fit(module)
    assert zeros(callback) == planned(RigL(0.8, every=2, stop=14), module)
    assert_masked(module, callback)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: ConstrainedL0(density=0.5, print_plan=False), "the gates of ConstrainedL0 share multipliers"),
        (lambda: ParallelGaP(0.8, partitions=1, print_plan=False), "the workers of ParallelGaP start from one network"),
    ],
)
def test_where_no_layer_can_join_the_plan_says_why_and_thawing_warns(make: Any, why: str, tmp_path: Path) -> None:
    callback, module = make(), Transfer()
    with pytest.warns(UserWarning, match=rf"leaves {BACKBONE[0]}, {BACKBONE[1]} dense: .* and {why}"):
        trainer_for([callback, Thaws(1)], tmp_path, max_epochs=3).fit(module)
    assert callback.plan()[BACKBONE[0]].reason.startswith(f"frozen (requires_grad=False); {why}")
    assert set(BACKBONE).isdisjoint(callback.masks)


def test_channels_that_a_frozen_layer_reads_stay_with_the_reason(tmp_path: Path) -> None:
    module = Transfer()
    module.backbone[1].requires_grad_(False)
    module.example_input_array = torch.zeros(1, 2, 5, 5)
    callback = SMCP(budget=0.9, cost="parameters", round_to=1, every=1, start=0, stop=4, print_plan=False)
    trainer_for([callback], tmp_path, max_epochs=2).fit(module)
    assert callback.plan()[BACKBONE[0]].reason.startswith(
        "frozen (requires_grad=False); SMCP forms its groups of channels"
    )
    assert set(callback.masks) == {BACKBONE[1], HEAD}


@both_orders
def test_an_average_of_a_thawed_layer_has_its_zeros(thaws_first: bool, tmp_path: Path) -> None:
    class EachEpoch(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return epoch_idx is not None

    callback, module = JOINING["rigl"](), Transfer()
    average = EachEpoch()
    looks = [[Thaws(1), callback, average], [average, callback, Thaws(1)]][not thaws_first]
    seen: list[bool] = []

    def look(*_: Any) -> None:
        held = dict(average._average_model.module.named_parameters())
        seen.append(all(not held[name][~mask].any() for name, mask in callback.masks.items()))

    trainer_for([*looks, watch(look)], tmp_path, max_epochs=3).fit(module)
    assert callback.updates > 3
    assert len(callback.masks) == 3
    assert all(seen)
    assert_masked(module, callback)
