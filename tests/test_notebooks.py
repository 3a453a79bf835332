"""Every notebook runs from its text, and the committed notebook holds the cells of that text and what they show."""

import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = (
    "01_first_sparse_network",
    "02_add_to_your_trainer",
    "03_how_topology_moves",
    "04_smaller_network",
    "05_when_sparse_is_faster",
)
MOST_BYTES = 2_000_000
every_notebook = pytest.mark.parametrize("name", NAMES)
# where files lie on one machine, and what progress bars and warnings look like
NOT_IN_OUTPUTS = re.compile(r"(?<![\w.])/(?:tmp|home|root|opt|work|usr|Users|private|var)/|\r|\d+%\||it/s\b|Warning\b")


def read(name: str, suffix: str) -> Any:
    return pytest.importorskip("jupytext").read(FOLDER / f"{name}{suffix}")


def sources(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def texts(notebook: Any) -> list[str]:
    """Everything that the cells have printed or returned as text."""
    return [str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs(notebook)]


def pictures(notebook: Any) -> int:
    """Images among the outputs, animations included."""
    data = [output.get("data", {}) for output in outputs(notebook)]
    return sum("image/png" in d or "data:image/gif" in str(d.get("text/html", "")) for d in data)


def faults(notebook: Any) -> list[str]:
    """What a reader should not have to see in the outputs."""
    found = [f"{o.output_type} {o.get('name', '')}" for o in outputs(notebook) if o.output_type == "error"]
    found += [o.text for o in outputs(notebook) if o.get("name") == "stderr"]
    return found + [text for text in texts(notebook) if NOT_IN_OUTPUTS.search(text)]


def test_the_notebooks_are_these_five() -> None:
    for suffix in (".py", ".ipynb"):
        assert tuple(sorted(path.stem for path in FOLDER.glob(f"*{suffix}"))) == NAMES


@every_notebook
def test_the_pair_agrees(name: str) -> None:
    assert sources(read(name, ".py")) == sources(read(name, ".ipynb"))


@every_notebook
def test_what_is_committed_was_run_and_is_small_and_tidy(name: str) -> None:
    notebook = read(name, ".ipynb")
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # from the first cell to the last, in one kernel
    assert not faults(notebook)
    assert pictures(notebook) >= 2


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        ({"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}, True),
        ({"output_type": "stream", "name": "stderr", "text": "GPU available: False"}, True),
        ({"output_type": "stream", "name": "stdout", "text": "saved to /tmp/x/small.onnx"}, True),
        ({"output_type": "stream", "name": "stdout", "text": "Epoch 3:  40%|####"}, True),
        ({"output_type": "stream", "name": "stdout", "text": "UserWarning: the loader"}, True),
        ({"output_type": "stream", "name": "stdout", "text": "RigL 95 % test accuracy 97.1 %, and/or"}, False),
    ],
)
def test_faults_of_outputs_are_found(output: dict[str, Any], fault: bool) -> None:
    nbformat = pytest.importorskip("nbformat.v4")
    cell = nbformat.new_code_cell("pass", outputs=[nbformat.new_output(**output)])
    assert bool(faults(nbformat.new_notebook(cells=[cell]))) is fault


@every_notebook
def test_it_runs_and_shows_its_pictures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient")
    notebook = read(name, ".py")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows pictures in the notebook
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    client.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert not faults(notebook)
    assert pictures(notebook) == pictures(read(name, ".ipynb"))
