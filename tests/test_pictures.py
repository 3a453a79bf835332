"""The pictures of README and docs: their scripts draw them, the committed ones are there and small, and each is said in words."""

import importlib
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_callbacks import methods

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
SCHEMES = ("light", "dark")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Markdown's and HTML's ways to show a picture: the words and the file
EMBEDDED = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<file>[^)\s]+)|<img(?P<tag>[^>]*)>", re.DOTALL)
every_method = pytest.mark.parametrize("name", sorted(methods.__all__))
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of docs/pictures, whose names others have too."""
    monkeypatch.syspath_prepend(str(ROOT / "docs/pictures"))
    names = ("looks", "recorded_digits", "methods", "topology")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = {name: importlib.import_module(name) for name in names}
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return SimpleNamespace(**found)


def svg_title(path: Path) -> str:
    """The title of an SVG file, which must be XML."""
    title = ET.fromstring(path.read_text())[0]
    assert title.tag.endswith("title")
    return str(title.text)


def gif(path: Path) -> tuple[tuple[int, int], list[int], int | None]:
    """Size, milliseconds of every frame, and how often an animation repeats: 0 for without an end."""
    image = pytest.importorskip("PIL.Image").open(path)
    durations = []
    for number in range(image.n_frames):
        image.seek(number)
        durations.append(image.info["duration"])
    return image.size, durations, image.info.get("loop")


# ---------------------------------------------------------------------- scripts


@pytest.mark.filterwarnings("ignore")
def test_the_script_draws_the_picture_of_a_method(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts.methods.main(["--only", "RigL", "--epochs", "4", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"rigl_light.svg", "rigl_dark.svg", "pictures.json"}
    words = json.loads((tmp_path / "pictures.json").read_text())["RigL"]
    assert words in capsys.readouterr().out
    texts = {scheme: (tmp_path / f"rigl_{scheme}.svg").read_text() for scheme in SCHEMES}
    assert {svg_title(tmp_path / f"rigl_{scheme}.svg") for scheme in SCHEMES} == {words}
    inks = {scheme.name: scheme.ink for scheme in scripts.looks.SCHEMES}
    assert inks["dark"] in texts["dark"]
    assert inks["dark"] not in texts["light"]
    assert "epoch 4" in texts["light"]


@pytest.mark.filterwarnings("ignore")
def test_words_and_kind_of_a_picture_follow_from_the_masks(scripts: Any) -> None:
    torch = pytest.importorskip("torch")
    full, read = (
        torch.ones(8, 64).bool(),
        torch.ones(64, 8).bool(),
    )  # of eight units: what they read, and what reads them
    half_read = torch.cat([read[:, :4], ~read[:, :4]], dim=1)
    two_of_four = torch.tensor([1, 1, 0, 0]).bool().repeat(8, 16)

    def run(*masks: Any) -> Any:
        named = [{"net.0.weight": first, "net.2.weight": second} for first, second in masks]
        return scripts.recorded_digits.Recorded("RigL", named)

    pruned = run((full, read), (full, half_read), (full, half_read))
    assert scripts.methods.kind_of(pruned) == "units"
    assert scripts.methods.kind_of(run((two_of_four, read))) == "groups"
    assert scripts.methods.kind_of(run((full, read))) == "pixels"
    assert pruned.changes() == ([0, 0], [0.25, 0])
    assert pruned.sparsity() == [0, 0.25, 0.25]
    assert "of 8 units of the first hidden layer 4 are active at the end" in scripts.methods.alt_text(pruned)
    assert "up to 25 % of the weights" in scripts.methods.alt_text(pruned)
    assert "no connection ever changes" in scripts.methods.alt_text(run(*2 * [(two_of_four, read)]))


@pytest.mark.filterwarnings("ignore")
def test_the_script_draws_the_picture_of_the_readme(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts.topology.main(["--steps", "60", "--frames", "5", "--out", str(tmp_path)])
    words = json.loads((tmp_path / "topology.json").read_text())
    assert words["alt"] in capsys.readouterr().out
    assert words["steps"] == 60
    assert 94 < words["sparsity_percent"] <= 95
    for scheme in SCHEMES:
        (width, height), durations, loop = gif(tmp_path / f"topology_{scheme}.gif")
        assert (width, height, len(durations), loop) == (800, 400, 5, 0)


def test_mnist_is_asked_for_by_its_folder(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scripts.topology.main(["--data", "mnist"])
    assert "needs --root FOLDER" in capsys.readouterr().err


# ---------------------------------------------------------------------- committed files


@every_scheme
@every_method
def test_every_method_has_its_picture(name: str, scheme: str) -> None:
    path = IMAGES / "methods" / f"{name.lower()}_{scheme}.svg"
    assert path.stat().st_size < 150_000
    words = json.loads((IMAGES / "methods/pictures.json").read_text())[name]
    assert svg_title(path) == words
    assert words.startswith(f"{name} over ")


def test_there_is_no_picture_of_anything_else() -> None:
    wanted = {f"{name.lower()}_{scheme}.svg" for name in methods.__all__ for scheme in SCHEMES}
    assert {path.name for path in (IMAGES / "methods").iterdir()} == {*wanted, "pictures.json"}


@every_scheme
def test_the_picture_of_the_readme_is_small_and_rests_at_its_end(scheme: str) -> None:
    path = IMAGES / f"topology_{scheme}.gif"
    assert path.stat().st_size < 600_000
    (width, _), durations, loop = gif(path)
    assert width == 800
    assert loop == 0
    assert len(durations) >= 30
    assert durations[-1] >= 2000 > 10 * max(durations[:-1])
    assert json.loads((IMAGES / "topology.json").read_text())["command"].endswith("--data mnist --root FOLDER")


def without_words(text: str) -> list[str]:
    """The pictures of a page that are not said in words."""
    found = []
    for match in EMBEDDED.finditer(re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)):
        alt = match["alt"] if match["tag"] is None else "".join(re.findall(r'\balt="([^"]*)"', match["tag"]))
        if len(alt.split()) < 3:
            found.append(match[0])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pictures_of_pages_are_said_in_words(page: Path) -> None:
    assert not without_words(page.read_text())


def test_pictures_without_words_are_found() -> None:
    page = '![](a.png) ![what it shows here](b.png) <img src="c.gif"> <img src="d.gif" alt="masks that\nmove around">'
    assert without_words(page) == ["![](a.png", '<img src="c.gif">']
