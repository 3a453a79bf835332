"""Networks for inference: the same outputs, kernels by timing, never slower than dense, and no gradients."""

import copy
import pickle
import sys
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import torch
from support.nets import mlp
from torch import Tensor, nn

from sparse_callbacks import SparseLinear, to_inference
from sparse_callbacks.core import inference
from sparse_callbacks.core.inference import InferenceLinear

Times = Callable[[str, int], float]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Times], list[tuple[int, list[str]]]]:
    """Gives kernels the times that a function of kernel and rows says, and collects what was asked."""

    def install(time_of: Times) -> list[tuple[int, list[str]]]:
        asked: list[tuple[int, list[str]]] = []

        def milliseconds(calls: list[Any], *args: Any, **kwargs: Any) -> list[float]:
            rows = len(calls[0].args[0])
            for call in calls:
                call()
            names = [getattr(call.func, "__name__", type(call.func).__name__) for call in calls]
            asked.append((rows, names))
            return [time_of(name, rows) for name in names]

        monkeypatch.setattr(inference, "milliseconds", milliseconds)
        return asked

    return install


def sparse_is_fast(name: str, rows: int) -> float:
    """The bag overtakes compressed rows between 8 and 16 rows, and both are faster than dense."""
    return {"InferenceLinear": 4.0, "compressed_product": 0.3 * rows, "Linear": 100.0}[name]


def net(storage: str = "sparse") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        SparseLinear.random(24, 32, 5, storage=storage, group=8), nn.ReLU(), SparseLinear.random(32, 6, 7, bias=False)
    )


def masked(*widths: int, density: float = 0.1, seed: int = 0) -> nn.Sequential:
    found = mlp(*widths, seed=seed)
    for layer in found[::2]:
        layer.weight.data *= torch.rand(layer.weight.shape) < density
    return found


@pytest.mark.parametrize("rows", [1, 7, 9, 40, 200])
@pytest.mark.parametrize("storage", ["sparse", "grouped"])
def test_outputs_are_those_of_the_module(rows: int, storage: str, timed: Any) -> None:
    timed(sparse_is_fast)
    module, x = net(storage), torch.randn(rows, 24)
    made = to_inference(module)
    assert [type(layer) for layer in made] == [InferenceLinear, nn.ReLU, InferenceLinear]
    torch.testing.assert_close(made(x), module(x), atol=1e-5, rtol=0)


def test_sequences_and_empty_batches_pass(timed: Any) -> None:
    timed(sparse_is_fast)
    module = net()
    made = to_inference(module)
    for shape in [(2, 3, 24), (24,), (0, 24)]:
        x = torch.randn(shape)
        torch.testing.assert_close(made(x), module(x), atol=1e-5, rtol=0)


def test_the_kernel_of_a_batch_is_the_one_that_was_faster_at_its_size(timed: Any, monkeypatch: Any) -> None:
    asked = timed(sparse_is_fast)
    made = to_inference(net()[0])
    assert made.crossing == 16
    assert len([rows for rows, names in asked if "compressed_product" in names]) <= 3  # halving, not every size
    used: list[int] = []
    product = InferenceLinear.compressed_product
    monkeypatch.setattr(InferenceLinear, "compressed_product", lambda m, x: used.append(len(x)) or product(m, x))
    for rows in (1, 15, 16, 128):
        made(torch.randn(rows, 24))
    assert used == [1, 15]


@pytest.mark.parametrize(("times", "crossing"), [((1.0, 2.0), 1), ((2.0, 1.0), sys.maxsize)])
def test_one_kernel_may_be_faster_for_all_sizes(times: tuple[float, float], crossing: int, timed: Any) -> None:
    timed(
        lambda name, rows: dict(zip(("InferenceLinear", "compressed_product", "Linear"), (*times, 9.0), strict=True))[
            name
        ]
    )
    made = to_inference(net()[0])
    assert made.crossing == crossing


def test_layers_of_one_kind_are_timed_once(timed: Any) -> None:
    asked = timed(sparse_is_fast)
    layers = [SparseLinear.random(16, 16, 3) for _ in range(3)]
    to_inference(nn.Sequential(layers[0]))
    once = len(asked)
    to_inference(nn.Sequential(*layers))
    assert len(asked) == 2 * once


@pytest.mark.parametrize("slow_at", [1, 128])
def test_a_layer_that_is_slower_than_dense_at_one_of_the_sizes_becomes_dense(slow_at: int, timed: Any) -> None:
    timed(lambda name, rows: 1.0 if (name == "Linear") == (rows == slow_at) else 5.0)
    module, x = net(), torch.randn(5, 24)
    made = to_inference(module)
    assert [type(layer) for layer in made] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(made(x), module(x), atol=1e-5, rtol=0)
    assert type(to_inference(module, rows=1 if slow_at == 128 else 128)[0]) is InferenceLinear
    assert not any(p.requires_grad for p in made.parameters())


def test_a_gain_of_less_than_a_tenth_is_noise(timed: Any) -> None:
    timed(lambda name, rows: 10.0 if name == "Linear" else 9.1)
    assert type(to_inference(net())[0]) is nn.Linear


def test_dense_layers_with_many_zeros_become_sparse_where_that_is_faster(timed: Any) -> None:
    timed(sparse_is_fast)
    module, x = masked(24, 32, 6), torch.randn(5, 24)
    module.append(nn.Linear(6, 6))  # without zeros
    made = to_inference(module)
    assert [type(layer) for layer in made] == [InferenceLinear, nn.ReLU, InferenceLinear, nn.Linear]
    assert made[0].live == int(module[0].weight.count_nonzero())
    torch.testing.assert_close(made(x), module(x), atol=1e-5, rtol=0)
    made[0](x).view(-1)  # as contiguous as the dense layer's outputs
    timed(lambda name, rows: 1.0 if name == "Linear" else 5.0)
    assert type(to_inference(module)[0]) is nn.Linear


