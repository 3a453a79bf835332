"""Rules that keep the package readable, found in its source."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.inside import count_writes, versions
from support.nets import Regression
from support.rig import fit_steps

import sparse_callbacks
from sparse_callbacks import GMP, SET, SNFS, GaP, RigL, Static, methods
from sparse_callbacks.channels import Group, channel_groups
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.method import Method
from sparse_callbacks.latency import main, measure

PACKAGE = Path(sparse_callbacks.__file__).parent
ROOT = Path(__file__).parent.parent
# the command converts runs of train.py, so it is one of tasks
CORE = sorted(
    p for p in PACKAGE.rglob("*.py") if not {"tasks", "testing", "convert.py"} & set(p.relative_to(PACKAGE).parts[:1])
)
FILES = sorted(PACKAGE.rglob("*.py"))


def shown(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file, which nobody changes."""
    return ast.parse(path.read_text())


@functools.cache
def syntax_of(cls: type) -> ast.Module:
    """The same of a class.

    Raises:
        OSError: it was made by type(), without a body.
    """
    return ast.parse(textwrap.dedent(inspect.getsource(cls)))


@pytest.fixture(scope="module", autouse=True)
def _trees_are_forgotten() -> Iterator[None]:
    """Millions of small objects, among which every garbage collection of later tests would search."""
    yield
    for cached in (parsed, syntax_of):
        cached.cache_clear()


@functools.cache
def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "sparse_callbacks":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}  # packages, imported from the root by name
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and re.search(r"import_module|__import__", ast.unparse(node.func)):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def is_lightning(module: str) -> bool:
    return module.split(".")[0] in ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities")


def test_lightning_is_imported_in_the_shell_only() -> None:
    outside = [shown(p) for p in CORE if any(map(is_lightning, imported(p))) and p.parent != PACKAGE / "lightning"]
    assert outside == []


@pytest.mark.parametrize("path", CORE, ids=shown)
def test_the_core_imports_torch_and_the_standard_library_only(path: Path) -> None:
    ours = {"torch", "pytorch_lightning", "sparse_callbacks"}
    if path.parent == PACKAGE / "reporting":
        # jinja2 comes with torch; matplotlib is imported for its types alone, and else by name when it is needed
        ours |= {"jinja2", "matplotlib"}
    for module in imported(path):
        root = module.split(".")[0]
        assert root in sys.stdlib_module_names or root in ours, module
        assert not module.startswith(("sparse_callbacks.tasks", "sparse_callbacks.testing"))


