"""experiment=my_photos: a folder of pictures becomes an ONNX file of half the FLOPs, by one command."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from support.pictures import COLORS, draw

from sparse_callbacks.tasks.data.image_files import read_image
from sparse_callbacks.tasks.data.image_folder import image_folder

PAGE = ROOT / "docs/your_data.md"

QUIET = ("logger=[]", "report=false", "trainer.enable_progress_bar=false")


def test_one_command_from_pictures_to_onnx(
    composed: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train import train

    draw(tmp_path / "pictures", dict.fromkeys(COLORS, 20))
    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    small = ("data.image_size=32", "data.workers=0", "data.batch_size=16", "trainer.max_epochs=8", "method.every=2")
    # a small network in the place of ResNet-18
    network = ("model=timm", "model.name=test_resnet", f"model.weights={weights}")
    command = ("experiment=my_photos", f"data.root={tmp_path / 'pictures'}", *network)
    metrics = train(composed(*command, *small, *QUIET, f"output_dir={tmp_path / 'run'}"))
    assert metrics["channels/cost"] <= 0.5
    # the budget counts what the knapsack chooses among, steps of 8 channels
    assert 0.4 < metrics["slim/flops_share"] <= 0.5
    assert metrics["slim/onnx_difference"] < 1e-4
    assert metrics["slim/test/acc"] == metrics["test/acc"] > 0.8  # by chance 0.33

    # the program of the page, which has nothing but the two files
    program = page_program(tmp_path)
    photos = sorted((tmp_path / "pictures").rglob("*.*"))
    upright = Image.new("RGB", (60, 40), "red")
    upright.getexif()[0x0112] = 6
    photos.append(tmp_path / "turned.jpg")
    upright.save(photos[-1], exif=upright.getexif())
    capsys.readouterr()
    program.main(tmp_path / "run", *photos)
    said = [line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines()]
    assert [photo for photo, _ in said] == [str(photo) for photo in photos]
    assert sum(Path(photo).parent.name == found for photo, found in said) >= 48  # of 60


@pytest.mark.parametrize("size", [(60, 41), (33, 79), (50, 50)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_program_of_the_page_makes_the_very_inputs_of_the_run(
    size: tuple[int, int], interpolation: str, tmp_path: Path
) -> None:
    draw(tmp_path / "pictures", dict.fromkeys(COLORS, 10))
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    photo.getexif()[0x0112] = 6  # lies on its side
    path = tmp_path / "pictures/blue/000.jpg"
    photo.save(path, exif=photo.getexif(), quality=95)
    path.with_suffix(".png").unlink()
    data = image_folder(str(tmp_path / "pictures"), image_size=31, resize=37, interpolation=interpolation)
    found = data.train.plain(read_image(path)).numpy()
    made = page_program(tmp_path).prepared(path, data.preprocessing)[0]
    np.testing.assert_allclose(made, found, rtol=0, atol=2e-6)  # torch scales by another order of operations


def page_program(folder: Path) -> Any:
    """The program that docs/your_data.md asks the reader to save, as a module."""
    (text,) = re.findall(r"^```python file=classify.py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (folder / "classify.py").write_text(text)
    return SimpleNamespace(**runpy.run_path(str(folder / "classify.py")))


def test_what_the_command_cannot_do_without_is_refused_first(
    composed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    from train import train

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is needed here .*pip install 'sparse-callbacks\[onnx\]'"):
        train(composed("experiment=my_photos", f"data.root={tmp_path}", *QUIET, f"output_dir={tmp_path / 'run'}"))
