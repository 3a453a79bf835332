"""Every notebook runs from its text, and the committed notebook holds the cells of that text."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("text", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_pair_agrees(text):
    jupytext = pytest.importorskip("jupytext")
    assert sources(jupytext.read(text)) == sources(jupytext.read(text.with_suffix(".ipynb")))


@pytest.mark.parametrize("text", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs_and_shows_its_pictures(text, tmp_path, monkeypatch):
    jupytext = pytest.importorskip("jupytext")
    client = pytest.importorskip("nbclient")
    notebook = jupytext.read(text)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows pictures in the notebook
    monkeypatch.setenv("PYTHONPATH", str(text.parent.parent))
    client.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    shown = sum("plt.show()" in c.source for c in notebook.cells)
    assert len(pictures) == shown > 0
