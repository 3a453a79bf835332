"""What moves along where layers take each other's places: hooks, copies, and blocks that read the weights of layers."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparse_callbacks import SparseLinear, exchange_layers, to_dense
from sparse_callbacks.core.storages.exchange import exchange
from sparse_callbacks.methods import SET, RigL


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def sparse(model: nn.Module) -> nn.Module:
    exchange_layers(RigL(0.5, storage="sparse", distribution="uniform"), model)
    return model


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


def test_an_exchange_that_is_undone_has_the_very_layers_back() -> None:
    model = net()
    held, values = list(model), copy.deepcopy(model.state_dict())
    seen: list[str] = []
    planted(model[0], seen)
    use(model)
    expected = list(seen)
    method = RigL(0.5, storage="sparse", distribution="uniform")
    done = exchange(method, model)
    assert done.originals["0.weight"] is held[0]._parameters["weight"]
    use(model)
    done.undo()
    assert list(model) == held
    seen.clear()
    use(model)
    assert seen == expected
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    assert method.attachment.choices == {}
