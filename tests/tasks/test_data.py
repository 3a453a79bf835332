"""Splits, order, augmentation and the position that a loader resumes from."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torchvision import datasets

from sparse_callbacks.tasks.data import module as data
from sparse_callbacks.tasks.data.loaders import Loader, Samples, crop_and_flip, crop_numbers, epoch_order, generator


def numbered(count: int = 10, **options: object) -> Loader:
    """Images of one pixel that holds its index; labels are the index."""
    samples = Samples(torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1), torch.arange(count))
    options.setdefault("even", options.get("shuffle", False))
    return Loader(samples, 4, mean=torch.zeros(1), std=torch.ones(1), **options)  # type: ignore[arg-type]


def labels(loader: Loader) -> list[int]:
    return [int(label) for _, batch in loader for label in batch]


def test_order_derives_from_seed_and_epoch() -> None:
    assert torch.equal(epoch_order(50, 3, 2), epoch_order(50, 3, 2))
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 9
    assert not torch.equal(
        torch.randperm(9, generator=generator(0, 1, 0)), torch.randperm(9, generator=generator(0, 1, 1))
    )


def test_an_epoch_has_every_sample_once_and_leaves_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    loader = numbered(shuffle=True, seed=1)
    first = labels(loader)
    loader.set_epoch(1)
    second = labels(loader)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert torch.equal(torch.get_rng_state(), state)
    assert labels(numbered()) == list(range(10))
    assert len(loader) == 3


@pytest.mark.parametrize("done", [0, 1, 2])
def test_goes_on_at_the_batch_where_it_was_saved(done: int) -> None:
    whole = numbered(shuffle=True)
    whole.set_epoch(5)
    expected = labels(whole)
    stopped = numbered(shuffle=True)
    stopped.set_epoch(5)
    seen = [int(label) for _, batch in islice(stopped, done) for label in batch]
    resumed = numbered(shuffle=True)
    resumed.load_state_dict(stopped.state_dict())
    iterator = iter(resumed)  # Lightning makes the iterator before it announces the epoch
    resumed.set_epoch(5)
    assert seen + [int(label) for _, batch in iterator for label in batch] == expected
    assert sorted(labels(resumed)) == list(range(10))


@pytest.mark.parametrize("epoch", [2**62, 2**62 - 1, 12345678901])
def test_goes_on_in_an_epoch_of_any_number_however_often_it_is_announced(epoch: int) -> None:
    whole = numbered(shuffle=True)
    whole.set_epoch(epoch)
    expected = labels(whole)
    assert expected != labels(numbered(shuffle=True))
    stopped = numbered(shuffle=True)
    stopped.set_epoch(epoch)
    seen = [int(label) for _, batch in islice(stopped, 2) for label in batch]
    resumed = numbered(shuffle=True)
    resumed.load_state_dict(stopped.state_dict())
    iterator = iter(resumed)
    resumed.set_epoch(3)
    resumed.set_epoch(epoch)
    assert seen + [int(label) for _, batch in iterator for label in batch] == expected
    resumed.set_epoch(1)  # no successor of the one before
    again = numbered(shuffle=True)
    again.set_epoch(1)
    assert labels(resumed) == labels(again)


def test_a_position_of_the_epoch_before_is_its_end() -> None:
    loader = numbered(shuffle=True)
    loader.load_state_dict({"epoch": 0, "batch": 3})
    loader.set_epoch(1)
    assert len(labels(loader)) == 10


def test_ranks_share_the_samples() -> None:
    ranks = [numbered(11, shuffle=True, rank=rank, world_size=2) for rank in (0, 1)]
    shares = [labels(loader) for loader in ranks]
    assert [len(share) for share in shares] == [5, 5]
    assert len(set(shares[0]) | set(shares[1])) == 10
    assert sorted(labels(numbered(11, rank=0, world_size=2)) + labels(numbered(11, rank=1, world_size=2))) == list(
        range(11)
    )


def test_without_shuffling_every_epoch_has_the_order_of_the_samples_and_ranks_stay_in_step() -> None:
    loader = numbered(11, even=True)
    assert labels(loader) == list(range(11))
    loader.set_epoch(1)
    assert labels(loader) == list(range(11))
    ranks = [numbered(11, even=True, rank=rank, world_size=2) for rank in (0, 1)]
    assert [labels(rank) for rank in ranks] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


@pytest.mark.parametrize(
    ("count", "even", "batches"),
    [
        (16, True, [1, 1, 1, 1]),
        (18, True, [1, 1, 1, 1]),
        (18, False, [2, 2, 1, 1]),
        (20, True, [2, 2, 2, 2]),
        (2, False, [1, 1, 0, 0]),
    ],
)
def test_the_batches_of_each_rank(count: int, even: bool, batches: list[int]) -> None:
    ranks = [numbered(count, even=even, rank=rank, world_size=4) for rank in range(4)]
    assert [len(rank) for rank in ranks] == [len(list(rank)) for rank in ranks] == batches
    seen = sorted(label for rank in ranks for label in labels(rank))
    assert seen == list(range(count // 4 * 4 if even else count))


def test_in_order_has_each_sample_once_over_the_ranks_and_leaves_the_position_alone() -> None:
    images = torch.rand(11, 1, 8, 8)
    samples = Samples(images, torch.arange(11))
    options = {
        "mean": torch.tensor([0.5]),
        "std": torch.tensor([0.25]),
        "shuffle": True,
        "even": True,
        "augment": True,
        "world_size": 2,
    }
    ranks = [Loader(samples, 2, rank=rank, **options) for rank in (0, 1)]  # type: ignore[arg-type]
    ranks[0].set_epoch(4)
    iterator = iter(ranks[0])
    next(iterator)
    before = ranks[0].state_dict()
    assert labels(ranks[0].in_order()) == [0, 2, 4, 6, 8, 10]
    assert labels(ranks[1].in_order()) == [1, 3, 5, 7, 9]
    assert ranks[0].state_dict() == before == {"epoch": 4, "batch": 1}
    assert len(list(iterator)) == 2
    plain = torch.cat([batch for batch, _ in ranks[1].in_order()])
    assert torch.equal(plain, (images[1::2] - 0.5) * 4)


@pytest.mark.parametrize(("distributed", "expected"), [(True, (1, 2)), (False, (0, 1))])
def test_ranks_have_all_the_data_where_the_trainer_distributes_none(
    distributed: bool, expected: tuple[int, int]
) -> None:
    found = data.digits()
    connector = SimpleNamespace(use_distributed_sampler=distributed)
    found.trainer = SimpleNamespace(global_rank=1, world_size=2, _accelerator_connector=connector)  # type: ignore[assignment]
    for loader in (found.train_dataloader(), found.val_dataloader(), found.test_dataloader()):
        assert (loader.rank, loader.world_size) == expected
    assert found.train_dataloader().even
    assert not found.val_dataloader().even


@pytest.mark.parametrize("use", [True, False])
def test_the_trainers_choice_of_distribution_is_where_it_is_looked_for(use: bool) -> None:
    assert (
        pl.Trainer(
            use_distributed_sampler=use, logger=False, accelerator="cpu"
        )._accelerator_connector.use_distributed_sampler
        is use
    )


def test_features_are_batched_with_one_scale_or_one_for_each() -> None:
    features = torch.rand(5, 3)
    samples = Samples(features, torch.arange(5))
    plain, _ = next(iter(Loader(samples, 5, mean=torch.zeros(1), std=torch.ones(1))))
    assert torch.equal(plain, features)
    mean, std = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 4.0])
    scaled, _ = next(iter(Loader(samples, 5, mean=mean, std=std)))
    torch.testing.assert_close(scaled, (features - mean) / std)


def test_features_are_not_augmented() -> None:
    with pytest.raises(
        ValueError, match=r"data.augment=True crops and flips images, and inputs of shape \(3,\) are not images"
    ):
        Loader(Samples(torch.rand(5, 3), torch.arange(5)), 5, mean=torch.zeros(1), std=torch.ones(1), augment=True)


def reference_crop(image: Tensor, down: int, right: int, flip: int) -> Tensor:
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    cut = padded[:, down : down + image.shape[1], right : right + image.shape[2]]
    return cut.flip(-1) if flip else cut


def test_crop_and_flip_against_slicing() -> None:
    images = torch.randint(0, 255, (20, 3, 8, 8), dtype=torch.uint8)
    numbers = crop_numbers(20, seed=0, epoch=0)
    expected = torch.stack([reference_crop(image, *row.tolist()) for image, row in zip(images, numbers, strict=True)])
    assert torch.equal(crop_and_flip(images, numbers), expected)
    assert numbers[:, :2].min() == 0
    assert numbers[:, :2].max() == 8
    assert set(numbers[:, 2].tolist()) == {0, 1}


def test_augmentation_belongs_to_the_sample_not_to_its_batch() -> None:
    images = torch.rand(12, 1, 8, 8)
    samples = Samples(images, torch.arange(12))

    def seen(batch_size: int, epoch: int) -> dict[int, Tensor]:
        loader = Loader(samples, batch_size, mean=torch.zeros(1), std=torch.ones(1), shuffle=True, augment=True)
        loader.set_epoch(epoch)
        return {int(label): image for batch, some in loader for image, label in zip(batch, some, strict=True)}

    a, b, other = seen(3, 1), seen(5, 1), seen(3, 2)
    assert all(torch.equal(a[i], b[i]) for i in range(12))
    assert not all(torch.equal(a[i], other[i]) for i in range(12))


def test_images_are_normalised() -> None:
    images = torch.randint(0, 256, (30, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    batch, _ = next(iter(Loader(Samples(images, torch.zeros(30)), 30, mean=mean, std=std)))
    expected = (images / 255.0 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(batch, expected)


def test_digits_are_split_once_and_stratified() -> None:
    a, b = data.digits(seed=0), data.digits(seed=7)
    assert torch.equal(a.test.inputs, b.test.inputs)
    assert torch.equal(a.train.labels, b.train.labels)
    assert [len(part) for part in (a.train, a.val, a.test)] == [1077, 270, 450]
    for part in (a.train, a.val, a.test):
        share = torch.bincount(part.labels, minlength=10) / len(part)
        assert share.min() > 0.08
    rows = [tuple(image.flatten().tolist()) for part in (a.train, a.val, a.test) for image in part.inputs]
    assert len(rows) == 1797
    assert a.input_shape == (1, 8, 8)
    batch = torch.cat([images for images, _ in a.train_dataloader()])
    assert abs(float(batch.mean())) < 0.02
    assert abs(float(batch.std()) - 1) < 0.02


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    """A set of 120 training and 20 test images in MNIST's files."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    source = np.random.default_rng(0)
    for stem, count in (("train", 120), ("t10k", 20)):
        images = source.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        head = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(head + (np.arange(count) % 10).astype(np.uint8).tobytes())
    return tmp_path


