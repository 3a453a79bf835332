"""Markdown as code hosts read it, made into what Python-Markdown reads as the same."""

import re

_ITEM = re.compile(r"^ *(?:[-*+]|\d+[.)]) +(?=\S)")
_STARTS_LIST = re.compile(r"^(?:[-*+]|1[.)]) +\S")
_FENCE = re.compile(r"^ *(`{3,}|~{3,})")
_NAMED = re.compile(r"\bfile=(\S+)")


def for_python_markdown(markdown: str) -> str:
    """The same page for Python-Markdown.

    What belongs to an item of a list is indented by four spaces for each level; lists, tables and comments have empty lines
    around them; ``file=NAME`` of a block of code is its title.
    """
    lines: list[str] = []
    widths: list[int] = []  # of each open item the column at which its contents begin
    fence, before = "", ""
    for line in markdown.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        if fence:
            lines.append(_indented(line, indent, widths))
            if line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
            before = line
            continue
        item, opened = _ITEM.match(line), _FENCE.match(line)
        if line.strip() and (item or opened or not before.strip()):
            while widths and indent < widths[-1]:
                widths.pop()
        if _needs_empty_line(line, before, bool(widths)):
            lines.append("")
        if item:
            lines.append("    " * len(widths) + line.strip(" "))
            widths.append(item.end())
        elif opened or not before.strip():
            lines.append(_indented(line, indent, widths))
        else:
            lines.append(line)
        if opened:
            fence = opened[1]
            lines[-1] = _NAMED.sub(r'title="\1"', lines[-1])
        before = line
    return "\n".join(lines)


def _indented(line: str, indent: int, widths: list[int]) -> str:
    if not widths or not line.strip():
        return line
    return "    " * len(widths) + line[min(indent, widths[-1]) :]


def _needs_empty_line(line: str, before: str, in_list: bool) -> bool:
    if not before.strip() or not line.strip():
        return False
    if before.rstrip().endswith("-->"):
        return True
    if line.startswith("|"):
        return not before.startswith("|")
    return bool(_STARTS_LIST.match(line)) and not in_list and not _ITEM.match(before) and not before.startswith(" ")


def heading_anchor(text: str, separator: str) -> str:
    """The anchor of a heading, as code hosts make it.

    Example:
        >>> heading_anchor("Speed, and slim: 2:4 / N:M", "-")
        'speed-and-slim-24--nm'
    """
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", separator)
