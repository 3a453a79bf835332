"""How the images were made that a network of a library was trained on."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from sparse_callbacks.core.inspection import extra
from sparse_callbacks.tasks.given_arguments import group_values

IMAGE_FOLDER = "sparse_callbacks.tasks.data.image_folder.image_folder"


@dataclass(frozen=True)
class ModelInputs:
    """The images that a network takes.

    Attributes:
        image_size: their height and width in pixels.
        crop_share: `image_size` as a share of the shorter side of an image of which the middle is taken.
        interpolation: nearest, bilinear, bicubic or lanczos.
        mean, std: the values that normalise each channel, in units of images scaled to 0..1.
    """

    image_size: int
    crop_share: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def for_image_folder(self, image_size: int | None) -> dict[str, Any]:
        """The arguments of `image_folder` by name.

        Args:
            image_size: the size that the user has given, which the shorter side goes by; None for that of the network.
        """
        size = self.image_size if image_size is None else image_size
        resize = math.floor(size / self.crop_share + 1e-6)  # as timm rounds; 224 / (224 / 232) is below 232 by one bit
        found = {"image_size": size, "resize": resize, "interpolation": self.interpolation}
        return found | {"mean": list(self.mean), "std": list(self.std)}


def of_torchvision(name: str = "resnet18", **_: Any) -> ModelInputs:
    """Those of the best weights of a network of torchvision."""
    from torchvision import models

    made = models.get_model_weights(name).DEFAULT.transforms()
    size = made.crop_size[0]
    share = size / made.resize_size[0]
    return ModelInputs(size, share, made.interpolation.value, tuple(made.mean), tuple(made.std))


def of_timm(name: str = "resnet18", **_: Any) -> ModelInputs:
    """Those of the weights that a name of timm stands for."""
    timm = extra("timm", "timm")
    # what timm.data.resolve_model_data_config reads of a model, without making the model
    described = timm.models.get_pretrained_cfg(name)
    found = timm.data.resolve_data_config(pretrained_cfg={} if described is None else described.to_dict())
    size = found["input_size"][-1]
    return ModelInputs(size, found["crop_pct"], found["interpolation"], tuple(found["mean"]), tuple(found["std"]))


OF_MODELS: Mapping[str, Callable[..., ModelInputs]] = {
    "sparse_callbacks.tasks.models.timm_classifier": of_timm,
    "sparse_callbacks.tasks.models.torchvision_classifier": of_torchvision,
}
"""By the `_target_` of a model what finds its images, from the values of its group."""


def of_model(cfg: DictConfig) -> ModelInputs | None:
    """The images that the network of the group `model` was trained on; None where no library knows."""
    find = OF_MODELS.get(str(cfg.model.get("_target_")))
    return None if find is None else find(**group_values(cfg, "model"))
