from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from pals import errors
from pals.errors import PalsError

TABLE = Path(__file__).parents[2] / "docs" / "errors.md"
ROW = re.compile(r"^\| `([^`]+)` \| `(\w+)` \| (\d+) \| (\d+) \| (.+) \|$")
CLASSES = sorted(
    (c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, PalsError)),
    key=lambda c: c.__name__,
)


def documented() -> dict[str, tuple[str, int, int]]:
    rows = [m for line in TABLE.read_text().splitlines() if (m := ROW.match(line))]
    return {m[2]: (m[1], int(m[3]), int(m[4])) for m in rows}


def test_every_error_is_documented_with_its_code_and_statuses() -> None:
    assert documented() == {c.__name__: (c.code, c.exit_code, c.http_status) for c in CLASSES}


def test_codes_are_unique() -> None:
    codes = [c.code for c in CLASSES]

    assert sorted(set(codes)) == sorted(codes)


@pytest.mark.parametrize("error", CLASSES)
def test_message_and_hint_render_from_the_fields(error: type[PalsError]) -> None:
    texts = (error.message, error.hint_template)
    names = {name for text in texts for _, name, _, _ in string.Formatter().parse(text) if name}

    # Zero fits every format that a template uses: text, octal and general.
    made = error(**dict.fromkeys(names, 0))

    assert str(made)
    assert "{" not in str(made) + made.hint
