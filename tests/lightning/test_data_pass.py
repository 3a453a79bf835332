"""One pass over the training data: the right samples in the right mode, and no trace of it afterwards."""

import math
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from sparse_callbacks.core.data_pass import call, in_order
from sparse_callbacks.core.undisturbed import undisturbed
from sparse_callbacks.lightning.data_pass import outputs


class Precision:
    """Counts the forward contexts that are open."""

    def __init__(self) -> None:
        self.open = 0

    def convert_input(self, batch: Any) -> Any:
        return batch

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        self.open += 1
        yield
        self.open -= 1


class Host:
    """What of a Trainer a pass asks for."""

    def __init__(self, loader: Any) -> None:
        self.train_dataloader = loader
        self.fit_loop = SimpleNamespace(_data_source=SimpleNamespace(is_defined=lambda: False))
        self.num_training_batches = math.inf
        self.precision_plugin = Precision()
        self.strategy = SimpleNamespace(batch_to_device=lambda batch, dataloader_idx: batch)


class Seen(nn.Module):
    """Gives back what it gets and notes how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.frozen = nn.Linear(1, 1), nn.Dropout(0.5), nn.BatchNorm1d(1).eval()
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((any(m.training for m in self.modules()), torch.is_grad_enabled()))
        return x


def data(count: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(float(count))[:, None], torch.zeros(count))


def over(
    loader: Any,
    module: nn.Module | None = None,
    forward: Any = None,
    given: Any = None,
    fraction: float = 1.0,
    **ranks: int,
) -> list:
    found = outputs(
        Host(loader), module or Seen(), forward, given, fraction, ranks.get("world", 1), ranks.get("rank", 0)
    )
    return [[int(v) for v in batch.flatten()] for batch in found]


IN_ORDER = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# ---------------------------------------------------------------------- which samples


def test_every_sample_once_in_the_order_of_the_data() -> None:
    for options in ({"shuffle": True}, {"drop_last": True}, {"shuffle": True, "num_workers": 1, "drop_last": True}, {}):
        assert over(DataLoader(data(), batch_size=4, **options)) == IN_ORDER
    batches = BatchSampler(RandomSampler(data()), 4, drop_last=True)
    assert over(DataLoader(data(), batch_sampler=batches)) == IN_ORDER
    assert over(DataLoader(data(), batch_size=None, shuffle=True)) == [[i] for i in range(10)]


def test_the_users_collate_function_makes_the_batches() -> None:
    def collate(items: list[Any]) -> Tensor:
        return torch.stack([10 * x for x, _ in items])

    assert over(DataLoader(data(5), batch_size=3, shuffle=True, collate_fn=collate)) == [[0, 10, 20], [30, 40]]


@pytest.mark.parametrize("world", [2, 3, 16])
def test_ranks_share_the_samples(world: int) -> None:
    parts = []
    for rank in range(world):
        sampler = DistributedSampler(data(), world, rank, shuffle=True, drop_last=True)
        batches = over(DataLoader(data(), batch_size=4, sampler=sampler), world=world, rank=rank)
        parts.append([i for batch in batches for i in batch])
        assert parts[-1] == list(range(rank, 10, world))


def test_samples_that_are_kept_from_training_are_not_looked_at() -> None:
    assert over(DataLoader(data(), batch_size=4, sampler=SubsetRandomSampler([7, 1, 2]))) == [[7, 1, 2]]
    assert over(DataLoader(data(), batch_size=2, sampler=[3, 5, 4])) == [[3, 5], [4]]
    wrapped = SimpleNamespace(
        dataset=SimpleNamespace(_sampler=SubsetRandomSampler([7, 1, 2]))
    )  # as Lightning does under DDP
    loader = DataLoader(data(), batch_size=4)
    loader.batch_sampler.sampler = wrapped
    assert over(loader) == [[7, 1, 2]]


@pytest.mark.parametrize(("fraction", "batches"), [(1.0, 3), (0.67, 2), (0.34, 1), (0.01, 1)])
def test_a_share_is_the_first_batches(fraction: float, batches: int) -> None:
    assert over(DataLoader(data(), batch_size=4, shuffle=True), fraction=fraction) == IN_ORDER[:batches]


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_is_positive_and_at_most_all(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"data_fraction={fraction} is not a share of the batches"):
        over(DataLoader(data()), fraction=fraction)


class Own:
    """A loader with an order of its own, and without a length."""

    def in_order(self) -> Iterator[Tensor]:
        return iter([torch.tensor([[5.0]]), torch.tensor([[6.0]])])


def test_a_loader_may_know_its_own_order() -> None:
    assert over(Own()) == [[5], [6]]
    assert isinstance(
        in_order(DataLoader(data(), in_order=False)), DataLoader
    )  # torch's attribute of that name is a number
    with pytest.raises(ValueError, match=r"data_fraction=0\.5 of a loader without a length .*data_fraction=1\.0"):
        over(Own(), fraction=0.5)


def test_a_given_loader_is_taken_as_it_is_and_ranks_take_turns() -> None:
    given = DataLoader(data(), batch_size=4)
    assert over(None, given=given) == IN_ORDER
    assert over(None, given=given, world=2, rank=0) == [IN_ORDER[0], IN_ORDER[2]]
    assert over(None, given=given, world=2, rank=1) == [IN_ORDER[1]]
    assert over(None, given=given, world=2, rank=0, fraction=0.5) == [IN_ORDER[0]]
    assert over(None, given=[torch.tensor([1.0])]) == [[1]]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.zeros(3, 1))


class Batching(BatchSampler):
    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1]])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream()), r"this is a DataLoader over an IterableDataset\. Give statistics_dataloader="),
        ([DataLoader(data()), DataLoader(data())], r"this is a list\. Give statistics_dataloader="),
        (None, r"this is a NoneType\. Give statistics_dataloader="),
        (
            DataLoader(data(), batch_sampler=Batching()),
            r"Batching makes the batches and has no batch_size.*statistics_dataloader=",
        ),
    ],
    ids=["stream", "several", "none", "batches"],
)
def test_data_without_an_order_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        over(loader)


# ---------------------------------------------------------------------- how the network is called


class Named(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale


def test_the_type_of_a_batch_decides_how_the_network_is_called() -> None:
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(call(nn.Identity(), x), x)
    assert torch.equal(call(nn.Identity(), (x, "label")), x)
    assert torch.equal(call(nn.Identity(), [x]), x)
    assert torch.equal(call(Named(), {"x": x, "scale": torch.tensor(2.0)}), 2 * x)
    for batch in ("text", 3, ()):
        with pytest.raises(ValueError, match=rf"a batch of the training data is a {type(batch).__name__}.*forward="):
            call(nn.Identity(), batch)


def test_a_call_that_fails_names_forward_and_keeps_the_cause() -> None:
    with pytest.raises(ValueError, match=r"Named\.forward failed .*TypeError.*Give forward=") as caught:
        over(DataLoader(data()), Named())
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(KeyError, match="mine"):  # a function of the user's speaks for itself
        over(DataLoader(data()), forward=lambda module, batch: {}["mine"])


def test_a_function_of_the_users_takes_the_place_of_the_default() -> None:
    assert over(
        DataLoader(data(), batch_size=4), Named(), lambda module, batch: module(batch[0], 2 + batch[1][:, None])
    ) == [
        [0, 2, 4, 6],
        [8, 10, 12, 14],
        [16, 18],
    ]


def test_eval_mode_without_gradients_and_in_the_precision_of_training() -> None:
    module, host, seen = Seen(), Host(DataLoader(data(), batch_size=5)), []

    def forward(module: Any, batch: Any) -> Tensor:
        seen.append(host.precision_plugin.open)
        return module(batch[0])

    for _ in outputs(host, module, forward, None, 1.0, 1, 0):
        seen.append(host.precision_plugin.open)
        assert torch.is_grad_enabled()  # the caller's own mode between two batches
    assert seen == [1, 0, 1, 0]
    assert module.modes == [(False, False)] * 2


def test_some_modules_may_stay_in_train_mode() -> None:
    module = Seen()
    for _ in outputs(Host(DataLoader(data(), batch_size=5)), module, None, None, 1.0, 1, 0, [module.frozen]):
        assert [m.training for m in (module, module.dropout, module.frozen)] == [False, False, True]
    assert [m.training for m in (module, module.dropout, module.frozen)] == [True, True, False]


def test_batches_go_where_the_training_step_gets_them() -> None:
    order: list[str] = []

    class Moving(Seen):
        def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            order.append("before")
            return batch

    host = Host(DataLoader(data(4), batch_size=4))
    host.precision_plugin.convert_input = lambda batch: (order.append("converted"), batch)[1]
    host.strategy.batch_to_device = lambda batch, dataloader_idx: (order.append("moved"), [batch[0] + 1])[1]
    (found,) = outputs(host, Moving(), None, None, 1.0, 1, 0)
    assert found.flatten().tolist() == [1, 2, 3, 4]
    assert order == ["converted", "before", "moved"]


def test_compiled_modules_run_eagerly_so_that_hooks_fire() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    module = torch.compile(net, backend="eager").eval()
    with torch.no_grad():  # the mode of the pass, so that nothing calls for a new compilation
        for size in (4, 2):
            module(torch.zeros(size, 1))
    fired = []
    net[0].register_forward_hook(lambda *_: fired.append(1))
    list(outputs(Host(DataLoader(data(), batch_size=4)), module, None, None, 1.0, 1, 0))
    assert len(fired) == 3


# ---------------------------------------------------------------------- no trace


class Noisy(Dataset):
    """Draws from every generator at each item."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(1) + random.random() + np.random.rand()


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


