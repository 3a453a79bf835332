"""Reads some 300 damaged files and states, and counts what comes of it.

``PYTHONPATH=tests python -m support.damaged_inputs`` prints the table; ``--each 10`` tries fewer of each kind, ``--seed 1``
others, and ``--show`` prints every try that was not refused in words.
"""

import argparse
import copy
import json
import logging
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fixtures.ends import FILES, differences, same_bits
from fixtures.modules import channel_net
from scipy.io import savemat
from torch import nn

from sparse_callbacks import Static, load_compact, save_compact
from sparse_callbacks.channels.latency.table import Table
from sparse_callbacks.core.randomness import random_states, restore_random_states
from sparse_callbacks.core.saved_bits import with_truths
from sparse_callbacks.tasks.build import refuse_sparse_checkpoint
from sparse_callbacks.tasks.data.tabular import tabular
from sparse_callbacks.tasks.run_state import KEY, RunState, states_to_save
from sparse_callbacks.testing.runs import fit
from support import damage, loops
from support.data import loader
from support.nets import Regression
from support.tables import table, whole, write_csv

REFUSED, CHANGED, BARE, WRONG, RIGHT = OUTCOMES = (
    "refused in words",
    "refused, but changed",
    "bare error",
    "accepted though wrong",
    "accepted and right",
)
DAMAGES = [*damage.BYTES, "a folder", "missing"]


@dataclass(frozen=True)
class Try:
    """One damaged input.

    Attributes:
        reader: who reads it.
        damage: what was done to it.
        names: what the error must name: the path, or where a state came from.
        run: reads it; what it gives is compared with what the undamaged input gives.
    """

    reader: str
    damage: str
    names: str
    run: Callable[[], Any]


class ChangedError(AssertionError):
    """A refused input has changed something."""


def outcome(one: Try, right: Any) -> tuple[str, str]:
    """One of :data:`OUTCOMES`, and the error's text.

    Args:
        one: the damaged input.
        right: what the undamaged input gives; None where other values are as good.
    """
    try:
        found = one.run()
    except ChangedError as error:
        return CHANGED, str(error)
    except (ValueError, FileNotFoundError) as error:
        # of the very class, as a JSONDecodeError and a UnicodeDecodeError are ValueErrors too
        plain = type(error) in (ValueError, FileNotFoundError) and one.names in str(error)
        return (REFUSED if plain else BARE), f"{type(error).__name__}: {error}"
    except Exception as error:
        return BARE, f"{type(error).__name__}: {error}"
    return (RIGHT, "") if right is None or not differences(found, right, same_bits) else (WRONG, "")


OTHERS_OWN = (
    r"optimizer_states/0/(state|param_groups/0)/.*",  # torch's
    r"(lr_schedulers|loops)/.*",  # Lightning's
    r"callbacks/SET{} .*",  # a callback that is not of this package may have a state of any kind
    r"callbacks a mapping|callbacks/SET{}/masks missing",
    r"(grids|about)/[^/]+ missing",  # a table of fewer kinds of layers, or that says less
    r"run_state missing",  # of a run without train.py
    r"run_state/gradients/weight (missing|infinite|of NaN)",  # it took no part in the step, or the loss was infinite
    r"groups/.* (negative|a fraction)",  # torch judges the settings of its optimizers
)
"""Names of damages that leave something that somebody may have saved."""


# ---------------------------------------------------------------------- states of loops

STOP, FURTHER = 9, 4
HAVE_PLANS = ("static", "set", "rigl", "snfs", "gmp", "ctre", "gap")
"""Methods whose masks have a plan for each parameter."""


