"""The doctor: each warning in a run that deserves it, none in a run beside it, and none where it was given before."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.stance import stance
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import (
    DPF,
    GMP,
    NM,
    SET,
    SNFS,
    ConstrainedL0,
    DoctorWarning,
    RigL,
    SparseRun,
    SparsityCallback,
    Static,
    Step,
    Update,
    sparsify,
)
from sparse_callbacks.core.doctor import at_start, movement
from sparse_callbacks.core.doctor.gradient_noise import COMPARED_STEPS, GradientNoise
from sparse_callbacks.core.doctor.remedies import REMEDIES, remedy
from sparse_callbacks.core.sparse_layers.moved_places import Move
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import trainer_for

QUIET: dict[str, Any] = {"print_plan": False, "distribution": "uniform"}


@contextmanager
def heard() -> Iterator[list[str]]:
    """Names of the checks that have warned, in their order."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    for warning in caught:
        if issubclass(warning.category, DoctorWarning):
            name = re.match(r"doctor/(\w+): \w+: ", str(warning.message))
            assert name is not None, warning.message
            found.append(name[1])


def wide(width: int = 32, depth: int = 2, inputs: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(inputs, width)]
    for _ in range(depth - 1):
        layers += [nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 4))


def digits(step: int, size: int = 16, inputs: int = 12) -> tuple[Tensor, Tensor]:
    """Four classes around four points."""
    source = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 4, (size,), generator=source)
    centres = torch.randn(4, inputs, generator=torch.Generator().manual_seed(99)) * 2
    return centres[labels] + torch.randn(size, inputs, generator=source) * 0.5, labels


def steps_of(
    run: SparseRun, model: nn.Module, optimizer: Any, steps: int, batch: Callable[[int], tuple[Tensor, Tensor]] = digits
) -> None:
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        with run.batch():
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def warned(
    method: SparsityCallback,
    model: nn.Module,
    steps: int = 24,
    lr: float = 0.1,
    length: float | None = None,
    batch: Callable[[int], tuple[Tensor, Tensor]] = digits,
    then: Callable[[SparseRun], object] = lambda _: None,
) -> list[str]:
    """Names of the checks that warn in a run of a loop."""
    with heard() as found:
        optimizer = torch.optim.SGD(model.parameters(), lr)
        with sparsify(method, model, optimizer, steps=steps if length is None else length) as run:
            steps_of(run, model, optimizer, steps, batch)
            then(run)
    return found


# ---------------------------------------------------------------------- layers


def narrow(sparsity: float) -> GMP:
    return GMP(0.9, every=2, stop=20, print_plan=False, distribution={"0.*": sparsity, "*": 0.5})


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 4))


def test_a_layer_with_fewer_weights_than_a_tenth_of_its_outputs_is_warned_about_once() -> None:
    method = narrow(0.994)
    assert warned(method, normed(), 30) == ["collapse"]
    assert method.weights.active_counts["0.weight"] == 3


def test_a_layer_that_can_feed_a_tenth_of_its_outputs_is_not_warned_about() -> None:
    method = narrow(0.99)
    assert warned(method, normed(), 30) == []
    assert method.weights.active_counts["0.weight"] == 5


