"""Numbers as people read them. Bytes are decimal (1 MB = 10^6 bytes), as in the literature on private inference."""

from __future__ import annotations


def count_of_bytes(value: float) -> str:
    """``12_345_678`` -> ``12.3 MB``."""
    return _scaled(value, 1000.0, ("B", "kB", "MB", "GB", "TB"))


def count(value: float) -> str:
    """A whole number with thousands set apart; an average keeps one decimal."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """``0.042`` -> ``42 ms``, ``75`` -> ``1 min 15 s``."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 59.95 else "60 s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def parameters(value: float) -> str:
    """``124_000_000`` -> ``124 M``."""
    return _scaled(value, 1000.0, ("", "k", "M", "B"))


def perplexity(value: float) -> str:
    """Four digits: runs differ in the third."""
    return f"{value:.4g}" if value < 10_000 else f"{value:.3g}"


def times(ratio: float, less: str = "less", more: str = "more") -> str:
    """A ratio of baseline over ours in words: ``3.4`` -> ``3.4x less``, ``0.5`` -> ``2.0x more``."""
    # Rounded, so that a ratio and its inverse fall on the same side.
    factor = round(max(ratio, 1 / ratio), 9)
    if factor < 1.005:
        return "the same"
    return f"{_factor(factor)}x {less}" if ratio > 1 else f"{_factor(factor)}x {more}"


def change(ratio: float) -> str:
    """Ours over baseline as a signed percentage: ``0.953`` -> ``-4.7 %``."""
    return f"{(ratio - 1) * 100:+.1f} %"


def _factor(value: float) -> str:
    """Two digits at least, and never a rounded-away difference: 1.04, 3.4, 340."""
    if value < 1.095:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _scaled(value: float, base: float, names: tuple[str, ...]) -> str:
    index = 0
    while index + 1 < len(names) and abs(value) >= base * 0.9995:
        value /= base
        index += 1
    digits = f"{value:.0f}" if index == 0 or value >= 99.95 else f"{value:.1f}"
    return f"{digits} {names[index]}".strip()
