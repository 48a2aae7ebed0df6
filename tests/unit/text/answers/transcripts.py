"""Answers as models of each family write them, and what they consist of.

The forms are those of the families' published chat templates and model cards.
"""

from dataclasses import dataclass

from pals.text.answers import families
from pals.text.answers.families import Family
from pals.text.answers.reasoning import MISTRAL_THINK, THINK, Thinking

BAR = "\uff5c"


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """One answer.

    Attributes:
        family: Who wrote it.
        text: It.
        parts: What it consists of, as `reading.joined` returns it.
        thinking: The marks of the model's reasoning.
        prompt_tail: The end of the prompt.
        special: Marks that are special tokens of such models.
    """

    family: Family
    text: str
    parts: list[tuple[str, ...]]
    thinking: Thinking | None = None
    prompt_tail: str = ""
    special: tuple[str, ...] = ()


PARIS = [("call", "0", "get_weather"), ("arguments 0", '{"city": "Paris", "days": 3}')]
CLOCK = [("call", "1", "now"), ("arguments 1", "{}")]


def _deepseek(word: str) -> str:
    return f"<{BAR}tool▁{word}{BAR}>"


TRANSCRIPTS = {
    "qwen 3: thinks, speaks, calls twice": Transcript(
        family=families.HERMES,
        thinking=THINK,
        text="<think>\nThe user wants the weather.\n</think>\n\nLet me look.\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        parts=[
            ("reasoning", "The user wants the weather."),
            ("content", "Let me look."),
            *PARIS,
            *CLOCK,
        ],
    ),
    "qwen 3: told not to think": Transcript(
        family=families.HERMES,
        thinking=THINK,
        prompt_tail="<|im_start|>assistant\n<think>\n\n</think>\n\n",
        text="Use <think> tags for that.",
        parts=[("content", "Use <think> tags for that.")],
    ),
    "qwq: the prompt opens the reasoning": Transcript(
        family=families.HERMES,
        thinking=THINK,
        prompt_tail="<|im_start|>assistant\n<think>\n",
        text="So 2 + 2 < 5.\n</think>\n\n4",
        parts=[("reasoning", "So 2 + 2 < 5."), ("content", "4")],
    ),
    "qwen 2.5: arguments before the name": Transcript(
        family=families.HERMES,
        text='<tool_call>\n{"arguments": {"city": "Paris", "days": 3}, "name": "get_weather"}\n'
        "</tool_call>",
        parts=PARIS,
    ),
    "qwen 2.5: text in the form of an open tag": Transcript(
        family=families.HERMES,
        text="In C, a <tool_cal is no tag, nor is a < b.",
        parts=[("content", "In C, a <tool_cal is no tag, nor is a < b.")],
    ),
    "qwen 3 coder: values on lines": Transcript(
        family=families.QWEN_CODER,
        text="I will.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>"
        "\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n"
        "<function=now>\n</function>\n</tool_call>",
        parts=[("content", "I will."), *PARIS, *CLOCK],
    ),
    "glm 4.5: pairs": Transcript(
        family=families.GLM,
        thinking=THINK,
        text="\n<think>Weather first.</think>\nOne moment.\n<tool_call>get_weather\n"
        "<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        parts=[("reasoning", "Weather first."), ("content", "One moment."), *PARIS, *CLOCK],
    ),
    "glm 4.5: empty reasoning": Transcript(
        family=families.GLM,
        thinking=THINK,
        text="\n<think></think>\nHello",
        parts=[("content", "Hello")],
    ),
    "llama 3.1: bare object": Transcript(
        family=families.LLAMA,
        special=("<|python_tag|>",),
        text='{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
        parts=PARIS,
    ),
    "llama 3.1: python tag and two calls": Transcript(
        family=families.LLAMA,
        special=("<|python_tag|>",),
        text='<|python_tag|>{"type": "function", "name": "get_weather", "parameters": '
        '{"city": "Paris", "days": 3}}; {"name": "now", "parameters": {}}',
        parts=[*PARIS, *CLOCK],
    ),
    "llama 3.1: an answer in JSON": Transcript(
        family=families.LLAMA,
        special=("<|python_tag|>",),
        text='{"name": "Ada", "born": 1815}',
        parts=[("content", '{"name": "Ada", "born": 1815}')],
    ),
    "mistral nemo: array": Transcript(
        family=families.MISTRAL_V3,
        special=("[TOOL_CALLS]",),
        text='[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}, '
        '"id": "VvvODy9mT"}, {"name": "now", "arguments": {}}]',
        parts=[*PARIS, *CLOCK],
    ),
    "magistral: thinks, then names and arguments": Transcript(
        family=families.MISTRAL,
        thinking=MISTRAL_THINK,
        special=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"),
        text="[THINK]Hm.[/THINK]Wait.[TOOL_CALLS]get_weather[CALL_ID]VvvODy9mT[ARGS]"
        '{"city": "Paris", "days": 3}[TOOL_CALLS]now[ARGS]{}',
        parts=[("reasoning", "Hm."), ("content", "Wait."), *PARIS, *CLOCK],
    ),
    "deepseek r1: the prompt opens the reasoning": Transcript(
        family=families.DEEPSEEK_V3,
        thinking=THINK,
        prompt_tail=f"<{BAR}Assistant{BAR}><think>\n",
        text="Look it up.\n</think>\n\n"
        f"{_deepseek('calls▁begin')}{_deepseek('call▁begin')}function{_deepseek('sep')}get_weather"
        f'\n```json\n{{"city": "Paris", "days": 3}}\n```{_deepseek("call▁end")}\n'
        f"{_deepseek('call▁begin')}function{_deepseek('sep')}now\n```json\n{{}}\n```"
        f"{_deepseek('call▁end')}{_deepseek('calls▁end')}",
        parts=[("reasoning", "Look it up."), *PARIS, *CLOCK],
    ),
    "deepseek v3.1: the prompt closes the reasoning": Transcript(
        family=families.DEEPSEEK,
        thinking=THINK,
        prompt_tail=f"<{BAR}Assistant{BAR}></think>",
        text=f"Sure. {_deepseek('calls▁begin')}{_deepseek('call▁begin')}get_weather"
        f'{_deepseek("sep")}{{"city": "Paris", "days": 3}}{_deepseek("call▁end")}'
        f"{_deepseek('call▁begin')}now{_deepseek('sep')}{{}}{_deepseek('call▁end')}"
        f"{_deepseek('calls▁end')}",
        parts=[("content", "Sure."), *PARIS, *CLOCK],
    ),
    "kimi k2: numbered names": Transcript(
        family=families.KIMI,
        special=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        text="Right away.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Paris", "days": 3}<|tool_call_end|>'
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        parts=[("content", "Right away."), *PARIS, *CLOCK],
    ),
    "gpt-oss: analysis, preamble, call": Transcript(
        family=families.HARMONY,
        special=families.HARMONY.marks,
        text="<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant<|channel|>"
        "commentary<|message|>Looking it up.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris", "days": 3}<|call|>',
        parts=[("reasoning", "Need weather."), ("content", "Looking it up."), *PARIS],
    ),
    "gpt-oss: recipient before the channel": Transcript(
        family=families.HARMONY,
        special=families.HARMONY.marks,
        text=" to=functions.get_weather<|channel|>commentary json<|message|>"
        '{"city": "Paris", "days": 3}',
        parts=PARIS,
    ),
    "gpt-oss: final answer": Transcript(
        family=families.HARMONY,
        special=families.HARMONY.marks,
        text="<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final"
        "<|message|>It is 4.<|return|>",
        parts=[("reasoning", "Easy."), ("content", "It is 4.")],
    ),
    "gemma 3: fenced call": Transcript(
        family=families.PLAIN,
        text='```json\n{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}\n```',
        parts=PARIS,
    ),
    "gemma 3: code": Transcript(
        family=families.PLAIN,
        text="```python\nprint({})\n```\n",
        parts=[("content", "```python\nprint({})\n```\n")],
    ),
}
