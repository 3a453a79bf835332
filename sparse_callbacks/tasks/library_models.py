"""Classifiers of torchvision and timm, untrained, or with the weights of their library or of a file."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from sparse_callbacks.core.error_text import first_line
from sparse_callbacks.core.inspection import extra
from sparse_callbacks.tasks.library_names import refuse_unknown_timm, refuse_unknown_torchvision
from sparse_callbacks.tasks.pretrained import put_weights, read_weights, refuse_missing_weights

Shape = Sequence[int]
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def torchvision_classifier(
    input_shape: Shape,
    num_classes: int,
    name: str = "resnet18",
    pretrained: bool = False,
    weights: str | None = None,
    read: bool = True,
) -> nn.Module:
    """Any classifier of torchvision, with a first convolution that takes the channels of the data.

    Args:
        input_shape: (channels, height, width) of the images.
        num_classes: the number of outputs.
        name: the name of the network in `torchvision.models`.
        pretrained: whether it begins with torchvision's best weights, which are downloaded; its classifier begins anew where
            these are for another number of classes.
        weights: a file of weights to begin with in place of a download.
        read: whether the weights are downloaded or read; False where a checkpoint brings them.

    Raises:
        FileNotFoundError: the file of weights is not there.
        ValueError: an unknown name, weights of another network or that cannot be downloaded, or images that the network
            cannot take.
    """
    refuse_unknown_torchvision(name)
    trained = pretrained or weights is not None
    make = partial(_torchvision, name, input_shape, trained)
    model = make(num_classes)
    if read and weights is not None:
        _begin_with_file(model, weights, partial(make, num_classes + 1), name)
    elif read and pretrained:
        put_weights(
            model, _downloaded(name), partial(make, num_classes + 1), "model.pretrained=true", f"model.name={name}"
        )
    check_fits(model, name, input_shape)
    return model


def timm_classifier(
    input_shape: Shape,
    num_classes: int,
    name: str = "resnet18",
    pretrained: bool = False,
    weights: str | None = None,
    options: Mapping[str, Any] | None = None,
    read: bool = True,
) -> nn.Module:
    """Any classifier of timm.

    Args:
        input_shape: (channels, height, width) of the images.
        num_classes: the number of outputs.
        name: the name of the network in timm, with or without the tag of its weights: resnet18, resnet18.a1_in1k.
        pretrained: whether it begins with timm's weights, which are downloaded; its classifier begins anew where these are for
            another number of classes.
        weights: a file of weights, with timm's names, to begin with in place of a download.
        options: further arguments of `timm.create_model`, such as drop_path_rate.
        read: whether the weights are downloaded or read; False where a checkpoint brings them.

    Raises:
        FileNotFoundError: the file of weights is not there.
        ImportError: timm (extra ``timm``) is missing.
        ValueError: an unknown name, options that the network does not have, weights of another network or that cannot be
            downloaded, or images that the network cannot take.
    """
    refuse_unknown_timm(name, read and pretrained and weights is None)
    make = partial(_timm, name, input_shape[0], options or {})
    if read and weights is not None:
        model = make(num_classes)
        _begin_with_file(model, weights, partial(make, num_classes + 1), name)
    elif read and pretrained:
        # timm knows the weights of other origins that it has to rename
        model = with_download(name, partial(make, num_classes, pretrained=True), _timms_place(name))
    else:
        model = make(num_classes)
    check_fits(model, name, input_shape)
    return model


def _torchvision(name: str, input_shape: Shape, trained: bool, num_classes: int) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {}
    if name in WITH_AUXILIARY_HEADS:
        # with auxiliary heads these two return tuples in training, and the heads count as layers that nobody evaluates;
        # without `init_weights` they warn that its default will change; their weights are for images normalised in another way
        options = {"aux_logits": False, "init_weights": True, "transform_input": trained and input_shape[0] == 3}
    if name.startswith("vit_"):
        options = {"image_size": input_shape[-1]}
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if input_shape[0] != 3:
        _take_channels(model, input_shape[0])
    return model


def _timm(
    name: str, channels: int, options: Mapping[str, Any], num_classes: int, pretrained: bool = False
) -> nn.Module:
    timm = extra("timm", "timm")
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, in_chans=channels, num_classes=num_classes, **options
        )
    except TypeError as error:
        if not options:
            raise
        raise ValueError(
            f"model.options={dict(options)} does not suit model.name={name}: {first_line(error)}. Give arguments of "
            "timm.create_model and of the network, or null for none."
        ) from error
    return model


def _begin_with_file(model: nn.Module, weights: str, other_classes: Callable[[], nn.Module], name: str) -> None:
    refuse_missing_weights(weights)
    source = f"model.weights={weights}"
    new = put_weights(model, read_weights(Path(weights)), other_classes, source, f"model.name={name}")
    if new:
        rank_zero_info(f"{source}: {', '.join(new)} begin anew, as the trained classifier is for other classes.")


def with_download(name: str, make: Callable[[], Any], place: str) -> Any:
    """What a function makes that may download weights.

    Args:
        name: the name of the network.
        make: the function.
        place: the address of the weights.

    Raises:
        ValueError: it has failed, most likely without a connection.
    """
    # it would tell of ten tries
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return make()
    except ValueError:
        raise
    except Exception as error:  # libraries of the web raise errors of many kinds
        raise ValueError(
            f"model.pretrained=true: the weights of {name} cannot be downloaded ({type(error).__name__}: {first_line(error)}). "
            f"Fetch them from {place} where there is a connection, and give model.weights=FILE."
        ) from error


def _timms_place(name: str) -> str:
    """The address of timm's weights."""
    described = extra("timm", "timm").models.get_pretrained_cfg(name)
    return f"https://huggingface.co/{described.hf_hub_id}" if described.hf_hub_id else str(described.url)


