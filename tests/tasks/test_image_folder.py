"""Images in folders of classes: parts, order, augmentation, and the position that a run goes on from."""

import os
import signal
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import COLORS, draw
from torch import Tensor
from torchvision.transforms import functional

from sparse_callbacks.tasks import plain_errors
from sparse_callbacks.tasks.classifier import Classifier
from sparse_callbacks.tasks.data.image_files import Files, find_images, read_image
from sparse_callbacks.tasks.data.image_folder import FolderData, ImageLoader, image_folder, sample_seed
from sparse_callbacks.tasks.safe_stop import RunStopped

COUNTS = dict.fromkeys(COLORS, 10)
Batches = list[tuple[Tensor, Tensor]]
Run = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder, COUNTS)
    return folder


def data_of(folder: Path, **options: Any) -> FolderData:
    return image_folder(
        str(folder), **{"image_size": 16, "batch_size": 5, "val_fraction": 0.2, "test_fraction": 0.2, **options}
    )


def names(files: Files) -> list[str]:
    return [f"{path.parent.name}/{path.name}" for path, _ in files]


def equal(some: Batches, others: Batches) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(x, y) and torch.equal(a, b) for (x, a), (y, b) in pairs)


def epoch(loader: ImageLoader, number: int) -> Batches:
    loader.set_epoch(number)
    return list(loader)


# ---------------------------------------------------------------------- parts


def test_one_folder_of_classes_is_split_once_and_by_class(pictures: Path) -> None:
    found = find_images(str(pictures), 0.2, 0.3)
    assert found.classes == ["blue", "green", "red"]
    for part, each in ((found.train, 5), (found.val, 2), (found.test, 3)):
        assert np.bincount([label for _, label in part]).tolist() == [each] * 3
        assert all(path.parent.name == found.classes[label] for path, label in part)
    everything = names(found.train) + names(found.val) + names(found.test)
    assert sorted(everything) == sorted(f"{p.parent.name}/{p.name}" for p in pictures.rglob("*.*"))
    assert find_images(str(pictures), 0.2, 0.3) == found
    first, other = (data_of(pictures, seed=seed) for seed in (0, 7))
    assert first.train.files == other.train.files


@pytest.mark.parametrize("val_name", ["val", "valid", "Validation"])
def test_parts_that_have_folders_are_those(val_name: str, tmp_path: Path) -> None:
    for part, count in (("train", 6), (val_name, 2), ("test", 1)):
        draw(tmp_path / part, dict.fromkeys(COLORS, count))
    found = find_images(str(tmp_path), 0.5, 0.4)
    assert [len(part) for part in (found.train, found.val, found.test)] == [18, 6, 3]
    assert {path.parents[1].name for path, _ in found.val} == {val_name}


def test_a_part_without_a_folder_is_a_share_of_the_training_images(tmp_path: Path) -> None:
    draw(tmp_path / "train", COUNTS)
    draw(tmp_path / "val", {"red": 2})
    found = find_images(str(tmp_path), 0.1, 0.2)
    assert [len(part) for part in (found.train, found.val, found.test)] == [24, 2, 6]
    # the number of a class is that of the training folder, also where others are absent
    assert [label for _, label in found.val] == [2, 2]


def test_hidden_folders_are_not_classes_and_a_class_may_be_named_train(tmp_path: Path) -> None:
    draw(tmp_path, COUNTS)
    (tmp_path / "red").rename(tmp_path / "train")
    for name in (".cache", "__MACOSX"):
        (tmp_path / name).mkdir()
    (tmp_path / "train/._000.png").write_bytes(b"")
    (tmp_path / "train/notes.txt").write_text("words")
    found = find_images(str(tmp_path), 0.2, 0.2)
    assert found.classes == ["blue", "green", "train"]
    assert len(found.train) == 18


# ---------------------------------------------------------------------- images


