"""A run whose layers are thawed in it resumes bit for bit, from before and after."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import BackboneFinetuning
from support.thawing import BACKBONE, EPOCH, HEAD, JOINING, Thaws, Transfer, assert_masked

from sparse_callbacks import RigL, SparsityCallback, Static, saved_masks
from sparse_callbacks.testing.runs import Stops, trainer_for

LAST = 4 * EPOCH
AFTER = (2, EPOCH, EPOCH + 2, 3 * EPOCH - 1)  # before the thaw, at the end of the epoch before it, and after it


def run(
    callback: SparsityCallback,
    thaws: Any,
    thaws_first: bool,
    folder: Path,
    path: Any = None,
    after: tuple[int, ...] = (),
) -> tuple[LightningModule, Stops, Any]:
    module, stops = Transfer(), Stops(folder, after)
    both = [thaws, callback] if thaws_first else [callback, thaws]
    trainer = trainer_for([*both, stops], folder, max_epochs=4)
    trainer.fit(module, ckpt_path=path)
    return module, stops, trainer.optimizers[0].state_dict()["state"]


def assert_same(one: Any, other: Any) -> None:
    """Equal in every tensor and number, however deeply they lie."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


@pytest.mark.combinations
@pytest.mark.parametrize("name", JOINING)
@pytest.mark.parametrize("thaws_first", [True, False])
def test_a_run_with_a_thawed_backbone_resumes_bitwise(name: str, thaws_first: bool, tmp_path: Path) -> None:
    callback = JOINING[name]()
    module, stops, optimizer = run(callback, Thaws(1), thaws_first, tmp_path, after=AFTER)
    for batch in AFTER:
        again = JOINING[name]()
        resumed, _, resumed_optimizer = run(again, Thaws(1), thaws_first, tmp_path / "again", stops.path(batch))
        assert_same(dict(module.state_dict()), dict(resumed.state_dict()))
        assert_same(callback.engine.state(), again.engine.state())
        assert_same(optimizer, resumed_optimizer)


@pytest.mark.parametrize("thaws_first", [True, False])
def test_lightnings_backbone_finetuning_resumes_with_the_masks_of_the_backbone(
    thaws_first: bool, tmp_path: Path
) -> None:
    """It leaves a backbone frozen in a resumed run, which then holds its masks and weights."""

    def thaws() -> BackboneFinetuning:
        return BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 1.0, train_bn=False)

    _, stops, _ = run(JOINING["rigl"](), thaws(), thaws_first, tmp_path, after=(EPOCH + 2,))
    masks = saved_masks(stops.path(EPOCH + 2))
    assert set(masks) == {*BACKBONE, HEAD}
    again = JOINING["rigl"]()
    module, _, _ = run(again, thaws(), thaws_first, tmp_path / "again", stops.path(EPOCH + 2))
    assert_masked(module, again)
    assert set(again.masks) == {*BACKBONE, HEAD}
    assert {n: int(m.sum()) for n, m in masks.items()} == {n: int(m.sum()) for n, m in again.masks.items()}


def test_a_layer_that_only_the_resumed_run_trains_joins_at_its_first_batch(tmp_path: Path) -> None:
    _, stops, _ = run(JOINING["gmp"](), Thaws(9), True, tmp_path, after=(3 * EPOCH + 2,))
    again, module = JOINING["gmp"](), Transfer()
    module.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        [{"params": module.head.parameters()}, {"params": module.backbone[2].parameters()}], lr=0.02, momentum=0.9
    )

    class ThawsAtOnce(Thaws):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self._restarting = False
            self.make_trainable(pl_module.backbone)
            weights = [m.weight for m in (pl_module.backbone[1], pl_module.backbone[4])]
            trainer.optimizers[0].add_param_group({"params": weights, "lr": 0.01})

        def finetune_function(self, *_: Any) -> None: ...

    saved = torch.load(stops.path(3 * EPOCH + 2), weights_only=True)
    # without the state of an optimizer with other groups, which torch refuses
    saved["optimizer_states"] = [torch.optim.SGD([torch.zeros(1)], lr=0.1).state_dict()]
    path = tmp_path / "changed.ckpt"
    torch.save(saved, path)
    trainer = trainer_for([ThawsAtOnce(9), again], tmp_path, max_epochs=4)
    trainer.strategy.load_optimizer_state_dict = lambda _: None  # type: ignore[method-assign]
    trainer.fit(module, ckpt_path=path)
    assert {n: int((~m).sum()) for n, m in again.masks.items()} == {
        n: int(0.8 * m.numel()) for n, m in again.masks.items()
    }
    assert set(again.masks) == {*BACKBONE, HEAD}


def test_a_state_from_before_layers_could_join_is_resumed(tmp_path: Path) -> None:
    """Its masks count what a target gives that was shared out without the layers that wait."""
    _, stops, _ = run(RigL(0.8, every=2, stop=14, print_plan=False), Thaws(9), True, tmp_path, after=(2,))
    saved = torch.load(stops.path(2), weights_only=True)
    state = next(s for s in saved["callbacks"].values() if "masks" in s)
    assert state.pop("awaited") == [*BACKBONE]
    assert int((~saved_masks(stops.path(2))[HEAD]).sum()) != int(0.8 * 40)
    state["masks"] = {HEAD: torch.arange(40).reshape(4, 10) < 8}
    saved["state_dict"][HEAD] *= state["masks"][HEAD]
    state["aux"] = {f"ever_active/{HEAD}": state["masks"][HEAD]}
    del saved["sparse_callbacks"]  # the inventory of the state
    torch.save(saved, tmp_path / "older.ckpt")
    again = RigL(0.8, every=2, stop=14, print_plan=False)
    module, stops, _ = run(again, Thaws(1), True, tmp_path, tmp_path / "older.ckpt", after=(1, 4))
    assert int(again.masks[HEAD].sum()) == 8
    assert set(again.masks) == {*BACKBONE, HEAD}
    assert_masked(module, again)
    for batch in (1, 4):  # also once more, from what this run has saved
        once_more = RigL(0.8, every=2, stop=14, print_plan=False)
        run(once_more, Thaws(1), True, tmp_path / "again", stops.path(batch))
        assert_same(again.engine.state(), once_more.engine.state())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"awaited": [HEAD]}, r"it has a mask of 'head.weight', which it says is not trained yet"),
        ({"awaited": [3]}, r"under 'awaited' is \[3\] and not a list of names"),
        ({"awaited": []}, r"masks do not fit the model"),
    ],
)
def test_a_damaged_list_of_what_waits_is_refused(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    _, stops, _ = run(Static(0.8, print_plan=False), Thaws(9), True, tmp_path, after=(2,))
    saved = torch.load(stops.path(2), weights_only=True)
    next(s for s in saved["callbacks"].values() if "masks" in s).update(change)
    torch.save(saved, tmp_path / "changed.ckpt")
    module = Transfer()
    with pytest.raises(ValueError, match=why):
        trainer_for([Static(0.8, print_plan=False)], tmp_path, max_epochs=4).fit(
            module, ckpt_path=tmp_path / "changed.ckpt"
        )
