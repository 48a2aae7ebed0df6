import json
import socket
from datetime import datetime

import jinja2
import pytest

from pals.text import sandbox


def render(source: str, **variables: object) -> str:
    template = sandbox.compile_template(source, now=lambda: datetime(2026, 2, 3))
    return sandbox.render(template, variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%d %b %Y') }}", "03 Feb 2026"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a{% generation %}b{{ 1 }}{% endgeneration %}c", "ab1c"),
        ("{{ missing }}|{{ x }}", "|y"),
    ],
)
def test_templates_render_as_in_transformers(source: str, text: str):
    assert render(source, x="y") == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ x.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% include 'other' %}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_that_reaches_out_or_refuses_is_stopped(source: str):
    with pytest.raises((jinja2.TemplateError, TypeError)):
        render(source, x=[])


def test_output_is_capped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "MAX_OUTPUT_CHARACTERS", 10)
    assert render("{% for i in range(10) %}a{% endfor %}") == "a" * 10
    with pytest.raises(jinja2.TemplateError, match="10 characters"):
        render("{% for i in range(11) %}a{% endfor %}")


def test_a_message_larger_than_any_is_refused_before_it_is_read():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall((sandbox.MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"))
        with pytest.raises(ValueError, match="bytes"):
            sandbox.receive(theirs)


def test_a_closed_socket_ends_the_message():
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall((5).to_bytes(4, "big") + b"abc")
        with pytest.raises(EOFError):
            sandbox.receive(theirs)


BYTES_TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    }
).encode()


def test_requests_are_answered_in_order_until_the_other_side_closes():
    ours, theirs = socket.socketpair()
    kinds: list[bytes] = []
    with theirs, ours:
        for kind, content in (
            (sandbox.START, b""),
            (sandbox.LOAD_TEMPLATE, b"{{ x }}{{ 1 // y }}"),
            (sandbox.RENDER, b'{"x": "a", "y": 1}'),
            (sandbox.RENDER, b'{"x": "a", "y": 0}'),
            (sandbox.LOAD_TOKENIZER, BYTES_TOKENIZER),
            (sandbox.ENCODE, b"abba"),
        ):
            sandbox.send(ours, kind + content)
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            sandbox.serve(theirs, before_each=lambda kind, _: kinds.append(kind))
        answers = [json.loads(sandbox.receive(ours)) for _ in range(6)]
    assert kinds == [b"A", b"T", b"R", b"R", b"K", b"E"]
    assert answers[1] == {"text": "", "ids": None, "problem": None}
    assert answers[2] == {"text": "a1", "ids": None, "problem": None}
    assert answers[3]["text"] is None
    assert "ZeroDivisionError" in answers[3]["problem"]
    assert answers[5] == {"text": None, "ids": [0, 1, 1, 0], "problem": None}


def test_a_request_before_its_load_is_a_problem():
    assert sandbox.Sandbox().answer(sandbox.ENCODE + b"a")["problem"] is not None
