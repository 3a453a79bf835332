"""Whether sparse layers are a chain, as the graph of a forward pass tells, and the paths through one by slow counts."""

import random
from collections.abc import Sequence
from itertools import pairwise, product

import pytest
import torch
from support.loops import conv_net, net
from torch import Tensor, nn

from sparse_callbacks import RigL, Static, sparsify
from sparse_callbacks.core.record.byte_counts import byte_counts
from sparse_callbacks.core.record.chains import Links, chain_figures, component_sizes, links_of_mask, paths_of
from sparse_callbacks.core.record.find_chain import Chain, LayerCall, find_chain
from sparse_callbacks.core.selection import Entry, select


def chain_in(model: nn.Module, x: Tensor, exclude: Sequence[str] | None = None) -> Chain:
    """The chain of the sparse layers in a training pass of a model."""
    entries = [e for e in select(model, None, exclude, None) if not e.reason]
    calls: list[LayerCall] = []
    for entry in entries:
        module = model.get_submodule(entry.name.rpartition(".")[0])

        def called(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = entry.name) -> None:
            calls.append(LayerCall.of(name, inputs[0], output))

        module.register_forward_hook(called)
    model.train()(x)
    return find_chain(calls, entries)


# ---------------------------------------------------------------------- what is a chain

ELEMENTWISE = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(),
    nn.PReLU(),
    nn.ELU(),
    nn.CELU(),
    nn.SELU(),
    nn.GELU(),
    nn.SiLU(),
    nn.Mish(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Hardtanh(),
    nn.ReLU6(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Softplus(),
    nn.LogSigmoid(),
    nn.Threshold(0.1, 0.0),
    nn.Dropout(),
    nn.Identity(),
    nn.BatchNorm1d(8),
    nn.LayerNorm(8),
    nn.GroupNorm(2, 8),
]


@pytest.mark.parametrize("between", ELEMENTWISE, ids=lambda module: type(module).__name__)
def test_units_pass_through_functions_and_norms_on_their_own(between: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 8), between, nn.Linear(8, 3))
    assert chain_in(model, torch.randn(4, 6)) == Chain(("0.weight", "2.weight"))


POOLINGS = [
    nn.MaxPool2d(2),
    nn.AvgPool2d(2),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveMaxPool2d(2),
    nn.BatchNorm2d(8),
    nn.Dropout2d(),
    nn.Upsample(scale_factor=2),
]


@pytest.mark.parametrize("between", POOLINGS, ids=lambda module: type(module).__name__)
def test_channels_pass_through_poolings(between: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), between, nn.Conv2d(8, 3, 1))
    assert chain_in(model, torch.randn(4, 2, 8, 8)) == Chain(("0.weight", "2.weight"))


def test_a_network_with_an_image_that_is_flattened_is_a_chain() -> None:
    assert chain_in(conv_net(), torch.randn(4, 2, 6, 6)).names == ("0.weight", "3.weight", "6.weight")


def test_layers_after_a_dense_one_are_a_chain() -> None:
    assert chain_in(net(), torch.randn(4, 12), ["0.weight"]) == Chain(("2.weight", "4.weight"))


# ---------------------------------------------------------------------- what is none


