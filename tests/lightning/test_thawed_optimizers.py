"""Layers that join a run, under optimizers of every kind."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.processes import run_processes
from support.sam import ClosureTwice
from support.schedule_free import schedule_free
from support.thawing import BACKBONE, EPOCH, HEAD, JOINING, SIZES, Records, Thaws, Transfer, assert_masked, zeros

from sparse_callbacks import DPF, GMP, SNFS, RigL, SparsityCallback, Static, sparsify
from sparse_callbacks.testing.runs import trainer_for, watch

UNIFORM = {n: int(0.8 * size) for n, size in SIZES.items()}


class ByHand(Transfer):
    """Manual optimization with an optimizer for the head; one for the backbone comes with its thaw."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(batch, batch_idx))
        found = cast(Any, self.optimizers())
        for optimizer in found if isinstance(found, list) else [found]:
            optimizer.step()
            optimizer.zero_grad()


class Adds(Thaws):
    """Trains the backbone by an optimizer of its own from epoch 1 on."""

    def on_train_start(self, *_: Any) -> None: ...

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone.requires_grad_(True)
            added = torch.optim.SGD(pl_module.backbone.parameters(), lr=0.02, momentum=0.9)
            trainer.strategy.optimizers = [*trainer.strategy.optimizers, added]


@pytest.mark.combinations
@pytest.mark.parametrize(
    "make",
    [
        lambda: RigL(0.8, distribution="uniform", every=2, stop=14, print_plan=False),
        lambda: GMP(0.8, every=2, stop=12, print_plan=False),
        lambda: DPF(0.8, every=2, stop=12, distribution="uniform", print_plan=False),
        lambda: Static(0.8, distribution="uniform", print_plan=False),
    ],
)
@pytest.mark.parametrize("thaws_first", [True, False])
def test_an_optimizer_that_is_added_in_the_middle(make: Any, thaws_first: bool, tmp_path: Path) -> None:
    callback, module = make(), ByHand()
    masked = watch(lambda _, module, __: assert_masked(module, callback))
    both = [Adds(), callback] if thaws_first else [callback, Adds()]
    trainer_for([*both, masked], tmp_path, max_epochs=4).fit(module)
    assert zeros(callback) == UNIFORM
    assert [len(names) for names in callback.owners.owns] == [1, 2]


def test_a_parameter_that_moves_to_another_optimizer_stays_masked(tmp_path: Path) -> None:
    class Moves(Adds):
        def freeze_before_training(self, pl_module: Any) -> None: ...

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                first = trainer.strategy.optimizers[0]
                moved = list(pl_module.backbone.parameters())
                ids = {id(p) for p in moved}
                first.param_groups[0]["params"] = [p for p in first.param_groups[0]["params"] if id(p) not in ids]
                trainer.strategy.optimizers = [first, torch.optim.SGD(moved, lr=0.05, momentum=0.9)]

    callback, module = RigL(0.8, distribution="uniform", every=2, stop=14, print_plan=False), ByHand()
    masked = watch(lambda _, module, __: assert_masked(module, callback))
    trainer_for([callback, Moves(), masked], tmp_path, max_epochs=3).fit(module)
    assert zeros(callback) == UNIFORM
    assert [len(names) for names in callback.owners.owns] == [1, 2]


