"""The families of models whose answers are known, as data.

A family is recognised by what its chat template says, because a fine-tuned model may have
another's architecture; the first row that fits is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pals.text.answers import json_calls, tagged_calls
from pals.text.answers.harmony import HARMONY_MARKS, harmony
from pals.text.answers.json_calls import (
    DEEPSEEK_CALL,
    DEEPSEEK_MARKS,
    HERMES_CLOSE,
    HERMES_OPEN,
    MISTRAL_ARGUMENTS,
    MISTRAL_CALLS,
    MISTRAL_ID,
    PYTHON_TAG,
)
from pals.text.answers.region import Calls
from pals.text.answers.source import Reader, Source
from pals.text.answers.tagged_calls import GLM_KEY, GLM_MARKS, QWEN_FUNCTION

ReadCalls = Callable[[Source, Calls], Reader[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family writes calls, and what its templates want to be given.

    Attributes:
        name: For people and tests.
        read: Reads an answer after its reasoning.
        marks: What the format writes around its parts.
        template_marks: A chat template that has all of them is the family's.
        model_types: ``model_type`` of config.json, where no template decides.
        arguments: Templates want the arguments of a call as an object or as JSON text.
        no_content: What they want for the content of a turn that has none.
        one_call_a_turn: They render a single call for each turn of the assistant.
        reasoning_key: How they call an earlier turn's reasoning.
        short_ids: They want ids of calls that have 9 letters or digits.
    """

    name: str
    read: ReadCalls
    marks: tuple[str, ...] = ()
    template_marks: tuple[str, ...] = ()
    model_types: frozenset[str] = frozenset()
    arguments: Literal["object", "text"] = "object"
    no_content: str | None = ""
    one_call_a_turn: bool = False
    reasoning_key: str = "reasoning_content"
    short_ids: bool = False


HARMONY = Family(
    name="harmony",
    read=harmony,
    marks=HARMONY_MARKS,
    template_marks=("<|channel|>", "<|message|>"),
    model_types=frozenset({"gpt_oss"}),
    one_call_a_turn=True,
    reasoning_key="thinking",
)
DEEPSEEK = Family(
    name="deepseek",
    read=json_calls.deepseek,
    marks=DEEPSEEK_MARKS,
    template_marks=(DEEPSEEK_CALL,),
    model_types=frozenset({"deepseek_v3"}),
    arguments="text",
    no_content=None,
)
GLM = Family(
    name="glm",
    read=tagged_calls.glm,
    marks=(HERMES_OPEN, HERMES_CLOSE, *GLM_MARKS),
    template_marks=(HERMES_OPEN, GLM_KEY),
    model_types=frozenset({"glm4_moe"}),
)
QWEN_CODER = Family(
    name="qwen-coder",
    read=tagged_calls.qwen_coder,
    marks=(HERMES_OPEN, HERMES_CLOSE),
    template_marks=(HERMES_OPEN, QWEN_FUNCTION),
)
HERMES = Family(
    name="hermes",
    read=json_calls.hermes,
    marks=(HERMES_OPEN, HERMES_CLOSE),
    template_marks=(HERMES_OPEN,),
    model_types=frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}),
)
MISTRAL = Family(
    name="mistral",
    read=json_calls.mistral,
    marks=(MISTRAL_CALLS, MISTRAL_ID, MISTRAL_ARGUMENTS),
    template_marks=(MISTRAL_CALLS,),
    model_types=frozenset({"mistral", "mixtral", "ministral", "mistral3"}),
    short_ids=True,
)
LLAMA = Family(
    name="llama",
    read=json_calls.llama,
    marks=(PYTHON_TAG,),
    template_marks=("<|start_header_id|>", '"parameters": '),
    one_call_a_turn=True,
)
PROMPTED = Family(name="plain", read=json_calls.llama)
"""Any other: the tools and how to call them are put into the first turn, as Gemma wants it."""

FAMILIES = (HARMONY, DEEPSEEK, GLM, QWEN_CODER, HERMES, MISTRAL, LLAMA)


def family_of(template: str | None, model_type: object) -> Family:
    """Return the family of a model with this chat template and architecture."""
    for family in FAMILIES:
        if template is not None and all(mark in template for mark in family.template_marks):
            return family
    for family in FAMILIES:
        if template is None and model_type in family.model_types:
            return family
    return PROMPTED
