"""Short fits with the channel methods on eight models of other packages; each is slimmed, saved, loaded and exported.

    pip install -e ".[all]" && pip install timm transformers segmentation-models-pytorch
    python benchmarks/zoo_fits.py                              # all of them, into benchmarks/results/zoo_fits.md and .json
    python benchmarks/zoo_fits.py --models 'transformers/*' --out some/file.md

Data and weights are random, images small, and fits a few steps long: enough for masks that remove something. The tables say
what was removed, and how far the masked, the slim, the loaded and the exported network are apart. Every model runs in a
process of its own with one thread and with limits of time and memory. A choice of models is printed, and written only with
`--out`.
"""

import argparse
import json
import logging
import sys
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from zoo_parts import fits, fits_page, page, processes
from zoo_parts.memory import limit_memory
from zoo_parts.models import built

RESULTS = Path(__file__).parent / "results" / "zoo_fits.md"
MODELS = (
    "timm/resnet26d", "timm/efficientnet_lite0", "timm/deit_tiny_patch16_224", "timm/convnext_atto", "smp/unet-resnet18",
    "transformers/bert", "transformers/vit", "transformers/llama",
)  # fmt: skip
"""Convolutions with shortcuts, depthwise ones, attention of either library, and a network that joins its own layers."""


def measure_one(name: str, sides: list[str], memory: float) -> None:
    """Fit one model in this process; each side prints its row as a line of JSON."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    limit_memory(memory)
    for side, row in fits.fits(lambda: built(name), sides):
        print(json.dumps({side: row}), flush=True)


def measure(names: list[str], given: argparse.Namespace, out: Path | None) -> None:
    """Fit models, and write the tables after each of them.

    Args:
        names: names of the models.
        given: the options.
        out: the file of the tables; None for the screen alone.

    Raises:
        SystemExit: a fit failed, or networks that should be equal are not.
    """
    source = page.source(sys.argv[1:], "zoo_fits.py", fits_page.PACKAGES)
    rows: list[fits.Row] = []
    for row in processes.all_rows(names, given.jobs, given.seconds, given.memory, Path(__file__), tuple(fits.SIDES)):
        rows = sorted([*rows, row], key=lambda r: names.index(r["name"]))
        print(json.dumps(page.rounded(row)), flush=True)
        if out is not None:
            page.write(rows, source, out, fits_page.text)
    print(fits_page.text(rows, source))
    wrong = [f"{row['name']} ({side})" for row in rows for side in fits.SIDES if not row[side].get("right")]
    if wrong:
        sys.exit(f"failed or not equal: {', '.join(wrong)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="GLOB", default=["*"], help="names such as 'timm/*'")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, help="the page that is written, with a .json beside it")
    parser.add_argument("--seconds", type=float, default=600, help="limit of each fit and all that follows it")
    parser.add_argument("--memory", type=float, default=12, help="limit of each process, in GiB")
    parser.add_argument("--one", choices=MODELS, metavar="NAME", help="fit one model in this process, for its JSON")
    parser.add_argument("--sides", nargs="+", choices=tuple(fits.SIDES), default=list(fits.SIDES), help="of --one")
    given = parser.parse_args()
    if given.one:
        measure_one(given.one, given.sides, given.memory)
        return
    names = [name for name in MODELS if any(fnmatchcase(name, glob) for glob in given.models)]
    if not names:
        parser.error(f"{' '.join(given.models)} matches no model. They are: {', '.join(MODELS)}")
    measure(names, given, given.out or (None if given.models != ["*"] else RESULTS))


if __name__ == "__main__":
    main()
