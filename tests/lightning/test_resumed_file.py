"""A fit resumes from no file whose parts do not belong together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import loops
from support.data import loader
from support.nets import Regression
from torch import Tensor

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
    name, mask = next((n, m) for n, m in state_in(content)["masks"].items() if not m.all())
    content["state_dict"][name][~mask] = 0.25
    cut = int((~mask).sum())
    with pytest.raises(ValueError, match=rf"run\.ckpt holds weights of {name} that its own masks cut: {cut} of them"):
        resume(method, content, path)


def test_a_file_that_was_written_within_an_optimizer_step_holds_dense_values(tmp_path: Path) -> None:
    path, content = saved_by("dpf", tmp_path)
    content["state_dict"] |= state_in(content)["dense"]
    resume("dpf", content, path)
    name, mask = next((n, m) for n, m in state_in(content)["masks"].items() if not m.all())
    content["state_dict"][name] = state_in(content)["dense"][name] * torch.where(mask, 1.0, 0.5)  # as gates would
    with pytest.raises(ValueError, match="that its own masks cut"):
        resume("dpf", content, path)
