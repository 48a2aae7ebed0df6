import json
from datetime import datetime

import pytest

from pals.errors import InvalidRequest
from pals.text import sandbox
from pals.text.answers import families
from pals.text.answers.families import FAMILIES, PLAIN, Family
from pals.text.answers.turns import tool_objects, turns_for
from tests.unit.text.answers.reading import NOW, WEATHER
from tests.unit.text.answers.templates import TEMPLATES

EVERY_FAMILY = [*FAMILIES, PLAIN]


def call(call_id: str, name: str, arguments: str) -> dict[str, object]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


TWO_CALLS = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Weather in Paris, and the time?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Two calls.",
        "tool_calls": [
            call("call_aaaaaaaaaaaaaaaaaaaaaaaa", "get_weather", '{"city": "Paris"}'),
            call("call_bbbbbbbbbbbbbbbbbbbbbbbb", "now", "{}"),
        ],
    },
    {"role": "tool", "tool_call_id": "call_aaaaaaaaaaaaaaaaaaaaaaaa", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call_bbbbbbbbbbbbbbbbbbbbbbbb", "content": "noon"},
    {"role": "assistant", "content": "Sunny, noon."},
    {"role": "user", "content": "Thanks"},
]


def render(family: Family, messages: list[dict[str, object]]) -> str:
    """Render a conversation as a model of the family would have it rendered."""
    source = TEMPLATES[family.name]
    reads_tools = "tools" in source.replace("tool▁calls", "")
    described = () if reads_tools else (WEATHER, NOW)
    template = sandbox.compile_template(source, now=lambda: datetime(2026, 2, 3))
    variables = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "messages": turns_for(family, messages, described),
        "tools": tool_objects((WEATHER, NOW)) if reads_tools else None,
        "add_generation_prompt": True,
    }
    return sandbox.render(template, json.loads(json.dumps(variables)))


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_a_conversation_with_calls_renders_whole(family: Family):
    prompt = render(family, TWO_CALLS)
    places = [
        prompt.index(text)
        for text in ("get_weather", "Weather in Paris", "sunny", "noon", "Sunny, noon.", "Thanks")
    ]
    assert places[1:] == sorted(places[1:])
    assert "Be brief." in prompt
    assert "None" not in prompt
    assert "undefined" not in prompt


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_earlier_calls_are_in_the_prompt_as_the_model_writes_them(family: Family):
    conversation = [*TWO_CALLS[:2], {**TWO_CALLS[2], "reasoning_content": None}, *TWO_CALLS[3:]]
    prompt = render(family, conversation)
    arguments = '{"city": "Paris"}'
    if family.syntax.tags is not None:
        tags = family.syntax.tags
        arguments = f"{tags.key}city{tags.value}Paris{tags.end.rstrip()}"
    assert arguments in prompt
    if family is families.HARMONY:  # whose template puts the recipient before the channel
        assert "to=functions.get_weather" in prompt
    else:
        assert f"{family.syntax.name}get_weather{family.syntax.arguments}" in prompt


def turns(family: Family, *messages: dict[str, object]) -> list[dict[str, object]]:
    return [dict(turn) for turn in turns_for(family, messages, ())]


def test_instructions_that_lead_are_one_turn_of_the_system():
    found = turns(
        families.HERMES,
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "system", "content": "d"},
    )
    assert found == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "system", "content": "d"},
    ]


def test_harmony_has_all_instructions_first_because_its_template_drops_later_ones():
    found = turns(
        families.HARMONY, {"role": "user", "content": "c"}, {"role": "system", "content": "d"}
    )
    assert found == [{"role": "system", "content": "d"}, {"role": "user", "content": "c"}]


def test_instructions_alone_are_a_conversation():
    assert turns(PLAIN, {"role": "system", "content": "a"}) == [{"role": "system", "content": "a"}]


@pytest.mark.parametrize(
    ("family", "arguments", "content"),
    [
        (families.HERMES, {"city": "Paris"}, ""),
        (families.DEEPSEEK, '{"city": "Paris"}', None),
    ],
)
def test_arguments_and_missing_content_are_as_the_template_wants_them(
    family: Family, arguments: object, content: object
):
    found = turns(family, *TWO_CALLS[2:3])[0]
    assert found["content"] == content
    assert found["tool_calls"][0]["function"]["arguments"] == arguments  # type: ignore[index]


