"""The command ``python -m sparse_callbacks.convert``: its arguments, and what it reads and writes.

python -m sparse_callbacks.convert outputs/2026-11-29/10-00-00 --pattern 2:4
"""

import argparse
import importlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from sparse_callbacks.channels.latency.command import built, count_of, json_arguments, why_not_written
from sparse_callbacks.core.checkpoint_file import is_safetensors, read_mapping, read_tensors
from sparse_callbacks.core.conversion.convert import convert
from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.files import replacing
from sparse_callbacks.reporting.compared_runs import CONFIGURATION
from sparse_callbacks.tasks import build, checks, run_data

CONVERTED = "converted.ckpt"
_ADVICE = "Give --checkpoint a file with the weights of this model, as Lightning or torch.save(model.state_dict(), FILE) writes it."


def convert_main(arguments: Sequence[str] | None = None) -> None:
    """Convert the network that the command line names, print the table and write the checkpoint.

    Args:
        arguments: words of the command line; None: those of the process.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    folder = Path(given.network)
    out = given.out or (folder / "checkpoints" if folder.is_dir() else Path()) / CONVERTED
    keep_dense = None if given.keep_dense == "none" else given.keep_dense
    options: dict[str, Any] = {
        "fit": given.fit,
        "damping": given.damping,
        "exclude": given.exclude,
        "keep_dense": keep_dense,
    }
    try:
        model, batches = _of_run(folder, given) if folder.is_dir() else _of_factory(given)
        if problem := why_not_written(out):
            raise ValueError(problem)
        made, report = convert(model.to(given.device).eval(), given.pattern, data=batches, **options)
        saved = report.checkpoint(made.cpu())
    # RuntimeError: torch, of a device that it lacks
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        parser.error(str(error))
    print(report)
    with replacing(out) as beside:
        torch.save(saved, beside)
    print(f"weights and masks in {out}")


def _of_run(folder: Path, given: argparse.Namespace) -> tuple[nn.Module, list[Any]]:
    """The trained network of a run of train.py, and batches of its training data.

    Raises:
        ValueError: the folder holds no run, or not its checkpoint.
    """
    if not (folder / CONFIGURATION).is_file():
        raise ValueError(
            f"{folder} holds no run of train.py (no {CONFIGURATION}). Give the folder of one, or MODULE:FACTORY with --checkpoint."
        )
    cfg = OmegaConf.load(folder / CONFIGURATION)
    assert isinstance(cfg, DictConfig)
    checks.take_paths_as_typed(cfg)
    pl.seed_everything(cfg.seed, verbose=False)
    data = run_data.build_data(cfg)
    # the weights are those of the checkpoint, so none are fetched
    for key in {"pretrained", "weights"} & set(cfg.model):
        cfg.model[key] = None if key == "weights" else False
    module = build.build_module(cfg, data)
    _load(module, given.checkpoint or _tested(folder, cfg))
    if given.data:
        return module, _batches_of(given.data, given.batches)
    data.prepare_data()
    data.setup("fit")
    return module, list(islice(iter(data.train_dataloader()), given.batches))


def _tested(folder: Path, cfg: DictConfig) -> Path:
    """The checkpoint of the network that the run has tested."""
    best = folder / "checkpoints" / "best.ckpt"
    return best if cfg.get("test") == "best" and best.is_file() else folder / "checkpoints" / "last.ckpt"


def _of_factory(given: argparse.Namespace) -> tuple[nn.Module, list[Any]]:
    """The network that ``MODULE:FACTORY`` makes, with the weights of --checkpoint, and the batches of --data.

    Raises:
        ValueError: one of them is missing, or does not fit.
    """
    if ":" not in given.network:
        raise ValueError(
            f"{given.network} is not a folder. Give that of a run of train.py, or MODULE:FACTORY with --checkpoint."
        )
    if given.checkpoint is None or given.data is None:
        raise ValueError(
            f"{given.network} needs --checkpoint FILE, its trained weights, and --data, batches that it runs on. Give both."
        )
    model = built(given.network, given.arguments)
    _load(model, given.checkpoint)
    return model, _batches_of(given.data, given.batches)


def _load(model: nn.Module, path: Path) -> None:
    """Load the weights of a file, which may have a prefix that all names of the model lack, such as ``model.``.

    Raises:
        ValueError: it is not there, damaged, or of another model.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there, so there are no trained weights. {_ADVICE}")
    found: Mapping[str, Any] = read_tensors(path, _ADVICE) if is_safetensors(path) else read_mapping(path, _ADVICE)
    saved = found.get("state_dict", found)
    own = model.state_dict()
    first = next(iter(own), "")
    odd: list[str] = []
    for prefix in {"": None} | dict.fromkeys(key.removesuffix(first) for key in saved if str(key).endswith(first)):
        weights = {name: saved.get(prefix + name) for name in own}
        odd = [name for name, value in weights.items() if getattr(value, "shape", None) != own[name].shape]
        if not odd:
            model.load_state_dict(weights)
            return
    raise ValueError(f"{path} is of another model: {', '.join(odd[:4])} are not in it with the same shape. {_ADVICE}")


