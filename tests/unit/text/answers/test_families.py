import re
from pathlib import Path

import pytest

from pals.text.answers.families import FAMILIES, PLAIN, family_of
from tests.unit.text.answers.templates import TEMPLATES


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_family_is_recognised_by_its_template(name: str):
    assert family_of(TEMPLATES[name], "qwen3").name == name


def test_every_family_has_a_template_here():
    assert {family.name for family in (*FAMILIES, PLAIN)} == set(TEMPLATES)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gpt_oss", "harmony"),
        ("deepseek_v3", "deepseek"),
        ("glm4_moe", "glm"),
        ("qwen3_moe", "hermes"),
        ("mistral", "mistral-v3"),
        ("gemma3_text", "plain"),
        (None, "plain"),
        (["qwen3"], "plain"),
    ],
)
def test_without_a_template_the_architecture_decides(model_type: object, name: str):
    assert family_of(None, model_type).name == name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mark_begins_or_holds_another(family: object):
    marks = family.marks  # type: ignore[attr-defined]
    assert not any(a in b for a in marks for b in marks if a != b)


def test_every_family_is_in_the_documentation():
    text = (Path(__file__).parents[4] / "docs/answers.md").read_text()
    named = re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE)
    assert sorted(named) == sorted(family.name for family in (*FAMILIES, PLAIN))
