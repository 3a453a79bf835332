"""The known name that somebody has meant by a wrong one."""

import difflib
from collections.abc import Iterable


def close(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The shortest name that begins or ends with another one; else the name that is most like it, where any is.

    >>> close("sparsty", ["seed", "sparsity"])
    'sparsity'
    """
    known = list(known)
    if longer := [other for other in known if other.startswith(f"{name}_") or other.endswith(f"_{name}")]:
        return min(longer, key=len)
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def meant(name: str, known: Iterable[str]) -> str:
    """' Did you mean NAME?' where a known name is like it; else nothing."""
    found = close(name, known)
    return "" if found is None else f" Did you mean {found}?"
