"""Dense values that lie in a file until they are asked for, and how many dense layers an exchange holds in memory."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.exchanged import fit, layers_of, mlp, sparse
from support.refusing import RefusedError, refuse
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import sparse_callbacks.core.storages.exchange as exchange
import sparse_callbacks.core.storages.first_places as first_places
import sparse_callbacks.core.storages.offloading as offloading
from sparse_callbacks import SparseLinear, exchange_layers, sparsify
from sparse_callbacks.core.storages.offloading import offload
from sparse_callbacks.methods import SET, Static
from sparse_callbacks.testing.comparison import differences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the files lie, also those of small tensors."""
    monkeypatch.setattr(offloading, "SMALLEST", 1)
    monkeypatch.setattr(offloading, "_folder", lambda: str(tmp_path))
    return tmp_path


def memory_of(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


TENSORS: dict[str, Callable[[], Tensor]] = {
    "a Parameter": lambda: nn.Parameter(torch.randn(6, 5)),
    "float64": lambda: torch.randn(6, 5, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(6, 5).bfloat16(),
    "transposed": lambda: nn.Parameter(torch.randn(5, 6).t()),
    "not finite": lambda: torch.tensor([[float("nan"), float("inf")], [-0.0, 1.0]]),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_keeps_its_values_and_lets_go_of_its_memory(kind: str, folder: Path) -> None:
    tensor = TENSORS[kind]()
    before, memory = tensor.detach().clone(), memory_of(tensor)
    move_back = offload(tensor)
    assert memory.expired()
    assert not list(folder.iterdir())
    assert_same(tensor, before)
    mapped = memory_of(tensor)
    move_back()
    assert mapped.expired(), "the tensor still lies in the file"
    assert_same(tensor, before)


def assert_same(tensor: Tensor, before: Tensor) -> None:
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (before.dtype, before.shape, before.stride())
    assert torch.equal(tensor.detach().contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))


def test_whoever_holds_the_tensor_reads_writes_and_differentiates_by_it() -> None:
    weight, x = nn.Parameter(torch.randn(4, 3)), torch.randn(2, 3)
    loss = nn.functional.linear(x, weight).square().sum()
    expected, before = torch.autograd.grad(loss, weight, retain_graph=True)[0], weight.detach().clone()
    move_back = offload(weight)
    loss.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)
    with torch.no_grad():
        weight.add_(1)
    del loss
    move_back()
    assert torch.equal(weight, before + 1)


def test_memory_that_somebody_else_has_held_is_the_tensors_again() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    array, twin = weight.detach().numpy(), weight.detach()
    move_back = offload(weight)
    assert weight.data_ptr() != twin.data_ptr()
    move_back()
    assert weight.data_ptr() == twin.data_ptr()
    weight.data[0, 0] = 7.0
    assert array[0, 0] == twin[0, 0] == 7.0


STAYING: dict[str, Callable[[], Tensor]] = {
    "one that other processes see": lambda: torch.randn(6, 5).share_memory_(),
    "a part of a larger buffer": lambda: nn.Parameter(torch.randn(60)[:30].view(6, 5)),
    "an expanded row": lambda: torch.randn(5).expand(6, 5),
    "a sparse gradient": lambda: torch.eye(3).to_sparse(),
    "one without memory": lambda: torch.empty(6, 5, device="meta"),
    "a class of its own": lambda: torch.randn(6, 5).as_subclass(type("Mine", (Tensor,), {})),
}


@pytest.mark.parametrize("kind", STAYING)
def test_a_tensor_stays_in_memory_where_a_file_would_gain_nothing(kind: str) -> None:
    tensor = STAYING[kind]()
    assert offload(tensor) is offloading._stays


def test_a_small_tensor_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "SMALLEST", 121)
    small, large = torch.randn(6, 5), torch.randn(31)
    memories = [memory_of(small), memory_of(large)]
    offload(small)
    offload(large)
    assert [m.expired() for m in memories] == [False, True]


def refuse_with(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("why", ["full", "missing", "no right", "full after all", "no file can be mapped"])
def test_a_tensor_stays_in_memory_where_no_file_can_be_written(
    why: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    weight = nn.Parameter(torch.randn(6, 5))
    before, address = weight.detach().clone(), weight.data_ptr()
    if why == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * weight.nbytes - 1))
    elif why == "missing":
        monkeypatch.setattr(offloading, "_folder", lambda: str(folder / "missing"))
    elif why == "no file can be mapped":
        monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse_with(RuntimeError("mmap")))
    else:
        monkeypatch.setattr(Path, "write_bytes", refuse_with(PermissionError() if why == "no right" else OSError(28)))
    offload(weight)()
    assert weight.data_ptr() == address
    assert torch.equal(weight, before)
    assert not list(folder.iterdir())


def test_large_files_lie_where_the_user_says_and_otherwise_not_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert offloading._folder() == str(tmp_path)
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(offloading, "_ROOMY", str(tmp_path / "roomy"))
    assert offloading._folder() == str(tmp_path)
    (tmp_path / "roomy").mkdir()
    assert offloading._folder() == str(tmp_path / "roomy")


# ---------------------------------------------------------------------- one layer at a time


