"""Screenshots of pages in headless Chromium: light, dark, narrow, and print.

    python benchmarks/screenshots.py outputs/2026-01-01/12-00-00 --out shots
    python benchmarks/screenshots.py compare.html --out shots

Needs Chromium, and pdftoppm for the print (Debian: apt-get install chromium poppler-utils).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HEIGHT = 20_000
"""Pixels of the window, which the page is cut out of: headless Chromium shows what fits in its window alone."""
VIEWS = {"light": (1180, ()), "dark": (1180, ("--blink-settings=preferredColorScheme=0",)), "narrow": (360, ())}


def main() -> None:
    """Write the screenshots of the page that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="an HTML file, or the folder of a run with its report.html")
    parser.add_argument("--out", type=Path, default=Path("screenshots"), help="the folder that they are written to")
    given = parser.parse_args()
    page = given.page / "report.html" if given.page.is_dir() else given.page
    if not page.is_file():
        parser.error(f"{page} is not there. Write it first: python -m sparse_callbacks.report {given.page}")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    missing = [name for name, found in {"Chromium": browser, "pdftoppm": shutil.which("pdftoppm")}.items() if not found]
    if missing or browser is None:
        parser.error(f"{' and '.join(missing)} not found. On Debian: apt-get install -y chromium poppler-utils")
    given.out.mkdir(parents=True, exist_ok=True)
    for path in screenshots(browser, page.resolve(), given.out):
        print(path)


def screenshots(browser: str, page: Path, out: Path) -> list[Path]:
    """PNG files of a page: whole in light, dark and narrow, and each sheet of its print.

    Args:
        browser: the program.
        page: an HTML file.
        out: the folder that they are written to.
    """
    for old in out.glob(f"{page.stem}_print*.png"):  # of a longer print
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        for view, (width, options) in VIEWS.items():
            # in a frame, as a window of a browser cannot be as narrow as a phone
            frame = Path(scratch) / f"{view}.html"
            frame.write_text(
                f'<!doctype html><meta name="color-scheme" content="light dark"><body style="margin:0"><iframe src="{page.as_uri()}" '
                f'width="{width}" height="{HEIGHT}" style="border:0;display:block"></iframe>'
            )
            path = out / f"{page.stem}_{view}.png"
            shot = f"--screenshot={path.resolve()}"
            _run(browser, scratch, *options, f"--window-size={max(width, 600)},{HEIGHT}", shot, frame.as_uri())
            _cut(path, width)
        printed = Path(scratch) / "print.pdf"
        _run(browser, scratch, f"--print-to-pdf={printed}", "--no-pdf-header-footer", page.as_uri())
        sheets = ["pdftoppm", "-png", "-r", "80", str(printed), str(out / f"{page.stem}_print")]
        subprocess.run(sheets, check=True, timeout=120)
    return sorted(out.glob(f"{page.stem}_*.png"))


def _run(browser: str, scratch: str, *options: str) -> None:
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={scratch}/profile")
    done = subprocess.run([browser, *fixed, *options], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        sys.exit(f"{browser} has failed:\n{done.stderr[-2000:]}")


def _cut(path: Path, width: int) -> None:
    """Remove what lies beside the page, and below its end."""
    from PIL import Image, ImageChops

    with Image.open(path) as opened:
        picture = opened.convert("RGB").crop((0, 0, width, opened.height))
    empty = Image.new("RGB", picture.size, picture.getpixel((0, picture.height - 1)))
    end = ImageChops.difference(picture, empty).getbbox()
    picture.crop((0, 0, width, min(picture.height, (end[3] if end else 0) + 20))).save(path, optimize=True)


if __name__ == "__main__":
    main()