@pytest.mark.parametrize("end", ["all", "closed", "failed"])
def test_generators_and_flags_are_as_before(end: str) -> None:
    module, loader = Seen(), DataLoader(Noisy(), batch_size=2, shuffle=True)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    expected = drawn()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    before = {n: m.training for n, m in module.named_modules()}

    def forward(module: nn.Module, batch: Tensor) -> Tensor:
        if end == "failed":
            raise KeyError("mine")
        return module(batch).bernoulli(0.5)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outputs(Host(loader), module, forward, None, 1.0, 1, 0)
        if end == "failed":
            with pytest.raises(KeyError):
                list(found)
        else:
            next(found)
            assert not any(m.training for m in module.modules())
            found.close() if end == "closed" else list(found)
    assert {n: m.training for n, m in module.named_modules()} == before
    assert before[""] is True
    assert before["frozen"] is False
    assert drawn() == expected


def test_the_training_loader_keeps_its_position_and_its_sampler() -> None:
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(data(), batch_size=2, shuffle=True, generator=order)
    whole = [
        b[0].flatten().tolist()
        for b in DataLoader(data(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))
    ]
    running, seen = iter(loader), []
    seen += [next(running)[0].flatten().tolist() for _ in range(2)]
    state, sampler = order.get_state(), loader.sampler
    over(loader)
    assert torch.equal(order.get_state(), state)
    assert loader.sampler is sampler
    seen += [b[0].flatten().tolist() for b in running]
    assert seen == whole


