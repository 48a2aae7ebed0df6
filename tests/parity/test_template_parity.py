"""Prompts of conversations with tools, against the text that transformers makes of them."""

import json
from datetime import datetime

import pytest

from pals.text.answers.families import FAMILIES, PLAIN, Family
from pals.text.answers.turns import tool_objects, turns_for
from pals.text.template import ChatTemplate
from tests.unit.text.answers.reading import NOW, WEATHER
from tests.unit.text.answers.templates import TEMPLATES
from tests.unit.text.answers.test_turns import TWO_CALLS

pytestmark = pytest.mark.parity

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("with_tools", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, PLAIN], ids=lambda family: family.name)
def test_a_conversation_with_calls_is_the_prompt_of_transformers(family: Family, with_tools: bool):
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = turns_for(family, TWO_CALLS, ())
    tools = tool_objects((WEATHER, NOW)) if with_tools else None
    day = datetime.now().date()

    rendered, _ = render_jinja_template(
        conversations=[json.loads(json.dumps(turns))],
        tools=tools,
        chat_template=TEMPLATES[family.name],
        add_generation_prompt=True,
        **TOKENS,
    )
    prompt = ChatTemplate(TEMPLATES[family.name], TOKENS).render(turns, tools=tools)

    # some templates write the date; midnight is the one moment at which it may differ
    assert prompt == rendered[0] or datetime.now().date() != day
