"""H8 and H9: what an endpoint says of its users, and where a request could send it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pals.api.key_file import FILE_NAME, create_key
from tests.attacks.http_child import Child, started
from tests.attacks.raw_http import CHAT, CHAT_PATH, Answer
from tests.waiting import wait_until

PROMPT = "canary-prompt-7f3a"
HEADER = "canary-header-7f3a"
QUERY = "canary-query-7f3a"
WRONG_KEY = "sk-canary-wrong-key-7f3a"
TOKEN = "pp_inv_canary7f3a.0123456789"
ENVIRONMENT_KEY = "canary-environment-key-7f3a"
URL = "http://192.0.2.1:1/canary"

# What vLLM, LiteLLM and their kin take besides OpenAI's own fields.
EXTRAS: list[dict[str, Any]] = [
    {"api_base": URL},
    {"base_url": URL},
    {"api_key": "sk-other"},
    {"api_version": "1"},
    {"custom_llm_provider": "openai"},
    {"litellm_params": {"api_base": URL}},
    {"model_list": [{"model_name": "test/tiny", "litellm_params": {"api_base": URL}}]},
    {"fallbacks": [{"model": "other", "api_base": URL}]},
    {"mock_response": "mocked"},
    {"extra_headers": {"Authorization": "Bearer x"}},
    {"extra_body": {"api_base": URL}},
    {"proxies": {"http": URL}},
    {"callbacks": [URL]},
    {"success_callback": ["langfuse"]},
    {"vertex_credentials": "/etc/passwd"},
    {"aws_bedrock_runtime_endpoint": URL},
    {"user_config": {"model_list": []}},
    {"num_retries": 5},
    {"metadata": {"api_base": URL}},
    {"guided_json": {"$ref": URL}},
    {"guided_regex": "(a+)+$"},
    {"guided_choice": ["a", "b"]},
    {"guided_grammar": "root ::= root"},
    {"guided_decoding_backend": "outlines"},
    {"structured_outputs": {"regex": "(a+)+$"}},
    {"chat_template": "{{ cycler.__init__.__globals__.os.popen('id').read() }}"},
    {"chat_template_kwargs": {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}},
    {"add_generation_prompt": False},
    {"continue_final_message": True},
    {"documents": [{"title": "x", "text": "y"}]},
    {"mm_processor_kwargs": {"x": 1}},
    {"media_io_kwargs": {"x": 1}},
    {"use_beam_search": True},
    {"prompt_logprobs": 5},
    {"truncate_prompt_tokens": 1},
    {"kv_transfer_params": {"remote_host": "192.0.2.1", "remote_port": 1}},
    {"priority": -1},
    {"logits_processors": [{"qualname": "os.system", "args": ["id"]}]},
    {"cache_salt": "x"},
    {"vllm_xargs": {"x": URL}},
    {"lora_request": {"lora_path": "/etc"}},
    {"return_tokens_as_token_ids": True},
]
STEERING: list[Any] = [
    [{"type": "image_url", "image_url": {"url": URL}}],
    [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
    [{"type": "input_audio", "input_audio": {"data": URL, "format": "wav"}}],
    [{"type": "file", "file": {"file_id": "../../etc/passwd"}}],
    [{"type": "text", "text": "hi", "cache_control": {"url": URL}}],
]


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    profile = tmp_path_factory.mktemp("profile")
    with started(profile) as child:
        yield child


# --- H8 ---------------------------------------------------------------------------------------


def refusals(child: Child, allowed: str) -> list[Answer]:
    """Have every kind of refusal of requests that are full of canaries."""
    ask, post = child.endpoint.ask, child.endpoint.post
    said = {"role": "user", "content": PROMPT}
    extra = f"X-Canary: {HEADER}"
    mine = (allowed, extra)
    path = f"{CHAT_PATH}?key={QUERY}"
    return [
        post(CHAT, extra, f"Authorization: Bearer {WRONG_KEY}"),
        post(CHAT, extra, f"Authorization: Basic {TOKEN}", path=path),
        ask("GET", path, *mine),
        ask("GET", f"/v1/nothing?key={QUERY}", *mine),
        ask("GET", "/v1/models", *mine, host=f"{HEADER}.example"),
        ask("GET", "/v1/models", *mine, f"Origin: http://{HEADER}.example"),
        ask("GET", "/v1/models", *mine, "Content-Length: x"),
        ask("GET", "/v1/models", *mine, "X-Long: " + HEADER * 2000),
        ask("POST", path, *mine, f"Content-Type: text/{HEADER}", body=PROMPT.encode()),
        post(json.dumps(said).encode()[:-1], *mine, path=path),
        post(PROMPT.encode(), *mine),
        post(b"\xff" + PROMPT.encode(), *mine),
        post(b"[" * 70 + PROMPT.encode(), *mine),
        post(CHAT | {"messages": PROMPT}, *mine),
        post(CHAT | {"messages": [PROMPT]}, *mine),
        post(CHAT | {"messages": [said | {"content": {"text": PROMPT}}]}, *mine),
        post(
            CHAT | {"messages": [said | {"content": [{"type": "text", "text": [PROMPT]}]}]}, *mine
        ),
        post(CHAT | {"messages": [said], "temperature": 9}, *mine),
        post(CHAT | {"messages": [said], "stop": [[PROMPT]]}, *mine),
        post(CHAT | {"messages": [said], "n": PROMPT}, *mine),
        post(CHAT | {"messages": [said], "model": "other"}, *mine),
    ]


def test_h8_no_log_and_no_refusal_holds_what_anybody_said(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    profile = tmp_path_factory.mktemp("profile")
    key = create_key(profile / FILE_NAME, "laptop", now=0)
    with started(profile, PALS_API_KEY=ENVIRONMENT_KEY) as child:
        allowed = f"Authorization: Bearer {key}"
        said = CHAT | {"messages": [{"role": "user", "content": PROMPT}]}
        answers = [child.endpoint.post(said | {"stream": s}, allowed) for s in (False, True)]
        refused = refusals(child, allowed)
        other = child.endpoint.post(said, f"Authorization: Bearer {ENVIRONMENT_KEY}")
        wait_until(lambda: '"key":"environment"' in child.log())
        log = child.log()

    assert [answer.status for answer in (*answers, other)] == [200] * 3
    assert all(400 <= answer.status < 500 and answer.code for answer in refused)
    written = log.encode() + b"".join(answer.body for answer in refused)
    canaries = (PROMPT, HEADER, QUERY, WRONG_KEY, TOKEN, ENVIRONMENT_KEY, key, key[-20:])
    assert [canary for canary in canaries if canary.encode() in written] == []
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [line["key"] for line in lines if line.get("status") == 200] == [
        "laptop",
        "laptop",
        "environment",
    ]
    shown = {"time", "level", "logger", "event", "id", "route", "status", "ms", "key"}
    assert all(line.keys() <= shown | {"received_bytes", "sent_bytes", "keys"} for line in lines)
    assert len(lines) >= len(refused) + 3


# --- H9 ---------------------------------------------------------------------------------------


def told(answer: Answer) -> str:
    """Return what the driver says that it was asked."""
    return json.loads(answer.body)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: next(iter(extra)))
def test_h9_a_field_of_another_server_is_ignored_or_refused(
    child: Child, extra: dict[str, Any]
) -> None:
    plain = CHAT | {"seed": 1}
    expected = told(child.endpoint.post(plain))

    for body in (plain | extra, plain | {"extra_body": extra}):
        answer = child.endpoint.post(body)

        assert answer.status in (200, 400)
        if answer.status == 200:
            assert told(answer) == expected
        else:
            assert answer.code
    assert child.ways_out() == []


@pytest.mark.parametrize("content", STEERING, ids=range(len(STEERING)))
def test_h9_no_content_is_fetched(child: Child, content: Any) -> None:
    answer = child.endpoint.post(CHAT | {"messages": [{"role": "user", "content": content}]})

    assert answer.status in (200, 400)
    assert child.ways_out() == []


@pytest.mark.parametrize(
    "name", ["X-Api-Base", "X-Forwarded-For", "X-Original-URL", "X-Rewrite-URL"]
)
def test_h9_no_header_steers_it(child: Child, name: str) -> None:
    answer = child.endpoint.post(CHAT | {"seed": 1}, f"{name}: {URL}")

    assert told(answer) == told(child.endpoint.post(CHAT | {"seed": 1}))
    assert child.ways_out() == []


def test_h9_what_the_driver_is_asked_can_be_told_apart(child: Child) -> None:
    """Else nothing above could fail."""
    answers = [told(child.endpoint.post(CHAT | {"seed": seed})) for seed in (1, 2)]

    assert len(set(answers)) == 2


def test_h9_the_watch_sees_a_way_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    with started(tmp_path_factory.mktemp("profile"), PALS_TEST_WAY_OUT="1") as child:
        child.endpoint.post(CHAT)

        assert "socket.connect" in "".join(child.ways_out())
