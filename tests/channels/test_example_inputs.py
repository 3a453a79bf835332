"""What a model is looked at with: its example_input_array as it is, or the first sample of a batch."""

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks import SMCP
from sparse_callbacks.channels.costs import layers, samples_in
from sparse_callbacks.core.example_inputs import example_inputs
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit


class Graph(nn.Module):
    """Sums over the edges [2, E] of a graph with nodes [N, 6], and one row for the whole graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.m, self.o = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.a(x).relu()
        to, source = edges
        return self.o(self.m(torch.zeros_like(h).index_add(0, to, h[source])).relu().mean(0, keepdim=True))


class Warm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, temperature: Tensor, x: Tensor) -> Tensor:
        return self.o((self.a(x) * temperature).relu())


GRAPH = (torch.randn(9, 6), torch.randint(9, (2, 20)))
WARM = (torch.tensor(0.5), torch.randn(9, 6))


def batches(model: nn.Module, batch: Any) -> Generator[Any, None, None]:
    model(*batch)
    yield batch


def looked_at_with(model: nn.Module, batch: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in example_inputs(model, batches(model, batch))]


def test_a_batch_is_cut_to_a_sample_where_its_tensors_have_a_common_size() -> None:
    assert looked_at_with(Warm(), WARM) == [(), (1, 6)]
    assert looked_at_with(Graph(), GRAPH) == [(9, 6), (2, 20)]


def test_a_batch_of_which_the_forward_takes_no_single_sample_stays_whole() -> None:
    class Pairs(Warm):
        def forward(self, temperature: Tensor, x: Tensor) -> Tensor:
            first, second = x[:1], x[1:2]
            return super().forward(temperature, first.view(1, 6) + second.view(1, 6))

    assert looked_at_with(Pairs(), WARM) == [(), (9, 6)]


def test_an_example_input_array_is_taken_as_it_is() -> None:
    model: Any = Warm()
    model.example_input_array = WARM
    assert [t.shape for t in example_inputs(model, batches(model, WARM))] == [(), (9, 6)]


def test_an_example_input_array_that_the_forward_does_not_take_is_named() -> None:
    model: Any = Warm()
    model.example_input_array = torch.zeros(2, 5)
    with pytest.raises(
        ValueError, match=r"Warm is looked at with its example_input_array.*TypeError.*Set example_input"
    ):
        example_inputs(model, batches(model, WARM))


def test_an_error_of_the_data_is_that_of_the_data() -> None:
    def broken() -> Generator[Any, None, None]:
        raise ValueError("photo.jpg cannot be read as an image.")
        yield

    with pytest.raises(ValueError, match=r"^photo\.jpg cannot be read as an image\.$"):
        example_inputs(Warm(), broken())


@pytest.mark.parametrize(("network", "example"), [(Graph, GRAPH), (Warm, WARM)])
def test_smcp_prunes_by_such_examples(network: type[nn.Module], example: Any) -> None:
    class Module(Classifier):
        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.net(*self.example_input_array).square().mean()

        def forward(self, *inputs: Tensor) -> Any:
            return self.net(*inputs)

    module = Module(network())
    module.example_input_array = example
    callback = SMCP(0.6, cost="flops", every=1, start=1, stop=3, prune_stem=True, print_plan=False)
    fit(module, callback, enable_model_summary=False)
    assert callback.network is not None
    assert callback.network.realised(callback.kept) <= 0.6 * callback.network.dense * 1.001


def test_costs_are_those_of_one_sample_or_of_an_input_that_is_no_batch() -> None:
    assert samples_in(GRAPH) == 1
    assert {name: layer.positions for name, layer in layers(Graph(), GRAPH).items()} == {
        "a": (9,),
        "m": (9,),
        "o": (1,),
    }
    assert samples_in(WARM) == 9
    assert {name: layer.positions for name, layer in layers(Warm(), WARM).items()} == {"a": (1,), "o": (1,)}
    # a layer that runs once for all of the batch costs something too
    whole = (torch.randn(9, 6), torch.zeros(9, dtype=torch.long), torch.zeros(9, dtype=torch.long))

    class Pooled(Graph):
        def forward(self, x: Tensor, to: Tensor, source: Tensor) -> Tensor:
            return super().forward(x, torch.stack([to, source]))

    assert layers(Pooled(), whole)["o"].positions == (1,)
