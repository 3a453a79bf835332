"""The layout of a latency table's file: what each part must be, whoever wrote it."""

from collections.abc import Callable, Mapping
from typing import Any

from sparse_callbacks.core.state_layout import is_count, shown_short

LONGEST_TEXT = 1000


def why_not_a_table(content: Any, version: int) -> str:
    """What is wrong with the content of a table's file, as a clause; empty where nothing is.

    Args:
        content: what the file's JSON holds.
        version: the version of tables that is read.
    """
    if not isinstance(content, Mapping) or "version" not in content:
        return "it has no version"
    if content["version"] != version:
        return f"it is one of version {shown_short(content['version'])}, written by another release"
    if missing := [key for key in ("about", "constant", "factor", "grids") if key not in content]:
        return f"{', '.join(missing)} missing in it"
    about, grids = content["about"], content["grids"]
    if not isinstance(about, Mapping):
        return f"about in it is {shown_short(about)}"
    for key in ("constant", "factor"):
        if not _is_number(content[key]):
            return f"{key} in it is {shown_short(content[key])} and not a number"
    # the factor is a time in the model over a time alone, so a table without times has none
    if content["factor"] < 0:
        return f"factor in it is {content['factor']:g}, so that smaller layers would take longer"
    if not isinstance(grids, Mapping):
        return f"grids in it is {shown_short(grids)}"
    return _why_other_facts(about) or next((why for k, g in grids.items() if (why := _why_not_a_grid(k, g))), "")


def _is_number(value: Any) -> bool:
    # an int of JSON may be too large for a float
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_FACTS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("machine", "device", "torch", "model"), _is_text),
    **dict.fromkeys(("threads", "batch", "points", "repeats"), is_count),
    **dict.fromkeys(("channels_last", "norms", "finished"), _is_flag),
    "input": _is_size,
    "off": lambda value: _is_number(value) and value >= 0,
}


def _why_other_facts(about: Mapping[str, Any]) -> str:
    for key, value in about.items():
        # a table may state more, in plain values
        is_right = _FACTS.get(key, lambda v: _is_text(v) or _is_number(v) or _is_flag(v))
        if not is_right(value):
            return f"{shown_short(key)} in what it is about is {shown_short(value)}"
    return ""


def _why_not_a_grid(kind: str, grid: Any) -> str:
    name = shown_short(kind)
    if not isinstance(grid, Mapping) or grid.keys() != {"inputs", "outputs", "ms"}:
        return f"its grid of {name} is {shown_short(grid)}"
    inputs, outputs, ms = grid["inputs"], grid["outputs"], grid["ms"]
    for sizes in (inputs, outputs):
        numbers = isinstance(sizes, list) and sizes and all(is_count(n) and n > 0 for n in sizes)
        if not numbers or sorted(set(sizes)) != sizes:
            return f"the numbers of channels in its grid of {name} are {shown_short(sizes)} and do not rise from 1 on"
    # a row for each number of inputs; of a depthwise layer, where outputs go with inputs, each has one time
    widths = {len(outputs), 1} if len(inputs) == len(outputs) else {len(outputs)}
    if not isinstance(ms, list) or len(ms) != len(inputs):
        return f"its grid of {name} does not have {len(inputs)} rows of times"
    rows = [row for row in ms if isinstance(row, list)]
    if len(rows) < len(ms) or len(found := {len(row) for row in rows}) != 1 or not found <= widths:
        return f"the rows of times in its grid of {name} do not have {' or '.join(map(str, sorted(widths)))} times each"
    wrong = [t for row in rows for t in row if not (_is_number(t) and t >= 0)]
    return f"a time in its grid of {name} is {shown_short(wrong[0])}" if wrong else ""
