from __future__ import annotations

from pathlib import Path

import pytest

from pals.api.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS, EMBEDDING_FIELDS, FieldTable
from pals.errors import UnknownParameter, UnsupportedParameter

PAGE = Path(__file__).parents[4] / "docs" / "reference" / "openai.md"


@pytest.mark.parametrize("table", [CHAT_FIELDS, COMPLETION_FIELDS, EMBEDDING_FIELDS])
def test_the_page_says_what_becomes_of_every_field(table: FieldTable) -> None:
    page = PAGE.read_text()

    missing = [n for n in (*table.struct.__struct_fields__, *table.refused) if f"`{n}`" not in page]

    assert missing == []


def test_values_are_compared_with_their_types() -> None:
    COMPLETION_FIELDS.check({"suffix": ""})
    CHAT_FIELDS.check({"store": False, "modalities": ["text"]})
    for store in (0, True, ""):
        with pytest.raises(UnsupportedParameter):
            CHAT_FIELDS.check({"store": store})


def test_a_long_name_is_not_quoted_whole() -> None:
    with pytest.raises(UnknownParameter) as caught:
        CHAT_FIELDS.check({"x" * 10_000: 1})

    assert len(str(caught.value)) < 300
