"""Classifiers of torchvision and timm: their names, the weights they begin with, and the images they are used to."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import save_file
from support.pictures import COLORS, draw
from torch import Tensor, nn

from sparse_callbacks.tasks import models, run_data
from sparse_callbacks.tasks.data.loaders import Samples
from sparse_callbacks.tasks.data.module import ImageData
from sparse_callbacks.tasks.library_models import refuse_timm, refuse_torchvision
from sparse_callbacks.tasks.model_inputs import of_timm, of_torchvision

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
TIMM = "test_resnet"  # 373,000 weights
State = dict[str, Tensor]


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same(some: State, other: State) -> set[str]:
    return {name for name, value in some.items() if name in other and torch.equal(value, other[name])}


def timm_file(path: Path, classes: int = 7) -> State:
    """Weights of a network of timm in a file, all of which are other numbers than initial ones."""
    state: State = timm.create_model(TIMM, num_classes=classes).state_dict()
    state = {name: torch.rand_like(value) if value.is_floating_point() else value + 3 for name, value in state.items()}
    torch.save(state, path)
    return state


# ---------------------------------------------------------------------- untrained


def test_torchvision_takes_one_channel_and_keeps_the_rest() -> None:
    model = models.torchvision_classifier(MNIST, 10, name="resnet18")
    assert model.conv1.weight.shape == (64, 1, 7, 7)
    assert model.training
    assert size(models.torchvision_classifier((3, 64, 64), 1000)) == 11_689_512


def test_timm_takes_channels_classes_and_options() -> None:
    model: Any = models.timm_classifier((4, 32, 32), 10, TIMM, options={"drop_rate": 0.3})
    assert model(torch.rand(2, 4, 32, 32)).shape == (2, 10)
    assert (model.drop_rate, model.training) == (0.3, True)


def test_unknown_torchvision_name() -> None:
    with pytest.raises(ValueError, match=r"model.name='resnet19' is not a torchvision classifier. Did you mean resnet"):
        models.torchvision_classifier(CIFAR, 10, name="resnet19")


@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [(models.torchvision_classifier, "squeezenet1_1", (3, 8, 8)), (models.timm_classifier, "test_vit", (3, 50, 50))],
)
def test_images_that_a_network_cannot_take(make: Callable[..., nn.Module], name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"model.name={name} cannot take images of shape \(3, {shape[1]}, {shape[1]}\)"
    ):
        make(shape, 10, name=name)


def test_a_vision_transformer_of_torchvision_takes_images_of_the_datas_size() -> None:
    with torch.device("meta"):  # without the time that 88 million initial weights take
        assert models.torchvision_classifier((3, 32, 32), 5, "vit_b_32").image_size == 32


# ---------------------------------------------------------------------- weights of a file


@pytest.mark.parametrize("classes", [7, 3])
def test_a_file_gives_all_weights_but_those_of_a_classifier_for_other_classes(
    classes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = timm_file(tmp_path / "weights.pth")
    state = torch.get_rng_state()
    fresh = timm.create_model(TIMM, num_classes=classes).state_dict()
    torch.set_rng_state(state)
    with caplog.at_level("INFO"):
        found = models.timm_classifier(CIFAR, classes, TIMM, weights=str(tmp_path / "weights.pth")).state_dict()
    new = set() if classes == 7 else {"fc.weight", "fc.bias"}
    assert same(found, saved) == saved.keys() - new
    # as a network without weights of a file has them
    assert same(found, fresh) >= new
    assert ("fc.weight, fc.bias begin anew" in caplog.text) == bool(new)


@pytest.mark.parametrize("kind", ["state_dict", "model", "module.", "model.", "safetensors"])
def test_files_of_many_kinds(kind: str, tmp_path: Path) -> None:
    saved = timm_file(tmp_path / "plain.pth")
    path = tmp_path / "weights.file"
    if kind == "safetensors":
        save_file(saved, path)
    elif kind.endswith("."):
        # as Lightning writes them, with metrics beside the network
        torch.save(
            {
                "state_dict": {f"{kind}{name}": value for name, value in saved.items()} | {"seen": torch.zeros(1)},
                "epoch": 3,
            },
            path,
        )
    else:
        torch.save({kind: saved, "epoch": 3}, path)
    found = models.timm_classifier(CIFAR, 7, TIMM, weights=str(path)).state_dict()
    assert same(found, saved) == saved.keys()


def test_torchvision_begins_with_a_file_that_is_older_than_a_buffer(tmp_path: Path) -> None:
    saved = torchvision.models.mobilenet_v3_small(num_classes=1000).state_dict()
    old = {name: value for name, value in saved.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    found = models.torchvision_classifier(
        CIFAR, 3, "mobilenet_v3_small", weights=str(tmp_path / "old.pth")
    ).state_dict()
    assert same(found, old) == old.keys() - {"classifier.3.weight", "classifier.3.bias"}


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_first_convolution_for_other_channels_gives_what_it_gave(channels: int, tmp_path: Path) -> None:
    saved = timm_file(tmp_path / "weights.pth")
    model: Any = models.timm_classifier((channels, 32, 32), 7, TIMM, weights=str(tmp_path / "weights.pth"))
    image = torch.rand(2, 1, 32, 32)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    name = next(name for name, m in model.named_modules() if m is first)
    gray = nn.functional.conv2d(
        image.expand(-1, 3, -1, -1), saved[f"{name}.weight"], stride=first.stride, padding=first.padding
    )
    found = first(image.expand(-1, channels, -1, -1)).detach()
    if channels == 1:
        torch.testing.assert_close(found, gray)
    # else the channels of RGB have unequal weights, and the outputs are as large
    assert 0.7 < float(found.mean() / gray.mean()) < 1.4


def other_model(saved: State) -> State:
    return torchvision.models.resnet18().state_dict()


def another_width(saved: State) -> State:
    return saved | {"layer1.0.conv1.weight": torch.zeros(3, 3, 3, 3)}


def a_layer_more(saved: State) -> State:
    return saved | {"layer9.weight": torch.zeros(3)}


def a_layer_less(saved: State) -> State:
    return {name: value for name, value in saved.items() if name != "layer1.0.conv1.weight"}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (other_model, r": conv1.0.weight, .* and \d+ more do not fit"),
        (another_width, r": layer1.0.conv1.weight do not fit"),
        (a_layer_more, r": layer9.weight do not fit"),
        (a_layer_less, r": layer1.0.conv1.weight do not fit"),
    ],
)
@pytest.mark.parametrize("classes", [7, 3])
def test_weights_of_another_model(change: Callable[[State], State], names: str, classes: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(change(timm_file(path)), path)
    sentence = (
        rf"model.weights={path} is of another model than model.name=test_resnet{names}. Give the weights of this model"
    )
    with pytest.raises(ValueError, match=sentence):
        models.timm_classifier(CIFAR, classes, TIMM, weights=str(path))
    with pytest.raises(ValueError, match=sentence):
        refuse_timm(TIMM, weights=str(path))


def test_what_is_looked_at_early_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    """So that a run with a file of weights has the classifier that one without has."""
    timm_file(tmp_path / "weights.pth")
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "squeeze.pth")
    state = torch.get_rng_state()
    refuse_timm(TIMM, weights=str(tmp_path / "weights.pth"))
    refuse_timm(TIMM, options={"drop_rate": 0.1})
    refuse_torchvision("squeezenet1_1", weights=str(tmp_path / "squeeze.pth"))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------- weights of a library


def test_torchvisions_weights_are_its_own_but_for_the_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = torchvision.models.squeezenet1_1(num_classes=1000)
    real = torchvision.models.get_model

    def get_model(name: str, weights: str | None = None, **options: Any) -> nn.Module:
        return trained if weights == "DEFAULT" else real(name, weights=weights, **options)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    found = models.torchvision_classifier((3, 64, 64), 3, "squeezenet1_1", pretrained=True).state_dict()
    saved = trained.state_dict()
    assert same(found, saved) == saved.keys() - {"classifier.1.weight", "classifier.1.bias"}


def test_timm_gets_its_weights_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved = timm_file(tmp_path / "weights.pth", classes=1000)
    real = timm.create_model

    def create_model(name: str, **options: Any) -> nn.Module:
        return real(name, **options, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth"), "hf_hub_id": None})

    monkeypatch.setattr(timm, "create_model", create_model)
    found = models.timm_classifier(CIFAR, 3, TIMM, pretrained=True).state_dict()
    assert same(found, saved) == saved.keys() - {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("make", "library", "function", "place"),
    [
        (models.timm_classifier, timm, "create_model", "https://huggingface.co/timm/resnet18.a1_in1k"),
        (
            models.torchvision_classifier,
            torchvision.models,
            "get_model",
            "https://download.pytorch.org/models/resnet18-",
        ),
    ],
)
def test_weights_that_cannot_be_downloaded(
    make: Callable[..., nn.Module], library: Any, function: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(library, function)

    def fail(name: str, pretrained: bool = False, weights: Any = None, **options: Any) -> nn.Module:
        if pretrained or weights:
            raise ConnectionError("no route\nto the host")
        made: nn.Module = real(name, **options)
        return made

    monkeypatch.setattr(library, function, fail)
    with pytest.raises(
        ValueError,
        match=rf"the weights of resnet18 cannot be downloaded \(ConnectionError: no route.*{place}.*model.weights=FILE",
    ):
        make(CIFAR, 3, "resnet18", pretrained=True)


def test_timm_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm is needed here .*pip install 'sparse-callbacks\[timm\]'"):
        models.timm_classifier(CIFAR, 10)


# ---------------------------------------------------------------------- images


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "vit_base_patch16_clip_224.openai", "inception_v3"])
def test_timms_images_are_those_of_its_data_config(name: str) -> None:
    model = SimpleNamespace(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    config, found = timm.data.resolve_model_data_config(model), of_timm(name)
    assert (found.image_size, found.crop_share, found.interpolation) == (
        config["input_size"][1],
        config["crop_pct"],
        config["interpolation"],
    )
    assert (found.mean, found.std) == (tuple(config["mean"]), tuple(config["std"]))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder, dict.fromkeys(COLORS, 10))
    return folder


@pytest.mark.parametrize(
    ("library", "name"),
    [("timm", "resnet18"), ("timm", "test_resnet"), ("torchvision", "resnet50"), ("torchvision", "inception_v3")],
)
def test_a_folder_is_read_as_the_library_reads_images(
    library: str, name: str, pictures: Path, composed: Callable[..., DictConfig]
) -> None:
    cfg = composed(
        "data=image_folder", f"data.root={pictures}", f"model={library}", f"model.name={name}", "data.batch_size=1"
    )
    data: Any = run_data.build_data(cfg)
    if library == "timm":
        transform = timm.data.create_transform(
            **timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
        )
    else:
        transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    with Image.open(data.val.files[0][0]) as image:
        expected = transform(image.convert("RGB"))
    images, _ = next(iter(data.val_dataloader()))
    torch.testing.assert_close(images[0], expected)


def test_given_values_go_before_those_of_the_model(pictures: Path, composed: Callable[..., DictConfig]) -> None:
    given = ("data=image_folder", f"data.root={pictures}", "data.image_size=64", "data.mean=[0.1,0.2,0.3]")
    found = run_data.build_data(composed(*given, "model=timm", "model.name=test_resnet")).preprocessing  # type: ignore[attr-defined]
    assert (found["center_crop"], found["resize_shorter_side"]) == (64, 67)  # 64 / 0.95
    assert (found["mean"], found["std"], found["interpolation"]) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5], "bilinear")


def test_trained_weights_see_a_set_in_memory_with_their_own_mean(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_channels(channels: int) -> ImageData:
        samples = Samples(torch.rand(6, channels, 8, 8), torch.arange(6))
        return ImageData(samples, samples, samples, num_classes=6, mean=(0.4,) * channels, batch_size=2)

    for channels, pretrained, mean in ((3, "true", 0.5), (3, "false", 0.4), (1, "true", 0.4)):
        monkeypatch.setattr(run_data, "instantiate", lambda group, channels=channels: with_channels(channels))
        data: Any = run_data.build_data(composed("model=timm", f"model.name={TIMM}", f"model.pretrained={pretrained}"))
        assert data.mean.tolist() == pytest.approx([mean] * channels)
    assert of_torchvision("resnet18").mean == (0.485, 0.456, 0.406)
