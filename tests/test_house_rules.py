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
from sparse_callbacks.channels import Group, channel_groups
from sparse_callbacks.latency import main, measure

PACKAGE = Path(sparse_callbacks.__file__).parent
ROOT = Path(__file__).parent.parent
CORE = sorted(p for p in PACKAGE.rglob("*.py") if not {"tasks", "testing"} & set(p.relative_to(PACKAGE).parts))
FILES = sorted(PACKAGE.rglob("*.py"))


def shown(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "sparse_callbacks":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}  # packages, imported from the root by name
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
        assert not module.startswith(("sparse_callbacks.tasks", "sparse_callbacks.testing"))


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
assert not [n for n in sys.modules if n.startswith(("sparse_callbacks.tasks", "sparse_callbacks.testing"))]
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


# ---------------------------------------------------------------------- where things are

ORDER = ["core", "channels", "methods", "lightning", "tasks", "testing"]
ROOT_MODULES = {
    "__init__.py",
    "latency.py",  # the face, and the command
    "distributions.py",
    "ops.py",
    "schedules.py",  # one-line modules for import paths that users have
}
OLD_PATHS_IN_TASKS = {"tasks/tabular.py", "tasks/tracking.py"}  # named by configurations that users have saved


def package_of(module: str) -> str:
    """The package of ours that a module belongs to; empty for the root."""
    parts = module.removeprefix("sparse_callbacks").strip(".").split(".")
    return parts[0] if parts[0] in ORDER else ""


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != PACKAGE], ids=shown)
def test_imports_follow_the_order_of_the_packages(path: Path) -> None:
    mine = ORDER.index(path.relative_to(PACKAGE).parts[0])
    for module in (m for m in imported(path) if m.startswith("sparse_callbacks")):
        package = package_of(module)
        assert package, f"{module} is the face, which imports everything"
        assert ORDER.index(package) <= mine, f"{shown(path)} imports {module} upwards"


def test_the_root_holds_the_face_the_command_and_old_import_paths() -> None:
    assert {p.name for p in PACKAGE.glob("*.py")} == ROOT_MODULES
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(ORDER)
    for path in [PACKAGE / name for name in ROOT_MODULES - {"__init__.py"}] + [
        PACKAGE / name for name in OLD_PATHS_IN_TASKS
    ]:
        statements = ast.parse(path.read_text()).body
        assert all(isinstance(s, ast.Expr | ast.Import | ast.ImportFrom | ast.If) for s in statements), shown(path)


def test_names_of_0_1_are_found_under_modules_that_are_still_there() -> None:
    assert channel_groups is sparse_callbacks.channel_groups
    assert Group.__module__ == "sparse_callbacks.channels.groups"
    assert {main.__module__, measure.__module__} == {
        "sparse_callbacks.channels.latency.command",
        "sparse_callbacks.channels.latency.measure",
    }


# private attributes of Lightning's Trainer, loops and modules that this package uses
LIGHTNING_PRIVATE = re.compile(
    r"\b(_combined_loader|_data_fetcher|_accelerator_connector|_on_before_batch_transfer|_generate_state_key|_compiler_ctx)\b"
)
# a compiled LightningModule must be recognised, also where Lightning is not imported, before it is copied
KNOWN_PRIVATE = {("core/inspection.py", "_compiler_ctx")}


def test_private_names_of_lightning_are_used_in_its_package_alone() -> None:
    outside = [p for p in FILES if p.relative_to(PACKAGE).parts[0] not in ("lightning", "tasks", "testing")]
    found = {(shown(p), name) for p in outside for name in LIGHTNING_PRIVATE.findall(p.read_text())}
    assert found <= KNOWN_PRIVATE
    assert not [p for p in outside if re.search(r"\btrainer\._|fit_loop\b", p.read_text())]


def private_names(path: Path) -> set[str]:
    """Attributes ``self._x`` that the classes of a file set or define."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and not node.name.startswith("__"):
            found.add(node.name)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return {name for name in found if name.startswith("_")}


BASES = [
    "core/method.py",
    "core/engine.py",
    "lightning/callback.py",
    "lightning/turns.py",
    "methods/drop_and_grow.py",
    "methods/gap/gap.py",
]
METHOD_FILES = sorted(
    p
    for p in PACKAGE.glob("methods/**/*.py")
    if re.search(r"^class \w+\(.*(DropAndGrow|SparsityCallback|TurnTaking)\)", p.read_text(), re.M)
)


@pytest.mark.parametrize("path", METHOD_FILES, ids=shown)
def test_no_method_uses_a_private_name_of_a_base(path: Path) -> None:
    bases = {name for base in BASES if base != shown(path) for name in private_names(PACKAGE / base)}
    used = {
        n.attr
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"
    }
    if shown(path) == "methods/gap/gap.py":  # its own subclass is no base of it
        bases -= private_names(path)
    assert not used & bases


@pytest.mark.parametrize("package", ORDER)
def test_no_public_name_is_defined_twice_in_a_package(package: str) -> None:
    where: dict[str, list[str]] = {}
    for path in sorted((PACKAGE / package).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            for name in names:
                if not name.startswith("_"):
                    where.setdefault(name, []).append(shown(path))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_a_module_begins_with_a_plain_sentence(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = text.splitlines()[0]
    assert first.endswith("."), first
    assert len(first) <= 100, first


# ---------------------------------------------------------------------- who writes to parameters


def writes(path: Path) -> Iterator[tuple[str, str]]:
    """(function, receiver) of everything in a file that changes a tensor in place: ``x.mul_()``, ``x.data``, ``x[...] =
    y``."""
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
        ("core/weights.py", "write_masked"),
        ("core/weights.py", "write_grown"),
        ("core/dense_copy.py", "_exchange"),
    }


class Still(torch.optim.SGD):
    """Takes its gradient and moves nothing."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            return closure()


@pytest.mark.parametrize("make", [RigL, SET, SNFS, Static, GMP, GaP], ids=lambda m: m.__name__)
def test_nobody_else_writes_to_a_parameter_in_training(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
