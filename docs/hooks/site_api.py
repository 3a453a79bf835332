"""The API reference: every public name of the package, found from what its modules say is public."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from site_methods import NAMES, page_of, sentence
from site_repository import ROOT

from sparse_callbacks import methods

FOLDER = "reference/api"
PACKAGE = "sparse_callbacks"


class Public(NamedTuple):
    """A public name.

    Attributes:
        name: as users import it, such as ``sparse_callbacks.slim``.
        home: where it is defined, such as ``sparse_callbacks.channels.slim.slim``.
    """

    name: str
    home: str


class Group(NamedTuple):
    """A page of the reference.

    Attributes:
        title: its heading.
        words: what stands below it.
        homes: beginnings of the modules whose names it has, of those at the top of the package.
    """

    title: str
    words: str
    homes: tuple[str, ...]


TOP = {
    "callbacks": Group(
        "Callbacks",
        "What a Trainer takes. Each method is a callback and has [a page of its own](../../methods/index.md).",
        ("lightning",),
    ),
    "loops": Group(
        "Loops of your own",
        "Sparse training without a Trainer: [loops](../../loops.md).",
        ("core.loop", "core.sparse_run"),
    ),
    "channels": Group(
        "Smaller networks",
        "Channels that belong together, and networks that are really smaller: [channels](../../channels.md) and "
        "[slimming](../../slimming.md).",
        ("channels",),
    ),
    "layers": Group(
        "Sparse layers, and after training",
        "Layers that hold their live weights alone ([when they are faster](../../real_speed.md)), and what is done with a network that "
        "is trained ([slimming](../../slimming.md)).",
        (
            "core.storages",
            "core.sparse_layers",
            "core.inference",
            "core.conversion",
            "core.running_statistics",
            "core.saved_masks",
        ),
    ),
    "method_parts": Group(
        "Parts of a method",
        "What [a method of your own](../../writing_a_method.md) is made of, and objects that arguments of methods may be.",
        (),  # all others, so that no name is left out
    ),
}
"""Pages of the names at the top of the package, by their files."""

MODULES = {
    "distributions": (
        "core/distributions.py",
        "How layers share a target: [distributions](../../methods.md#how-layers-share-a-target).",
    ),
    "schedules": (
        "core/schedules.py",
        "Numbers that change over a run, for arguments such as `drop_fraction` and `sparsity`.",
    ),
    "ops": ("core/ops.py", "Pure functions of scores and masks: tensors in, tensors out."),
    "testing": (
        "testing/__init__.py",
        "The contract of a method as cases of pytest: [writing a method](../../writing_a_method.md).",
    ),
}
"""Public modules, each with the file whose ``__all__`` counts and what stands at the top of its page."""

COMMANDS = {
    "latency": (Public(f"{PACKAGE}.latency.measure", f"{PACKAGE}.channels.latency.measure.measure"),),
    "reporting": (
        Public(f"{PACKAGE}.reporting.page.write_report", f"{PACKAGE}.reporting.page.write_report"),
        Public(f"{PACKAGE}.reporting.page.figures", f"{PACKAGE}.reporting.page.figures"),
        Public(f"{PACKAGE}.reporting.measures.share_to_keep", f"{PACKAGE}.reporting.measures.share_to_keep"),
        Public(f"{PACKAGE}.core.record.record_file.read_record", f"{PACKAGE}.core.record.record_file.read_record"),
        Public(f"{PACKAGE}.lightning.logged_network.log_network", f"{PACKAGE}.lightning.logged_network.log_network"),
    ),
}


def top_level() -> list[Public]:
    """The names of ``sparse_callbacks.__all__`` that are no modules, with the modules that they are imported from."""
    tree = _parsed("__init__.py")
    homes = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}.")
        for alias in node.names
    }
    return [Public(f"{PACKAGE}.{name}", f"{homes[name]}.{name}") for name in names_of(tree) if name in homes]


def names_of(tree: ast.Module) -> list[str]:
    """``__all__`` of a module."""
    (found,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return [str(name) for name in ast.literal_eval(found)]


def _parsed(file: str) -> ast.Module:
    return ast.parse((ROOT / PACKAGE / file).read_text(encoding="utf-8"))


def of_module(file: str) -> list[str]:
    """The names of ``__all__`` of a module, from its file in the package."""
    return names_of(_parsed(file))


def _home_in(file: str, name: str) -> str:
    """Where a public name of a module is defined, which may be another one that it is imported from."""
    own = f"{PACKAGE}.{file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGE):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    inner = Path(*node.module.split(".")[1:])
                    deeper = f"{inner}.py" if (ROOT / PACKAGE / f"{inner}.py").is_file() else f"{inner}/__init__.py"
                    return _home_in(deeper, alias.name)
    return f"{own}.{name}"


def public_names() -> dict[str, list[Public]]:
    """Every public name, by the page of the reference that has it; the methods are under ``callbacks``."""
    pages: dict[str, list[Public]] = {page: [] for page in TOP}
    for public in top_level():
        inner = public.home.removeprefix(f"{PACKAGE}.")
        found = (page for page, group in TOP.items() if inner.startswith(group.homes) and group.homes)
        pages[next(found, "method_parts")].append(public)
    # of channels, which has a class that the top does not
    known = {public.home for public in pages["channels"]}
    for name in of_module("channels/__init__.py"):
        if (home := _home_in("channels/__init__.py", name)) not in known:
            pages["channels"].append(Public(f"{PACKAGE}.channels.{name}", home))
    pages["channels"].extend(COMMANDS["latency"])
    pages["reporting"] = list(COMMANDS["reporting"])
    for module, (file, _) in MODULES.items():
        pages[module] = [Public(f"{PACKAGE}.{module}.{name}", _home_in(file, name)) for name in of_module(file)]
    return {page: sorted(names, key=lambda public: public.name.lower()) for page, names in pages.items()}


def homes() -> dict[str, str]:
    """Where the site explains a public object, by the dotted path of its definition: the anchor that has its name."""
    found = {public.home: public.name for names in public_names().values() for public in names}
    for name in NAMES:
        found |= {
            f"{getattr(methods, name).__module__}.{name}": f"{PACKAGE}.{name}",
            f"{PACKAGE}.methods.{name}": f"{PACKAGE}.{name}",
        }
    return found


def api_pages() -> dict[str, str]:
    """The pages of the reference, by their places in the site."""
    found = public_names()
    titles = {page: group.title for page, group in TOP.items()} | {"reporting": "Records and reports"}
    titles |= {module: module.capitalize() for module in MODULES} | {"ops": "Functions of masks"}
    words = {page: group.words for page, group in TOP.items()} | {page: said for page, (_, said) in MODULES.items()}
    words["reporting"] = (
        "Records of runs, and pages made of them: [recording](../../recording.md) and [report](../../report.md)."
    )
    pages = {
        f"{FOLDER}/{page}.md": f"# {titles[page]}\n\n{words[page]}\n\n" + "\n".join(_entries(names))
        for page, names in found.items()
    }
    return {f"{FOLDER}/index.md": _overview(found, titles)} | pages


def _entries(names: list[Public]) -> Iterator[str]:
    shown_elsewhere = [public for public in names if public.name.removeprefix(f"{PACKAGE}.") in NAMES]
    if shown_elsewhere:
        yield "## The methods\n\n| callback | what it does |\n| --- | --- |"
        for name in NAMES:
            yield f"| [`{name}`](../../{page_of(name)}) | {sentence(name).replace('|', chr(92) + '|')} |"
        yield ""
    for public in names:
        if public not in shown_elsewhere:
            # an anchor for the name that users import, above the heading that mkdocstrings makes
            yield f"[](){{ #{public.name} }}\n\n::: {public.home}\n    options:\n      show_root_heading: true\n"


def _overview(found: Mapping[str, list[Public]], titles: Mapping[str, str]) -> str:
    parts = [
        "# API\n\nEvery public name, by what it is for. Names at the top are imported by `from sparse_callbacks import ...`; a method "
        "of the same name in `sparse_callbacks.methods` is for loops and needs no Lightning."
    ]
    for page, names in found.items():
        links = []
        for public in names:
            short = public.name.removeprefix(f"{PACKAGE}.")
            target = f"../../{page_of(short)}" if short in NAMES else f"{page}.md#{public.name}"
            links.append(f"[`{public.name.rpartition('.')[2]}`]({target})")
        parts.append(f"## [{titles[page]}]({page}.md) {{ #{page} }}\n\n{', '.join(links)}")
    return "\n\n".join(parts) + "\n"
