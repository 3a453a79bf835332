"""A fit resumes from no file whose parts do not belong together."""

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from support import loops
from support.data import loader
from support.nets import Regression
from torch import Tensor

from sparse_callbacks import saved_masks
from sparse_callbacks.testing.runs import fit

STEPS = 8


def saved_by(method: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of a fit, and what it holds."""
    callback = loops.METHODS[method]()
    trainer = fit(Regression(), callback, loader=loader(STEPS), max_steps=STEPS, default_root_dir=folder)
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt", torch.load(folder / "run.ckpt", weights_only=True)


def resume(method: str, content: Any, path: Path) -> dict[str, Tensor]:
    """Weights of a fit that was resumed from a file of this content."""
    torch.save(content, path)
    module, callback = Regression(), loops.METHODS[method]()
    options: dict[str, Any] = {"loader": loader(STEPS), "max_steps": STEPS + 2, "default_root_dir": path.parent}
    fit(module, callback, ckpt_path=path, **options)
    return dict(module.state_dict())


def state_in(content: Mapping[str, Any]) -> Any:
    return next(iter(content["callbacks"].values()))


@pytest.mark.parametrize("method", ["static", "set", "rigl", "dpf"])
def test_weights_that_the_masks_of_their_own_file_cut_are_refused(method: str, tmp_path: Path) -> None:
    path, content = saved_by(method, tmp_path)
    name, mask = next((n, m) for n, m in saved_masks(content).items() if not m.all())
    content["state_dict"][name][~mask] = 0.25
    cut = int((~mask).sum())
    with pytest.raises(ValueError, match=rf"run\.ckpt holds weights of {name} that its own masks cut: {cut} of them"):
        resume(method, content, path)


def test_a_file_that_was_written_within_an_optimizer_step_holds_dense_values(tmp_path: Path) -> None:
    path, content = saved_by("dpf", tmp_path)
    content["state_dict"] |= state_in(content)["dense"]
    resume("dpf", content, path)
    name, mask = next((n, m) for n, m in saved_masks(content).items() if not m.all())
    content["state_dict"][name] = state_in(content)["dense"][name] * torch.where(mask, 1.0, 0.5)  # as gates would
    with pytest.raises(ValueError, match="that its own masks cut"):
        resume("dpf", content, path)


def without(part: str, name: str) -> Callable[[Any], object]:
    return lambda content: state_in(content)[part].pop(next(key for key in state_in(content)[part] if name in key))


def a_weight_less(content: Any) -> None:
    bits = next(iter(state_in(content)["masks"].values()))["bits"]
    byte = bits.nonzero()[0]
    bits[byte] &= bits[byte] - 1  # without its lowest bit


def no_arguments(content: Any) -> None:
    state_in(content)["arguments"].clear()


DAMAGES: list[tuple[str, Callable[[Any], object], str]] = [
    ("snfs", without("aux", "smoothed/"), r"it has 'smoothed/.*' in 'aux' no more, and had it when it was saved"),
    ("rigl", without("arguments", "drop_fraction"), r"it has 'drop_fraction' in 'arguments' no more"),
    ("rigl", lambda c: state_in(c)["aux"].update(more=torch.ones(1)), r"it has 'more' in 'aux' and had it not"),
    ("dpf", without("dense", "weight"), r"no dense values of|in 'dense' no more"),
    ("gmp", a_weight_less, r"zeros, and \d+ were counted when it was saved"),
    ("dpf", a_weight_less, r"zeros, and \d+ were counted when it was saved"),
    ("rigl", no_arguments, r"its arguments are {}"),
    ("rigl", lambda c: c.update(sparse_callbacks=3), r"under 'names' is '3' and not lists of names"),
    ("rigl", lambda c: next(iter(c["sparse_callbacks"].values())).pop("zeros"), r"and not lists of names"),
]


@pytest.mark.parametrize(("method", "harm", "message"), DAMAGES)
def test_a_state_that_holds_less_than_was_saved_is_refused(
    method: str, harm: Callable[[Any], object], message: str, tmp_path: Path
) -> None:
    path, content = saved_by(method, tmp_path)
    harm(content)
    with pytest.raises(ValueError, match=message):
        resume(method, content, path)


def test_a_file_of_version_0_1_has_no_inventory(tmp_path: Path) -> None:
    path, content = saved_by("snfs", tmp_path)
    assert list(content.pop("sparse_callbacks")) == list(content["callbacks"])
    resume("snfs", content, path)


def test_a_damaged_file_that_is_not_on_this_machine_is_refused_as_a_local_one(tmp_path: Path) -> None:
    whole = saved_by("set", tmp_path)[0].read_bytes()
    flipped = bytearray(whole)
    with zipfile.ZipFile(io.BytesIO(whole)) as parts:  # between them are bytes that no checksum is of
        largest = max(parts.namelist(), key=lambda part: parts.getinfo(part).file_size)
        flipped[whole.index(parts.read(largest))] ^= 1
    files = {"whole": whole, "cut": whole[: len(whole) // 2], "flipped": bytes(flipped), "text": b"no checkpoint"}
    store = fsspec.filesystem("memory")
    for name, damaged in files.items():
        store.pipe(f"/{tmp_path.name}/{name}.ckpt", damaged)
        url = f"memory://{tmp_path.name}/{name}.ckpt"
        module = Regression()
        options: dict[str, Any] = {"loader": loader(STEPS), "max_steps": STEPS + 2, "default_root_dir": tmp_path}
        if name == "whole":
            fit(module, loops.METHODS["set"](), ckpt_path=url, **options)
            continue
        with pytest.raises(ValueError, match=rf"{name}\.ckpt is not a whole torch file"):
            fit(module, loops.METHODS["set"](), ckpt_path=url, **options)


@pytest.mark.parametrize("word", ["last", "best"])
def test_a_damaged_file_that_lightning_finds_itself_is_refused(word: str, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=2)
    options: dict[str, Any] = {"loader": loader(STEPS), "default_root_dir": tmp_path, "enable_checkpointing": True}
    fit(Regression(), loops.METHODS["set"](), keeper, max_steps=STEPS, **options)
    for path in (tmp_path / "kept").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"\.ckpt is not a whole torch file"):
        fit(Regression(), loops.METHODS["set"](), keeper, max_steps=STEPS + 2, ckpt_path=word, **options)
