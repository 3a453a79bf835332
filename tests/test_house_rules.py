"""Rules that keep the package readable, found in its source."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.inside import count_writes, versions
from support.nets import Regression
from support.rig import fit_steps

import sparse_callbacks
from sparse_callbacks import GMP, SET, SNFS, GaP, RigL, Static

PACKAGE = Path(sparse_callbacks.__file__).parent
ROOT = Path(__file__).parent.parent
CORE = sorted(p for p in PACKAGE.rglob("*.py") if "tasks" not in p.relative_to(PACKAGE).parts)
FILES = sorted(PACKAGE.rglob("*.py"))


def shown(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def is_lightning(module: str) -> bool:
    return module.split(".")[0] in ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities")


def test_lightning_is_imported_in_the_shell_only() -> None:
    outside = [shown(p) for p in CORE if any(map(is_lightning, imported(p))) and p.parent != PACKAGE / "lightning"]
    assert outside == []


@pytest.mark.parametrize("path", CORE, ids=shown)
def test_the_core_imports_torch_and_the_standard_library_only(path: Path) -> None:
    for module in imported(path):
        root = module.split(".")[0]
        assert root in sys.stdlib_module_names or root in ("torch", "pytorch_lightning", "sparse_callbacks"), module
        assert not module.startswith("sparse_callbacks.tasks")


def test_the_package_imports_with_its_core_dependencies_alone() -> None:
    program = """
import sys, torch, pytorch_lightning
optional = ("hydra", "omegaconf", "wandb", "torchvision", "sklearn", "matplotlib", "rich", "lightning", "rigl_torch", "tensorboard",
    "torch_pruning", "safetensors", "onnx", "onnxscript", "onnxruntime")
for name in [n for n in sys.modules if n.split(".")[0] in optional]:
    del sys.modules[name]
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in optional:
            raise ModuleNotFoundError(f"{name} is not installed")
sys.meta_path.insert(0, Blocked())
import sparse_callbacks as s
for name in s.__all__:
    getattr(s, name)
assert not [n for n in sys.modules if n.startswith("sparse_callbacks.tasks")]
s.RigL(0.9).plan(torch.nn.Sequential(torch.nn.Linear(20, 20)))
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


def test_the_version_is_the_one_of_the_distribution() -> None:
    assert sparse_callbacks.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (PACKAGE / "py.typed").is_file()


def test_the_public_names_are_there() -> None:
    promised = {"RigL", "SET", "SNFS", "Static", "GMP", "DPF", "GaP", "ParallelGaP", "CTRE", "SparsityCallback"}
    promised |= {"distributions", "schedules", "ops", "combine", "horizon"}
    assert promised <= set(sparse_callbacks.__all__)


# ---------------------------------------------------------------------- who writes to parameters


def writes(path: Path) -> Iterator[tuple[str, str]]:
    """(function, receiver) of everything in a file that changes a tensor in place: ``x.mul_()``, ``x.data``, ``x[...] = y``."""
    tree = ast.parse(path.read_text())
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        for node in ast.walk(function):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and re.fullmatch(r"[a-z]\w*[^_]_", called.attr):
                yield function.name, ast.unparse(called.value)
            if isinstance(node, ast.Attribute) and node.attr == "data":
                yield function.name, ast.unparse(node)


def test_parameter_values_are_written_by_sparse_weights_alone() -> None:
    found = {(shown(p), function, receiver) for p in CORE for function, receiver in writes(p)}
    about_parameters = {f for f in found if re.search(r"param|\bp\b|\.data\b|weight", f[2]) and ".state[" not in f[2]}
    assert {(file, function) for file, function, _ in about_parameters} == {
        ("core/weights.py", "write_masked"), ("core/weights.py", "write_grown"), ("core/dense_copy.py", "_exchange")
    }  # fmt: skip


class Still(torch.optim.SGD):
    """Takes its gradient and moves nothing."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            return closure()


@pytest.mark.parametrize("make", [RigL, SET, SNFS, Static, GMP, GaP], ids=lambda m: m.__name__)
def test_nobody_else_writes_to_a_parameter_in_training(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts the writes to a tensor: beside those of the known function there is none."""
    times = {Static: {}, GaP: {"partitions": 2, "every": 2}}.get(make, {"every": 2, "stop": 8})
    callback, module = make(0.5, print_plan=False, **times), Regression(configure=lambda p: Still(p, lr=0.1))
    known = dict.fromkeys(dict(module.named_parameters()), 0)

    def wrote(name: str, writes: int) -> None:
        known[name] += writes

    count_writes(monkeypatch, wrote)
    at_first = {n: versions(p) for n, p in module.named_parameters()}
    fit_steps(tmp_path, callback, module, 8)
    assert {n: versions(p) - at_first[n] for n, p in module.named_parameters()} == known
    assert known["net.0.weight"] >= 8
    assert known["net.0.bias"] == 0


def test_every_error_says_more_than_its_kind() -> None:
    """What, why and what to do take more than a few words."""
    for path in CORE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = ast.unparse(node.exc.args[0])
                assert len(text) > 40 or "(" in text or text.isidentifier(), f"{shown(path)}:{node.lineno}: {text}"


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
