"""Paths that configurations saved by earlier versions name go on leading to the same objects."""

import pytest
from hydra.utils import get_class, get_method, get_object

from sparse_callbacks.tasks import data, loggers, tabular, tracking
from sparse_callbacks.tasks.data import module
from sparse_callbacks.tasks.data import tabular as data_tabular

# every `_target_` that conf/ named before the package was cut into folders; a saved run is repeated with them
TARGETS = [
    "pytorch_lightning.Trainer",
    "pytorch_lightning.loggers.CSVLogger",
    "pytorch_lightning.loggers.TensorBoardLogger",
    "sparse_callbacks.CTRE",
    "sparse_callbacks.ConstrainedL0",
    "sparse_callbacks.DPF",
    "sparse_callbacks.GMP",
    "sparse_callbacks.GaP",
    "sparse_callbacks.ParallelGaP",
    "sparse_callbacks.RigL",
    "sparse_callbacks.SET",
    "sparse_callbacks.SMCP",
    "sparse_callbacks.SNFS",
    "sparse_callbacks.Static",
    "sparse_callbacks.tasks.data.digits",
    "sparse_callbacks.tasks.data.torchvision_set",
    "sparse_callbacks.tasks.models.lenet5",
    "sparse_callbacks.tasks.models.lenet5_caffe",
    "sparse_callbacks.tasks.models.lenet_300_100",
    "sparse_callbacks.tasks.models.mlp",
    "sparse_callbacks.tasks.models.resnet20",
    "sparse_callbacks.tasks.models.torchvision_classifier",
    "sparse_callbacks.tasks.models.wrn_22_2",
    "sparse_callbacks.tasks.tabular.madelon",
    "sparse_callbacks.tasks.tabular.tabular",
    "sparse_callbacks.tasks.tracking.wandb_logger",
]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_a_saved_configuration_imports(target: str) -> None:
    name = target.rpartition(".")[2]
    # classes of the public API start with a capital letter, the builders are functions
    find = get_class if name[0].isupper() else get_method
    assert find(target).__name__ == name


def test_the_old_modules_give_the_objects_of_the_new_ones() -> None:
    assert tabular.madelon is data_tabular.madelon
    assert tabular.tabular is data_tabular.tabular
    assert tracking.wandb_logger is loggers.wandb_logger
    assert get_object("sparse_callbacks.tasks.tabular.tabular") is data_tabular.tabular


def test_the_package_of_data_gives_what_its_module_gave() -> None:
    assert data.MemoryData is module.MemoryData
    assert data.digits is module.digits
    assert data.torchvision_set is module.torchvision_set
