"""Names of keys, groups and choices of the command line, and the nearest one to a wrong name."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sparse_callbacks.core.similar_names import close

ELSEWHERE = {
    "batch": "data.batch_size",
    "cuda": "trainer.accelerator",
    "dataset": "data",
    "device": "trainer.devices",
    "epochs": "trainer.max_epochs",
    "gpu": "trainer.accelerator",
    "gpus": "trainer.devices",
    "learning_rate": "optim.lr",
    "load_from": "ckpt_path",
    "network": "model",
    "optimizer": "optim",
    "resume": "ckpt_path",
    "steps": "trainer.max_steps",
    "wd": "optim.weight_decay",
}
"""What other programs call a key, by the last part of its name."""


@dataclass(frozen=True)
class Names:
    """What a command line may name.

    Args:
        keys: the keys, with dots, that the chosen groups have.
        groups: the choices of each group.
        empty: those of the keys whose value is null.
        elsewhere: by key, with dots, the choices of its group that have it.
    """

    keys: Sequence[str]
    groups: Mapping[str, Sequence[str]]
    empty: Sequence[str] = ()
    elsewhere: Mapping[str, Sequence[str]] = field(default_factory=dict)


@functools.cache
def root_names(conf: Path) -> set[str]:
    """Root keys and groups, of the files alone."""
    keys = OmegaConf.load(conf / "train.yaml")
    return {str(key) for key in keys} | {path.name for path in conf.iterdir() if path.is_dir()}


def known_names(conf: Path, arguments: Sequence[str]) -> Names:
    """The names that a command line may have, whose own choices of groups decide which keys there are.

    Args:
        conf: the folder of the configuration.
        arguments: the arguments of the command line.
    """
    folders = [value for flag, value in itertools.pairwise(arguments) if flag in ("--config-dir", "-cd")]
    folders += [value.partition("=")[2] for value in arguments if value.startswith("--config-dir=")]
    groups = _groups(conf)
    chosen = tuple(text for text in arguments if "=" in text and text.partition("=")[0] in groups)
    values = _values(conf, tuple(folders), chosen)
    empty = [key for key, value in values.items() if value is None]
    return Names(list(values), groups, empty, _keys_of_choices(conf))


@functools.cache  # reads every file of the configuration
def _groups(conf: Path) -> dict[str, list[str]]:
    """The choices of each group."""
    with initialize_config_dir(str(conf), version_base=None):
        loader = GlobalHydra.instance().config_loader()
        return {group: loader.get_group_options(group) for group in loader.list_groups("") if group != "hydra"}


@functools.cache  # composing takes a while
def _values(conf: Path, folders: tuple[str, ...], chosen: tuple[str, ...]) -> dict[str, Any]:
    """The values under these choices of groups, by their keys with dots."""
    search = [f"hydra.searchpath=[{','.join(f'file://{Path(folder).absolute()}' for folder in folders)}]"]
    with initialize_config_dir(str(conf), version_base=None):
        # a choice may be the very name that is wrong
        for overrides in ([*chosen, *search], search, []):
            try:
                cfg: Any = OmegaConf.to_container(compose("train", overrides=overrides), resolve=False)
            except Exception:
                continue
            return dict(_dotted(cfg))
    return {}


@functools.cache
def _keys_of_choices(conf: Path) -> dict[str, list[str]]:
    """By key, with dots, the choices of its group whose files have it."""
    found: dict[str, list[str]] = {}
    for path in sorted(conf.glob("*/*.yaml")):
        group = path.parent.name
        # files of these groups have keys of the root and of other groups
        if group not in ("experiment", "sweep", "shrinkbench"):
            for key in map(str, OmegaConf.load(path)):
                found.setdefault(f"{group}.{key}", []).append(path.stem)
    return found


def _dotted(cfg: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in cfg.items():
        yield f"{before}{key}", value
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{before}{key}.")


def nearest_key(key: str, names: Names) -> str | None:
    """The key or group that somebody has meant by a key that is not there; None where none is like it.

    Args:
        key: the wrong key, with dots.
        names: the known names.
    """
    parent, _, leaf = key.rpartition(".")
    beside = [name.rpartition(".")[2] for name in names.keys if name.rpartition(".")[0] == parent and name != parent]
    if not parent:
        beside += list(names.groups)
    leaves: dict[str, str] = {}
    for name in names.keys:
        leaves.setdefault(name.rpartition(".")[2], name)
    if (small := key.lower()) != key and (small in names.keys or small in names.groups):
        return small
    # the very name in another group is meant more likely than a name that is only like it
    if found := leaves.get(leaf):
        return found
    other = (name for name in names.elsewhere if name.rpartition(".")[2] == leaf)
    if not parent and (found := ELSEWHERE.get(leaf) or next(other, None)):
        return found
    if found := close(leaf, beside):
        return f"{parent}.{found}" if parent else found
    if found := ELSEWHERE.get(leaf):
        return found
    if found := close(leaf, leaves, cutoff=0.75):
        return leaves[found]
    return close(key, names.keys, cutoff=0.75)
