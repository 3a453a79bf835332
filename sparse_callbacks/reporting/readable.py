"""Numbers as people read them: counts, FLOPs, bytes, shares, and how many times fewer."""

import math
from collections.abc import Sequence
from datetime import datetime

_LARGE = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
UNKNOWN = "not recorded"
TIMES = "\N{MULTIPLICATION SIGN}"


def count(value: float | None) -> str:
    """A number with three digits and a letter for its thousands: ``"12.3 M"``; a whole number below 10,000 in full.

    Example:
        >>> count(1234), count(12_345_678), count(0.25), count(None)
        ('1,234', '12.3 M', '0.25', 'not recorded')
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == int(value) and abs(value) < 10_000:
        return f"{int(value):,}"
    # by what it is once rounded: 999,999 is 1 M and not 1000 k
    rounded = float(f"{value:.3g}")
    for size, letter in _LARGE:
        if abs(rounded) >= size:
            return f"{_digits(rounded / size)} {letter}"
    return f"{value:.3g}"


def plural(number: int, what: str) -> str:
    """A number of things: ``"1 run"``, ``"3 runs"``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def tick(value: float | None) -> str:
    """A number beside an axis: four digits, so that ticks that differ read differently; from 10,000 on as :func:`count`."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return count(value) if abs(value) >= 10_000 else f"{int(value):,}" if value == int(value) else f"{value:.4g}"


def _digits(value: float) -> str:
    """Three digits without an exponent and without zeros that say nothing."""
    text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def size(value: float | None) -> str:
    """Bytes: ``"12.3 MB"``, in powers of 1,000."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{count(value)}B" if abs(value) >= 10_000 else f"{count(value)} B"


def share(value: float | None) -> str:
    """A share of 1 in percent: ``"93.4 %"``; close to 0 and 1 with as many digits as tell it from them.

    Example:
        >>> share(0.934), share(0.99987), share(1.0)
        ('93.4 %', '99.987 %', '100 %')
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    distance = min(abs(value), abs(1 - value))
    digits = 1 if distance == 0 or distance >= 0.01 else min(8, math.ceil(-math.log10(distance)) - 1)
    text = f"{100 * value:.{max(1, digits)}f}"
    return f"{text.rstrip('0').rstrip('.')} %"


def seconds(value: float | None) -> str:
    """A time: ``"3.2 s"``, ``"4 min 10 s"``, ``"2 h 5 min"``."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value < 60:
        return f"{value:.3g} s" if value < 59.95 else "1 min"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def milliseconds(value: float) -> str:
    """A latency: ``"12.3 ms"``, below a tenth of a millisecond in microseconds."""
    return f"{value:.3g} ms" if value >= 0.1 else f"{1000 * value:.3g} \N{MICRO SIGN}s"


def moment(text: str) -> str:
    """A time of ISO 8601 to the minute: ``"2026-01-01 12:30 UTC"``; another text as it is."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = "" if found.tzinfo is None else " UTC" if not found.utcoffset() else found.strftime(" %z")
    return found.strftime("%Y-%m-%d %H:%M") + zone


def fewer(
    value: float | None, reference: float | None, than: str = "", words: tuple[str, str] = ("fewer", "more")
) -> str:
    """How many times fewer a figure is than a reference: ``"4.1 x fewer"``, with :data:`TIMES`; empty where that is unknown.

    Args:
        value: the figure.
        reference: what it is compared with.
        than: what the reference is called; empty leaves it out.
        words: what a smaller and a larger figure is.

    Example:
        >>> fewer(10, 41, "dense").replace(TIMES, "x"), fewer(10, 10)
        ('4.1 x fewer than dense', 'the same')
    """
    if not value or not reference or value < 0 or reference < 0:
        return ""
    ratio = reference / value
    if 0.995 < ratio < 1.005:
        return f"the same as {than}" if than else "the same"
    times = f"{_times(ratio)} {TIMES} {words[0]}" if ratio > 1 else f"{_times(1 / ratio)} {TIMES} {words[1]}"
    return f"{times} than {than}" if than else times


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 99.5 else f"{ratio:.3g}" if ratio < 1.1 else f"{ratio:.2g}"


def score(name: str, value: float | None) -> str:
    """A logged metric: accuracies between 0 and 1 in percent, anything else with four digits."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{100 * value:.2f} %" if is_accuracy(name) and 0 <= value <= 1 else f"{value:.4g}"


def shortened(text: str, most: int) -> str:
    """A text without its middle where it has more than ``most`` letters."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as text: its sides with :data:`TIMES` between them."""
    return f" {TIMES} ".join(map(str, shape)) or "scalar"


def is_accuracy(name: str) -> bool:
    """Whether a metric's name is that of an accuracy, of which more is better."""
    lowered = name.lower()
    return any(word in lowered for word in ("acc", "top1", "top5", "top_1", "top_5", "f1", "auroc"))
