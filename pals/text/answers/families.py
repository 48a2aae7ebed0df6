"""The families of models whose answers are known, as data.

A family is recognised by what its chat template says, because a fine-tuned model may have
another's architecture; the first row that fits is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from pals.text.answers import json_calls, tagged_calls
from pals.text.answers.harmony import CHANNEL, CONSTRAIN, HARMONY_MARKS, MESSAGE, harmony
from pals.text.answers.json_calls import (
    DEEPSEEK_CALL,
    DEEPSEEK_CALL_END,
    DEEPSEEK_CALLS,
    DEEPSEEK_CALLS_END,
    DEEPSEEK_MARKS,
    DEEPSEEK_SEPARATOR,
    HERMES_CLOSE,
    HERMES_OPEN,
    KIMI_CALL,
    KIMI_CALL_END,
    KIMI_CALLS,
    KIMI_CALLS_END,
    KIMI_MARKS,
    KIMI_SEPARATOR,
    MISTRAL_ARGUMENTS,
    MISTRAL_CALLS,
    MISTRAL_ID,
    PYTHON_TAG,
)
from pals.text.answers.region import Calls
from pals.text.answers.source import Reader, Source
from pals.text.answers.tagged_calls import (
    GLM_KEY,
    GLM_KEY_END,
    GLM_MARKS,
    GLM_VALUE,
    GLM_VALUE_END,
    QWEN_FUNCTION,
    QWEN_FUNCTION_END,
    QWEN_PARAMETER,
    QWEN_PARAMETER_END,
)

ReadCalls = Callable[[Source, Calls], Reader[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """What stands around keys and values where arguments are no JSON object."""

    key: str
    value: str
    end: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Syntax:
    """What a model writes when it calls, with the names and arguments left out.

    Attributes:
        before: Comes first.
        name: Before each name.
        arguments: Between each name and its arguments.
        end: After each call's arguments.
        between: Between two calls; None where an answer makes one at most.
        after: Comes last.
        tags: How the arguments are written, if not as JSON.
    """

    before: str = ""
    name: str
    arguments: str
    end: str
    between: str | None
    after: str = ""
    tags: Tags | None = None

    @property
    def is_bare(self) -> bool:
        """A call is a JSON object with no mark before it."""
        return (self.before or self.name).startswith("{")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family writes calls, and what its templates want to be given.

    Attributes:
        name: For people and tests.
        read: Reads an answer after its reasoning.
        syntax: What its grammars ask of a call.
        marks: What the format writes around its parts.
        template_marks: A chat template that has all of them is the family's.
        model_types: ``model_type`` of config.json, where no template decides.
        arguments: Templates want the arguments of a call as an object or as JSON text.
        no_content: What they want for the content of a turn that has none.
        flattened: They know neither calls nor results: both are told as text.
        one_call_a_turn: They render a single call for each turn of the assistant.
        one_system_turn: They leave out what the system says after the first turn.
        reasoning_key: How they call an earlier turn's reasoning.
        ids: What ids of calls they want: any, 9 letters or digits, or ``functions.NAME:0`` and
            so on.
    """

    name: str
    read: ReadCalls
    syntax: Syntax
    marks: tuple[str, ...] = ()
    template_marks: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    arguments: Literal["object", "text"] = "object"
    no_content: str | None = ""
    flattened: bool = False
    one_call_a_turn: bool = False
    one_system_turn: bool = False
    reasoning_key: str = "reasoning_content"
    ids: Literal["any", "short", "numbered"] = "any"