def test_the_package_imports_with_its_core_dependencies_alone() -> None:
    program = """
import sys, torch, pytorch_lightning
optional = ("hydra", "omegaconf", "wandb", "torchvision", "sklearn", "matplotlib", "rich", "lightning", "rigl_torch", "tensorboard",
    "safetensors", "onnx", "onnxscript", "onnxruntime")
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


def test_the_version_of_the_distribution_is_read_from_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert ROOT / project["tool"]["hatch"]["version"]["path"] == PACKAGE / "__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", sparse_callbacks.__version__)
    assert (PACKAGE / "py.typed").is_file()


def test_the_public_names_are_there() -> None:
    promised = {"RigL", "SET", "SNFS", "Static", "GMP", "DPF", "GaP", "ParallelGaP", "CTRE", "SparsityCallback"}
    promised |= {"distributions", "schedules", "ops", "combine", "horizon"}
    assert promised <= set(sparse_callbacks.__all__)


# ---------------------------------------------------------------------- where things are

ORDER = ["core", "channels", "methods", "reporting", "lightning", "tasks", "testing"]
HOSTLESS = ("core", "channels", "methods")
ROOT_MODULES = {
    "__init__.py",
    "allocate.py",
    "convert.py",
    "latency.py",
    "compare.py",
    "report.py",  # the face, and the commands
    "distributions.py",
    "ops.py",
    "schedules.py",  # one-line modules for import paths that users have
}
# the face imports each public name when it is first asked for
NAMES_IN_THE_ROOT = {"__all__", "__version__", "__getattr__", "__dir__", "_CALLBACKS", "_MODULE_OF", "_MODULES"}
# a run writes its page when it ends, and records know nothing of pages: found when it is called, in one place
UPWARDS = {("core/record/page.py", "sparse_callbacks.reporting.page")}
OLD_PATHS_IN_TASKS = {"tasks/tabular.py", "tasks/tracking.py"}  # named by configurations that users have saved


def package_of(module: str) -> str:
    """The package of ours that a module belongs to; empty for the root."""
    parts = module.removeprefix("sparse_callbacks").strip(".").split(".")
    return parts[0] if parts[0] in ORDER else ""


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != PACKAGE], ids=shown)
def test_imports_follow_the_order_of_the_packages(path: Path) -> None:
    mine = ORDER.index(path.relative_to(PACKAGE).parts[0])
    for module in (m for m in imported(path) if m.startswith("sparse_callbacks") and (shown(path), m) not in UPWARDS):
        package = package_of(module)
        assert package, f"{module} is the face, which imports everything"
        assert ORDER.index(package) <= mine, f"{shown(path)} imports {module} upwards"


def test_the_root_holds_the_face_the_command_and_old_import_paths() -> None:
    assert {p.name for p in PACKAGE.glob("*.py")} == ROOT_MODULES
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(ORDER)
    for path in [PACKAGE / name for name in [*ROOT_MODULES, *OLD_PATHS_IN_TASKS]]:
        tree = parsed(path)
        assert {*defined_names(tree.body)} <= NAMES_IN_THE_ROOT, f"{shown(path)} is for names alone"


def test_names_of_0_1_are_found_under_modules_that_are_still_there() -> None:
    assert channel_groups is sparse_callbacks.channel_groups
    assert Group.__module__ == "sparse_callbacks.channels.groups"
    assert {main.__module__, measure.__module__} == {
        "sparse_callbacks.channels.latency.command",
        "sparse_callbacks.channels.latency.measure",
    }


# private names of torch and the standard library that have no public counterpart
THEIR_PRIVATE = {
    "_BatchNorm",  # the common base of torch's batch norms
    "_parameters",  # the parameters of one module alone, None where it has none
    "_buffers",  # the same for buffers
    "_modules",  # the same for children, in the order of registration
    "_forward_hooks",  # the forward hooks of a module, from which one may take itself away
    "_backward_hooks",  # functions that a tensor's gradient is given to
    "_post_accumulate_grad_hooks",  # the same, once it is accumulated
    "_version",  # how often a tensor was written in place
    "_new_with_weak_ptr",  # the memory behind a weak reference, None where nobody holds it any more
    "_reversed_padding_repeated_twice",  # a convolution's padding as torch pads with it
    "_schema",  # the names and defaults of an operation's arguments
    "_C",  # torch's own module, for the next one
    "_current_graph_task_id",  # whether a backward pass is running
    "_orig_mod",  # the module under torch.compile's wrapper
    "_step_supports_amp_scaling",  # an optimizer unscales within its step, as fused ones do
}
# A compiled LightningModule must be recognised, also where Lightning is not imported, before it is copied.
LIGHTNING_NAMES = {("core/inspection.py", "_compiler_ctx")}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(PACKAGE).parts[0] in HOSTLESS], ids=shown)
def test_private_names_of_others_are_used_in_lightning_and_tasks_alone(path: Path) -> None:
    """So nothing of Lightning's is: its Trainer, loops and strategies have few public names for what callbacks need."""
    tree = parsed(path)
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) not in ("self", "cls"):
            assert node.attr in own | THEIR_PRIVATE, f"{shown(path)}:{node.lineno}: {ast.unparse(node)} is another's"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = ast.literal_eval(node.args[1]) if isinstance(node.args[1], ast.Constant) else ""
            assert not is_private(name) or name in own | THEIR_PRIVATE, f"{shown(path)}:{node.lineno}: {name}"


def test_one_private_name_of_lightning_is_known_outside_of_its_package() -> None:
    outside = [p for p in FILES if p.relative_to(PACKAGE).parts[0] in HOSTLESS]
    named = re.compile(
        r"_compiler_ctx|_combined_loader|_data_fetcher|_connector\b|_generate_state_key|_on_before_batch"
    )
    assert {(shown(p), name) for p in outside for name in named.findall(p.read_text())} == LIGHTNING_NAMES


def classes_of(package: ModuleType) -> Iterator[type]:
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for found in vars(importlib.import_module(module.name)).values():
            if isinstance(found, type) and found.__module__ == module.name:
                yield found


@functools.cache
def private_names(cls: type) -> set[str]:
    """Private attributes that a class defines or sets on ``self``."""
    try:
        tree = syntax_of(cls)
    except OSError:  # made by type(), without a body
        return set()
    set_on_self = {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"
    }
    return {name for name in {*vars(cls), *set_on_self} if is_private(name)}


METHOD_CLASSES = sorted({c for c in classes_of(methods) if issubclass(c, Method)}, key=lambda c: c.__qualname__)


@pytest.mark.parametrize("cls", METHOD_CLASSES, ids=lambda c: c.__name__)
def test_no_method_uses_a_private_name_of_a_base(cls: type) -> None:
    bases = [c for c in cls.__mro__[1:] if c.__module__.startswith("sparse_callbacks.")]
    theirs = {name for c in [*bases, Engine] for name in private_names(c)} - private_names(cls)
    for node in ast.walk(syntax_of(cls)):
        if isinstance(node, ast.Attribute) and node.attr in theirs:
            raise AssertionError(f"{cls.__name__} uses {ast.unparse(node)}, which is private to a base")
    overridden = {name for name in vars(cls) for c in bases if is_private(name) and callable(vars(c).get(name))}
    assert not overridden, f"{cls.__name__} overrides {overridden}, which is private to a base"


