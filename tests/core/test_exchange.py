"""Layers that take each other's places: what moves along, what stays as it was, and what a refused exchange gives back."""

import copy
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks import SparseLinear, exchange_layers, sparsify, to_dense
from sparse_callbacks.core.exchange import exchange
from sparse_callbacks.methods import SET, RigL, Static
from tests.support import loops


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def sparse(model: nn.Module, **more: Any) -> nn.Module:
    exchange_layers(RigL(0.5, storage="sparse", distribution="uniform", **more), model)
    return model


STARTS: dict[str, Callable[[nn.Module], Any]] = {
    "random": lambda _: "random",
    "magnitude": lambda _: "magnitude",
    "nonzero": lambda _: "nonzero",
    "a state dict": lambda model: {n: t * (torch.rand_like(t) < 0.4) for n, t in model.state_dict().items()},
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("group", [None, 4])
def test_the_first_masks_are_those_of_masked_storage(start: str, group: int | None) -> None:
    model = net()
    if start == "nonzero":
        torch.manual_seed(1)
        for i in (0, 2, 4):
            model[i].weight.data *= torch.rand_like(model[i].weight) < 0.4
    pattern = {"pattern": "fan_in/4"} if group else {}
    storage = {"storage": "grouped", "group": group} if group else {"storage": "sparse"}
    twin = copy.deepcopy(model)
    initial = STARTS[start](model)
    if group and start not in ("random", "magnitude"):
        pytest.skip("such masks are not of the pattern")
    method = RigL(initial_mask=initial, seed=3, **pattern)
    sparsify(method, twin, torch.optim.SGD(twin.parameters(), 0.1), 10).close()
    exchanged = RigL(initial_mask=initial, seed=3, **storage)
    layers = exchange_layers(exchanged, model)
    assert layers.keys() >= {"0.weight", "2.weight"}
    for name, layer in layers.items():
        assert torch.equal(layer.mask, method.masks[name])
        assert torch.equal(layer.weight, twin.get_parameter(name))
    assert [r.zeros for r in exchanged.plan(model)] == [r.zeros for r in method.plan(twin)]


def test_names_their_order_and_everything_else_stay() -> None:
    model = net()
    dense = copy.deepcopy(model)
    bias, container = model[0].bias, model[2]
    model[0].tag, model[0].weight.no_decay = "first", True
    model[0].register_buffer("scale", torch.ones(3))
    model[0].extra = nn.Parameter(torch.zeros(2))
    model[0].eval()
    model[2].bias.requires_grad_(False)
    model[2].weight.grad = torch.arange(576.0).view(24, 24)
    names, keys = [n for n, _ in model.named_parameters()], list(model.state_dict())
    sparse(model)
    assert model[2] is not container
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    layer = model[0]
    assert (layer.tag, layer.training, layer.name, layer.values.no_decay) == ("first", False, "0", True)
    assert layer.bias is bias
    assert layer.scale.shape == (3,)
    assert not model[2].bias.requires_grad
    assert torch.equal(model[2].places.dense(model[2].values.grad), torch.arange(576.0).view(24, 24) * model[2].mask)
    assert [type(m) for m in model] == [SparseLinear, nn.ReLU, SparseLinear, nn.ReLU, SparseLinear]
    masked = {k: t for k, t in dense.state_dict().items() if "weight" in k}
    for name, weight in masked.items():
        assert torch.equal(model.state_dict()[name], weight * model[int(name[0])].mask)


class Held(nn.Module):
    """Linear layers in every kind of container."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.listed = nn.ModuleList([nn.Linear(6, 6), nn.Sequential(OrderedDict(inner=nn.Linear(6, 6), act=nn.ReLU()))])
        self.named = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Identity()})
        self.after = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.named["a"](self.listed[1](self.listed[0](self.before(x)))))


def test_a_layer_is_exchanged_wherever_it_is_held() -> None:
    torch.manual_seed(0)
    model = Held()
    order = [name for name, _ in model.named_modules()]
    sparse(model)
    assert [name for name, _ in model.named_modules()] == order
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == 5
    x = torch.randn(3, 6)
    out = model(x)
    assert to_dense(model) is model
    assert [name for name, _ in model.named_modules()] == order
    assert not [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert torch.allclose(model(x), out, atol=1e-6)


# ---------------------------------------------------------------------- hooks


def planted(layer: nn.Module, seen: list[str]) -> list[Any]:
    """One hook of each kind, which notes that it was called with the module that stands there."""

    def note(kind: str) -> Callable[..., None]:
        return lambda module, *_: seen.append(f"{kind} {type(module).__name__}")

    def note_state(kind: str) -> Callable[..., None]:
        return lambda module, *_, **__: seen.append(f"{kind} {type(module).__name__}")

    return [
        layer.register_forward_hook(note("forward")),
        layer.register_forward_hook(lambda m, args, kwargs, out: seen.append(f"kwargs {kwargs}"), with_kwargs=True),
        layer.register_forward_hook(note("always"), always_call=True),
        layer.register_forward_pre_hook(note("pre")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_full_backward_pre_hook(note("backward pre")),
        layer.register_state_dict_pre_hook(note_state("state pre")),
        layer.register_state_dict_post_hook(note_state("state post")),
        layer.register_load_state_dict_pre_hook(note_state("load pre")),
        layer.register_load_state_dict_post_hook(note("load post")),
    ]


def use(model: nn.Module) -> None:
    model(torch.randn(2, 12, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())


def test_hooks_of_every_kind_move_along_and_back_and_their_handles_remove_them() -> None:
    model, seen = net(), list[str]()
    handles = planted(model[0], seen)
    use(model)
    expected = list(seen)
    assert len(expected) == 10

    seen.clear()
    use(sparse(model))
    assert seen == [text.replace("Linear", "SparseLinear") for text in expected]

    seen.clear()
    use(to_dense(model))
    assert seen == expected

    sparse(model)
    for handle in handles:
        handle.remove()
    seen.clear()
    use(model)
    assert seen == []


def test_a_copy_and_a_pickle_of_an_exchanged_model_are_models_of_their_own() -> None:
    model = sparse(net())
    model[0].tag = 1
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other[0].tag == 1
        assert other[0].values is not model[0].values
        x = torch.randn(3, 12)
        assert torch.equal(other(x), model(x))
        assert torch.allclose(to_dense(other)(x), model(x), atol=1e-6)


# ---------------------------------------------------------------------- blocks that read the weights of their layers


def encoders() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    gelu = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, activation="gelu")
    return {"layer": layer, "gelu": gelu, "stack": nn.TransformerEncoder(layer, 2)}


@pytest.mark.parametrize("kind", ["layer", "gelu", "stack"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_eval_path_of_an_encoder_calls_its_exchanged_layers(kind: str, padded: bool) -> None:
    model = encoders()[kind].eval()
    fast = {
        n: (getattr(m, "activation_relu_or_gelu", 0), getattr(m, "use_nested_tensor", None))
        for n, m in model.named_modules()
    }
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    method = SET(0.5, storage="sparse", distribution="uniform")
    exchange_layers(method, model)
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert len(layers) == (4 if kind == "stack" else 2)
    twin = to_dense(copy.deepcopy(model))
    here = {
        n: (getattr(m, "activation_relu_or_gelu", 0), getattr(m, "use_nested_tensor", None))
        for n, m in twin.named_modules()
    }
    assert here == fast
    assert not any("fast_path" in name for m in twin.modules() for name in vars(m))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        for one in (model, copy.deepcopy(model)):
            out = one(x, src_key_padding_mask=mask)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        expected = twin(x, src_key_padding_mask=mask)
    kept = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    assert torch.allclose(out[kept], expected[kept], atol=1e-5)
    assert not any(layer.weight_was_read for layer in layers)


def test_a_whole_transformer_trains_and_evaluates() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    layers = exchange_layers(SET(0.5, storage="sparse", distribution="uniform"), model)
    assert len(layers) == 4
    x = torch.randn(2, 5, 16)
    model(x, x).sum().backward()
    assert all(layer.values.grad is not None for layer in layers.values())
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(x, x), to_dense(copy.deepcopy(model))(x, x), atol=1e-5)


# ---------------------------------------------------------------------- without dense matrices, and back


def test_a_layer_on_the_meta_device_is_never_dense_and_stays_there_until_it_gets_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(300_000, 200_000), nn.ReLU(), nn.Linear(200_000, 64))
    method = SET(1 - 2e-5, storage={"0*": "sparse", "2*": "grouped"}, group=32, distribution="uniform")
    exchange_layers(method, model)
    assert model[0].values.is_meta
    assert model[0].live == 300_000 * 200_000 - method.plan(model)["0.weight"].zeros == 1_200_000
    assert model[2].live == 64 * 4
    assert "drawn by rejection" in method.plan(model)["0.weight"].remark
    keys = model[0].keys()
    assert bool((keys.diff() > 0).all())
    model.to_empty(device="cpu")
    assert model[0].values.shape == (1, 1_200_000)
    again = nn.Sequential(nn.Linear(300_000, 200_000, device="meta"))
    exchange_layers(SET(1 - 2e-5, storage="sparse", distribution="uniform"), again)
    assert torch.equal(again[0].keys(), keys)
    with pytest.raises(ValueError, match=r"0.weight is on the meta device .*initial_mask='random'"):
        exchange_layers(SET(initial_mask="magnitude", storage="sparse"), nn.Sequential(nn.Linear(8, 8, device="meta")))


def test_layers_that_are_sparse_already_keep_their_places_and_their_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SparseLinear.random(12, 24, fan_in=3), nn.ReLU(), nn.Linear(24, 24))
    first, keys = model[0], model[0].keys()
    method = SET(0.5, storage="sparse", distribution="uniform")
    assert list(exchange_layers(method, model)) == ["2.weight"]
    assert model[0] is first
    assert torch.equal(first.keys(), keys)
    plan = method.plan(model)
    assert (plan["0.weight"].zeros, plan["0.weight"].storage) == (24 * 9, "sparse")
    assert exchange_layers(method, model) == {}


def test_to_dense_of_a_layer_itself_gives_the_linear_layer() -> None:
    layer = SparseLinear.random(12, 24, fan_in=3)
    layer.tag = 1
    dense = to_dense(layer)
    assert type(dense) is nn.Linear
    assert dense.tag == 1
    assert torch.equal(dense.weight, layer.weight)
    assert dense.bias is layer.bias
    assert to_dense(dense) is dense


def test_an_exchange_that_is_undone_has_the_very_layers_back() -> None:
    model = net()
    held, values = list(model), copy.deepcopy(model.state_dict())
    seen: list[str] = []
    planted(model[0], seen)
    use(model)
    expected = list(seen)
    method = RigL(0.5, storage="sparse", distribution="uniform")
    done = exchange(method, model)
    assert done.originals["0.weight"] is held[0].weight
    use(model)
    done.undo()
    assert list(model) == held
    seen.clear()
    use(model)
    assert seen == expected
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    assert method.attachment.choices == {}


@pytest.mark.parametrize("start", ["random", "nonzero"])
def test_a_second_exchange_after_to_dense_goes_on_with_the_masks_of_the_last_run(start: str) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[2].weight[:, ::3] = 0
        model[4].weight[:, ::4] = 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = Static(initial_mask=start, storage="sparse", print_plan=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sparsify(method, model, optimizer, 2):
            for x, _ in list(loops.data())[:2]:
                model(x).sum().backward()
                optimizer.step()
    masks = {n: m.clone() for n, m in method.masks.items()}
    to_dense(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsify(method, model, torch.optim.SGD(model.parameters(), 0.1), 2).close()
    assert isinstance(model[0], SparseLinear)
    assert all(torch.equal(m, masks[n]) for n, m in method.masks.items())