def test_evaluation_resizes_and_crops_as_torchvision_does(pictures: Path) -> None:
    data = data_of(pictures, resize=20, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation="bicubic")
    images, _ = next(iter(data.val_dataloader()))
    with Image.open(data.val.files[0][0]) as image:
        resized = functional.resize(image.convert("RGB"), 20, functional.InterpolationMode.BICUBIC)
        pixels = functional.to_tensor(functional.center_crop(resized, 16))
    expected = functional.normalize(pixels, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    torch.testing.assert_close(images[0], expected)
    assert images.shape == (5, 3, 16, 16)
    assert (data.input_shape, data.num_classes, data.class_names) == ((3, 16, 16), 3, ["blue", "green", "red"])


def test_the_usual_numbers_are_those_of_imagenet(pictures: Path) -> None:
    found = image_folder(str(pictures)).preprocessing
    assert (found["center_crop"], found["resize_shorter_side"], found["interpolation"]) == (224, 256, "bilinear")
    assert (found["mean"], found["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert found["classes"] == ["blue", "green", "red"]


def test_without_augmentation_training_images_are_made_as_the_others(pictures: Path) -> None:
    data = data_of(pictures, augment=False)
    for images, labels in epoch(data.train_dataloader(), 3):
        for image, label in zip(images, labels, strict=True):
            same = [n for n in range(len(data.train)) if torch.equal(data.train[n, None][0], image)]  # type: ignore[index]
            assert [data.train.files[n][1] for n in same] == [label]


def test_gray_transparent_and_turned_images_become_upright_rgb(tmp_path: Path) -> None:
    Image.new("L", (8, 4), 100).save(tmp_path / "gray.png")
    Image.new("RGBA", (8, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=turned)
    images = [read_image(tmp_path / name) for name in ("gray.png", "clear.png", "turned.jpg")]
    assert [image.mode for image in images] == ["RGB"] * 3
    assert [image.size for image in images] == [(8, 4), (8, 4), (4, 8)]


# ---------------------------------------------------------------------- order and random numbers


def test_an_epoch_has_each_image_once_changed_anew_and_leaves_the_generator_alone(pictures: Path) -> None:
    loader = data_of(pictures).train_dataloader()
    state = torch.get_rng_state()
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(loader) == len(first) == 4
    for batches in (first, second):
        assert torch.bincount(torch.cat([labels for _, labels in batches])).tolist() == [6, 6, 6]
    images = [{image.numpy().tobytes() for images, _ in batches for image in images} for batches in (first, second)]
    assert len(images[0] | images[1]) == 36  # each image is changed in another way in each epoch
    assert equal(epoch(loader, 0), first)
    other = data_of(pictures, seed=1).train_dataloader()
    assert not equal(epoch(other, 0), first)
    seeds = {sample_seed(*numbers) for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0))}
    assert len(seeds) == 5


def test_workers_do_not_change_a_batch_and_stay_for_the_next_epoch(pictures: Path) -> None:
    alone, helped = (data_of(pictures, workers=workers).train_dataloader() for workers in (0, 2))
    assert list(islice(helped, 1))  # an epoch that is left early
    for number in (0, 1):
        assert equal(epoch(alone, number), epoch(helped, number))
    plain = helped.in_order()
    assert equal(list(plain), list(alone.in_order()))
    assert torch.equal(torch.cat([labels for _, labels in plain]), torch.tensor([0, 1, 2]).repeat_interleave(6))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_in_order_within_an_epoch_leaves_it_alone(workers: int, pictures: Path) -> None:
    loader = data_of(pictures, workers=workers).train_dataloader()
    whole = epoch(data_of(pictures).train_dataloader(), 0)
    batches = iter(loader)
    loader.set_epoch(0)
    first = next(batches)
    assert len(list(loader.in_order())) == 4
    assert equal([first, *batches], whole)


def test_the_batch_size_and_the_processes_do_not_change_an_image(pictures: Path) -> None:
    def seen(loader: ImageLoader) -> list[bytes]:
        return sorted(image.numpy().tobytes() for images, _ in epoch(loader, 2) for image in images)

    data = data_of(pictures)
    options = {"seed": 0, "shuffle": True, "even": True, "augment": True}
    ranks = [ImageLoader(data.train, 4, rank=rank, world_size=2, **options) for rank in (0, 1)]
    assert sorted(seen(ranks[0]) + seen(ranks[1])) == seen(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_at_the_batch_where_it_was_saved(workers: int, pictures: Path) -> None:
    whole = epoch(data_of(pictures).train_dataloader(), 5)
    stopped, resumed = (data_of(pictures, workers=workers).train_dataloader() for _ in range(2))
    stopped.set_epoch(5)
    seen = list(islice(stopped, 2))
    assert stopped.state_dict() == {"epoch": 5, "batch": 2}  # and not the batches that workers have made already
    resumed.load_state_dict(stopped.state_dict())
    iterator = iter(resumed)
    resumed.set_epoch(5)
    assert equal(seen + list(iterator), whole)


# ---------------------------------------------------------------------- runs


@pytest.fixture
def run(composed: Callable[..., Any], pictures: Path, tmp_path: Path) -> Run:
    """`train` on the pictures with a small network, whose dropout draws random numbers of its own."""
    from train import train

    def go(*overrides: str, folder: str = "run") -> dict[str, float]:
        small = (
            "model.hidden=[24]",
            "model.dropout=0.3",
            "data.image_size=8",
            "data.batch_size=3",
            "trainer.max_epochs=3",
        )
        quiet = ("logger=[]", "report=false", "trainer.enable_progress_bar=false", f"output_dir={tmp_path / folder}")
        return train(composed("data=image_folder", f"data.root={pictures}", *small, *quiet, *overrides))

    return go


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_bitwise_within_an_epoch(
    workers: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Classifier, *_: object) -> None:
        if self.trainer.global_step == 11:  # 6 steps an epoch
            os.kill(os.getpid(), signal.SIGTERM)

    whole = run(folder="whole")
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_train_batch_end", stop)
        with pytest.raises(RunStopped) as stopped:
            run(f"data.workers={workers}")
    # with workers the first part, without them the second one
    resumed = run(f"ckpt_path={stopped.value.checkpoint}", folder="resumed")
    assert "val/acc5" not in resumed  # three classes
    for metrics in (whole, resumed):
        del metrics["seconds"]
    assert resumed == whole
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_warnings_of_a_run_are_none(run: Run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run("trainer.max_epochs=1", "method=none")


# ---------------------------------------------------------------------- what is refused


def nothing(folder: Path) -> None:
    folder.mkdir()


def a_file(folder: Path) -> None:
    folder.write_text("words")


def without_classes(folder: Path) -> None:
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "1.png")


def one_class(folder: Path) -> None:
    draw(folder, {"red": 5})


def classes_further_down(folder: Path) -> None:
    draw(folder / "flowers", COUNTS)


def without_images(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
    (folder / "cat/1.mp4").write_bytes(b"")


def an_empty_class(folder: Path) -> None:
    draw(folder, COUNTS)
    (folder / "cat").mkdir()


def a_small_class(folder: Path) -> None:
    draw(folder, COUNTS | {"red": 2})


def few_images(folder: Path) -> None:
    draw(folder, dict.fromkeys(COLORS, 3))


def another_class_validates(folder: Path) -> None:
    draw(folder / "train", COUNTS)
    draw(folder / "val", {"red": 1})
    (folder / "val/cat").mkdir()


def nothing_tests(folder: Path) -> None:
    draw(folder / "train", COUNTS)
    (folder / "test/red").mkdir(parents=True)


def nothing_trains(folder: Path) -> None:
    draw(folder / "val", COUNTS)
    draw(folder / "test", COUNTS)


def broken(folder: Path) -> None:
    draw(folder, COUNTS)
    (folder / "green/001.jpg").write_text("words")


def empty_files(folder: Path) -> None:
    draw(folder, COUNTS)
    for number in range(0, 10, 2):
        for color in ("red", "blue"):
            (folder / f"{color}/{number:03}.png").write_bytes(b"")


def cut_off(folder: Path) -> None:
    draw(folder, COUNTS)
    for name in ("red/003.jpg", "red/002.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-60])


def without_a_range(folder: Path) -> None:
    draw(folder, COUNTS)
    Image.new("F", (4, 4)).save(folder / "red/100.tiff")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda folder: None,
            r"data.root=\S+pictures is not there \(looked at /.*\). Give data.root=FOLDER. Put the images",
        ),
        (a_file, r"data.root=\S+pictures is a file"),
        (nothing, r"pictures has no folders, and its folders are the classes. Put the images of each class"),
        (without_classes, r"pictures has no folders, and its folders are the classes"),
        (one_class, r"has the folder red alone, .* one class needs no network. Put the images"),
        (classes_further_down, r"has the folder flowers alone, .* Did you mean data.root=\S+/pictures/flowers\?"),
        (without_images, r"pictures has 2 folders and no images in them. Images end in one of .jpg .jpeg .png"),
        (an_empty_class, r"cat of 4 classes has no images. .* Remove the folder, or put images into it."),
        (a_small_class, r"class red has 2 images, too few to train, validate and test with: 3 are needed."),
        (
            few_images,
            r"data.val_fraction=0.1 of 9 samples is 1, fewer than the 3 classes, .* Give data.val_fraction=0.34 or more, or put images",
        ),
        (another_class_validates, r"val has the folder cat, which \S+/train has not"),
        (nothing_tests, r"test has no images. Remove the folder"),
        (nothing_trains, r"pictures has val and test, and no train with folders of classes in it."),
        (broken, r"^\S+/green/001.jpg cannot be read as an image \(UnidentifiedImageError: .*Remove or replace"),
        (empty_files, r"^\S+/blue/\d+.png, \S+, \S+, \S+, \S+ and 5 more cannot be read as images"),
        (cut_off, r"red/002.png, \S+/red/003.jpg cannot be read as images \(\w+: .*Remove or replace what is broken"),
        (
            without_a_range,
            r"red/100.tiff cannot be read as an image \(ValueError: its pixels are of mode F, 32 bits without",
        ),
    ],
)
def test_a_folder_that_cannot_be_trained_on(make: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    make(tmp_path / "pictures")
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        image_folder(str(tmp_path / "pictures"))
    assert "\n" not in str(caught.value)


def test_the_smallest_share_that_a_sentence_names_is_enough(tmp_path: Path) -> None:
    few_images(tmp_path)
    assert len(image_folder(str(tmp_path), val_fraction=0.34, test_fraction=0.34).train) == 3


def test_what_is_left_out_is_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(tmp_path, COUNTS)
    for name in ("1.heic", "2.heic", "3.txt", ".4.txt"):
        (tmp_path / "red" / name).write_text("")
    Image.new("RGB", (4, 4)).save(tmp_path / "red/5.gif")
    with caplog.at_level("INFO"):
        found = image_folder(str(tmp_path))
    assert sum(map(len, (found.train, found.val, found.test))) == sum(COUNTS.values()) + 1
    assert f"{tmp_path}: files that do not end as images do are left out: 2 .heic, 1 .txt." in caplog.text


def test_sixteen_bits_keep_their_shades(tmp_path: Path) -> None:
    shades = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "1.png")
    Image.fromarray(shades).save(tmp_path / "2.tiff")
    for name in ("1.png", "2.tiff"):
        assert np.array_equal(np.asarray(read_image(tmp_path / name))[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_size": 0}, "data.image_size=0 is not a number of pixels"),
        (
            {"image_size": 64, "resize": 32},
            "data.resize=32 is smaller than data.image_size=64, .* Give at least 64, or null for 73",
        ),
        ({"interpolation": "cubic"}, "data.interpolation='cubic' is not known. Choose one of nearest, bilinear"),
        ({"mean": [0.5]}, r"data.mean=\[0.5\] is not a list of three numbers, one for each channel of RGB"),
        ({"std": [0.5, 0.5, 0.0]}, r"data.std=\[0.5, 0.5, 0.0\] is not a list of three numbers above 0"),
        ({"crop_scale": [0.5]}, r"data.crop_scale=\[0.5\] is not a least and a largest share"),
        ({"crop_scale": [0.5, 2.0]}, r"data.crop_scale=\[0.5, 2.0\] is not a least"),
        ({"flip": 2}, "data.flip=2 is not a probability"),
        ({"workers": -1}, "data.workers=-1 is not a number of processes"),
        ({"batch_size": 0}, "data.batch_size=0 is not a number of samples"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave one of the three parts empty"),
    ],
)
def test_numbers_that_make_no_image_are_refused_before_the_folder_is_looked_at(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        image_folder("nowhere", **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_was_cut_off_is_named_by_its_path(workers: int, tmp_path: Path, run: Run) -> None:
    draw(tmp_path / "pictures", COUNTS)
    path = tmp_path / "pictures/red/003.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(
        ValueError, match=rf"^{path} cannot be read as an image \(OSError: .*truncated.*Remove or replace it.$"
    ) as caught:
        run(f"data.root={tmp_path / 'pictures'}", f"data.workers={workers}", "method=none", "data.check=false")
    # from our own `raise`, without the frames that a worker adds, so the command line prints the sentence alone
    assert plain_errors.refusal(caught.value, tmp_path, []) == str(caught.value)
