"""Weights of a trained classifier in a network for other classes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core.checkpoint_file import is_safetensors, read_mapping, read_tensors

HOLDERS = ("state_dict", "model_state_dict", "model")
"""Keys under which checkpoints hold their weights."""
PREFIXES = ("", "model.", "module.", "_orig_mod.", "model._orig_mod.")
"""What wrappers put before the names of weights: LightningModules, DataParallel, torch.compile."""
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Beginnings of the names in heads that GoogLeNet and Inception have in training alone, and that are left out here."""
_SHOWN = 4


def refuse_missing_weights(weights: str | None) -> None:
    """Refuse a path where no file is.

    Raises:
        FileNotFoundError: the file is not there.
    """
    if weights is None or Path(weights).is_file():
        return
    reason = "is a folder" if Path(weights).is_dir() else f"is not there (looked at {Path(weights).absolute()})"
    raise FileNotFoundError(
        f"model.weights={weights} {reason}. Give a file of weights of the model, .safetensors, .pth, or a checkpoint of a run; "
        "model.pretrained=true takes those of the library."
    )


def read_weights(path: Path) -> dict[str, Any]:
    """The tensors of a file by name, as a safetensors file, a state dict or a checkpoint holds them.

    Raises:
        ImportError: safetensors (extra ``channels``) is missing.
        ValueError: the file is damaged or of another kind.
    """
    advice = "Give model.weights= a file of weights of the model."
    if is_safetensors(path):
        return read_tensors(path, advice)
    found = read_mapping(path, advice)
    held: Any = next((found[key] for key in HOLDERS if isinstance(found.get(key), Mapping)), found)
    return {str(name): value for name, value in held.items() if isinstance(value, Tensor)}


def put_weights(
    model: nn.Module, saved: Mapping[str, Tensor], other_classes: Callable[[], nn.Module], source: str, what: str
) -> list[str]:
    """Copy trained weights into a network, all of them but those of a classifier for another number of classes.

    A first convolution for another number of channels than three gets the trained one repeated over its channels, and scaled
    so that its outputs stay as large.

    Args:
        model: the network.
        saved: the trained weights by name.
        other_classes: makes the same network for another number of classes, which tells what its classifier is.
        source: where the weights are from, for messages.
        what: the network as the command line names it, for messages.

    Returns:
        The names of the weights of the classifier, where it is for another number of classes and keeps its initial ones.

    Raises:
        ValueError: the weights are of another network.
    """
    own = model.state_dict()
    prefix = max(PREFIXES, key=lambda text: len(own.keys() & _without(saved, text).keys()))
    given = {name: value for name, value in _without(saved, prefix).items() if not name.startswith(AUXILIARY)}
    _take_channels(model, own, given)
    odd = [name for name, value in own.items() if name not in given or given[name].shape != value.shape]
    # files that are older than this count of batches do not have it, and nothing is computed from it
    odd = [name for name in odd if not name.endswith("num_batches_tracked") or name in given]
    odd += sorted(given.keys() - own.keys())
    if odd:
        # a second network, whose initial weights nobody sees
        with torch.random.fork_rng(devices=[]):
            other = other_classes().state_dict()
        classifier = {name for name, value in other.items() if name in own and value.shape != own[name].shape}
        if wrong := [name for name in odd if name not in classifier]:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise ValueError(
                f"{source} is of another model than {what}: {', '.join(wrong[:_SHOWN])}{more} do not fit. Give the weights of this "
                "model, or the name of theirs."
            )
    model.load_state_dict({name: value for name, value in given.items() if name not in odd}, strict=False)
    return odd


def _without(saved: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}


def _take_channels(model: nn.Module, own: Mapping[str, Tensor], given: dict[str, Tensor]) -> None:
    """Replace the weights of a first convolution for RGB by those for the channels of the model."""
    first = next((f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), "")
    if first not in given or given[first].dim() != 4 or given[first].shape[1] != 3:
        return
    channels = own[first].shape[1]
    if channels != 3:
        repeated = given[first].repeat(1, -(-channels // 3), 1, 1)[:, :channels]
        # one channel stands for the sum of three, as a gray image has three equal ones
        given[first] = given[first].sum(1, keepdim=True) if channels == 1 else repeated * (3 / channels)
