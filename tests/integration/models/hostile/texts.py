"""Chat templates and tokenizers that attack whoever runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.integration.models.hostile.cases import Case, Spoil, corrupt, file_with

TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TOUCH = "touch PWNED ../PWNED"
Settings = dict[str, object]


def template(source: str) -> Case:
    """Return the case of a template that cannot be rendered."""
    spoil = file_with(TEMPLATE, source.encode())
    return Case(spoil=spoil, error="TemplateError", says=("chat template",))


def tokenizer_changed(change: Callable[[Settings], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / TOKENIZER).read_text())
        change(values)
        (folder / TOKENIZER).write_text(json.dumps(values))

    return spoil


def tokenizer_with(**parts: object) -> Spoil:
    return tokenizer_changed(lambda values: values.update(parts))


def model_with(**parts: object) -> Spoil:
    return tokenizer_changed(lambda values: values["model"].update(parts))  # type: ignore[attr-defined]


def settings_with(**parts: object) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / SETTINGS
        path.write_text(json.dumps(json.loads(path.read_text()) | parts))

    return spoil


def split_by(pattern: str) -> Spoil:
    """Let a regular expression cut the text."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return tokenizer_with(pre_tokenizer=split | {"invert": False})


def survives(spoil: Spoil) -> Case:
    """Return a case that may load: what matters is that nothing else comes of it."""
    return Case(spoil=spoil, error="?", says=())


TEMPLATE_CASES: dict[str, Case] = {
    f"tpl_{name}": template(source)
    for name, source in {
        "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "classes_by_filter": "{{ (''|attr('__class__')).__mro__ }}",
        "classes_by_map": "{{ ['']|map(attribute='__class__')|first|attr('mro') }}{{ x.y.z }}",
        "globals": "{{ cycler.__init__.__globals__.os.popen('" + TOUCH + "').read() }}",
        "globals_of_namespace": "{{ namespace.__init__.__globals__['os'].system('"
        + TOUCH
        + "') }}",
        "globals_of_function": "{{ raise_exception.__globals__['__builtins__'] }}",
        "globals_of_macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__.x }}",
        "imports": "{{ lipsum.__globals__.os.system('" + TOUCH + "') }}",
        "format": "{{ '{0.__class__.__mro__}'.format(1) }}",
        "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
        "format_by_filter": "{{ ('{0.__class__}'|attr('format'))(1).mro.x }}",
        "mutates": "{{ messages.append(1) }}",
        "mutates_dict": "{{ messages[0].update({'a': 1}) }}",
        "include": "{% include '/etc/passwd' %}",
        "extends": "{% extends '../../secret' %}",
        "import": "{% import 'os' as os %}{{ os.system('" + TOUCH + "') }}",
        "from_import": "{% from 'os' import system %}{{ system('" + TOUCH + "') }}",
        "loop": "{% for i in range(10**10) %}{% endfor %}",
        "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "power": "{{ 9**(9**(9**9)) }}",
        "memory": "{{ 'a' * 10**10 }}",
        "list": "{{ ([0] * 10**10)|length }}",
        "doubling": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}",
        "output": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "recursive_loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "deep": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
        "nested_blocks": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
        "padding": "{{ '%1000000000000d' % 1 }}",
        "centred": "{{ 'a'|center(10**10) }}",
        "no_template": "{% for %}",
        "raises": "{{ raise_exception('no') }}",
        "unknown_filter": "{{ messages|shell }}",
    }.items()
} | {
    "tpl_large": corrupt(file_with(TEMPLATE, b"x" * (2 << 20)), TEMPLATE, "larger than"),
    "tpl_no_utf_8": corrupt(file_with(TEMPLATE, b"\xff\xfe{{ 1 }}"), TEMPLATE, "UTF-8"),
    "tpl_no_text": corrupt(settings_with(chat_template={"a": 1}), SETTINGS, "chat_template"),
}

TOKENIZER_CASES: dict[str, Case] = {
    "tok_regex_exponential": corrupt(split_by("(a|a)*$"), TOKENIZER),
    "tok_regex_nested": corrupt(split_by("((a+)+)+$"), TOKENIZER),
    "tok_regex_invalid": corrupt(split_by("(unclosed"), TOKENIZER),
    "tok_regex_lookbehind": survives(split_by("(?<=a+)b")),
    "tok_regex_panics": survives(split_by("\\p{Nonsense}")),
    "tok_replace_invalid": corrupt(
        tokenizer_with(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}),
        TOKENIZER,
    ),
    "tok_replace_grows": corrupt(
        tokenizer_with(
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
                ]
                * 4,
            }
        ),
        TOKENIZER,
    ),
    "tok_template_without_token": survives(
        tokenizer_with(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        )
    ),
    "tok_added_out_of_order": survives(
        tokenizer_changed(lambda values: values["added_tokens"].reverse())  # type: ignore[attr-defined]
    ),
    "tok_added_far_away": survives(
        tokenizer_changed(lambda values: values["added_tokens"][0].update(id=2**31))  # type: ignore[index]
    ),
    "tok_added_past_32_bits": corrupt(
        tokenizer_changed(lambda values: values["added_tokens"][0].update(id=2**40)),  # type: ignore[index]
        TOKENIZER,
    ),
    "tok_negative_id": corrupt(model_with(vocab={"a": -1}), TOKENIZER),
    "tok_merge_of_unknown": corrupt(model_with(merges=[["zz", "yy"]]), TOKENIZER),
    "tok_precompiled": corrupt(
        tokenizer_with(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        TOKENIZER,
    ),
    "tok_unknown_model": corrupt(model_with(type="Python"), TOKENIZER),
    "tok_deep": corrupt(file_with(TOKENIZER, b"[" * 10**6), TOKENIZER),
    "tok_cut": corrupt(file_with(TOKENIZER, b'{"version": "1.0", "model": '), TOKENIZER),
    "tok_empty": corrupt(file_with(TOKENIZER, b"{}"), TOKENIZER),
    "tok_large": corrupt(file_with(TOKENIZER, b" " * (100 << 20)), TOKENIZER, "larger than"),
    "tok_no_utf_8": corrupt(file_with(TOKENIZER, b'{"version": "\xff"}'), TOKENIZER, "UTF-8"),
    "tok_settings_deep": corrupt(file_with(SETTINGS, b"[" * 10**6), SETTINGS, "JSON"),
    "tok_settings_of_objects": corrupt(
        file_with(SETTINGS, b"[" + b"{}," * 5_000_000 + b"{}]"), SETTINGS
    ),
    "tok_settings_digits": corrupt(
        file_with(SETTINGS, b'{"a": ' + b"9" * 10**6 + b"}"), SETTINGS, "JSON"
    ),
    "tok_bos_no_text": corrupt(settings_with(bos_token=[1]), SETTINGS, "bos_token"),
    "tok_generation_ids": corrupt(
        file_with("generation_config.json", b'{"eos_token_id": [300]}'), "generation_config.json"
    ),
    "tok_remote_code": survives(
        settings_with(auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    ),
}

CASES = TEMPLATE_CASES | TOKENIZER_CASES
