"""experiment=my_photos: a folder of pictures becomes an ONNX file of half the FLOPs, by one command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from support.pictures import COLORS, draw

QUIET = ("logger=[]", "report=false", "trainer.enable_progress_bar=false")


def test_one_command_from_pictures_to_onnx(composed: Callable[..., Any], tmp_path: Path) -> None:
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

    # a program that has nothing but the two files
    said = json.loads((tmp_path / "run/preprocessing.json").read_text())
    session = onnxruntime.InferenceSession(str(tmp_path / "run/slim.onnx"))
    for color in said["classes"]:
        found = [classify(session, said, tmp_path / f"pictures/{color}/{number:03}.png") for number in range(0, 20, 2)]
        assert found.count(color) >= 8


def classify(session: onnxruntime.InferenceSession, said: dict[str, Any], path: Path) -> str:
    size, shorter = said["center_crop"], said["resize_shorter_side"]
    with Image.open(path) as image:
        scale = shorter / min(image.size)
        image = image.convert(said["color"]).resize(
            [round(side * scale) for side in image.size], Image.Resampling.BILINEAR
        )
        left, top = ((side - size) // 2 for side in image.size)
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    pixels = (pixels - np.float32(said["mean"])) / np.float32(said["std"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]})
    return str(said["classes"][int(logits[0].argmax())])


def test_what_the_command_cannot_do_without_is_refused_first(
    composed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    from train import train

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is needed here .*pip install 'sparse-callbacks\[onnx\]'"):
        train(composed("experiment=my_photos", f"data.root={tmp_path}", *QUIET, f"output_dir={tmp_path / 'run'}"))
