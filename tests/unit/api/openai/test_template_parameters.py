"""What a request may not have: a say in how the model's own chat template is rendered."""

import msgspec
import pytest

from pals.api.openai.conversation import conversation
from pals.api.openai.fields import CHAT_FIELDS
from pals.api.openai.reading import read_request
from pals.api.openai.schema.chat import ChatRequest
from pals.errors import InvalidRequest

HELLO = {"role": "user", "content": "hello"}
TEMPLATE = "{{ ''.__class__.__mro__ }}"
PARAMETERS = {
    "chat_template": TEMPLATE,
    "chat_template_kwargs": {"enable_thinking": False},
    "enable_thinking": False,
    "thinking": True,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "documents": [{"title": "a", "text": "b"}],
    "custom_tools": [],
    "bos_token": "x",
    "strftime_now": "x",
}


def read(**fields: object) -> ChatRequest:
    body = msgspec.json.encode({"model": "m", "messages": [HELLO]} | fields)
    return read_request(body, CHAT_FIELDS, ChatRequest)


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_a_parameter_of_the_template_is_refused_by_its_name(name: str):
    with pytest.raises(InvalidRequest) as caught:
        read(**{name: PARAMETERS[name]})
    assert caught.value.fields["param"] == name
    assert caught.value.http_status == 400


@pytest.mark.parametrize("name", ["thinking", "tool_responses", "prefix"])
def test_a_message_has_no_fields_that_only_a_template_knows(name: str):
    with pytest.raises(InvalidRequest):
        conversation(read(messages=[HELLO | {name: "x"}]).messages)


def test_a_template_in_a_message_is_text():
    messages = conversation(read(messages=[HELLO | {"content": TEMPLATE}]).messages)
    assert messages[0].content == TEMPLATE
