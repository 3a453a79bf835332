"""Parallel grow-and-prune: an independent loop, two processes against one, resume within rounds, refusals."""

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support import processes
from support.inside import after_epoch_starts, kept_of_the_round
from support.processes import run_processes
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sparse_callbacks import ParallelGaP, Static, combine, horizon
from sparse_callbacks.methods.gap.combination import names_by_partition, tensor_owners
from sparse_callbacks.testing.comparison import assert_effective, differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, conv_net, double_mlp
from sparse_callbacks.testing.runs import Stops, fit, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SIZE = 0.8


class Recorded(Batches):
    """Notes the epochs that it is told, and the order of what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.told.append(epoch)


def prune(weight: Tensor) -> Tensor:
    """Mask of all but the floor(0.8 * size) smallest, by a full sort."""
    order = weight.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[: weight.numel() - int(SIZE * weight.numel())]] = True
    return mask.view_as(weight)


def test_workers_equal_a_hand_written_loop() -> None:
    """Two rounds of two workers and fine-tuning, bit by bit, with random numbers and data order taken from the
    callback's seeds."""
    callback, module, loader = (
        ParallelGaP(SIZE, partitions=2, rounds=2, print_plan=False),
        Classifier(processes.network()),
        Recorded(),
    )
    model = copy.deepcopy(module)
    seeds: list[int] = []
    after_epoch_starts(callback, lambda: seeds.append(torch.initial_seed()))
    initial: dict[str, Tensor] = {}
    begin = pl.callbacks.LambdaCallback(on_fit_start=lambda *_: initial.update(callback.masks))
    fit(module, callback, begin, loader=loader, max_epochs=5)
    epochs = loader.told[-5:] if len(loader.told) == 5 else sorted(set(loader.told), key=loader.told.index)

    parts = callback.blocks()
    masks = dict(initial)
    weights = dict(model.named_parameters())

    def apply(masks: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name].masked_fill_(~mask, 0)

    def epoch(number: int, masks: dict[str, Tensor]) -> None:
        configured = model.configure_optimizers()
        optimizer, rates = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        torch.manual_seed(seeds[number])
        data = Batches()
        data.set_epoch(epochs[number])
        model.train()
        for batch in data:
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
            apply(masks)
            rates.step()

    apply(masks)
    for turn in range(2):
        common = copy.deepcopy(model.state_dict())
        trained = []
        for worker in range(2):
            model.load_state_dict(common)
            epoch(2 * turn + worker, masks | {n: torch.ones_like(masks[n]) for n in parts[worker]})
            trained.append(copy.deepcopy(model.state_dict()))
        model.load_state_dict(combine(trained, tensor_owners(common, names_by_partition(common, parts))))
        masks = {n: prune(weights[n].detach()) for n in masks}
        apply(masks)
        model.eval()
        update_bn([(x.double(), y) for x, y in Batches().in_order()], _OnlyNormsTrain(model.net))
    epoch(4, masks)
    assert differences(dict(module.state_dict()), dict(model.state_dict())) == []
    assert differences(callback.masks, masks) == []


