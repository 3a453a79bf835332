"""NM: the tables of SR-STE and of the soft projection through a real Trainer, refreshes, the ramp, tiles, curves, refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.sr_ste import LEARNING_RATE, MOMENTUM, SR_STE
from support.inside import dense_values
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparse_callbacks import NM
from sparse_callbacks.core.nm_masks import in_groups
from sparse_callbacks.core.transposable import in_tiles
from sparse_callbacks.methods.nm.soft_projection import scale_of, shrunk, soft_factors
from sparse_callbacks.testing.networks import Classifier, conv_net
from sparse_callbacks.testing.runs import fit, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Given(pl.LightningModule):
    """One layer in float64 whose gradients are given: the loss is the sum of gradient * weight."""

    def __init__(self, dense: Any, gradients: Any, rate: float = LEARNING_RATE, momentum: float = 0.0) -> None:
        super().__init__()
        weight, self.given = torch.tensor(dense, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)
        outputs, inputs, *kernel = weight.shape
        layer = nn.Conv2d(inputs, outputs, kernel, bias=False) if kernel else nn.Linear(inputs, outputs, bias=False)
        self.layer = layer.double()
        self.layer.weight.data.copy_(weight)
        self.rate, self.momentum = rate, momentum

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.layer.weight * self.given[batch_idx]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=self.momentum)


def steps_of(callback: NM, module: Given, steps: int) -> list[tuple[Any, Tensor, Tensor, dict[str, float]]]:
    """Mask and effective weights before each step, dense weights and figures after it, those of its update too."""
    found: list[tuple[Any, Tensor, Tensor, dict[str, float]]] = []
    seen: list[tuple[Any, Tensor]] = []
    events: list[dict[str, float]] = []
    # before the callback's own turn, in which they are logged and forgotten
    updated = watch(lambda *_: events.append(dict(callback.engine.events)))
    begin = pl.callbacks.LambdaCallback(
        on_train_batch_start=lambda *_: seen.append(
            (callback.masks["layer.weight"].int().tolist(), module.layer.weight.detach().clone())
        )
    )
    after = watch(
        lambda *_: found.append(
            (*seen[-1], dense_values(callback, "layer.weight").clone(), callback.figures() | events[-1])
        )
    )
    fit(module, updated, callback, begin, after, loader=DataLoader(torch.zeros(steps)), max_steps=steps)
    return found


def assert_close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9
    )  # the table has ten digits


# ---------------------------------------------------------------------- SR-STE


@pytest.mark.parametrize("name", SR_STE)
@pytest.mark.parametrize(("decay", "every"), [(2e-4, 1), (0.1, 1), (2e-4, 2)])
def test_the_steps_of_the_table(name: str, decay: float, every: int) -> None:
    table = SR_STE[name]
    callback = NM(f"{table['n']}:{table['m']}", every=every, decay=decay, print_plan=False)
    found = steps_of(callback, Given(table["dense"], table["gradients"]), 3)
    for (mask, effective, dense, _), expected in zip(found, table["steps"][decay, every], strict=True):
        assert mask == expected[0]
        assert_close(effective, expected[1])
        assert_close(dense, expected[2])


@pytest.mark.parametrize("name", SR_STE)
def test_momentum_sees_the_decay(name: str) -> None:
    table = SR_STE[name]
    callback = NM(f"{table['n']}:{table['m']}", print_plan=False)  # its defaults are a mask in every step and 2e-4
    found = steps_of(callback, Given(table["dense"], table["gradients"], momentum=MOMENTUM), 2)
    assert_close(found[-1][2], table["with_momentum"])


def test_the_curves_are_those_of_the_table() -> None:
    table = SR_STE["linear_2of4"]
    found = steps_of(NM(print_plan=False), Given(table["dense"], table["gradients"]), 3)
    masks = [torch.tensor(step[0]) for step in table["steps"][2e-4, 1]]
    for step, figures in enumerate(row[3] for row in found[:2]):
        changed = in_groups(masks[step] != masks[step + 1], 4).any(-1)
        assert figures["update/groups_changed"] == float(changed.sum()) / 4
        pruned = torch.tensor(table["steps"][2e-4, 1][step][2])[masks[step + 1] == 0]
        assert figures["nm/pruned_dense_norm"] == pytest.approx(float(pruned.norm()), rel=1e-5)  # taken in float32
        assert figures["nm/n"] == 2


# ---------------------------------------------------------------------- the soft projection

SOFT = [[4.0, -1.0, 2.0, 0.0], [-2.0, 1.0, -2.0, 0.5]]
# t is 1 in both rows, S = [[3, 0, 1, 0], [-1, 0, -1, 0]], <w, S> = 18 and ||S||^2 = 12, so beta is 1.5
SOFT_GRADIENTS = [
    [[1.0, 2.0, -1.0, 0.5], [0.0, -1.5, 0.5, -2.5]],
    [[1.0, 0.0, -1.0, 0.5], [1.0, 0.5, -0.5, 1.0]],
    [[0.0] * 4] * 2,
]
# the effective weights of each step, and the dense ones after it, at a learning rate of 1
SOFT_STEPS = [
    ([[4.5, 0.0, 1.5, 0.0], [-1.5, 0.0, -1.5, 0.0]], [[3.0, -3.0, 3.0, -0.5], [-2.0, 2.5, -2.5, 3.0]]),
    # three of a row are equal, and the threshold is theirs
    ([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.75]], [[2.0, -3.0, 4.0, -1.0], [-3.0, 2.0, -2.0, 2.0]]),
    ([[0.0, -1.5, 3.0, 0.0], [-1.5, 0.0, 0.0, 0.0]], [[2.0, -3.0, 4.0, -1.0], [-3.0, 2.0, -2.0, 2.0]]),
]


def test_the_soft_projection_moves_as_worked_by_hand() -> None:
    callback = NM(projection="soft", print_plan=False)
    found = steps_of(callback, Given(SOFT, SOFT_GRADIENTS, rate=1.0), 3)
    for (mask, effective, dense, _), (expected, after) in zip(found, SOFT_STEPS, strict=True):
        assert_close(effective, expected)
        assert_close(dense, after)
        assert mask == (torch.tensor(expected) != 0).int().tolist()
    assert [row[3]["update/groups_changed"] for row in found] == [1.0, 1.0, 0.0]
    assert float(callback.aux["scale/layer.weight"]) == 1.5


def test_the_threshold_is_the_largest_of_the_pruned() -> None:
    weight = torch.tensor([[5.0, -1.0, 3.0, 2.0, 8.0, 0.0, -6.0, 7.0]])
    assert shrunk(weight, 1, 4).tolist() == [[2.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    assert shrunk(weight, 3, 4).tolist() == [[4.0, 0.0, 2.0, 1.0, 8.0, 0.0, -6.0, 7.0]]
    assert shrunk(weight, 3, 8).tolist() == [[0.0, 0.0, 0.0, 0.0, 3.0, 0.0, -1.0, 2.0]]
    assert torch.equal(shrunk(weight, 4, 4), weight)


@pytest.mark.parametrize("axis", [0, 1])
def test_factors_times_weights_are_the_soft_projection(axis: int) -> None:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 8, 3, 3, generator=source)
    weight[0] = 0.0
    for n in (1, 2, 3, 4):
        scale = scale_of(weight, n, 4, axis)
        soft = shrunk(weight, n, 4, axis)
        torch.testing.assert_close(soft_factors(weight, scale, n, 4, axis) * weight, scale * soft, rtol=1e-4, atol=1e-6)
        # no other factor of the projection comes closer
        for factor in (0.99, 1.01):
            assert (weight - scale * soft).norm() < (weight - factor * scale * soft).norm()
    assert float(scale_of(torch.zeros(4, 4), 2, 4)) == 1.0


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.01), (torch.float16, 0.002), (torch.float32, 1e-6)])
def test_factors_near_the_threshold_keep_their_digits(dtype: torch.dtype, error: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64).to(dtype)
    expected = shrunk(weight.double(), 2, 4) * scale_of(weight.double(), 2, 4)
    found = (soft_factors(weight, scale_of(weight, 2, 4), 2, 4).double() * weight.double())[expected != 0]
    expected = expected[expected != 0]
    assert ((found - expected).abs() / expected.abs()).max() < error


def test_what_a_user_writes_into_soft_weights_is_kept() -> None:
    callback = NM(projection="soft", print_plan=False)
    module = Given(SOFT, SOFT_GRADIENTS, rate=1.0)

    def clamp(*_: Any) -> None:
        if callback.step == 0:
            with torch.no_grad():
                module.layer.weight.clamp_(max=3.0)

    fit(
        module,
        callback,
        pl.callbacks.LambdaCallback(on_train_batch_start=clamp),
        loader=DataLoader(torch.zeros(1)),
        max_steps=1,
    )
    # 4.5 became 3, which is a factor of 9 / 8 on a dense weight of 8 / 3; the others step as in the table
    expected = torch.tensor(SOFT_STEPS[0][1]).double()
    expected[0, 0] = 8 / 3 - 1
    torch.testing.assert_close(dense_values(callback, "layer.weight"), expected)


# ---------------------------------------------------------------------- the ramp


def test_n_falls_from_m_by_one_at_equal_intervals() -> None:
    callback = NM("1:4", ramp=9, print_plan=False)
    rows: list[tuple[int, int, bool]] = []

    def note(*_: Any) -> None:
        most = max(int(in_groups(m, 4).sum(-1).max()) for m in callback.masks.values())
        rows.append((int(callback.figures()["nm/n"]), most, callback.at_target))

    fit(Classifier(), callback, watch(note), max_steps=11)
    assert [n for n, _, _ in rows] == [4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1]
    assert all(most == n for n, most, _ in rows)
    assert [there for _, _, there in rows] == [False] * 8 + [True] * 3


def test_the_curve_of_n_is_that_of_the_masks_between_refreshes() -> None:
    callback = NM("1:4", ramp=9, every=4, print_plan=False)
    rows: list[tuple[int, int]] = []

    def note(*_: Any) -> None:
        most = max(int(in_groups(m, 4).sum(-1).max()) for m in callback.masks.values())
        rows.append((int(callback.figures()["nm/n"]), most))

    fit(Classifier(), callback, watch(note), max_steps=11)
    assert [most for _, most in rows] == [4] * 3 + [3] * 4 + [2] + [1] * 3
    assert all(n == most for n, most in rows)


def test_masks_that_are_never_renewed_are_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    fit(Classifier(), NM("2:4", every=9, print_plan=False), max_steps=8)
    assert "every=9 is longer than the run (8 steps), so the first masks stay" in caplog.text
    caplog.clear()
    fit(Classifier(), NM("2:4", every=8, print_plan=False), max_steps=8)
    assert "longer than the run" not in caplog.text


def test_n_is_reached_at_the_end_of_the_ramp_whatever_the_interval() -> None:
    callback = NM("2:4", ramp=0.5, every=5, print_plan=False)
    rows: list[float] = []
    fit(
        Classifier(),
        callback,
        watch(lambda *_: rows.append(callback.measured_sparsity()["sparsity/total"])),
        max_steps=16,
    )
    # refreshes at 5, 8, 10 and 15: after 5 of 8 steps N is 3
    assert rows == [0.0] * 4 + [0.25] * 3 + [0.5] * 9


def test_a_run_that_ends_on_the_ramp_says_so() -> None:
    callback = NM("1:4", ramp=0.5, print_plan=False)
    fit(Classifier(), callback, max_steps=8)
    assert callback.at_target
    stopped = NM("1:4", ramp=12, print_plan=False)
    fit(Classifier(), stopped, max_steps=6)
    assert not stopped.at_target
    assert stopped.shortfall().startswith(
        "NM ended with 3:4 active weights in groups, before its pattern '1:4': 6 steps were"
    )


# ---------------------------------------------------------------------- tiles and layers


def test_tiles_obey_the_pattern_in_both_directions() -> None:
    callback = NM("transposable 2:4", every=2, print_plan=False)

    def look(*_: Any) -> None:
        for mask in callback.masks.values():
            tiles = in_tiles(mask, 4)
            assert int(tiles.sum(1).max()) <= 2
            assert int(tiles.sum(2).max()) <= 2

    fit(Classifier(), callback, watch(look), max_steps=6)
    assert callback.updates == 3
    assert 0.5 <= callback.measured_sparsity()["sparsity/total"] < 0.53


def test_transposable_masks_are_renewed_every_40_steps() -> None:
    callback = NM("transposable 2:4", print_plan=False)
    fit(Classifier(), callback, max_epochs=50)
    assert (callback.times.every, callback.updates) == (40, 10)
    short = NM("transposable 2:4", print_plan=False)
    fit(Classifier(), short, max_epochs=2)
    assert short.times.every == 10
    assert NM(print_plan=False).every is None


def test_layers_that_do_not_fit_stay_dense_with_that_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.ConvTranspose2d(8, 4, 2), nn.Linear(8, 10))
    plan = NM("2:4").plan(model)
    assert plan["0.weight"].reason == "not 2:4: 3 inputs do not divide into groups of 4"
    assert [plan[f"{i}.weight"].reason for i in (1, 2, 3)] == [""] * 3
    assert plan["1.weight"].remark == "2:4: 2 of every 4 inputs"
    assert plan["1.weight"].zeros == 6 * 8 * 9 // 2
    both = NM("transposable 2:4").plan(model)
    assert both["1.weight"].reason == "not transposable 2:4: 6 outputs do not divide into groups of 4"
    assert both["2.weight"].reason == ""
    with pytest.raises(ValueError, match=r"pattern='2:16' fits no layer, so nothing would be sparse: .* Give another"):
        NM("2:16").plan(model)


def test_groups_of_a_transposed_convolution_run_along_its_inputs() -> None:
    class Both(Given):
        def __init__(self) -> None:
            super().__init__([[1.0] * 4], [[[0.0] * 4]] * 2)
            self.layer = nn.ConvTranspose2d(8, 3, 2, bias=False).double()
            self.given = torch.zeros(2, *self.layer.weight.shape).double()

    callback, module = NM("1:4", print_plan=False), Both()
    dense = module.layer.weight.detach().clone()
    fit(module, callback, loader=DataLoader(torch.zeros(2)), max_steps=2)
    groups = dense.abs().unflatten(0, (2, 4))
    largest = groups == groups.amax(1, keepdim=True)
    assert torch.equal(callback.masks["layer.weight"], largest.flatten(0, 1))


def test_pruned_weights_of_a_convolution_decay_and_others_do_not() -> None:
    module = Classifier(conv_net())
    callback = NM("2:4", decay=0.1, every=50, print_plan=False)
    before: dict[str, Tensor] = {}

    def at_start(*_: Any) -> None:
        if not before:
            before.update({n: dense_values(callback, n).clone() for n in callback.params})
            for group in module.optimizers().optimizer.param_groups:
                group.update(lr=1.0, momentum=0.0, weight_decay=0.0)

    class Still(pl.Callback):
        def on_after_backward(self, *_: Any) -> None:
            for p in module.parameters():
                if p.grad is not None:
                    p.grad.zero_()

    begin = pl.callbacks.LambdaCallback(on_train_batch_start=at_start)
    fit(module, Still(), callback, begin, max_steps=1)
    for name, dense in before.items():
        left = torch.where(callback.masks[name], dense, 0.9 * dense)
        torch.testing.assert_close(dense_values(callback, name), left)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NM("4:2"), r"pattern='4:2' is not N:M\. Give '2:4'"),
        (lambda: NM("fan_in/4"), r"pattern='fan_in/4' is not N:M\. Give '2:4'"),
        (lambda: NM(decay=-0.1), r"decay=-0\.1 is not a decay of weights\. Give a number from 0 on"),
        (lambda: NM(decay=math.inf), r"decay=inf is not a decay of weights\. Give a number from 0 on"),
        (lambda: NM(ramp=0), r"ramp=0 ends where the run begins\. Give a later time"),
        (lambda: NM(ramp=0.0), r"ramp=0\.0 ends where the run begins\. Give a later time"),
        (lambda: NM(ramp=-3), r"ramp=-3"),
        (lambda: NM(every=0), r"every=0 is not an interval between updates\. Give optimizer steps"),
        (lambda: NM(projection="firm"), r"projection='firm' is not known\. Give 'hard' or 'soft'"),
        (
            lambda: NM("transposable 2:4", projection="soft"),
            r"pattern='transposable 2:4' with projection='soft': .* Give '2:4'",
        ),
        (lambda: NM(projection="soft", every=2), r"every=2 with projection='soft': .* Leave every= out"),
        (lambda: NM(projection="soft", decay=2e-4), r"decay=0\.0002 with projection='soft': .* Leave decay= out"),
        (lambda: NM(projection="soft", ramp=0.5), r"ramp=0\.5 with projection='soft': .* Leave ramp= out"),
    ],
)
def test_arguments_that_no_run_can_use_are_refused(make: Callable[[], NM], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
    NM(projection="soft", every=1, decay=0.0)
