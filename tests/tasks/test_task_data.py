"""Splits, order, augmentation and the position that a loader resumes from."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import datasets

from sparse_callbacks.tasks import data
from sparse_callbacks.tasks.loaders import Loader, Samples, crop_and_flip, crop_numbers, epoch_order, generator


def numbered(count: int = 10, **options: object) -> Loader:
    """Images of one pixel that holds its index; labels are the index."""
    samples = Samples(torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1), torch.arange(count))
    return Loader(samples, 4, mean=torch.zeros(1), std=torch.ones(1), **options)  # type: ignore[arg-type]


def labels(loader: Loader) -> list[int]:
    return [int(label) for _, batch in loader for label in batch]


def test_order_derives_from_seed_and_epoch() -> None:
    assert torch.equal(epoch_order(50, 3, 2), epoch_order(50, 3, 2))
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 9
    assert not torch.equal(torch.randperm(9, generator=generator(0, 1, 0)), torch.randperm(9, generator=generator(0, 1, 1)))


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
    assert sorted(labels(numbered(11, rank=0, world_size=2)) + labels(numbered(11, rank=1, world_size=2))) == list(range(11))


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
    assert torch.equal(a.test.images, b.test.images)
    assert torch.equal(a.train.labels, b.train.labels)
    assert [len(part) for part in (a.train, a.val, a.test)] == [1077, 270, 450]
    for part in (a.train, a.val, a.test):
        share = torch.bincount(part.labels, minlength=10) / len(part)
        assert share.min() > 0.08
    rows = [tuple(image.flatten().tolist()) for part in (a.train, a.val, a.test) for image in part.images]
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
    assert torch.equal(found.test.images[:, 0], official.data)
    assert [len(part) for part in (found.train, found.val, found.test)] == [100, 20, 20]
    again = data.torchvision_set("mnist", root=str(mnist_folder), val_count=20, seed=5)
    assert torch.equal(found.val.images, again.val.images)
    everything = torch.cat([found.train.images, found.val.images])[:, 0].flatten(1).float().sum(1).sort().values
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
    with pytest.raises(ValueError, match=r"data.batch_size=0 is no batch"):
        data.digits(batch_size=0)
