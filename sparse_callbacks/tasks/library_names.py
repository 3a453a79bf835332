"""Names of the classifiers of torchvision and timm, and of their weights."""

import difflib
from collections.abc import Sequence
from importlib.util import find_spec

from sparse_callbacks.core.inspection import extra


def libraries_of(name: str) -> list[str]:
    """The choices of the group `model` that have a network of this name: torchvision, timm, both or none."""
    from torchvision import models

    found = ["torchvision"] if name in models.list_models(module=models) else []
    if find_spec("timm") is not None and extra("timm", "timm").is_model(name.partition(".")[0]):
        found.append("timm")
    return found


def refuse_unknown_torchvision(name: str) -> None:
    """Refuse a name that torchvision does not have a classifier of.

    Raises:
        ValueError: the name is not known.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"model.name={name!r} is not a torchvision classifier. Did you mean {_nearest(name, known)}? "
            "torchvision.models.list_models(module=torchvision.models) lists all."
        )


def refuse_unknown_timm(name: str, pretrained: bool) -> None:
    """Refuse a name that timm does not have a classifier or, with `pretrained`, weights of.

    Raises:
        ImportError: timm (extra ``timm``) is missing.
        ValueError: the name or its tag is not known, or there are no weights.
    """
    timm = extra("timm", "timm")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(
            f"model.name={name!r} is not a timm model. Did you mean {_nearest(architecture, timm.list_models())}? "
            "timm.list_models() lists all."
        )
    tagged = timm.list_pretrained(f"{architecture}.*")
    tags = ", ".join(known.partition(".")[2] for known in tagged) or "none"
    if tag and name not in tagged:
        raise ValueError(
            f"model.name={name!r}: {tag} does not name weights of {architecture}. Known: {tags}. Write {architecture} alone for the "
            "first of them."
        )
    if pretrained and not timm.models.is_model_pretrained(name):
        raise ValueError(
            f"model.pretrained=true: timm has no weights of {name}. Leave pretrained out, give model.weights=FILE, or choose a model "
            "of timm.list_pretrained()."
        )


def _nearest(name: str, known: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5])
