"""Figures in words: sizes, durations, counts and numbers as people read them."""

from __future__ import annotations

import math

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size_text(num_bytes: float) -> str:
    """Return a size in words: "6.8 MB"."""
    unit = 0
    while num_bytes >= 999.5 and unit < len(_UNITS) - 1:
        num_bytes /= 1000
        unit += 1
    return f"{num_bytes:.{0 if unit == 0 or num_bytes >= 99.95 else 1}f} {_UNITS[unit]}"


def duration_text(seconds: float) -> str:
    """Return a duration in its two largest units: "41 ms", "3.2 s", "4 min 10 s", "2 d 5 h"."""
    if seconds < 0 or not math.isfinite(seconds):
        return "unknown"
    if seconds < 0.9995:
        return f"{number_text(seconds * 1000, digits=2 if seconds < 0.0995 else 3)} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, part, part_name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size:,} {name}" + (f" {rest} {part_name}" if rest else "")
    return f"{seconds:.1f} s"


def number_text(value: float, *, digits: int = 4) -> str:
    """Return a number with so many significant digits: "0.00812", "1,234,567", "3.2e-9"."""
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if not 1e-5 <= abs(value) < 1e15:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count_text(number: int, noun: str) -> str:
    """Return a number of things: "1 file", "2,000 files"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
