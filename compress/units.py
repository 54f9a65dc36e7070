"""Numbers as people read them: a value with its standard error, bytes, milliseconds."""

from __future__ import annotations

import math

_SCALES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def format_stderr(value: float, stderr: float | None, plus: bool = False) -> str:
    """Value and standard error to two significant digits of the latter.

    >>> format_stderr(0.037912, 0.00041)
    '0.03791 ± 0.00041'
    >>> format_stderr(44.3, None)
    '44.3'
    """
    sign = "+" if plus else ""
    if stderr is None or stderr <= 0 or not math.isfinite(stderr):
        return f"{value:{sign}.4g}"
    decimals = 1 - math.floor(math.log10(stderr))
    if decimals > 7:  # a string of zeros says less than an exponent
        return f"{value:{sign}.3g} ± {stderr:.1e}"
    decimals = max(0, decimals)
    return f"{value:{sign}.{decimals}f} ± {stderr:.{decimals}f}"


def format_bytes(count: float | None) -> str:
    """Bytes in decimal units: 1 MB is 10^6 bytes.

    >>> format_bytes(1_234_567_890)
    '1.23 GB'
    """
    if count is None:
        return "–"
    for scale, unit in _SCALES:
        if abs(count) >= scale:
            return f"{count / scale:.3g} {unit}" if abs(count) < 999.5 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} B"


def byte_unit(largest: float) -> tuple[float, str]:
    """Scale and name of the unit in which an axis up to `largest` bytes reads well."""
    return next(((scale, unit) for scale, unit in _SCALES if largest >= scale), (1.0, "B"))


def format_ms(milliseconds: float | None) -> str:
    """Three significant digits, in ms, or in s from ten seconds on."""
    if milliseconds is None:
        return "–"
    if milliseconds >= 10_000:
        return f"{milliseconds / 1000:.1f} s"
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:#.3g} ms"


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `31 s`, `12 min 04 s`, `3 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_share(fraction: float | None) -> str:
    """A fraction as a percentage."""
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def format_count(value: float | None) -> str:
    """Thousands separated by commas, no decimals; small values keep three digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
