"""Classes of other packages by their qualified names, and shapes of parameters inside their modules.

The modules of timm and transformers are known by the qualified names of their classes; neither package is imported.
"""

from collections.abc import Container, Iterable, Iterator, Sequence

from torch import nn

Shape = Sequence[int]


def known_as(module: nn.Module, table: Container[str]) -> str:
    """The name in ``table`` of the class whose forward ``module`` has; empty where there is none.

    A subclass with a forward of its own may do anything.
    """
    for kind in type(module).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in table:
            return name
        if "forward" in vars(kind):
            return ""
    return ""


def inner_shape(module: nn.Module, name: str) -> Shape | None:
    """Shape of a parameter inside ``module``; None where there is none of that name."""
    *path, last = name.split(".")
    inner: nn.Module | None = module
    for part in path:
        inner = None if inner is None else inner._modules.get(part)
    parameter = None if inner is None else getattr(inner, last, None)
    return None if parameter is None else tuple(parameter.shape)


def modules_around(model: nn.Module, names: Iterable[str]) -> Iterator[nn.Module]:
    """The modules of these names and every module that they are inside of, the outer ones first."""
    around = {".".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(len(parts) + 1)}
    for name in sorted(around):
        yield model.get_submodule(name)
