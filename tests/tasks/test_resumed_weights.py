"""A run that goes on from a checkpoint has its weights from there, and asks for those that it began with no more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from omegaconf import DictConfig
from support.pictures import COLORS, draw
from torch import nn

from sparse_callbacks.tasks import early_network, models
from sparse_callbacks.tasks.build import build_method

QUIET = ("logger=[]", "report=false", "trainer.enable_progress_bar=false", "trainer.limit_train_batches=2")
NETWORKS = {"timm": "test_resnet", "torchvision": "squeezenet1_1"}


@pytest.fixture
def made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries make networks, and fail where somebody asks them for trained weights."""
    for library, function in ((timm, "create_model"), (torchvision.models, "get_model")):
        real = getattr(library, function)

        def make(name: str, real: Any = real, pretrained: bool = False, weights: Any = None, **options: Any) -> Any:
            assert not pretrained
            assert weights is None
            return real(name, **options)

        monkeypatch.setattr(library, function, make)


@pytest.mark.parametrize("library", list(NETWORKS))
@pytest.mark.usefixtures("made_anew")
def test_a_file_that_is_gone_and_a_download_are_not_asked_for(
    library: str, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    from train import train

    draw(tmp_path / "pictures", dict.fromkeys(COLORS, 10))
    network: nn.Module = getattr(models, f"{library}_classifier")((3, 32, 32), 9, NETWORKS[library])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    command = ("data=image_folder", f"data.root={tmp_path / 'pictures'}", "data.image_size=32", "data.batch_size=8")
    command += (f"model={library}", f"model.name={NETWORKS[library]}", "sparsity=0.5", "optim.lr=0.001", *QUIET)
    weights = f"model.weights={tmp_path / 'weights.pth'}"
    train(composed(*command, weights, "trainer.max_epochs=1", f"output_dir={tmp_path / 'first'}"))
    (tmp_path / "weights.pth").unlink()
    again = (*command, f"ckpt_path={tmp_path / 'first/checkpoints/last.ckpt'}", "trainer.max_epochs=2")
    found = [
        train(composed(*again, begun, f"output_dir={tmp_path / str(number)}"))
        for number, begun in enumerate((weights, "model.pretrained=true"))
    ]
    for metrics in found:
        assert metrics.pop("epochs") == 2
        del metrics["seconds"]
    assert found[0] == found[1]
    with pytest.raises(FileNotFoundError, match=r"weights\.pth is not there"):
        train(composed(*command, weights, f"output_dir={tmp_path / 'new'}"))


def test_the_network_of_a_resumed_run_is_made_as_that_of_the_first() -> None:
    network: Any = models.torchvision_classifier((3, 64, 64), 2, "googlenet", pretrained=True, read=False)
    assert network.transform_input  # which only networks with trained weights do


@pytest.mark.usefixtures("made_anew")
def test_a_look_at_the_names_of_parameters_reads_no_weights(composed: Callable[..., DictConfig]) -> None:
    cfg = composed("model=timm", "model.name=test_resnet", "model.pretrained=true", "method.include=[nothing*]", *QUIET)
    with pytest.raises(ValueError, match=r"include=\['nothing\*'\] matches no parameter"):
        early_network.refuse_unmatched_globs(cfg, build_method(cfg))