HARMONY = Family(
    name="harmony",
    read=harmony,
    syntax=Syntax(
        name=f"{CHANNEL}commentary to=functions.",
        arguments=f" {CONSTRAIN}json{MESSAGE}",
        end="",
        between=None,
    ),
    marks=HARMONY_MARKS,
    template_marks=(CHANNEL, MESSAGE),
    model_types=("gpt_oss",),
    one_call_a_turn=True,
    one_system_turn=True,
    reasoning_key="thinking",
)
DEEPSEEK_V3 = Family(
    name="deepseek-v3",
    read=json_calls.deepseek,
    syntax=Syntax(
        before=DEEPSEEK_CALLS,
        name=f"{DEEPSEEK_CALL}function{DEEPSEEK_SEPARATOR}",
        arguments="\n```json\n",
        end=f"\n```{DEEPSEEK_CALL_END}",
        between="\n",
        after=DEEPSEEK_CALLS_END,
    ),
    marks=DEEPSEEK_MARKS,
    template_marks=(DEEPSEEK_CALL, "```json"),
    arguments="text",
    no_content=None,
)
DEEPSEEK = replace(
    DEEPSEEK_V3,
    name="deepseek",
    syntax=Syntax(
        before=DEEPSEEK_CALLS,
        name=DEEPSEEK_CALL,
        arguments=DEEPSEEK_SEPARATOR,
        end=DEEPSEEK_CALL_END,
        between="",
        after=DEEPSEEK_CALLS_END,
    ),
    template_marks=(DEEPSEEK_CALL,),
    model_types=("deepseek_v3",),
)
KIMI = Family(
    name="kimi",
    read=json_calls.kimi,
    syntax=Syntax(
        before=KIMI_CALLS,
        name=f"{KIMI_CALL}functions.",
        arguments=f":0{KIMI_SEPARATOR}",
        end=KIMI_CALL_END,
        between="",
        after=KIMI_CALLS_END,
    ),
    marks=KIMI_MARKS,
    template_marks=(KIMI_CALL,),
    model_types=("kimi_k2",),
    ids="numbered",
)
GLM = Family(
    name="glm",
    read=tagged_calls.glm,
    syntax=Syntax(
        name=HERMES_OPEN,
        arguments="\n",
        end=HERMES_CLOSE,
        between="\n",
        tags=Tags(key=GLM_KEY, value=f"{GLM_KEY_END}\n{GLM_VALUE}", end=f"{GLM_VALUE_END}\n"),
    ),
    marks=(HERMES_OPEN, HERMES_CLOSE, *GLM_MARKS),
    template_marks=(HERMES_OPEN, GLM_KEY),
    model_types=("glm4_moe",),
)
QWEN_CODER = Family(
    name="qwen-coder",
    read=tagged_calls.qwen_coder,
    syntax=Syntax(
        name=f"{HERMES_OPEN}\n{QWEN_FUNCTION}",
        arguments=">\n",
        end=f"{QWEN_FUNCTION_END}\n{HERMES_CLOSE}",
        between="\n",
        tags=Tags(key=QWEN_PARAMETER, value=">\n", end=f"\n{QWEN_PARAMETER_END}\n"),
    ),
    marks=(HERMES_OPEN, HERMES_CLOSE),
    template_marks=(HERMES_OPEN, QWEN_FUNCTION),
)
HERMES = Family(
    name="hermes",
    read=json_calls.hermes,
    syntax=Syntax(
        name=f'{HERMES_OPEN}\n{{"name": "',
        arguments='", "arguments": ',
        end=f"}}\n{HERMES_CLOSE}",
        between="\n",
    ),
    marks=(HERMES_OPEN, HERMES_CLOSE),
    template_marks=(HERMES_OPEN,),
    model_types=(
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
    ),
)
MISTRAL = Family(
    name="mistral",
    read=json_calls.mistral,
    syntax=Syntax(name=MISTRAL_CALLS, arguments=MISTRAL_ARGUMENTS, end="", between=""),
    marks=(MISTRAL_CALLS, MISTRAL_ID, MISTRAL_ARGUMENTS),
    template_marks=(MISTRAL_CALLS, MISTRAL_ARGUMENTS),
    ids="short",
)
MISTRAL_V3 = replace(
    MISTRAL,
    name="mistral-v3",
    syntax=Syntax(
        before=f"{MISTRAL_CALLS}[",
        name='{"name": "',
        arguments='", "arguments": ',
        end="}",
        between=", ",
        after="]",
    ),
    template_marks=(MISTRAL_CALLS,),
    model_types=(
        "mistral",
        "mixtral",
    ),
)
LLAMA = Family(
    name="llama",
    read=json_calls.llama,
    syntax=Syntax(name='{"name": "', arguments='", "parameters": ', end="}", between=None),
    marks=(PYTHON_TAG,),
    template_marks=("<|start_header_id|>", '"parameters": '),
    one_call_a_turn=True,
)
PLAIN = Family(
    name="plain",
    read=json_calls.llama,
    syntax=Syntax(name='{"name": "', arguments='", "parameters": ', end="}", between="; "),
    flattened=True,
)
"""Any other, such as Gemma 3: tools are described in the first turn, calls are bare JSON."""

FAMILIES = (
    HARMONY,
    DEEPSEEK_V3,
    DEEPSEEK,
    KIMI,
    GLM,
    QWEN_CODER,
    HERMES,
    MISTRAL,
    MISTRAL_V3,
    LLAMA,
)


def family_of(template: str | None, model_type: object) -> Family:
    """Return the family of a model with this chat template and architecture."""
    for family in FAMILIES:
        if template is not None and all(mark in template for mark in family.template_marks):
            return family
    for family in FAMILIES:
        if template is None and model_type in family.model_types:
            return family
    return PLAIN