class _OnlyNormsTrain(nn.Module):
    """torch's update_bn puts the whole network into train mode, dropout included; here only norms."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def train(self, mode: bool = True) -> "_OnlyNormsTrain":
        for module in self.net.modules():
            module.training = mode and isinstance(module, nn.modules.batchnorm._BatchNorm)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_seeds_and_epochs_differ_between_workers_rounds_and_epochs_and_not_between_runs() -> None:
    told: list[list[int]] = []
    for seed in (0, 0, 1):
        loader = Recorded()
        fit(
            Classifier(),
            ParallelGaP(partitions=2, rounds=2, epochs=2, seed=seed, print_plan=False),
            loader=loader,
            max_epochs=10,
        )
        told.append(sorted(set(loader.told), key=loader.told.index))
        assert "set_epoch" not in vars(loader)
    assert told[0] == told[1]
    assert len(set(told[0]) | set(told[2])) == 20


def test_random_numbers_of_an_epoch_are_those_of_its_worker() -> None:
    class Draws(Classifier):
        def on_train_epoch_start(self) -> None:
            drawn.append((float(torch.rand(())), random.random()))

    drawn: list[Any] = []
    for _ in range(2):
        torch.manual_seed(len(drawn))
        fit(Draws(), ParallelGaP(partitions=2, print_plan=False), max_epochs=4)
    assert drawn[:4] == drawn[4:]
    assert len(set(drawn)) == 4


def test_every_weight_is_active_once_a_round_and_sparse_after_it() -> None:
    callback, module = ParallelGaP(SIZE, partitions=2, rounds=2, print_plan=False), Classifier()
    ever: dict[str, Tensor] = {}
    dense: list[int | None] = []

    def check(trainer: pl.Trainer, module: Classifier, index: int) -> None:
        assert_effective(module, callback)
        for name, mask in callback.masks.items():
            ever[name] = ever.get(name, mask) | mask
        if index % 8 == 0 and index < 32:
            full = [i for i, block in enumerate(callback.blocks()) if all(bool(callback.masks[n].all()) for n in block)]
            assert full == [callback.dense_partition] == [index // 8 % 2]
        if index % 16 == 15 and index < 32:
            assert all(bool(e.all()) for e in ever.values())
            ever.clear()
        dense.append(callback.dense_partition)
        assert callback.at_target == (index >= 31)

    fit(module, callback, watch(check), max_epochs=5)
    assert dense[-1] is None
    assert callback.updates == 4
    assert kept_of_the_round(callback) == set()


def test_optimizers_and_schedules_start_anew_for_each_worker_and_for_fine_tuning() -> None:
    class Cosine(Classifier):
        def configure_optimizers(self) -> Any:
            asked.append(horizon(self.trainer))
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=asked[-1])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    asked: list[float] = []
    rates: list[float] = []
    see = watch(lambda trainer, *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"]))
    fit(Cosine(), ParallelGaP(partitions=2, epochs=2, print_plan=False), see, max_epochs=7)
    assert asked == [16, 16, 24]
    one = [0.05 * (1 + torch.tensor(torch.pi * s / 16).cos().item()) for s in range(1, 17)]
    assert rates[:15] == pytest.approx(one[:15], abs=1e-8)
    assert rates[16:31] == pytest.approx(one[:15], abs=1e-8)
    assert rates[32] > 0.099


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_within_a_round_is_bitwise(optimizer: str, tmp_path: Path) -> None:
    def make() -> ParallelGaP:
        return ParallelGaP(SIZE, partitions=2, rounds=2, epochs=1, print_plan=False)

    stops = (1, 4, 9, 12, 17, 23, 28, 33)
    options: dict[str, Any] = {"max_epochs": 5, "accumulate_grad_batches": 3}
    module, callback = Classifier(optimizer=optimizer), make()
    expected = snapshot(fit(module, callback, Stops(tmp_path, stops), **options), module, callback)
    for stop in stops:
        again, other = Classifier(conv_net(stop), optimizer), make()
        trainer = fit(again, other, ckpt_path=tmp_path / f"{stop}.ckpt", **options)
        assert differences(expected, snapshot(trainer, again, other)) == [], stop


def test_a_resume_from_the_end_of_an_epoch(tmp_path: Path) -> None:
    """Lightning's own checkpoints are written at the end of a validation: the round's end is behind them already."""

    def run(folder: Path, module: Classifier, **options: Any) -> dict[str, Any]:
        callback = ParallelGaP(SIZE, partitions=2, rounds=2, print_plan=False)
        saver = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, monitor="val_loss")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=6,
            callbacks=[callback, saver],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Batches(), Batches(batches=2, seed=1), **options)
        return snapshot(trainer, module, callback)

    expected = run(tmp_path / "a", Classifier())
    for epoch in (0, 1, 3, 4):
        found = run(tmp_path / f"b{epoch}", Classifier(conv_net(5)), ckpt_path=tmp_path / "a" / f"epoch={epoch}.ckpt")
        assert differences(expected, found) == [], epoch


def test_magnitude_masks_at_the_start() -> None:
    callback, module = ParallelGaP(SIZE, partitions=2, init="magnitude", print_plan=False), Classifier()
    expected = {n: prune(module.get_parameter(n).detach()) for n in ("net.0.weight", "net.4.weight", "net.7.weight")}
    begun: dict[str, Tensor] = {}
    begin = pl.callbacks.LambdaCallback(on_fit_start=lambda *_: begun.update(callback.masks))
    fit(module, callback, begin, max_epochs=2)
    assert differences(begun, expected) == []


# ---------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes("workers", tmp_path_factory.mktemp("gap"))


def test_two_processes_equal_one_bit_by_bit(two_processes: list[dict[str, Any]]) -> None:
    alone = processes.train_worker(1)
    length = 8 * processes.EPOCHS
    for rank, found in enumerate(two_processes):
        assert differences(alone["end"]["weights"], found["whole"]["end"]["weights"]) == []
        assert differences(alone["end"]["masks"], found["whole"]["end"]["masks"]) == []
        assert differences(alone["end"]["optimizers"], found["whole"]["end"]["optimizers"]) == []
        for turn in range(processes.ROUNDS):  # each worker's path, up to the batch that ends its phase
            begin = (2 * turn + rank) * length
            mine = found["whole"]["seen"][turn * length : (turn + 1) * length - 1]
            assert differences(alone["seen"][begin : begin + length - 1], mine) == []
    first, second = (found["whole"]["seen"][5] for found in two_processes)
    assert differences(first, second) != []


def test_two_processes_resume_within_a_round(two_processes: list[dict[str, Any]]) -> None:
    for found in two_processes:
        for stop in processes.STOPS:
            assert differences(found["whole"]["end"], found[f"resumed {stop}"]["end"]) == [], stop


# ---------------------------------------------------------------------- refusals


class Fake:
    """A Trainer as far as the refusals look at it."""

    def __init__(self, split: bool = False, strategy: str = "DDPStrategy", wraps: bool = True) -> None:
        self._accelerator_connector = type("Connector", (), {"use_distributed_sampler": split})()
        model = type("Wrapped", (), {"require_backward_grad_sync": True} if wraps else {})()
        self.strategy = type(strategy, (), {"model": model})()


def test_processes_that_cannot_be_workers() -> None:
    from sparse_callbacks.lightning.turns import refuse_ranks

    refuse_ranks(Fake(split=True), double_mlp(), 1, 4)
    refuse_ranks(Fake(), double_mlp(), 4, 4)
    for trainer, module, ranks, words in (
        (Fake(), double_mlp(), 3, r"3 processes and partitions= makes 4 workers"),
        (Fake(split=True), double_mlp(), 4, "use_distributed_sampler=False"),
        (Fake(wraps=False, strategy="HorovodStrategy"), double_mlp(), 4, "HorovodStrategy does not let"),
        (Fake(), nn.Sequential(nn.SyncBatchNorm(3)), 4, "0 average batch statistics over processes"),
    ):
        with pytest.raises(ValueError, match=words):
            refuse_ranks(trainer, module, ranks, 4)
    manual = double_mlp()
    manual.automatic_optimization = False  # type: ignore[assignment]
    with pytest.raises(ValueError, match="in manual optimization"):
        refuse_ranks(Fake(), manual, 4, 4)


@pytest.mark.parametrize("epochs", [1.5, None, "2"])
def test_epochs_are_whole(epochs: Any) -> None:
    with pytest.raises(ValueError, match=rf"epochs={epochs!r} is no"):
        ParallelGaP(epochs=epochs)


def test_epochs_of_no_known_length() -> None:
    class Endless(Batches):
        def __len__(self) -> int:
            raise TypeError

    with pytest.raises(ValueError, match=r"ParallelGaP counts whole epochs.*limit_train_batches=N"):
        fit(Classifier(double_mlp()), ParallelGaP(partitions=2, print_plan=False), loader=Endless(), max_epochs=4)


def test_a_sampler_that_splits_the_data_is_refused() -> None:
    from sparse_callbacks.lightning.turns import refuse_split_data

    data = TensorDataset(torch.zeros(8))
    for replicas in (1, 2):
        loader = DataLoader(data, sampler=DistributedSampler(data, num_replicas=replicas, rank=0))
        trainer = type(
            "T", (), {"fit_loop": type("L", (), {"_combined_loader": type("C", (), {"flattened": [loader]})()})()}
        )()
        if replicas == 1:
            refuse_split_data(trainer)
        else:
            with pytest.raises(ValueError, match=r"DistributedSampler\(num_replicas=2\)"):
                refuse_split_data(trainer)


def test_another_sparsity_callback_beside_it_is_refused() -> None:
    pair = [ParallelGaP(partitions=1, include=["net.0.*"]), Static(exclude=["net.0.*"])]
    with pytest.raises(
        ValueError, match="ParallelGaP trains several copies of the whole network, and 2 sparsity callbacks"
    ):
        fit(Classifier(), *pair, max_epochs=4)


# ---------------------------------------------------------------------- validation, norms, loaders


def test_a_validation_at_a_worker_s_end_sees_that_worker_and_at_a_round_s_end_the_combined_network() -> None:
    seen: list[tuple[float, dict[str, Tensor]]] = []

    class Validated(Classifier):
        def on_validation_epoch_end(self) -> None:
            seen.append(
                (callback.measured_sparsity()["sparsity/total"], {k: v.clone() for k, v in self.state_dict().items()})
            )

    callback = ParallelGaP(SIZE, partitions=2, rounds=2, print_plan=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=5,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
    )
    trainer.fit(Validated(), Batches(), Batches(batches=2, seed=1))
    dense = callback.plan()["net.0.weight"].size / callback.plan().weights
    assert [s for s, _ in seen] == pytest.approx([SIZE * (1 - dense), SIZE] * 2 + [SIZE], abs=1e-2)
    assert all(differences(a, b) != [] for (_, a), (_, b) in itertools.pairwise(seen))


def test_norms_in_eval_mode_keep_their_statistics() -> None:
    class Frozen(Classifier):
        def on_train_epoch_start(self) -> None:
            self.net[1].eval()

    module = Frozen()
    module.net[1].running_mean.fill_(0.3)
    fit(module, ParallelGaP(partitions=2, print_plan=False), max_epochs=2)
    assert torch.equal(module.net[1].running_mean, torch.full((8,), 0.3))


def test_a_last_batch_of_one_sample_is_left_out_of_the_statistics() -> None:
    class Flat(Classifier):
        def __init__(self) -> None:
            super().__init__(
                nn.Sequential(nn.Flatten(), nn.Linear(50, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
            )

    x = torch.randn(17, 2, 5, 5)
    loader = DataLoader(TensorDataset(x, torch.zeros(17).long()), batch_size=8, drop_last=True)
    callback = ParallelGaP(partitions=2, print_plan=False)
    fit(Flat(), callback, loader=loader, max_epochs=3)
    assert callback.at_target


def test_generators_of_loaders_are_seeded_too() -> None:
    class Orders(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            order.append(int(batch[1][0]))
            return self.net(batch[0]).sum() * 0.0

    orders: list[list[int]] = []
    source = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(torch.zeros(12, 2, 5, 5), torch.arange(12)), shuffle=True, generator=source)
    for _ in range(2):
        order: list[int] = []
        fit(Orders(double_mlp().float()), ParallelGaP(partitions=2, print_plan=False), loader=loader, max_epochs=3)
        orders.append(order)
    assert orders[0] == orders[1]
    assert orders[0][:12] != orders[0][12:24]


def test_a_run_that_is_too_short() -> None:
    with pytest.raises(ValueError, match=r"4 phases .* do not fit a run of 24 steps"):
        fit(Classifier(), ParallelGaP(partitions=2, rounds=2, print_plan=False), max_epochs=3)


def test_data_that_cannot_be_passed_over_is_refused_before_the_first_batch() -> None:
    class Endless(Batches):
        in_order = None  # type: ignore[assignment]

    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="statistics_dataloader="):
        fit(module, ParallelGaP(partitions=2, print_plan=False), loader=Endless(), max_epochs=4)
    assert differences(before, dict(module.state_dict())) == []
    fit(
        Classifier(double_mlp()), ParallelGaP(partitions=2, print_plan=False), loader=Endless(), max_epochs=4
    )  # no statistics, no pass
