"""Where weights are used, as the first batch shows it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparse_callbacks import SlimAttention, exchange_layers
from sparse_callbacks.core.record.first_batch import FirstBatch, WeightUse
from sparse_callbacks.methods import Static

SAMPLES = 4


def uses_of(model: nn.Module, *inputs: Any, run: Callable[..., Any] | None = None) -> dict[str, WeightUse]:
    """The use of each parameter by one sample of a batch with a backward pass."""
    first = FirstBatch(model)
    found = (run or model)(*inputs)
    found = found[0] if isinstance(found, tuple) else found
    found.square().mean().backward()
    uses = first.end().of
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return {name: use.of_a_sample(SAMPLES) for name, use in uses.items()}


def everywhere(positions: int) -> WeightUse:
    """The use of a weight in a network that passes once over a batch."""
    return WeightUse(positions, positions, positions, positions)


@pytest.mark.parametrize(
    ("layer", "shape", "positions"),
    [
        (nn.Linear(3, 5), (3,), 1),
        (nn.Linear(3, 5), (7, 3), 7),
        (nn.Conv1d(2, 4, 3), (2, 10), 8),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 9, 7), 5 * 4),
        (nn.Conv3d(1, 2, 2), (1, 3, 3, 3), 8),
        (nn.ConvTranspose2d(2, 4, 3, stride=2), (2, 5, 6), 30),
        (nn.LazyLinear(5), (6, 3), 6),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_weight_is_used_at_each_row_or_place(layer: nn.Module, shape: tuple[int, ...], positions: int) -> None:
    assert uses_of(layer, torch.randn(SAMPLES, *shape))["weight"] == everywhere(positions)


def test_biases_norms_and_embeddings_multiply_nothing() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    found = uses_of(model, torch.randint(9, (SAMPLES, 5)))
    assert {n: u.inference for n, u in found.items()} == {
        "0.weight": 0, "1.weight": 0, "1.bias": 0, "2.weight": 5, "2.bias": 0
    }  # fmt: skip


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_used_at_every_step(kind: Any) -> None:
    model = kind(3, 4, num_layers=2, bidirectional=True)
    found = uses_of(model, torch.randn(6, SAMPLES, 3))
    weights = [name for name, _ in model.named_parameters() if name.startswith("weight")]
    assert len(weights) == 8
    assert {found[name].forward for name in weights} == {6}


def test_a_packed_sequence_has_the_steps_that_it_has() -> None:
    sequences = [torch.randn(n, 3) for n in (5, 4, 2, 1)]
    packed = nn.utils.rnn.pack_sequence(sequences)
    model = nn.LSTM(3, 4)
    first = FirstBatch(model)
    model(packed)[0].data.square().mean().backward()
    found = first.end().of
    assert found["weight_ih_l0"].forward == found["weight_hh_l0"].forward == 12


def test_a_recurrent_cell_is_used_once_a_call() -> None:
    cell = nn.GRUCell(3, 4)

    def run(x: Tensor) -> Tensor:
        state = torch.zeros(SAMPLES, 4)
        for step in x:
            state = cell(step, state)
        return state

    assert uses_of(cell, torch.randn(5, SAMPLES, 3), run=run)["weight_ih"] == everywhere(5)


def test_attention_is_used_at_every_token() -> None:
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    found = uses_of(model, torch.randn(SAMPLES, 5, 8))
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert {name: found[name] for name in names} == dict.fromkeys(names, everywhere(5))
    # an attention that calls its output projection counts it there, once
    model.self_attn = SlimAttention(8, 3, head_dim=2, batch_first=True)
    found = uses_of(model, torch.randn(SAMPLES, 5, 8))
    assert {name: found[name] for name in names} == dict.fromkeys(names, everywhere(5))


def test_keys_may_be_of_another_length_than_queries() -> None:
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    memory = torch.randn(SAMPLES, 9, 6), torch.randn(SAMPLES, 9, 4)
    found = uses_of(model, torch.randn(SAMPLES, 5, 8), *memory)
    by_name = {
        name: found[name].forward for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    }
    assert by_name == {"q_proj_weight": 5, "k_proj_weight": 9, "v_proj_weight": 9, "out_proj.weight": 5}


def test_several_uses_of_a_module_add_up() -> None:
    layer = nn.Linear(3, 3)
    assert uses_of(layer, torch.randn(SAMPLES, 3), run=lambda x: layer(layer(x)))["weight"] == everywhere(2)


def test_a_tied_weight_is_used_where_it_is_multiplied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))  # type: ignore[no-any-return]

    assert uses_of(Tied(), torch.randint(9, (SAMPLES, 5)))["embed.weight"] == everywhere(5)


def test_what_is_used_by_a_function_is_not_known() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.inner = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x @ self.matrix, self.inner.weight)

    assert set(uses_of(Functional(), torch.randn(SAMPLES, 3))) == {"inner.bias"}


def test_a_reparametrised_weight_is_not_known() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    assert set(uses_of(model, torch.randn(SAMPLES, 3))) == {"bias"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_is_counted_once(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(SAMPLES, 3, requires_grad=True)
    found = uses_of(model, x, run=lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert found["0.weight"] == found["2.weight"] == everywhere(1)


def test_a_pass_without_gradients_is_not_counted() -> None:
    model = nn.Linear(3, 4)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            model(torch.randn(50, 3))
        return model(x)  # type: ignore[no-any-return]

    assert uses_of(model, torch.randn(SAMPLES, 3), run=run)["weight"] == everywhere(1)


def test_frozen_layers_have_no_gradient_of_their_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    found = uses_of(model, torch.randn(SAMPLES, 3))
    assert found["0.weight"] == WeightUse(1, 1, 0, 0)  # no gradient reaches it
    assert found["1.weight"] == everywhere(1)
    assert found["2.weight"] == WeightUse(1, 1, 1, 0)


def test_passes_after_the_first_backward_are_training_and_not_inference() -> None:
    model = nn.Linear(3, 4)

    def run(x: Tensor) -> Tensor:
        model(x).square().mean().backward()
        return model(x)  # type: ignore[no-any-return]

    assert uses_of(model, torch.randn(SAMPLES, 3), run=run)["weight"] == WeightUse(1, 2, 2, 2)


def test_an_exchanged_layer_is_used_as_a_dense_one() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    exchange_layers(Static(0.5, storage="sparse", print_plan=False), model)
    found = uses_of(model, torch.randn(SAMPLES, 3, 8))
    assert found["0.weight"] == everywhere(3)


def test_a_compiled_model_runs_eagerly_in_its_first_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert uses_of(model, torch.randn(SAMPLES, 3), run=compiled)["0.weight"] == everywhere(1)
    compiled(torch.randn(SAMPLES, 3)).sum().backward()


def test_what_one_batch_computes_once_is_a_position_of_each_sample() -> None:
    model = nn.Linear(3, 4)
    assert uses_of(model, torch.randn(1, 3))["weight"] == everywhere(1)
    assert WeightUse(9, 9, 9, 9).of_a_sample(4) == everywhere(3)