def _batches_of(words: str, count: int) -> list[Any]:
    """The first batches of a file that ``torch.save`` wrote, or of what a callable gives.

    Args:
        words: the file, a list of batches or one tensor of samples; or ``MODULE:CALLABLE``, which gives a loader or a list.
        count: batches that are taken.

    Raises:
        ValueError: it is neither, or cannot be read.
    """
    if Path(words).is_file():
        try:
            found = torch.load(words, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch's reader finds in a file of another kind
            raise ValueError(
                f"--data {words} cannot be read ({with_class(error)}). Give a file of torch.save."
            ) from error
    elif ":" not in words:
        raise ValueError(f"--data {words} is not there. Give a file of torch.save, or MODULE:CALLABLE.")
    else:
        module, _, name = words.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)()
        except Exception as error:  # whatever the callable raises
            raise ValueError(
                f"--data {words} gives no batches ({with_class(error)}). Give MODULE:CALLABLE, which is called without arguments "
                "and gives a loader or a list of batches, or a file of torch.save."
            ) from error
    if isinstance(found, Tensor):
        found = [found]
    if not isinstance(found, Iterable) or isinstance(found, Mapping | str):
        raise ValueError(
            f"--data {words} gives no batches, but this: {type(found).__name__}. Give a loader, or a list of batches."
        )
    return list(islice(iter(found), count))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_callbacks.convert",
        description="Convert a trained network, dense or unstructured, to N:M: the largest weights of each group stay, and those of "
        "each layer are fitted to its dense outputs (AdaPrune). Prints what became of each layer, and writes weights and masks.",
    )
    add = parser.add_argument
    add("network", metavar="RUN", help="the folder of a run of train.py, or MODULE:FACTORY that gives the model")
    add("--arguments", type=json_arguments, default={}, help="of the factory, as JSON, e.g. '{\"num_classes\": 10}'")
    add("--checkpoint", type=Path, help="file with the trained weights; of a run by default those that it has tested")
    data = "MODULE:CALLABLE that gives a loader or a list of batches, or a file of torch.save; of a run by default its training data"
    add("--data", help=data)
    add("--batches", type=count_of, default=16, help="batches of the data that are taken")
    add("--pattern", default="2:4", help='N:M, or "transposable N:M"')
    add("--fit", choices=("adaprune", "absorbed", "masked"), default="adaprune", help="how weights are fitted")
    add("--damping", type=float, default=0.01, help="how strongly normal equations hold weights back; 0 for none")
    add("--keep-dense", choices=("first", "last", "both", "none"), default="both", help="layers that stay dense")
    add("--exclude", nargs="+", metavar="GLOB", help="weights that stay dense, as in exclude= of a method")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--out", type=Path, help=f"the file to write; by default checkpoints/{CONVERTED} of the run, else {CONVERTED}")
    return parser