def defined_names(statements: Sequence[ast.stmt]) -> Iterator[str]:
    """Names that statements of a module define, those within ``if`` and ``try`` included."""
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.If | ast.Try):
            inner = [*node.body, *node.orelse, *(s for h in getattr(node, "handlers", []) for s in h.body)]
            yield from set(defined_names(inner))


@pytest.mark.parametrize("package", ORDER)
def test_no_public_name_is_defined_twice_in_a_package(package: str) -> None:
    where: dict[str, list[str]] = {}
    for path in sorted((PACKAGE / package).rglob("*.py")):
        for name in defined_names(parsed(path).body):
            if not name.startswith("_"):
                where.setdefault(name, []).append(shown(path))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_a_module_begins_with_a_plain_sentence(path: Path) -> None:
    text = ast.get_docstring(parsed(path)) or ""
    first = text.splitlines()[0]
    assert first.endswith("."), first
    assert len(first) <= 100, first


# ---------------------------------------------------------------------- who writes to parameters


PARAMETERS = re.compile(r"\bparams\b|\bparameters\(|get_parameter\(|\bweight\b|\bparam\b|\bp\b|\bparameter\b|\.data\b")
NOT_VALUES = re.compile(r"\.grad\b|\.state\[|masks?\b|factor|\.items\(\)$|\.keys\(\)$|len\(")


def names_in(target: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}


def parameter_names(function: ast.AST) -> set[str]:
    """Names that a function binds to parameters: loop variables over them, and plain assignments of one."""
    found: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.For | ast.comprehension):
            source = ast.unparse(node.iter)
            if re.search(r"params\.values\(\)|params\.items\(\)|parameters\(\)", source):
                # of pairs the second is the parameter
                target = node.target.elts[-1] if isinstance(node.target, ast.Tuple) else node.target
                found |= names_in(target)
        if isinstance(node, ast.Assign) and re.fullmatch(
            r"(self\.|method\.)?(_?params|parameters)\[[^\[\]]+\](\.detach\(\)|\.data)?|.*get_parameter\([^()]*\)",
            ast.unparse(node.value),
        ):
            found |= {name for target in node.targets for name in names_in(target)}
    return found


def writes(path: Path) -> Iterator[tuple[str, str]]:
    """(function, receiver) of everything in a file that changes a tensor in place: ``x.mul_()``, ``x.data``, ``x[...] =
    y``, ``x += y`` and ``out=x``."""
    for function in (n for n in ast.walk(parsed(path)) if isinstance(n, ast.FunctionDef)):
        bound = parameter_names(function)
        for node in ast.walk(function):
            receivers: list[ast.expr] = []
            if isinstance(node, ast.Call):
                called = node.func
                if isinstance(called, ast.Attribute) and re.fullmatch(r"[a-z]\w*[^_]_", called.attr):
                    receivers.append(called.value)
                receivers += [keyword.value for keyword in node.keywords if keyword.arg == "out"]
            if isinstance(node, ast.Attribute) and node.attr == "data":
                receivers.append(node)
            if isinstance(node, ast.Assign):
                stored = [t.value for t in node.targets if isinstance(t, ast.Subscript)]
                receivers += [t for t in stored if names_in(t) & bound]
            if isinstance(node, ast.AugAssign) and names_in(node.target) & bound:
                receivers.append(node.target)
            for receiver in receivers:
                text = ast.unparse(receiver)
                if names_in(receiver) & bound or PARAMETERS.search(text):
                    yield function.name, text


def test_parameter_values_are_written_by_sparse_weights_alone() -> None:
    found = {(shown(p), function, receiver) for p in CORE for function, receiver in writes(p)}
    about_parameters = {f for f in found if not NOT_VALUES.search(f[2])}
    assert {(file, function) for file, function, _ in about_parameters} == {
        ("core/weights.py", "write_masked"),
        ("core/weights.py", "write_grown"),
        ("core/weights.py", "write_values"),
        ("core/weights.py", "effective"),
        ("core/dense_copy.py", "_exchange"),
        (
            "core/sparse_layers/live_weight.py",
            "set_places",
        ),  # loading: a Parameter of live values takes another number of them
        ("core/storages/offloading.py", "offload"),  # write no value: the same ones lie elsewhere
        ("core/storages/offloading.py", "_move_back"),
        ("core/sparse_layers/handed_out.py", "watch"),  # writes no value: a detached view lets go of its memory
        ("core/local_parts.py", "follow"),  # writes no value: a view moves to the memory that its parameter has now
    }, sorted(about_parameters)


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
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = ast.unparse(node.exc.args[0])
                assert len(text) > 40 or "(" in text or text.isidentifier(), f"{shown(path)}:{node.lineno}: {text}"


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = parsed(path)
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            given = any(ast.unparse(s).startswith("__doc__ = ") for s in node.body)  # that of another class
            assert given or ast.get_docstring(node), node.name
