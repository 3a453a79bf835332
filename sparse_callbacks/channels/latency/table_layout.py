"""The layout of a latency table's file: what each part must be, whoever wrote it."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from sparse_callbacks.core.state_layout import is_count, shown_short


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
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= 1e300 and math.isfinite(value)


def _why_other_facts(about: Mapping[str, Any]) -> str:
    size = about.get("input", [])
    if not isinstance(size, list) or not all(is_count(n) for n in size):
        return f"the input size in it is {shown_short(size)}"
    if not isinstance(about.get("finished", True), bool):
        return f"finished in it is {shown_short(about['finished'])}"
    error = about.get("off", 0.0)
    return "" if _is_number(error) and error >= 0 else f"the error of the fit in it is {shown_short(error)}"


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