@cache
def loops_state(method: str) -> dict[str, Any]:
    """State of a run after some steps, of its model and of its optimizer."""
    model, optimizer, run = _begun(method)
    loops.train(run, model, optimizer, last=STOP)
    found = {"run": run.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    run.close()
    return copy.deepcopy(found)


def _begun(method: str, state: Any = None, weights: Any = None) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = loops.net()
    optimizer = loops.sgd(model)
    if state is not None:
        model.load_state_dict(weights or loops_state(method)["model"])
        optimizer.load_state_dict(copy.deepcopy(loops_state(method)["optimizer"]))
    made = loops.METHODS[method](**({"unit": "weight"} if method == "l0" else {}))
    before = copy.deepcopy(model.state_dict())
    try:
        run = loops.begin(made, model, optimizer, state=state)
    except Exception:
        changed = differences(dict(before), dict(model.state_dict()), same_bits)
        if changed or made.masks or made.progress.most() or optimizer._optimizer_step_pre_hooks:
            raise ChangedError("state= was refused after the model or the method was changed") from None
        raise
    return model, optimizer, run


def gone_on(method: str, state: Any, weights: Any = None) -> Any:
    """What a loop has after some steps from a state, with the weights of its run or others."""
    with global_states_kept():
        torch.manual_seed(0)
        model, optimizer, run = _begun(method, copy.deepcopy(state), weights)
        loops.train(run, model, optimizer, STOP, STOP + FURTHER, check=False)
        return {"model": dict(model.state_dict()), "run": {k: v for k, v in run.state_dict().items() if k in READ}}


READ = ("times", "steps", "done", "updates", "masks", "aux", "dense", "epoch")


def damaged_masks(method: str, state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """States with masks that have other counts than their run can have."""
    masks = with_truths(state)["masks"]
    for name, value in (("all True", True), ("all False", False)):
        yield f"masks {name}", state | {"masks": {n: torch.full_like(m, value) for n, m in masks.items()}}
    first = next(iter(masks))
    yield "a mask all False", state | {"masks": masks | {first: torch.zeros_like(masks[first])}}
    if method in HAVE_PLANS:
        last = next(n for n, m in reversed(masks.items()) if not m.all())
        yield "a mask all True", state | {"masks": masks | {last: torch.ones_like(masks[last])}}
        fewer = masks[last].clone()
        fewer.view(-1)[fewer.view(-1).nonzero()[0]] = False
        if method != "gmp":  # whose curve passes through every count
            yield "a mask with one weight less", state | {"masks": masks | {last: fewer}}


def tries_of_states(each: int, rng: random.Random) -> Iterator[tuple[Try, Any]]:
    """Damaged states of every method, with what the undamaged state gives."""
    for method in loops.METHODS:
        state = loops_state(method)["run"]
        right = gone_on(method, state)
        single = [*damage.damaged_values(state, OTHERS_OWN)]
        for name, damaged in [*damaged_masks(method, state), *rng.sample(single, min(each, len(single)))]:
            yield Try(f"state= of {method}", name, "state=", partial(gone_on, method, damaged)), right
        if not all(mask.all() for mask in with_truths(state)["masks"].values()):
            foreign = partial(gone_on, method, state, loops.net(seed=5).state_dict())
            yield Try(f"state= of {method}", "weights of another run", "state=", foreign), right
        others = (("a list", [1]), ("empty", {}), ("of other keys", {"a": 1}), ("a text", "x"))
        for name, damaged in others[: max(1, each // 4)]:
            yield Try(f"state= of {method}", name, "state=", partial(gone_on, method, damaged)), right


# ---------------------------------------------------------------------- files


def masks_of(path: Path) -> Any:
    model = loops.net()
    Static(from_checkpoint=str(path), print_plan=False).plan(model)
    method = Static(from_checkpoint=str(path), print_plan=False)
    loops.sparsify(method, model, loops.sgd(model), 4)
    return method.masks


def table_of(path: Path) -> Any:
    made = Table.load(path)
    made.doubts(made.about.get("input", [2, 3, 3]))
    for grid in made.grids.values():
        grid(grid.inputs[-1], grid.outputs[-1])
    return {
        "about": dict(made.about),
        "grids": {k: vars(g) for k, g in made.grids.items()},
        "fit": [made.constant, made.factor],
    }


def compact_of(path: Path) -> Any:
    model = channel_net(salt=1)
    before = copy.deepcopy(model.state_dict())
    try:
        return dict(load_compact(model, path).state_dict())
    except Exception:
        if differences(dict(before), dict(model.state_dict()), same_bits):
            raise ChangedError(f"{path} was refused after the model was changed") from None
        raise


def arrays_of(path: Path) -> Any:
    made = tabular(path.name, str(path.parent), header=path.suffix == ".csv")
    return {"inputs": whole(made)[0], "labels": whole(made)[1]}


def run_state_of(path: Path) -> Any:
    refuse_sparse_checkpoint(str(path), None)
    module: Any = nn.Linear(2, 1)
    callback, trainer = RunState(gradients=True), SimpleNamespace(ckpt_path=str(path), world_size=1, global_rank=0)
    with global_states_kept():
        before = random_states()
        checkpoint = torch.load(path, weights_only=True)
        try:
            callback.on_load_checkpoint(trainer, module, checkpoint)
            callback.on_train_start(trainer, module)
        except Exception:
            if not torch.equal(before["torch"], torch.get_rng_state()) or module.weight.grad is not None:
                raise ChangedError(f"{path} was refused after random states or gradients were changed") from None
            raise
        return {"torch": torch.get_rng_state(), "python": random.getstate()[1][-1], "grad": module.weight.grad}


@contextmanager
def global_states_kept() -> Iterator[None]:
    kept = random_states()
    try:
        yield
    finally:
        restore_random_states(kept)


def resumed(method: str) -> Callable[[Path], Any]:
    """Resumes a fit from a file."""

    def run(path: Path) -> Any:
        callback, module = loops.METHODS[method](), Regression()
        before = copy.deepcopy(module.state_dict())
        try:
            fit(module, callback, loader=loader(12), max_steps=12, ckpt_path=path, default_root_dir=path.parent)
        except Exception:
            if differences(dict(before), dict(module.state_dict()), same_bits) or callback.masks:
                raise ChangedError(f"{path} was refused after weights were loaded from it") from None
            raise
        return {"weights": dict(module.state_dict()), "masks": callback.masks}

    return run


@dataclass(frozen=True)
class Reader:
    """Who reads a kind of file.

    Attributes:
        name: its name in the table.
        path: an undamaged file.
        read: reads a file.
        content: the values in it, for damage to single values; None where there is none of that kind.
        write: writes such values to a path.
        has_checksum: changed bytes that leave a value of the right kind can be found.
        more: further damaged values by name.
    """

    name: str
    path: Path
    read: Callable[[Path], Any]
    content: Any = None
    write: Callable[[Any, Path], object] = torch.save
    has_checksum: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)


def of_two_runs(run: Mapping[str, Any]) -> dict[str, Any]:
    """Checkpoints whose parts do not belong together, made of an undamaged one."""
    key, state = next(iter(run["callbacks"].items()))
    other = {name: torch.full_like(value, 0.5) for name, value in run["state_dict"].items()}
    moved = {name: mask.flip(0).flip(-1) for name, mask in with_truths(state)["masks"].items()}
    return {
        "weights of another run": {**run, "state_dict": other},
        "masks of another run": {**run, "callbacks": {key: {**state, "masks": moved}}},
        "the inventory of another method": {**run, "sparse_callbacks": {key: {"zeros": {}, "names": {"aux": ["a"]}}}},
    }


def readers(folder: Path) -> list[Reader]:
    """Every reader of files, with a file of its own in ``folder``."""
    features, labels = table()
    csv = write_csv(folder / "a.csv", features, labels, head="a,b,c,d,label")
    np.savez(folder / "b.npz", X=features, Y=labels)
    savemat(folder / "c.mat", {"X": features, "Y": labels}, do_compression=True)
    saved = loops_state("set")
    masks = {"state_dict": saved["model"], "callbacks": {"SET{}": {"masks": saved["run"]["masks"]}}}
    torch.save(masks, folder / "static.ckpt")
    callback = loops.METHODS["rigl"]()
    fit(Regression(), callback, loader=loader(8), max_steps=8, default_root_dir=folder).save_checkpoint(
        folder / "fit.ckpt"
    )
    run = torch.load(folder / "fit.ckpt", weights_only=True)
    save_compact(channel_net(), folder / "slim.safetensors")
    state = run | {"callbacks": {}, KEY: {"random": [states_to_save()], "gradients": {"weight": torch.ones(1, 2)}}}
    torch.save(state, folder / "state.ckpt")
    words = FILES / "latency.json"

    def described(content: Any, path: Path) -> None:
        path.with_suffix(".safetensors").write_bytes((folder / "slim.safetensors").read_bytes())
        path.with_suffix(".json").write_bytes(damage.json_text(content))

    numbers = {"X": torch.from_numpy(features), "Y": torch.from_numpy(labels)}
    return [
        Reader("Static(from_checkpoint=)", folder / "static.ckpt", masks_of, masks),
        Reader("a Trainer's resume", folder / "fit.ckpt", resumed("rigl"), run, more=of_two_runs(run)),
        Reader(
            "latency table",
            words,
            table_of,
            json.loads(words.read_text()),
            lambda c, p: p.write_bytes(damage.json_text(c)),
            has_checksum=False,
        ),
        Reader(
            "compact checkpoint",
            folder / "slim.safetensors",
            compact_of,
            json.loads((folder / "slim.json").read_text()),
            described,
        ),
        Reader("table .csv", csv, arrays_of, has_checksum=False),
        Reader("table .npz", folder / "b.npz", arrays_of, numbers, lambda c, p: p.write_bytes(damage.npz_file(c))),
        Reader("table .mat", folder / "c.mat", arrays_of),
        Reader("train.py's state", folder / "state.ckpt", run_state_of, state),
    ]


def tries_of_files(folder: Path, each: int, rng: random.Random) -> Iterator[tuple[Try, Any]]:
    """Damaged files of every kind, with what the undamaged file gives."""
    (folder / "whole").mkdir()
    for number, reader in enumerate(readers(folder / "whole")):
        right = reader.read(reader.path)
        for name in rng.sample(DAMAGES, min(each, len(DAMAGES))):
            path = damage.damaged_file(reader.path, name, rng.randrange(2**30), folder / f"{number} {name}")
            found = right if reader.has_checksum or name not in damage.LEAVE_VALUES else None
            yield Try(reader.name, name, path.stem, partial(reader.read, path)), found
        single = [] if reader.content is None else [*damage.damaged_values(reader.content, OTHERS_OWN)]
        for index, (name, damaged) in enumerate([*reader.more.items(), *rng.sample(single, min(each, len(single)))]):
            path = folder / f"{number} value {index}" / reader.path.name
            path.parent.mkdir()
            try:
                reader.write(damaged, path)
            except Exception:  # no file can hold this value
                continue
            yield Try(reader.name, name, path.stem, partial(reader.read, path)), right


def counted(each: int, seed: int, folder: Path) -> tuple[dict[str, Counter[str]], list[str]]:
    """How many inputs of each reader came to which outcome, and a line for each that was not refused in words.

    Args:
        each: damaged inputs of each reader, of files and of values.
        seed: which of the possible damages are tried.
        folder: an empty folder.
    """
    rng, found, lines = random.Random(seed), {}, []
    damage.MARKER.unlink(missing_ok=True)
    for one, right in [*tries_of_files(folder, each, rng), *tries_of_states(each, rng)]:
        result, text = outcome(one, right)
        found.setdefault(one.reader, Counter())[result] += 1
        if result != REFUSED:
            lines.append(f"{result}: {one.reader}, {one.damage[-90:]}: {text[:300]!r}")
    if damage.MARKER.exists():
        lines.append(f"{WRONG}: code in a file was executed")
    return found, lines


def as_table(found: dict[str, Counter[str]]) -> str:
    rows = [["", *OUTCOMES], *([name, *(str(counts[o]) for o in OUTCOMES)] for name, counts in found.items())]
    total = sum(found.values(), Counter[str]())
    rows.append([f"{total.total()} in all", *(str(total[o]) for o in OUTCOMES)])
    return "\n".join(f"{name:26}" + "".join(f"{cell:>23}" for cell in cells) for name, *cells in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        found, lines = counted(given.each, given.seed, Path(folder))
    print("\n".join(lines) if given.show else "", as_table(found), sep="\n")


def quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
