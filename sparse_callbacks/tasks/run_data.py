"""The data module of a run, which makes images as the network is used to them."""

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from sparse_callbacks.core.files import replacing
from sparse_callbacks.tasks import model_inputs
from sparse_callbacks.tasks.data.module import ImageData
from sparse_callbacks.tasks.given_arguments import group_values

PREPROCESSING = "preprocessing.json"
"""The file that says how an image becomes an input of the network, and which class an output is."""


def build_data(cfg: DictConfig) -> pl.LightningDataModule:
    """The data module of the group `data`.

    Values of `data=image_folder` that are null are those of the model, where it is one of timm or torchvision. Images of other
    sets have sizes of their own, and get the mean and the standard deviation of weights that the network begins with.
    """
    known = model_inputs.of_model(cfg)
    if known is not None and str(cfg.data.get("_target_")) == model_inputs.IMAGE_FOLDER:
        given = group_values(cfg, "data")
        filled = known.for_image_folder(given.get("image_size"))
        absent = {name: value for name, value in filled.items() if given.get(name) is None}
        folder: pl.LightningDataModule = instantiate(cfg.data, **absent)
        return folder
    data: pl.LightningDataModule = instantiate(cfg.data)
    trained = cfg.model.get("pretrained") or cfg.model.get("weights")
    if known is not None and trained and isinstance(data, ImageData) and data.input_shape[0] == len(known.mean):
        data.mean, data.std = torch.tensor(known.mean), torch.tensor(known.std)
    return data


@rank_zero_only
def write_preprocessing(data: Any, folder: Path) -> None:
    """Write preprocessing.json for data that says how an image becomes an input of the network, as images of a folder do.

    Args:
        data: the data module.
        folder: the folder of the run.
    """
    if (said := getattr(data, "preprocessing", None)) is not None:
        with replacing(folder / PREPROCESSING) as path:
            path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
