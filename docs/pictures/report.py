"""Draws the picture of a report: trains a dense and a sparse network on scikit-learn's digits and takes a screenshot of the page.

    python docs/pictures/report.py                            # the two runs, in a temporary folder; writes docs/images/report.png
    python docs/pictures/report.py --run outputs/rigl         # of a run that is there

The commands are those of docs/start.md, "The page of the run". Needs Chromium (Debian: apt-get install chromium).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = (
    ("method=none", "hydra.run.dir=outputs/dense"),
    ("method=rigl", "hydra.run.dir=outputs/rigl", "dense_run=outputs/dense"),
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WINDOW = (1180, 1368)
"""Pixels: what was gained, and the first curves."""


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, help="the folder of a run with its report.html; without it two runs are made"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/report.png", help="the file that is written")
    given = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error("Chromium not found. On Debian: apt-get install -y chromium")
    with tempfile.TemporaryDirectory() as scratch:
        run = given.run
        if run is None:
            for overrides in COMMANDS:
                subprocess.run([sys.executable, str(ROOT / "train.py"), *overrides], cwd=scratch, check=True)
            run = Path(scratch) / "outputs/rigl"
        take(browser, (run / "report.html").resolve(), given.out.resolve(), Path(scratch))


def take(browser: str, page: Path, out: Path, scratch: Path) -> None:
    """A screenshot of the beginning of a page, with the 256 colours that it needs at most.

    Args:
        browser: the program.
        page: an HTML file.
        out: the PNG file that is written.
        scratch: a folder for the browser's own files.
    """
    from PIL import Image

    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={scratch}/profile")
    size = f"--window-size={WINDOW[0]},{WINDOW[1]}"
    subprocess.run([browser, *fixed, size, f"--screenshot={out}", page.as_uri()], check=True, timeout=120)
    with Image.open(out) as opened:
        picture = opened.convert("RGB").quantize(256)
    picture.save(out, optimize=True)


if __name__ == "__main__":
    main()
