import gc
import json
import os
from pathlib import Path

import pytest

from pals import config
from pals.errors import CorruptModel, InvalidText, TemplateError
from pals.text import template
from pals.text.sandbox import MAX_CPU_S, MAX_TEMPLATE_MEMORY_BYTES
from pals.text.template import ChatTemplate
from tests import checkpoints

MESSAGES = [{"role": "user", "content": "Hi 😀"}]


def test_the_configured_template_is_rendered(tmp_path: Path):
    checkpoints.write_tokenizer(tmp_path)
    chat = ChatTemplate.load(tmp_path)
    prompt = "<|im_start|>user\nHi 😀<|im_end|>\n"
    assert chat.render(MESSAGES, add_generation_prompt=False) == prompt
    assert chat.render(MESSAGES) == prompt + "<|im_start|>assistant\n"


def test_the_template_file_wins_and_knows_the_special_tokens(tmp_path: Path):
    checkpoints.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ tools is none }}")
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "<|endoftext|>True"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "d"


def test_a_model_without_template_says_so(tmp_path: Path):
    with pytest.raises(TemplateError, match="there is none"):
        ChatTemplate.load(tmp_path)


def test_a_template_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(CorruptModel):
        ChatTemplate.load(tmp_path)


def test_a_template_that_does_not_compile_fails_at_once():
    with pytest.raises(TemplateError, match="TemplateSyntaxError"):
        ChatTemplate("{% if %}", {})


def test_the_words_of_raise_exception_reach_the_user():
    chat = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(TemplateError, match="roles must alternate"):
        chat.render(MESSAGES)


def test_half_a_surrogate_pair_in_a_message_is_refused():
    chat = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(InvalidText):
        chat.render([{"role": "user", "content": "\ud800"}])
    assert chat.render(MESSAGES) == "Hi 😀"


def test_an_endless_template_is_stopped_and_the_next_rendering_works(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(template, "RENDER_DEADLINE_S", 0.3)
    source = (
        "{% if messages | length > 1 %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}ok"
    )
    chat = ChatTemplate(source, {})
    with pytest.raises(TemplateError, match=r"0\.3 s"):
        chat.render(MESSAGES * 2)
    assert chat.render(MESSAGES) == "ok"


HOSTILE = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "pow": "{{ 9 ** (9 ** (messages | length * 4)) }}",
    "long": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format by attribute": "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
    "format kept": "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",
    "pickle": "{{ messages.__reduce_ex__(2) }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "change": "{% set _ = messages.append(1) %}",
    "file": "{% include '/etc/passwd' %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.timeout(15)
@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_ends_in_an_error(source: str):
    chat = ChatTemplate("{% if messages | length > 1 %}" + source + "{% endif %}ok", {})
    with pytest.raises(TemplateError):
        chat.render(MESSAGES * 2)
    assert chat.render(MESSAGES) == "ok"


@pytest.mark.timeout(15)
def test_a_template_that_is_computed_for_ever_while_it_compiles_is_refused():
    """Jinja folds constants."""
    with pytest.raises(TemplateError, match=r"within 4\.0 s"):
        ChatTemplate("{{ 9 ** (9 ** 9) }}", {})


def test_an_attribute_out_of_bounds_is_nothing():
    hidden = "{{ messages|attr('__class__')|attr('__init__')|attr('__globals__') }}ok"
    assert ChatTemplate(hidden, {}).render(MESSAGES) == "ok"


def test_a_template_of_half_a_surrogate_pair_is_refused():
    with pytest.raises(TemplateError, match="surrogate"):
        ChatTemplate("\ud800", {})


MEMORY = {
    "doubling": (
        "{% set ns = namespace(x='aaaaaaaa') %}"
        "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    ),
    "at once": "{{ 'a' * 9999999999 }}",
    "list": "{{ ([0] * 999999999) | length }}",
    "width": "{{ '%999999999d' % 1 }}",
}


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="macOS sets no limit on memory")
@pytest.mark.parametrize("source", MEMORY.values(), ids=MEMORY.keys())
def test_a_template_that_asks_for_gigabytes_runs_out_of_its_own_memory(source: str):
    with pytest.raises(TemplateError):
        ChatTemplate(source, {}).render(MESSAGES)


def test_a_child_that_dies_is_an_error_and_is_replaced():
    chat = ChatTemplate("ok", {})
    os.kill(child_pid(chat), 9)
    with pytest.raises(TemplateError, match="was ended"):
        chat.render(MESSAGES)
    assert chat.render(MESSAGES) == "ok"


def test_closing_or_dropping_a_template_ends_its_process():
    closed, dropped = ChatTemplate("a", {}), ChatTemplate("b", {})
    pids = child_pid(closed), child_pid(dropped)
    closed.close()
    del dropped
    gc.collect()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="reads /proc")
def test_the_child_inherits_no_secret(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(config.SWARM_SECRET_VARIABLE, "canary-secret")
    monkeypatch.setenv("TZ", "UTC")
    chat = ChatTemplate("ok", {})
    environment = Path(f"/proc/{child_pid(chat)}/environ").read_bytes()
    assert b"TZ=UTC" in environment
    assert b"canary-secret" not in environment


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="reads /proc")
def test_the_child_has_limits_of_its_own_should_nobody_stop_it():
    chat = ChatTemplate("ok", {})
    chat.render(MESSAGES)
    lines = Path(f"/proc/{child_pid(chat)}/limits").read_text().splitlines()
    soft = {line[:26].strip(): line[26:].split()[0] for line in lines}
    assert int(soft["Max cpu time"]) <= MAX_CPU_S + 5
    assert int(soft["Max address space"]) <= 2 * MAX_TEMPLATE_MEMORY_BYTES


def child_pid(chat: ChatTemplate) -> int:
    process = chat._child._process
    assert process is not None
    call = process.stop.peek()
    assert call is not None
    return call[2][0].pid
