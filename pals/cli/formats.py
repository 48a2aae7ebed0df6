"""How times are written in tables and documents."""

from __future__ import annotations

from datetime import UTC, datetime

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def format_moment(at: int | None) -> str:
    """Return Unix seconds in ISO 8601, or nothing for none."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") if at else ""


def format_age(age_s: float | None) -> str:
    """Return an age in one unit, such as ``3 min``, or nothing for none."""
    if age_s is None:
        return ""
    for size_s, unit in _UNITS:
        if age_s >= size_s:
            return f"{age_s / size_s:.0f} {unit}"
    return f"{max(0.0, age_s):.0f} s"
