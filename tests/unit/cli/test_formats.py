from __future__ import annotations

import pytest

from pals.cli.formats import format_age, format_moment


@pytest.mark.parametrize(
    ("age_s", "text"),
    [
        (None, ""),
        (-3.0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60.0, "1 min"),
        (3599.0, "60 min"),
        (7200.0, "2 h"),
        (86400.0 * 3, "3 d"),
    ],
)
def test_age_is_written_in_one_unit(age_s: float | None, text: str) -> None:
    assert format_age(age_s) == text


def test_moment_is_written_in_utc_and_none_as_nothing() -> None:
    assert format_moment(1_800_000_000) == "2027-01-15T08:00:00+00:00"
    assert format_moment(0) == format_moment(None) == ""