class Given(Static):
    """Masks that join the outputs of the first layer from one unit on with the inputs of the second up to another."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(0.5, print_plan=False)
        self.first, self.last = first, last

    def initial_masks(self) -> dict[str, Tensor]:
        masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self.params.items()}
        masks["0.weight"][: self.first] = False
        masks["2.weight"][:, self.last :] = False
        return masks


@pytest.mark.parametrize(("last", "expected"), [(16, ["no_path"]), (28, [])])
def test_a_chain_that_no_path_leads_through_is_warned_about(last: int, expected: list[str]) -> None:
    assert warned(Given(16, last), wide(), 3) == expected


def test_a_path_around_the_layers_is_no_broken_chain() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.side = wide(), nn.Linear(12, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[4](self.inner[2](self.inner[0](x).relu()) + self.side(x))

    class GivenInside(Given):
        def initial_masks(self) -> dict[str, Tensor]:
            masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self.params.items()}
            masks["inner.0.weight"][:16], masks["inner.2.weight"][:, 16:] = False, False
            return masks

    assert warned(GivenInside(0, 0), Around(), 3) == []


# ---------------------------------------------------------------------- the first batch


def deep(layers: int) -> nn.Sequential:
    """Whose dense signal keeps its size."""
    model = wide(40, layers)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=torch.Generator().manual_seed(0))
            nn.init.zeros_(module.bias)
    return model


def test_a_signal_that_fades_in_the_first_batch_is_warned_about() -> None:
    assert warned(Static(0.5, **QUIET), deep(17), 2) == ["faded_signals"]
    assert warned(Static(0.5, rescale="fan_in", **QUIET), deep(17), 2) == []
    assert warned(Static(0.5, **QUIET), deep(5), 2) == []


def test_what_the_masks_have_told_before_the_batch_is_not_said_twice() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = deep(9)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with sparsify(Static(0.95, **QUIET), model, optimizer, steps=2) as run:
            steps_of(run, model, optimizer, 2)
    assert [str(w.message).split(" for each")[0] for w in caught] == ["few inputs are left"]
    assert warned(Static(0.8, rescale="fan_in", **QUIET), deep(9), 2) == []


def test_a_norm_that_gives_signals_another_scale_is_no_fading() -> None:
    model = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    loud = lambda step: (digits(step)[0] * 1000, digits(step)[1])  # noqa: E731
    assert warned(Static(0.5, **QUIET), model, 3, batch=loud) == []


def test_models_are_copied_and_saved_before_the_first_step_without_the_doctor() -> None:
    model = wide()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with sparsify(Static(0.5, **QUIET), model, optimizer, steps=3) as run:
        copied, buffer = deepcopy(model), io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for other in (copied, loaded):
            other(torch.randn(2, 12))
            assert not any(m._forward_hooks for m in other.modules())
        assert any(m._forward_hooks for m in model.modules())
        steps_of(run, model, optimizer, 1)
        assert not any(m._forward_hooks for m in model.modules())


# ---------------------------------------------------------------------- updates


def test_a_run_that_begins_and_never_steps_leaves_compiled_code_compiled() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    run = sparsify(Static(0.5, print_plan=False), net, torch.optim.SGD(net.parameters(), lr=0.1), steps=2)
    assert stance() == "default"
    run.close()


def test_a_compiled_module_is_compiled_once_and_gets_no_hooks() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    counter = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    net.compile(backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with sparsify(Static(0.5, print_plan=False), net, optimizer, steps=3):
        assert not any(module._forward_hooks for module in net)
        for _ in range(3):
            net(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert counter.frame_count == 1


def test_a_layer_that_joins_between_two_gradients_begins_the_look_at_noise_anew() -> None:
    noise, generator = GradientNoise(), torch.Generator().manual_seed(0)
    noise.updated(0)
    for size in [5] * 3 + [9] * COMPARED_STEPS:
        step = SimpleNamespace(index=0, masking=False, gradient=lambda _, n=size: torch.randn(n, generator=generator))
        noise.look(step, {"weight": torch.ones(size, dtype=torch.bool)})
    assert not noise.waits  # all looks of the larger one, and none of the smaller


def test_grown_weights_that_the_next_update_drops_are_warned_about() -> None:
    often = SET(0.8, every=1, stop=1000, drop_fraction="constant(0.3)", **QUIET)
    assert warned(often, wide(), 12, lr=0.01, length=1000) == ["short_interval"]
    seldom = SET(0.8, every=12, stop=1000, drop_fraction="constant(0.3)", **QUIET)
    assert warned(seldom, wide(), 100, length=1000) == []
    assert seldom.updates > movement.POOLED


def test_grown_units_of_exchanged_layers_that_the_next_update_drops_are_warned_about() -> None:
    often = SET(0.8, every=1, stop=1000, drop_fraction="constant(0.3)", storage="sparse", **QUIET)
    assert warned(often, wide(), 12, lr=0.01, length=1000) == ["short_interval"]


def test_units_and_masks_count_the_same_weights_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movement, "LOST", 0.0)  # any share is told of
    generator = torch.Generator().manual_seed(0)
    masks = [torch.zeros(500, dtype=torch.bool), torch.arange(500) < 100]
    while len(masks) < movement.POOLED + 2:
        worth = torch.rand(500, generator=generator) + masks[-1]  # 30 of 100 are dropped, and 30 others grow
        kept = worth.where(masks[-1], 0).topk(70).indices
        grown = worth.where(~masks[-1], 0).topk(30).indices
        masks.append(torch.zeros_like(masks[0]).index_fill_(0, torch.cat([kept, grown]), True))
    by_masks, by_moves = movement.GrownWeights(), movement.GrownWeights()
    lost = there = 0
    for earlier, before, after in zip([masks[0], *masks], masks, masks[1:], strict=False):
        old, keys = before.nonzero().flatten(), after.nonzero().flatten()
        slots = (before.cumsum(0) - 1)[keys].where(before[keys], -1).int()
        by_masks.masked("weight", before, after)
        by_moves.moved("weight", Move.between(old, keys, slots))
        grown = before & ~earlier
        lost, there = lost + int((grown & ~after).sum()), there + int(grown.sum())
        said = by_masks.look(0.0), by_moves.look(0.0)
    words = f"of the weights that the last updates have grown, {lost / there:.0%} were dropped by the very next one"
    assert said == (words, words)


class Still(SET):
    """Updates that are to replace weights and do not."""

    def new_masks(self, step: Step) -> Update:
        masks = {name: self.weights.held_masks[name] for name in step.names}
        return Update(masks, {"update/drop_fraction": self.fraction_at(step.number)})


def test_updates_that_replace_nothing_are_warned_about() -> None:
    options: dict[str, Any] = {"every": 4, "stop": 1000, "drop_fraction": "constant(0.3)", **QUIET}
    assert warned(Still(0.8, **options), wide(), 13, length=1000) == ["stuck_masks"]
    assert warned(Still(0.8, **options), wide(), 8, length=1000) == []  # twice
    assert warned(Still(0.8, **{**options, "drop_fraction": "constant(0.0)"}), wide(), 24, length=1000) == []


@pytest.mark.parametrize("kind", [SET, RigL])
def test_a_fraction_of_less_than_a_weight_is_warned_about(kind: type[SET] | type[RigL]) -> None:
    # the largest layer has 204 active weights
    few = kind(0.8, every=4, stop=1000, drop_fraction="constant(0.004)", **QUIET)
    assert warned(few, wide(), 3, length=1000) == ["stuck_masks"]
    one = kind(0.8, every=4, stop=1000, drop_fraction="constant(0.006)", **QUIET)
    assert warned(one, wide(), 3, length=1000) == []


def test_masks_that_move_at_a_learning_rate_of_zero_are_warned_about() -> None:
    def warms_up(steps: int) -> list[str]:
        model, method = wide(), SET(0.8, every=2, stop=1000, drop_fraction="constant(0.1)", **QUIET)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= steps))
        with heard() as found, sparsify(method, model, optimizer, steps=1000) as run:
            for step in range(8):
                steps_of(run, model, optimizer, 1, lambda _, step=step: digits(step))  # type: ignore[misc]
                schedule.step()
        return found

    assert warms_up(3) == []  # updates after steps 1 and 3
    assert warms_up(6) == ["zero_rate"]


def test_growth_by_the_gradient_of_noise_is_warned_about() -> None:
    def noise(step: int, size: int = 4) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(1000 + step)
        return torch.randn(size, 12, generator=source), torch.randint(0, 4, (size,), generator=source)

    options: dict[str, Any] = {"every": 10, "stop": 1000, "drop_fraction": "constant(0.3)", **QUIET}
    assert warned(RigL(0.8, **options), wide(64), 200, 0.01, length=1000, batch=noise) == ["gradient_noise"]
    assert warned(RigL(0.8, **options), wide(64), 200, 0.01, length=1000) == []
    # of growth that goes by no single gradient nothing is said
    assert warned(SNFS(0.8, **options), wide(64), 120, 0.01, length=1000, batch=noise) == []


# ---------------------------------------------------------------------- before the first step


def test_a_run_that_ends_before_its_target_is_warned_about_at_its_start() -> None:
    for method in (GMP(0.5, every=2, stop=30, **QUIET), DPF(0.5, every=2, stop=30, **QUIET)):
        model = wide()
        with heard() as found:
            run = sparsify(method, model, torch.optim.SGD(model.parameters(), 0.1), steps=24)
            assert found == []
        assert found == ["short_run"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.close()
    assert warned(GMP(0.5, every=2, stop=24, **QUIET), wide(), 24) == []
    assert warned(SET(0.5, every=2, stop=30, **QUIET), wide(), 24) == []  # has its sparsity from the start


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_that_could_be_fused_is_warned_about(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_start, "MANY_WEIGHTS", 1500)
    for options, expected in (({}, ["slow_optimizer"]), ({"fused": True}, []), ({"foreach": True}, ["slow_optimizer"])):
        model = wide()
        with heard() as found:
            sparsify(Static(0.5, **QUIET), model, kind(model.parameters(), 0.1, **options), steps=3).close()
        assert found == expected
    small = wide(16)
    with heard() as found:
        sparsify(Static(0.5, **QUIET), small, kind(small.parameters(), 0.1), steps=3).close()
    assert found == []


# ---------------------------------------------------------------------- once, and off


def test_a_warning_is_not_given_again_by_a_resumed_run_and_is_by_a_new_one() -> None:
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with heard() as found:
        run = sparsify(narrow(0.994), model, optimizer, steps=30)
        steps_of(run, model, optimizer, 22)
        state = run.state_dict()
        run.close()
    assert found == ["collapse"]
    with heard() as found, sparsify(narrow(0.994), model, optimizer, steps=30, state=state) as run:
        steps_of(run, model, optimizer, 8)
    assert found == []
    assert warned(narrow(0.994), normed(), 30) == ["collapse"]


def test_a_single_warning_can_be_switched_off() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="doctor/short_run")
        model = wide()
        sparsify(GMP(0.5, every=2, stop=30, **QUIET), model, torch.optim.SGD(model.parameters(), 0.1), steps=24).close()
    assert not [w for w in caught if issubclass(w.category, DoctorWarning)]


def test_a_trainer_gives_the_same_warnings(tmp_path: Path) -> None:
    def fitted(method: SparsityCallback, **options: Any) -> list[str]:
        batches = DataLoader(TensorDataset(*digits(0, 64)), batch_size=8)
        with heard() as found:
            trainer_for(method, tmp_path, max_epochs=2, **options).fit(Classifier(normed()), batches)
        return found

    def pruned(sparsity: float, stop: int) -> GMP:
        return GMP(0.9, every=2, stop=stop, print_plan=False, distribution={"net.0.*": sparsity, "*": 0.5})

    assert fitted(pruned(0.9, 20)) == ["short_run"]
    assert fitted(pruned(0.994, 14)) == ["collapse"]
    assert fitted(pruned(0.99, 16)) == []


def test_gates_that_close_a_layer_are_warned_about_at_the_end_of_an_epoch() -> None:
    def closes(run: SparseRun) -> None:
        run.method.weights.set_factor("0.weight", torch.zeros(40, 12))
        run.epoch_end()

    method = ConstrainedL0(density=0.9, print_plan=False)
    assert warned(method, normed(), 3, then=closes) == ["collapse"]
    assert warned(ConstrainedL0(density=0.9, print_plan=False), normed(), 3, then=lambda run: run.epoch_end()) == []


def owning(method: Any, *groups: dict[str, Any]) -> Any:
    """A method whose optimizer has these groups of parameters."""
    params = [{"params": [nn.Parameter(torch.zeros(2))], **group} for group in groups]
    method.owners = SimpleNamespace(optimizers=[torch.optim.SGD(params, 0.1)])
    return method


@pytest.mark.parametrize(
    ("name", "follows", "does_not", "advice"),
    [
        ("faded_signals", Static(0.5, rescale="fan_in"), Static(0.5), "Give rescale="),
        ("faded_signals", SET(0.5, rescale="layer"), SET(0.5), "Give rescale="),
        ("collapse", Static(0.5), Static(0.5, distribution="uniform"), "distribution="),
        ("collapse", Static(0.5, distribution="erdos_renyi"), GMP(0.5), "distribution="),
        ("short_run", GMP(0.5, stop=0.75), GMP(0.5, stop=500), "as a share of the run"),
        ("short_run", NM("1:4", ramp=0.5), NM("1:4", ramp=100), "ramp=, best as a share of the run, such as ramp=0.5."),
        ("slow_optimizer", owning(GMP(0.5), {"fused": True}, {}), owning(GMP(0.5), {}, {}), "Give it fused=True"),
    ],
)
def test_no_remedy_is_what_the_run_does_already(name: str, follows: Any, does_not: Any, advice: str) -> None:
    assert advice in remedy(name, does_not)
    assert advice not in remedy(name, follows)
    assert remedy(name, follows).endswith(".")


def test_a_signal_that_fades_under_rescaled_masks_is_said_with_what_is_left_to_do() -> None:
    """Weights that are too small before any mask."""
    model = deep(9)
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Linear):
                module.weight.mul_(0.4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.warns(DoctorWarning, match=r"faded_signals.* rescale='fan_in' has given back .* give norms") as caught,
        sparsify(Static(0.5, rescale="fan_in", **QUIET), model, optimizer, steps=2) as run,
    ):
        steps_of(run, model, optimizer, 2)
    assert "Give rescale" not in str([str(w.message) for w in caught])


def test_every_warning_has_a_test_that_gives_it() -> None:
    text = Path(__file__).read_text()
    assert {name for name in REMEDIES if f'["{name}"]' not in text and f'"{name}"]' not in text} == set()
