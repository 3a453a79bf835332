"""HTML pages from the templates of this package."""

from pathlib import Path
from typing import Any

import jinja2

from sparse_callbacks.core.files import replacing

TEMPLATES = Path(__file__).parent / "templates"


def rendered(template: str, **values: Any) -> str:
    """The page that a template makes of values; texts among them are escaped.

    Args:
        template: its file in the folder ``templates``; it extends ``base.html.j2``.
        values: what its variables stand for; drawings (``<svg>``) are given to ``figure`` of ``parts.html.j2``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        # a variable that nobody gives is a mistake, which would leave a hole in the page
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write the page of :func:`rendered`, whole or not at all; gives ``path`` back."""
    text = rendered(template, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path