def test_torchvision_files_validate_on_training_images_and_test_on_the_official_set(mnist_folder: Path) -> None:
    found = data.torchvision_set("mnist", root=str(mnist_folder), val_count=20)
    official = datasets.MNIST(str(mnist_folder), train=False)
    assert torch.equal(found.test.inputs[:, 0], official.data)
    assert [len(part) for part in (found.train, found.val, found.test)] == [100, 20, 20]
    again = data.torchvision_set("mnist", root=str(mnist_folder), val_count=20, seed=5)
    assert torch.equal(found.val.inputs, again.val.inputs)
    everything = torch.cat([found.train.inputs, found.val.inputs])[:, 0].flatten(1).float().sum(1).sort().values
    assert torch.equal(everything, datasets.MNIST(str(mnist_folder)).data.flatten(1).float().sum(1).sort().values)


@pytest.mark.parametrize("name", list(data.SETS))
def test_an_absent_set_names_both_ways_to_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"its files are not there.*data.root=FOLDER.*data.download=true"):
        data.torchvision_set(name, root=str(tmp_path))


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets.MNIST, "download", fail)
    with pytest.raises(FileNotFoundError, match=r"the download failed \(no network\).*data.root=FOLDER"):
        data.torchvision_set("mnist", root=str(tmp_path), download=True)


def test_an_unknown_set() -> None:
    with pytest.raises(ValueError, match=r"data.name='svhn' is not known. Known sets: mnist"):
        data.torchvision_set("svhn")


@pytest.mark.parametrize("count", [0, 120])
def test_a_validation_set_that_takes_all_or_nothing(mnist_folder: Path, count: int) -> None:
    with pytest.raises(ValueError, match=f"data.val_count={count} does not leave both"):
        data.torchvision_set("mnist", root=str(mnist_folder), val_count=count)


def test_a_batch_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"data.batch_size=0 is not a number of samples"):
        data.digits(batch_size=0)