def _downloaded(name: str) -> dict[str, Tensor]:
    """The weights of a network of torchvision, under the names of the current version."""
    from torchvision import models

    options = {"aux_logits": False} if name in WITH_AUXILIARY_HEADS else {}
    model: nn.Module = with_download(
        name, partial(models.get_model, name, weights="DEFAULT", **options), models.get_model_weights(name).DEFAULT.url
    )
    return model.state_dict()


def refuse_torchvision(
    name: str = "resnet18", pretrained: bool = False, weights: str | None = None, read: bool = True
) -> None:
    """Refuse what `torchvision_classifier` refuses whatever the data is.

    Raises:
        FileNotFoundError: the file of weights is not there.
        ValueError: an unknown name, or weights of another network.
    """
    refuse_unknown_torchvision(name)
    if not read:
        return
    refuse_missing_weights(weights)
    # a vision transformer has weights for each place in images of the data's size
    if weights is not None and not name.startswith("vit_"):
        _refuse_other_weights(weights, partial(_torchvision, name, (3,), True), name)


def refuse_timm(
    name: str = "resnet18",
    pretrained: bool = False,
    weights: str | None = None,
    options: Mapping[str, Any] | None = None,
    read: bool = True,
) -> None:
    """Refuse what `timm_classifier` refuses whatever the data is.

    Raises:
        FileNotFoundError: the file of weights is not there.
        ImportError: timm (extra ``timm``) is missing.
        ValueError: an unknown name, options that the network does not have, or weights of another network.
    """
    refuse_unknown_timm(name, read and pretrained and weights is None)
    make = partial(_timm, name, 3, options or {})
    if read and weights is not None:
        refuse_missing_weights(weights)
        _refuse_other_weights(weights, make, name)
    elif options:
        with torch.random.fork_rng(devices=[]):
            make(2)


def _refuse_other_weights(weights: str, make: Callable[[int], nn.Module], name: str) -> None:
    # two classes stand for those of the data, which is not there yet
    with torch.random.fork_rng(devices=[]):
        model = make(2)
    put_weights(model, read_weights(Path(weights)), partial(make, 3), f"model.weights={weights}", f"model.name={name}")


def _take_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one that takes `channels` channels."""
    # in every classifier of torchvision the convolution that is registered first is the one that takes the image
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    parent, _, leaf = name.rpartition(".")
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    setattr(model.get_submodule(parent), leaf, new)


def check_fits(model: nn.Module, name: str, input_shape: Shape) -> None:
    """Run the network once, so that images that are too small for its strides are refused before training.

    Raises:
        ValueError: it cannot take such images.
    """
    try:
        with torch.no_grad():
            # in evaluation, since a batch norm in training refuses a single value for each channel
            model.eval()(torch.zeros(1, *input_shape))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"model.name={name} cannot take images of shape {tuple(input_shape)}: {error}. "
            "Choose a network for small images (model=resnet20, model=wrn_22_2, model.name=resnet18) or other data."
        ) from None
    finally:
        model.train()