@pytest.mark.parametrize("arguments", ["[1]", "{", "no", '"{}"'])
def test_arguments_that_are_no_object_are_refused_with_a_name(arguments: str):
    message = {"role": "assistant", "content": "", "tool_calls": [call("a", "f", arguments)]}
    with pytest.raises(InvalidRequest) as caught:
        turns(families.HERMES, message)
    assert caught.value.fields["param"] == "messages"


def test_ids_are_short_and_alike_for_mistral():
    found = turns(families.MISTRAL, *TWO_CALLS[2:5])
    ids = [made["id"] for made in found[0]["tool_calls"]]  # type: ignore[union-attr]
    assert ids == [turn["tool_call_id"] for turn in found[1:]]
    assert len(set(ids)) == 2
    assert all(len(i) == 9 and i.isalnum() for i in ids)


def test_ids_are_numbered_for_kimi():
    found = turns(families.KIMI, *TWO_CALLS[2:5])
    assert [turn["tool_call_id"] for turn in found[1:]] == [
        "functions.get_weather:0",
        "functions.now:1",
    ]
    assert (
        [made["id"] for made in found[0]["tool_calls"]]
        == [  # type: ignore[union-attr]
            turn["tool_call_id"] for turn in found[1:]
        ]
    )


def test_results_know_the_tool_that_they_are_of():
    found = turns(families.HERMES, *TWO_CALLS[2:5])
    assert [turn["name"] for turn in found[1:]] == ["get_weather", "now"]


def test_each_call_is_followed_by_its_result_where_a_turn_makes_one():
    late = [TWO_CALLS[2], TWO_CALLS[4], TWO_CALLS[3], TWO_CALLS[6]]
    found = turns(families.LLAMA, *late)
    assert [turn["role"] for turn in found] == ["assistant", "tool", "assistant", "tool", "user"]
    assert [turn["content"] for turn in found if turn["role"] == "tool"] == ["sunny", "noon"]
    assert "reasoning_content" not in found[2]


def test_ids_that_are_used_again_do_not_mix_up_results():
    def again(name: str, result: str) -> list[dict[str, object]]:
        calls = [call("1", name, "{}"), call("2", "now", "{}")]
        return [
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": result},
            {"role": "tool", "tool_call_id": "2", "content": "noon"},
        ]

    found = turns(families.LLAMA, *again("a", "first"), *again("b", "second"))
    assert [turn["content"] for turn in found if turn["role"] == "tool"] == [
        "first", "noon", "second", "noon"
    ]  # fmt: skip


def test_a_result_of_no_known_call_stays_where_it_is():
    stray = {"role": "tool", "tool_call_id": "x", "content": "?"}
    found = turns(families.LLAMA, *TWO_CALLS[2:5], stray)
    assert [turn["content"] for turn in found] == ["", "sunny", "", "noon", "?"]


def test_calls_and_results_are_text_where_templates_know_neither():
    found = turns(PLAIN, *TWO_CALLS[1:5], {"role": "user", "content": "And?"})
    assert [turn["role"] for turn in found] == ["user", "assistant", "user"]
    assert found[1]["content"] == (
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "now", "parameters": {}}'
    )
    assert found[2]["content"] == ("Result of get_weather:\nsunny\n\nResult of now:\nnoon\n\nAnd?")


def test_two_turns_of_a_user_stay_two():
    message = {"role": "user", "content": "a"}
    assert turns(PLAIN, message, message) == [message, message]


def test_tools_are_described_where_the_template_is_silent():
    found = turns_for(PLAIN, [{"role": "user", "content": "a"}], (WEATHER,))
    told = str(found[0]["content"])
    assert found[0]["role"] == "system"
    assert json.dumps(WEATHER.parameters) in told
    assert '{"name": "NAME", "parameters": {"argument": "value"}}' in told


def test_tools_have_every_key_that_templates_read():
    assert tool_objects((NOW,)) == [
        {
            "type": "function",
            "function": {
                "name": "now",
                "description": "",
                "parameters": {"type": "object", "properties": {}},
            },
        }
    ]