class Skips(nn.Module):
    """Reads a layer's outputs, and those of the one before beside them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(12 if how == "cat" else 6, 6)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        second = self.b(first.relu())
        if self.how == "add":
            joined = second + first
        elif self.how == "inplace":
            joined = second
            joined += first
        elif self.how == "gate":
            joined = second * first.sigmoid()
        else:
            joined = torch.cat([first, second], 1)
        return self.c(joined)


@pytest.mark.parametrize("how", ["add", "inplace", "gate", "cat"])
def test_a_connection_past_a_layer_is_no_chain(how: str) -> None:
    found = chain_in(Skips(how), torch.randn(4, 6))
    assert not found.names
    assert "between b.weight and c.weight" in found.reason
    assert how == "cat" or "of 2 activations" in found.reason


class Mixes(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(6, 6), nn.Linear(6, 6), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "transpose":
            y = y.view(6, 6).t()
        elif self.how == "flip":
            y = y.flip(1)
        elif self.how == "softmax":
            y = y.softmax(1)
        elif self.how == "product":
            y = y @ torch.ones(6, 6)
        elif self.how == "detached":
            y = y.detach()
        return self.b(y)


@pytest.mark.parametrize("how", ["transpose", "flip", "softmax", "product", "detached"])
def test_an_operation_that_mixes_units_is_no_chain(how: str) -> None:
    found = chain_in(Mixes(how), torch.randn(6, 6))
    assert not found.names
    assert "a.weight" in found.reason
    assert "b.weight" in found.reason


def test_rows_that_are_flattened_are_no_chain() -> None:
    # a feature is every third input there, and no block of them
    model = nn.Sequential(nn.Linear(5, 3), nn.Flatten(), nn.Linear(6, 2))
    assert "reads [4, 6]" in chain_in(model, torch.randn(4, 2, 5)).reason


def test_a_dense_layer_in_between_is_named() -> None:
    found = chain_in(net(), torch.randn(4, 12), ["2.weight"])
    assert found.reason == "between 0.weight and 4.weight lies Addmm, which is a layer of its own or mixes units"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x))


def test_layers_that_are_unused_or_used_twice_are_no_chain() -> None:
    assert chain_in(Twice(), torch.randn(4, 6)).reason == "b.weight was not called in the forward pass"
    assert "a.weight is used more than once" in chain_in(Twice(), torch.randn(4, 6), ["b.weight"]).reason
    assert chain_in(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)).reason == "there is one sparse layer alone"


def test_stacked_matrices_are_no_chain() -> None:
    entries = [Entry("attention.in_proj_weight", 27, (9, 3), (3, 3), parts=3)]
    assert "not the weight of a linear layer" in find_chain([], entries).reason


def test_gates_of_biases_and_norms_do_not_hide_a_chain() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    params = dict(model.named_parameters())
    entries = [Entry(n, p.numel(), tuple(p.shape), tuple(p.shape)) for n, p in params.items()]
    calls: list[LayerCall] = []
    for name in ("0.weight", "1.weight", "4.weight"):  # a norm is called between the layers, as the doctor sees it

        def called(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            calls.append(LayerCall.of(name, inputs[0], output))

        model[int(name[0])].register_forward_hook(called)
    model(torch.randn(5, 1, 4, 4))
    assert find_chain(calls, entries) == Chain(("0.weight", "4.weight"))


# ---------------------------------------------------------------------- paths by slow counts


def slow_paths(matrices: Sequence[Tensor]) -> tuple[int, int, list[set[int]]]:
    """Paths one by one: how many, how many connections lie on them, and the hidden units on none."""
    sizes = [matrices[0].shape[1], *(m.shape[0] for m in matrices)]
    paths = [
        path for path in product(*map(range, sizes)) if all(m[path[i + 1], path[i]] for i, m in enumerate(matrices))
    ]
    used = {(i, path[i], path[i + 1]) for path in paths for i in range(len(matrices))}
    hidden = [set(range(sizes[i])) - {path[i] for path in paths} for i in range(1, len(matrices))]
    return len(paths), len(used), hidden


def slow_components(matrices: Sequence[Tensor]) -> list[int]:
    sizes = [matrices[0].shape[1], *(m.shape[0] for m in matrices)]
    left = {(side, unit) for side, size in enumerate(sizes) for unit in range(size)}
    found = []
    while left:
        todo, part = [left.pop()], 0
        while todo:
            side, unit = todo.pop()
            part += 1
            near = [(side - 1, u) for u in range(sizes[side - 1]) if side and matrices[side - 1][unit, u]]
            if side < len(matrices):
                near += [(side + 1, u) for u in range(sizes[side + 1]) if matrices[side][u, unit]]
            todo += [n for n in near if n in left]
            left -= set(near)
        found.append(part)
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(8))
def test_paths_and_components_are_those_of_a_slow_count(seed: int) -> None:
    draw, source = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = [draw.randint(1, 6) for _ in range(draw.randint(3, 5))]
    matrices = [
        torch.rand(after, before, generator=source) < draw.choice([0.15, 0.4, 0.8]) for before, after in pairwise(sizes)
    ]
    entry = Entry("w", 0, ())
    chain = [links_of_mask(m, entry) for m in matrices]
    found, (paths, used, hidden) = paths_of(chain), slow_paths(matrices)
    assert (found.paths, found.connections) == (paths, used)
    assert [set(t.nonzero().flatten().tolist()) for t in found.off_path] == hidden
    assert component_sizes(chain) == slow_components(matrices)


def test_a_flattened_channel_is_connected_where_one_of_its_inputs_is() -> None:
    mask = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]]).bool()
    links = links_of_mask(mask, Entry("w", 18, (3, 6)), units=3)
    assert sorted(zip(*(t.tolist() for t in links.edges()), strict=True)) == [(0, 2), (1, 0), (2, 0), (2, 2)]
    assert (links.inputs, links.outputs) == (3, 3)


def test_channels_of_groups_are_connected_within_their_group() -> None:
    mask = torch.zeros(4, 2, 1, 1, dtype=torch.bool)
    mask[0, 1], mask[3, 0] = True, True
    plain = links_of_mask(mask, Entry("w", 8, (4, 2, 1, 1)), groups=2)
    assert sorted(zip(*(t.tolist() for t in plain.edges()), strict=True)) == [(1, 0), (2, 3)]
    turned = links_of_mask(mask, Entry("w", 8, (4, 2, 1, 1), transposed=True), groups=2)
    assert sorted(zip(*(t.tolist() for t in turned.edges()), strict=True)) == [(0, 1), (3, 2)]
    assert (turned.inputs, turned.outputs) == (4, 4)


def test_a_unit_whose_inputs_cancel_is_reached() -> None:
    links = Links(torch.tensor([0, 1]), torch.tensor([0, 0]), 2, 1)
    assert paths_of([links, Links(torch.tensor([0]), torch.tensor([0]), 1, 1)]).paths == 2


def test_figures_of_a_convolutional_chain_name_what_lies_on_no_path() -> None:
    model = conv_net()
    method = Static(0.5, distribution="uniform", print_plan=False)
    with sparsify(method, model, torch.optim.SGD(model.parameters(), 0.1), steps=4):
        masks = {name: torch.ones_like(mask) for name, mask in method.masks.items()}
        masks["0.weight"][3] = False  # reads nothing
        masks["3.weight"][:, 5] = False  # nobody reads channel 5
        masks["6.weight"][:, 8:12] = False  # nobody reads channel 2 of the flattened image
        method.weights.set_masks(masks)
        figures, layers = chain_figures(("0.weight", "3.weight", "6.weight"), [method.weights], model)
    assert layers == {"0.weight": {"on_no_path": 2}, "3.weight": {"on_no_path": 1}}
    # of 8 + 8 channels 6 and 7 are left: 2 inputs, 6, 7, 4 outputs
    assert figures == {
        "topology/paths": 2 * 6 * 7 * 4,
        "topology/connections_on_path": 2 * 6 + 6 * 7 + 7 * 4,
        "topology/dead_units": 3,
    }


# ---------------------------------------------------------------------- bytes


def test_bytes_are_those_of_the_tensors_of_a_run() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    method = RigL(0.5, every=4, start=4, stop=12, print_plan=False)
    sizes = [p.numel() for p in model.parameters()]
    matrices = 12 * 24 + 24 * 24 + 24 * 4
    with sparsify(method, model, optimizer, steps=16) as run:
        before = byte_counts(model, [optimizer], [method])
        model(torch.randn(3, 12)).sum().backward()
        optimizer.step()
        after = byte_counts(model, [optimizer], [method])
        assert run.step == 1
    assert before == {
        "bytes/weights": 4 * sum(sizes),
        "bytes/masks": (1 + 4) * matrices,  # a bool, and an integer that the weight is cut with
        "bytes/dense_copies": 0,
        "bytes/optimizer": 0,
    }
    assert after == before | {"bytes/optimizer": 8 * sum(sizes) + 4 * len(sizes)}  # two moments, and a count each
    assert byte_counts(model, [optimizer]) == after | {"bytes/masks": 0}


def test_bytes_of_exchanged_layers_are_those_of_live_values() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = Static(0.9, storage="sparse", print_plan=False)
    with sparsify(method, model, optimizer, steps=4):
        model(torch.randn(3, 64)).sum().backward()
        optimizer.step()
        found = byte_counts(model, [optimizer], [method])
    live = 64 * 64 - int(0.9 * 64 * 64)
    assert found["bytes/weights"] == found["bytes/optimizer"] == 4 * live
    assert found["bytes/masks"] == 4 * (
        3 * live + 2 * 65
    )  # columns, columns and order of the transposed, two lists of rows
