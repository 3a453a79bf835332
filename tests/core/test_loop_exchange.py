"""Sparse storage under `sparsify`: optimizers that are there already, runs that are refused, and the first batch."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import exchange_ranks, loops, sam
from support.processes import run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparse_callbacks.core.storages.auto_storage as auto_storage
from sparse_callbacks import SparseLinear, exchange_layers, sparsify
from sparse_callbacks.core.storages import offloading
from sparse_callbacks.core.storages.loop_exchange import exchange_for_loop
from sparse_callbacks.methods import SET, RigL, Static


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def method(kind: type[Any] = RigL, **more: Any) -> Any:
    times = {} if kind is Static else {"every": 2}
    return kind(0.5, storage="sparse", distribution="uniform", print_plan=False, **times, **more)


def grouped(model: nn.Sequential) -> torch.optim.Optimizer:
    """The second layer in a group of its own, with weights and biases in another order than the model's."""
    named = dict(model.named_parameters())
    first = [named[n] for n in ("4.bias", "0.weight", "0.bias", "4.weight")]
    groups = [{"params": first, "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.05, "weight_decay": 0.1}]
    return torch.optim.AdamW(groups)


def names_in(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return [[names.get(id(p), "a stranger") for p in group["params"]] for group in optimizer.param_groups]


def train(model: nn.Module, optimizer: Any, steps: int = 6) -> None:
    for x, y in [*loops.data()][:steps]:
        nn.functional.cross_entropy(model(x.to(next(model.parameters()))), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", [RigL, SET, Static])
def test_live_parameters_take_the_places_of_the_dense_ones_in_the_groups(kind: type[Any]) -> None:
    model = net().double()
    twin = copy.deepcopy(model)
    optimizer, other = grouped(model), grouped(twin)
    order = names_in(optimizer, model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    run = sparsify(method(kind), model, optimizer, 6)
    assert names_in(optimizer, model) == order
    assert all(isinstance(model[i], SparseLinear) for i in (0, 2, 4))
    dense = sparsify(
        kind(0.5, distribution="uniform", print_plan=False, **({} if kind is Static else {"every": 2})), twin, other, 6
    )
    train(model, optimizer)
    train(twin, other)
    schedule.step()
    assert run.updates == dense.updates
    assert all(torch.equal(m, dense.masks[n]) for n, m in run.masks.items())
    assert all(torch.allclose(t, twin.state_dict()[n], atol=1e-10) for n, t in model.state_dict().items())
    assert optimizer.state[model[0].values]["exp_avg"].shape == model[0].values.shape


ADVICE = r".*Call exchange_layers\(method, model\) before you make the optimizer"


def refused_by_state(model: nn.Sequential) -> Any:
    optimizer = grouped(model)
    model(torch.ones(2, 12)).sum().backward()
    optimizer.step()
    return model, optimizer


def refused_by_ddp(model: nn.Sequential) -> Any:
    class Wrapped(DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    return Wrapped(model), grouped(model)


def refused_by_fabric(model: nn.Sequential) -> Any:
    class _FabricOptimizer:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    return model, _FabricOptimizer(grouped(model))


def refused_by_a_list(model: nn.Sequential) -> Any:
    optimizer = grouped(model)
    optimizer.watched = list(model.parameters())  # type: ignore[attr-defined]
    return model, optimizer


REFUSED: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "a state": (refused_by_state, f"AdamW has a state for .* which is one of its dense weight{ADVICE}"),
    "a step": (lambda m: refused_by_adagrads_step(m), f"Adagrad has a state for .*{ADVICE}"),
    "a state of noise": (lambda m: (m, Counts(m.parameters())), f"Counts has a state for .*{ADVICE}"),
    "another reason": (
        lambda m: (m, made_by_constructor()([*m[:4].parameters(), m[4].bias])),
        "4.weight .*in no optimizer",
    ),
    "DDP": (refused_by_ddp, f"DistributedDataParallel has set up the model{ADVICE}"),
    "Fabric": (refused_by_fabric, f"_FabricOptimizer has set up the model or its optimizer{ADVICE}"),
    "a list": (refused_by_a_list, f"AdamW keeps .*0.weight.* outside of its parameter groups{ADVICE}"),
    "no optimizer": (lambda m: (m, torch.optim.SGD(m[:4].parameters(), 0.1)), "4.weight .*in no optimizer"),
    "a matrix": (lambda m: (m, torch.optim.Adafactor(m.parameters())), "Adafactor looks at a weight as a matrix"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_run_gives_the_dense_layers_and_the_groups_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "SMALLEST", 1)  # as large layers, whose dense values lie in files
    make, why = REFUSED[kind]
    model = net()
    given, optimizer = make(model)
    inner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    held, order = list(model), names_in(inner, model)
    values, state = copy.deepcopy(model.state_dict()), copy.deepcopy(list(inner.state.values()))
    with pytest.raises(ValueError, match=why):
        sparsify(method(), given, optimizer, 6)
    assert list(model) == held
    assert names_in(inner, model) == order
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    assert str(list(inner.state.values())) == str(state)


@pytest.mark.parametrize("kind", ["DDP", "Fabric", "a list"])
def test_what_was_exchanged_before_the_optimizer_was_made_is_taken_as_it_is(kind: str) -> None:
    model, mine = net(), method(SET)
    layers = exchange_layers(mine, model)
    places = {name: layer.keys() for name, layer in layers.items()}
    given, optimizer = REFUSED[kind][0](model)
    run = sparsify(mine, given, optimizer, 6)
    assert all(torch.equal(layer.keys(), places[name]) for name, layer in layers.items())
    assert run.method.weights.layers_stored.keys() == layers.keys()


def made_by_constructor(**options: Any) -> Any:
    return lambda parameters: torch.optim.Adagrad(parameters, 0.1, **options)


class Counts(torch.optim.SGD):
    """Its constructor makes a state that is not the same for all weights."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.1)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 0, "noise": torch.rand_like(p)}


@pytest.mark.parametrize("kind", [RigL, SET])
@pytest.mark.parametrize("options", [{}, {"initial_accumulator_value": 0.1, "lr_decay": 0.01}])
def test_a_state_that_the_constructor_has_made_is_made_anew_for_live_values(kind: type[Any], options: Any) -> None:
    found = []
    for before in (True, False):
        model, mine = net().double(), method(kind)
        if before:
            exchange_layers(mine, model)
        optimizer = made_by_constructor(**options)(model.parameters())
        run = sparsify(mine, model, optimizer, 6)
        assert [p.shape for p in optimizer.state] == [p.shape for p in model.parameters()]
        train(model, optimizer)
        assert run.updates > 1
        found.append((model.state_dict(), optimizer.state_dict()["state"]))
        run.close()
    for name, tensor in found[0][0].items():
        assert torch.equal(tensor, found[1][0][name]), name
    torch.testing.assert_close(*(state for _, state in found), rtol=0, atol=0)


def refused_by_adagrads_step(model: nn.Sequential) -> Any:
    optimizer = made_by_constructor()(model.parameters())
    train(model, optimizer, 1)
    return model, optimizer


def test_an_optimizer_that_has_stepped_other_parameters_alone_is_taken() -> None:
    model = net()
    optimizer = torch.optim.Adam([*model.parameters()])
    model[4].bias.grad = torch.ones(4)
    optimizer.step()
    sparsify(method(), model, optimizer, 6)
    assert optimizer.state[model[4].bias]["step"] == 1


def test_a_compiled_model_is_exchanged_within() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = grouped(model)
    run = sparsify(method(SET), compiled, optimizer, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(compiled, optimizer)
    assert run.updates == 2
    assert isinstance(model[0], SparseLinear)


def test_the_optimizer_within_one_of_two_passes_gets_the_live_parameters() -> None:
    model = net()
    optimizer = sam.TwoCalls(model.parameters())
    order = names_in(optimizer, model)
    run = sparsify(method(SET), model, optimizer, 6)
    assert names_in(optimizer, model) == names_in(optimizer.base_optimizer, model) == order
    for x, y in [*loops.data()][:6]:

        def closure(x: Tensor = x, y: Tensor = y) -> None:
            nn.functional.cross_entropy(model(x), y).backward()

        closure()
        optimizer.step(closure)
        optimizer.zero_grad()
    assert run.updates == 2


@pytest.mark.parametrize("kind", [RigL, SET, Static])
@pytest.mark.parametrize("when", ["given as state=", "load_state_dict"])
def test_a_run_resumes_with_the_places_that_it_had(kind: type[Any], when: str) -> None:
    whole, other = net(), net()
    one, two = grouped(whole), grouped(other)
    with sparsify(method(kind), whole, one, 12):
        train(whole, one, 12)
    run = sparsify(method(kind), other, two, 12)
    train(other, two, 6)
    saved = copy.deepcopy((other.state_dict(), two.state_dict(), run.state_dict()))
    run.close()

    model = net()
    with torch.no_grad():
        model[0].weight.mul_(2.0)  # another start, with other largest weights
    optimizer = grouped(model)
    if when == "load_state_dict":
        again = sparsify(method(kind, seed=0), model, optimizer, 12)
        again.load_state_dict(saved[2])
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    else:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        again = sparsify(method(kind), model, optimizer, 12, state=saved[2])
    for x, y in [*loops.data()][6:]:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert again.updates == (0 if kind is Static else run.updates + 1) or kind is not Static
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        assert all(torch.equal(one.state[p][k], optimizer.state[q][k]) for k in one.state[p])


def test_a_state_of_masked_storage_is_refused() -> None:
    model = net()
    with sparsify(RigL(0.5, print_plan=False, every=2, distribution="uniform"), model, grouped(model), 6) as run:
        state = run.state_dict()
    again = net()
    held = list(again)
    with pytest.raises(ValueError, match="storage='masked', and this run has storage='sparse'"):
        sparsify(method(), again, grouped(again), 6, state=state)
    assert list(again) == held


def test_auto_in_a_loop_times_the_rows_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def times_of(shape: tuple[int, int], rows: int, density: float, dtype: torch.dtype) -> dict[str, float]:
        asked.append(rows)
        return {"masked": 2.0, "sparse": 1.0}

    monkeypatch.setattr(auto_storage, "times_of", times_of)
    model = net()
    auto = RigL(0.5, storage="auto", distribution="uniform", print_plan=False, every=2)
    run = sparsify(auto, model, grouped(model), 6, data=loops.data())
    assert asked == [8, 8, 8]
    assert isinstance(model[0], SparseLinear)
    assert "0.weight: storage 'sparse' (1" in capsys.readouterr().out
    assert run.plan()["0.weight"].storage == "sparse"
    run.close()
    model = net()
    sparsify(RigL(0.5, storage="auto", print_plan=False, every=2), model, grouped(model), 6)
    assert isinstance(model[0], nn.Linear)


def test_parameters_in_no_group_of_an_optimizer_are_left_alone() -> None:
    model = net()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    done = exchange_for_loop(method(), model, [optimizer], None)
    assert len(optimizer.param_groups[0]["params"]) == 1
    done.undo()
    assert isinstance(model[0], nn.Linear)


def test_ranks_exchange_the_same_layers_into_the_same_places(tmp_path: Path) -> None:
    one, other = run_processes("exchanged", tmp_path, 2, exchange_ranks.__file__)
    assert one.keys() == other.keys()
    for start, layers in one.items():
        if start == "remark":
            assert layers == other[start]
            continue
        assert layers.keys() == other[start].keys(), start
        assert layers
        for name, pattern in layers.items():
            assert all(torch.equal(tensor, other[start][name][key]) for key, tensor in pattern.items()), (start, name)


@pytest.mark.parametrize("rescale", [None, "fan_in"])
def test_layers_that_the_user_has_made_sparse_are_neither_rescaled_nor_warned_of(rescale: Any) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(SparseLinear.random(24, 24, fan_in=2) for _ in range(4)), nn.Linear(24, 24))

    mine = model()
    optimizer = torch.optim.SGD(mine.parameters(), 0.1)
    before = [layer.values.detach().clone() for layer in mine[:4]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify(method(SET, rescale=rescale), mine, optimizer, 6)
    assert all(torch.equal(layer.values, old) for layer, old in zip(mine[:4], before, strict=True))
    if rescale is None:
        thinned = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
        with pytest.warns(UserWarning, match="few inputs are left"):
            sparsify(
                SET(0.92, storage="sparse", distribution="uniform", print_plan=False, every=2),
                thinned,
                torch.optim.SGD(thinned.parameters(), 0.1),
                6,
            )