def test_undisturbed_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with undisturbed(nn.Identity()):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


# ---------------------------------------------------------------------- data that moves


class Items(Dataset):
    """Items of many types, one of which may differ from fetch to fetch."""

    def __init__(self, random_key: str | None = None) -> None:
        self.random_key = random_key

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        one = {"t": torch.tensor([float("nan"), 1.0]), "a": np.array([1.0]), "l": [1, 2.0], "s": "name", "o": object()}
        changed = {"t": torch.rand(2), "a": np.random.rand(1), "l": [1, random.random()], "s": str(random.random())}
        return one | ({self.random_key: changed[self.random_key]} if self.random_key else {})


def looked_at(loader: Any, host: Any = None, rank: int = 0, values: bool = True) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(outputs(host or Host(loader), Seen(), lambda module, batch: None, None, 1.0, 1, rank, values=values))
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("key", ["t", "a", "l", "s"])
def test_random_augmentation_is_told_once(key: str) -> None:
    loader = DataLoader(Items(key), collate_fn=list)
    host = Host(loader)
    assert looked_at(loader, host, values=False) == []  # nor does such a pass take the place of one that tells
    (message,) = looked_at(loader, host)
    assert "differs each time that it is fetched" in message
    assert "statistics_dataloader=" in message
    assert looked_at(loader, host) == []
    assert looked_at(loader, rank=1) == []


def test_data_that_stays_is_no_reason_to_warn() -> None:
    assert looked_at(DataLoader(Items(), collate_fn=list)) == []
    assert looked_at(DataLoader(data(), batch_size=4, shuffle=True)) == []


@pytest.mark.parametrize(("limit", "fraction", "seen"), [(2, 1.0, 2), (4, 0.5, 2), (2, 0.1, 1), (99, 1.0, 5)])
def test_no_more_batches_are_seen_than_an_epoch_takes(limit: int, fraction: float, seen: int) -> None:
    host = Host(DataLoader(TensorDataset(torch.arange(10.0)[:, None]), batch_size=2))
    host.num_training_batches = limit
    assert len(list(outputs(host, Seen(), None, None, fraction, 1, 0))) == seen


def test_worker_processes_are_those_of_the_loader() -> None:
    loader = in_order(DataLoader(TensorDataset(torch.arange(6.0)), batch_size=4, shuffle=True, num_workers=2))
    assert loader.num_workers == 2
    assert [b[0].tolist() for b in loader] == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("count", "drop_last", "sizes"), [(9, False, [4, 4]), (10, False, [4, 4, 2]), (10, True, [4, 4]), (1, False, [1])]
)
def test_batches_of_which_norms_take_statistics_are_whole(count: int, drop_last: bool, sizes: list[int]) -> None:
    data = DataLoader(TensorDataset(torch.arange(float(count))), batch_size=4, drop_last=drop_last)
    assert [len(b[0]) for b in in_order(data, whole=True)] == sizes
    assert sum(len(b[0]) for b in in_order(data)) == count
