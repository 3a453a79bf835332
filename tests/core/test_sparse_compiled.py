"""Truly sparse layers under torch.compile, in several processes, and shared with another one."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from support import sparse_ranks
from support.processes import run_processes
from support.sparse_layers import STORAGES
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_callbacks import SparseLinear

STORED = pytest.mark.parametrize("storage", STORAGES)


def network(storage: str) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = (
        SparseLinear.random(inputs, outputs, 3, storage=storage, group=4)  # type: ignore[arg-type]
        for inputs, outputs in ((10, 16), (16, 12))
    )
    return nn.Sequential(first, nn.ReLU(), second)


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad()
    net(x).square().sum().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("rows", [5, 200])
@STORED
def test_steps_compile_whole_and_not_again_when_places_move(storage: str, rows: int) -> None:
    torch.compiler.reset()
    net = network(storage)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for seed in range(3):
        x = torch.randn(rows, 10)
        for ours, expected in zip(gradients(compiled, x), gradients(net, x), strict=True):
            torch.testing.assert_close(ours, expected)
        for layer in (net[0], net[2]):
            source = torch.Generator().manual_seed(seed)
            sizes = (layer.in_features, layer.out_features, 3)
            layer.move_to(SparseLinear.random(*sizes, storage=storage, group=4, generator=source).keys())
    assert counter.frame_count == 1


@STORED
def test_a_layer_that_records_runs_uncompiled(storage: str) -> None:
    torch.compiler.reset()
    net = network(storage)
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.randn(5, 10)
    for layer in (net[0], net[2]):
        layer.records = []
    ours = gradients(compiled, x)
    assert [len(layer.records) for layer in (net[0], net[2])] == [1, 1]
    torch.testing.assert_close(ours, gradients(net, x))


@STORED
def test_the_compiled_graph_serves_again_after_a_window_that_is_forced_to_be_eager(storage: str) -> None:
    """After a graph break torch would prefer the broken code ever after."""
    torch.compiler.reset()
    net = network(storage)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    x = torch.randn(5, 10)
    for _ in range(2):
        gradients(compiled, x)
        net[0].records = []
        with torch.compiler.set_stance("force_eager"):
            gradients(compiled, x)
        assert len(net[0].records) == 1
        net[0].records = None
    assert counter.frame_count == 1


def test_ddp_trains_both_ranks_alike_and_sends_no_pattern(tmp_path: Path) -> None:
    """A pattern among the buffers would be sent before each forward pass."""
    first, second = run_processes("replicas", tmp_path, script=sparse_ranks.__file__)
    for storage in STORAGES:
        assert first[storage]["buffers_sent"] == 0
        assert first[storage]["broadcasts_of_steps"] == second[storage]["broadcasts_of_steps"] == 0
        for mine, other in zip(first[storage]["state"], second[storage]["state"], strict=True):
            assert torch.equal(mine, other)
        assert not torch.equal(first[storage]["state"][0], first[storage]["before"])


def moved_by_the_child(net: nn.Sequential, keys: torch.Tensor) -> None:
    net[0].move_to(keys)


@STORED
def test_another_process_moves_the_places_of_a_shared_layer(storage: str) -> None:
    """As in Hogwild training: values and pattern lie in the same memory."""
    net = network(storage)
    net.share_memory()
    source = torch.Generator().manual_seed(7)
    keys = SparseLinear.random(10, 16, 3, storage=storage, group=4, generator=source).keys()  # type: ignore[arg-type]
    before = net[0].weight.detach()
    child = mp.get_context("fork").Process(target=moved_by_the_child, args=(net, keys))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(net[0].keys(), keys)
    assert torch.equal(net[0].weight, before * net[0].mask)