class Sharpness(ClosureTwice):
    """Its groups are those of the optimizer within, which knows their further values."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "base_optimizer"):
            self.base_optimizer.add_param_group({"rho": 0.05, **param_group})
        else:
            super().add_param_group(param_group)


@pytest.mark.parametrize("name", ["rigl", "dpf", "static"])
def test_an_optimizer_of_two_passes_is_announced_once_a_step(name: str, tmp_path: Path) -> None:
    callback, module = JOINING[name](), Transfer(lambda p: Sharpness(p, lr=0.05))
    steps = Records(callback, lambda c: c.step + (c.updates if name == "rigl" else 0))
    masked = watch(lambda _, module, __: assert_masked(module, callback))
    trainer_for([callback, Thaws(1), masked, steps], tmp_path, max_epochs=3).fit(module)
    assert steps.seen == list(range(1, 3 * EPOCH + 1))
    assert set(callback.masks) == {*BACKBONE, HEAD}


@pytest.mark.parametrize("name", ["rigl", "dpf"])
def test_a_schedule_free_optimizer_keeps_zeros_in_both_modes(name: str) -> None:
    module = Transfer()
    module.backbone.requires_grad_(False)
    optimizer = schedule_free("stand-in/SGDScheduleFree")(module.head.parameters())
    optimizer.train()
    with sparsify(JOINING[name](), module, optimizer, steps=16, epoch=EPOCH) as run:
        for number, batch in enumerate(module.train_dataloader().all(4)):
            if number == 6:
                module.backbone.requires_grad_(True)
                optimizer.add_param_group({"params": list(module.backbone.parameters()), "train_mode": True})
            module.training_step(batch, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_masked(module, run)
            optimizer.eval()
            assert_masked(module, run)
            optimizer.train()
        assert len(run.masks) == 3


def test_accumulation_and_clipping_after_a_thaw(tmp_path: Path) -> None:
    callback, module = JOINING["snfs"](), Transfer()
    masked = watch(lambda _, module, __: assert_masked(module, callback))
    trainer_for(
        [callback, Thaws(1), masked], tmp_path, max_epochs=4, accumulate_grad_batches=3, gradient_clip_val=0.1
    ).fit(module)
    assert set(callback.masks) == {*BACKBONE, HEAD}
    assert f"smoothed/{BACKBONE[0]}" in callback.aux


def test_an_optimizer_that_cannot_grow_weights_is_refused_when_it_brings_layers_and_nothing_changes(
    tmp_path: Path,
) -> None:
    class Forgets(torch.optim.SGD):
        """Keeps state of weights where nobody finds it, and takes no step from anything else."""

        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("this optimizer does not step")

    class AddsForgets(Adds):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.backbone.requires_grad_(True)
                added = Forgets(pl_module.backbone.parameters(), lr=0.02)
                trainer.strategy.optimizers = [*trainer.strategy.optimizers, added]

    callback, module = JOINING["set"](), ByHand()
    before = module.backbone[1].weight.detach().clone()
    with pytest.raises(
        ValueError, match="SET grows weights, and each starts with the optimizer state of a fresh weight"
    ):
        trainer_for([callback, AddsForgets()], tmp_path, max_epochs=3).fit(module)
    assert torch.equal(module.backbone[1].weight, before)
    assert set(callback.masks) == {HEAD}


def test_gradients_of_a_window_that_is_open_at_the_thaw_are_kept(tmp_path: Path) -> None:
    """A method that reads dense gradients finds those of the batches before too."""

    class Windows(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = cast(Any, self.optimizers())
            self.manual_backward(Transfer.training_step(self, batch, batch_idx))
            if batch_idx == 2:  # the window is open where the next epoch begins
                optimizer.step()
                optimizer.zero_grad()

    class Still(Thaws):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            super().finetune_function(pl_module, epoch, optimizer)
            for group in optimizer.param_groups[1:]:
                group["lr"] = 0.0

    def smoothed(at: int) -> Any:
        # the layers that join are not pruned and do not move: nothing else differs
        callback = SNFS(0.8, distribution={"backbone*": 0.0, "*": 0.8}, every=2, stop=4, print_plan=False)
        module = Windows()
        trainer_for([callback, Still(at)], tmp_path, max_epochs=2).fit(module)
        return callback.aux[f"smoothed/{HEAD}"]

    assert torch.equal(smoothed(1), smoothed(9))


def test_two_callbacks_take_up_their_own_layers(tmp_path: Path) -> None:
    first: SparsityCallback = Static(0.5, include="backbone.1*", print_plan=False)
    module = Transfer()
    second = RigL(0.8, exclude="backbone.1*", distribution="uniform", every=2, stop=14, print_plan=False)

    class Part(Thaws):
        def freeze_before_training(self, pl_module: Any) -> None:
            pl_module.backbone[4].requires_grad_(False)

    trainer_for([second, first, Part(1)], tmp_path, max_epochs=3).fit(module)
    assert set(first.masks) == {BACKBONE[0]}
    assert set(second.masks) == {BACKBONE[1], HEAD}


def test_two_callbacks_that_await_one_layer_are_refused(tmp_path: Path) -> None:
    first = Static(0.5, include=["backbone.1*", "backbone.4*"], print_plan=False)
    second = Static(0.5, include=["backbone.1*", "head*"], print_plan=False)
    module = Transfer()
    module.backbone[1].requires_grad_(False)
    with pytest.raises(ValueError, match=rf"both claim {BACKBONE[0]}"):
        trainer_for([first, second], tmp_path, max_epochs=1).fit(module)


def test_no_warning_of_silent_parameters_misfires(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    callback, module = JOINING["static"](), Transfer()
    trainer_for([callback, Thaws(2)], tmp_path, max_epochs=4).fit(module)
    assert not [w for w in recwarn if "had no gradient" in str(w.message)]


def test_two_processes_give_a_layer_that_is_thawed_between_fits_the_same_masks(tmp_path: Path) -> None:
    one, other = run_processes("thawed", tmp_path)
    errors = one.pop("within one fit"), other.pop("within one fit")
    assert any("Thaws thaws within this fit" in text for text in one.pop("warned"))
    other.pop("warned")
    assert all("were frozen when DistributedDataParallel took hold of the model" in error for error in errors)
    for name, found in one.items():
        assert [len(masks) for masks in found["masks"]] == [1] * EPOCH + [3] * (3 * EPOCH)
        for mine, theirs in zip(found["masks"], other[name]["masks"], strict=True):
            assert all(torch.equal(mask, theirs[n]) for n, mask in mine.items())
        assert all(torch.equal(p, other[name]["weights"][n]) for n, p in found["weights"].items())