def maps() -> str:
    """The files of which this process maps a part into its memory (Linux)."""
    return Path("/proc/self/maps").read_text()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(13, 13) for _ in range(4)))
    for layer in model:
        layer.weight.grad = torch.ones(13, 13)
    return model


def pruned(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.data *= torch.rand_like(p) < 0.5
    return model


STARTS = ["random", "magnitude", "nonzero", "file", "file of a run", "compact file", "file of torch's pruning"]


def start(kind: str, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Arguments of a method, whose masks come from somewhere."""
    if kind in ("random", "magnitude"):
        return {"sparsity": 0.5, "distribution": "uniform", "initial_mask": kind}
    if kind == "nonzero":
        pruned(model)
        return {"initial_mask": kind}
    saved: Any = pruned(net()).state_dict()
    if kind == "file of a run":
        source = net()
        with sparsify(Static(0.5, print_plan=False), source, torch.optim.SGD(source.parameters(), 0.1), 4) as run:
            saved = {"state_dict": source.state_dict(), "run": run.state_dict()}
    elif kind == "compact file":
        exchange_layers(Static(0.5, storage="sparse"), source := net())
        for layer in source:
            layer.compact_state = True
        saved = source.state_dict()
    elif kind == "file of torch's pruning":
        saved = {
            key: t
            for k, w in saved.items()
            for key, t in ([(f"{k}_orig", w), (f"{k}_mask", (w != 0).float())] if "weight" in k else [(k, w)])
        }
    torch.save(saved, folder / "given.pt")
    return {"initial_mask": str(folder / "given.pt")}


class Counted:
    """Counts, when each layer is exchanged, what is in memory.

    Attributes:
        dense: of how many layers a dense tensor is.
        masks: how many of the masks are that were found in a model or a file.
        mapped: whether that file is in use.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
        layers = [m for m in model.modules() if type(m) is nn.Linear]
        self._dense = [[memory_of(t) for t in (m.weight, m.weight.grad) if t is not None] for m in layers]
        self._masks: list[StorageWeakRef] = []
        self.dense: list[int] = []
        self.masks: list[int] = []
        self.mapped: list[bool] = []
        make, find = exchange.sparse_twin, first_places.given_mask

        def counted(*given: Any) -> SparseLinear:
            self.dense.append(self.dense_now())
            self.masks.append(sum(not memory.expired() for memory in self._masks))
            self.mapped.append("given.pt" in maps())
            return make(*given)

        def noted(*given: Any) -> Tensor | None:
            mask = find(*given)
            if mask is not None:
                self._masks.append(memory_of(mask))
            return mask

        monkeypatch.setattr(exchange, "sparse_twin", counted)
        monkeypatch.setattr(first_places, "given_mask", noted)

    def dense_now(self) -> int:
        return sum(not all(memory.expired() for memory in memories) for memories in self._dense)


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("host", ["exchange_layers", "sparsify"])
def test_each_dense_layer_leaves_memory_before_the_next_one_is_exchanged(
    kind: str, host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = net()
    method = SET(**start(kind, model, tmp_path), storage="sparse", print_plan=False, every=2)
    counted = Counted(monkeypatch, model)
    if host == "sparsify":
        sparsify(method, model, torch.optim.SGD(model.parameters(), 0.1), 6).close()
    else:
        exchange_layers(method, model)
    assert counted.dense == [4, 3, 2, 1]
    assert counted.dense_now() == 0
    assert counted.masks == [0, 0, 0, 0]
    assert counted.mapped == ["file" in kind] * 4
    assert str(tmp_path) not in maps(), "who writes to the given file would write to the run"


def test_a_fit_of_a_trainer_holds_one_layer_twice_and_gives_it_back_where_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    module = mlp()
    before, parameters = copy.deepcopy(module.state_dict()), list(module.parameters())
    counted = Counted(monkeypatch, module)
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(counted.dense_now())

    refused = pl.callbacks.LambdaCallback(on_train_start=look, on_train_epoch_start=refuse)
    with pytest.raises(RefusedError):
        fit(sparse(), module, refused)
    assert counted.dense == [3, 2, 1]
    assert seen == [0]
    assert [id(p) for p in module.parameters()] == [id(p) for p in parameters]
    assert differences(before, module.state_dict()) == []
    assert str(folder) not in maps()
    fit(sparse(), module)
    assert len(layers_of(module)) == 3


def test_layers_that_were_exchanged_before_an_error_come_back_into_memory(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    model = net()
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    gradients = [p.grad for p in parameters]
    make, made = exchange.sparse_twin, list[SparseLinear]()

    def fails_in_the_third(*given: Any) -> SparseLinear:
        assert [type(m) for m in model].count(SparseLinear) == len(made)
        made.append(make(*given))
        return made[-1] if len(made) < 3 else refuse()

    monkeypatch.setattr(exchange, "sparse_twin", fails_in_the_third)
    with pytest.raises(RefusedError):
        exchange_layers(Static(0.5, storage="sparse"), model)
    assert len(made) == 3
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert [id(p.grad) for p in parameters] == [id(g) for g in gradients]
    assert differences(before, model.state_dict()) == []
    assert all(g is None or torch.equal(g, torch.ones(13, 13)) for g in gradients)
    assert str(folder) not in maps()