def test_layers_that_cannot_be_exchanged_stay(timed: Any) -> None:
    timed(sparse_is_fast)

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = masked(6, 6, 6, 6, density=0.3)
    module[2].weight = module[0].weight
    module[4] = Own(6, 6)
    nn.init.zeros_(module[4].weight)
    made = to_inference(module)
    assert [type(layer) for layer in made[::2]] == [nn.Linear, nn.Linear, Own]
    assert made[0].weight is made[2].weight


def test_the_module_stays_as_it_is_and_nothing_global_moves(timed: Any) -> None:
    timed(sparse_is_fast)
    module = net().train()
    module(torch.randn(3, 24)).sum().backward()
    state, random_state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    made = to_inference(module)
    assert module.training
    assert all(p.requires_grad and p.grad is not None for p in module.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in made.parameters())
    assert not any(m.training for m in made.modules())
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert module[0].values.data_ptr() != made[0].values.data_ptr()


def test_hooks_and_tied_places_move_to_the_copy(timed: Any) -> None:
    timed(sparse_is_fast)
    seen: list[type] = []
    layer = SparseLinear.random(6, 6, 2)
    layer.register_forward_hook(lambda m, args, out: seen.append(type(m)))
    made = to_inference(nn.Sequential(layer, layer))
    assert made[0] is made[1]
    made(torch.ones(1, 6))
    assert seen == [InferenceLinear] * 2


@pytest.mark.parametrize("storage", ["sparse", "grouped"])
def test_a_copy_is_copied_pickled_and_saved(storage: str, timed: Any) -> None:
    timed(sparse_is_fast)
    made, x = to_inference(net(storage)), torch.randn(3, 24)
    file = BytesIO()
    torch.save(made, file)
    file.seek(0)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(file, weights_only=False)):
        assert other[0].crossing == made[0].crossing
        assert torch.equal(other(x), made(x))


def test_the_state_dict_of_the_module_loads_and_a_dense_network_loads_the_copy_s(timed: Any) -> None:
    timed(sparse_is_fast)
    module, x = net(), torch.randn(3, 24)
    made = to_inference(module)
    for layer in module[::2]:
        layer.values.data.mul_(2)
    made.load_state_dict(module.state_dict())
    torch.testing.assert_close(made(x), module(x), atol=1e-5, rtol=0)
    dense = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 6, bias=False))
    dense.load_state_dict(made.state_dict())
    torch.testing.assert_close(dense(x), module(x), atol=1e-5, rtol=0)


def test_gradients_are_refused_and_train_mode_does_no_harm(timed: Any) -> None:
    timed(sparse_is_fast)
    made, x = to_inference(net()), torch.randn(3, 24)
    expected = made(x)
    assert torch.equal(made.train()(x), expected)
    with pytest.raises(ValueError, match=r"^0 was made by to_inference and gives no gradients: take the module"):
        made(x.requires_grad_())
    with torch.no_grad():
        made(x)
    made[2].values.requires_grad_()
    with pytest.raises(ValueError, match=r"^2 was made by to_inference"):
        made(x.detach())


def test_half_precision_works_whatever_the_kernels_can_do(timed: Any) -> None:
    timed(sparse_is_fast)
    module, x = net().to(torch.bfloat16), torch.randn(3, 24, dtype=torch.bfloat16)
    made = to_inference(module)
    assert made(x).dtype is torch.bfloat16
    torch.testing.assert_close(made(x), module(x), atol=0.05, rtol=0.05)


def test_without_torch_s_product_of_compressed_rows_the_other_kernel_does_all(timed: Any, monkeypatch: Any) -> None:
    asked = timed(sparse_is_fast)

    def missing(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("Calling addmm on a sparse CPU tensor requires compiling PyTorch with MKL")

    monkeypatch.setattr(InferenceLinear, "compressed_product", missing)
    module, x = net(), torch.randn(1, 24)
    made = to_inference(module)
    assert {name for _, names in asked for name in names} == {"InferenceLinear", "Linear"}
    torch.testing.assert_close(made(x), module(x), atol=1e-5, rtol=0)


def test_a_transformer_block_calls_its_layers_in_eval_mode(timed: Any) -> None:
    timed(sparse_is_fast)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    block.linear1.weight.data *= torch.rand(16, 8) < 0.2
    made, x = to_inference(block), torch.randn(2, 3, 8)
    assert type(made.linear1) is InferenceLinear
    with torch.no_grad():
        torch.testing.assert_close(made(x), block(x), atol=1e-5, rtol=0)
    assert not made.linear1.weight_was_read


def test_the_pattern_of_gradients_is_not_held(timed: Any) -> None:
    timed(sparse_is_fast)
    made = to_inference(SparseLinear.random(400, 300, 40))
    held = sum(t.numel() * t.element_size() for _, t in made.places.tensors())
    assert held == 4 * (300 + 1 + made.live)


@pytest.mark.parametrize("rows", [0, (), (4, -1)])
def test_rows_that_are_none_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"give the numbers of rows for which layers are to be fast"):
        to_inference(net(), rows=rows)


def test_a_compiled_copy_is_one_graph(timed: Any) -> None:
    timed(sparse_is_fast)
    made, x = to_inference(net()), torch.randn(3, 24)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="eager")(x), made(x), atol=1e-5, rtol=0)


def test_real_times_choose_a_kernel() -> None:
    module, x = SparseLinear.random(512, 512, 8), torch.randn(1, 512)
    made = to_inference(module, rows=1)
    torch.testing.assert_close(made(x), module(x), atol=1e-5, rtol=0)
