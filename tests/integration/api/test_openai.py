from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from pals.driver.interface import GenerateParams, Message
from pals.errors import ContextTooLong, NoChain, QueueFull, ShardLost
from tests.fakes import FakeDriver
from tests.integration.api.servers import running

CHAT = {"model": "test/tiny", "messages": [{"role": "user", "content": "hi"}]}
CHAT_PATH = "/v1/chat/completions"
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def url(driver: FakeDriver) -> Iterator[str]:
    with running(driver) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=20) as made:
        yield made


def events(text: str) -> list[str]:
    """Return the data of each event; everything else in a stream is a comment."""
    blocks = [block for block in text.split("\n\n") if block]
    return [b.removeprefix("data: ") for b in blocks if not b.startswith(":")]


def test_models_are_listed_and_found_by_name(client: OpenAI) -> None:
    (model,) = client.models.list().data

    assert (model.id, model.object, model.created) == ("test/tiny", "model", 1_700_000_000)
    assert client.models.retrieve("test/tiny") == model
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_whole_completion_has_openai_s_shape(url: str, driver: FakeDriver) -> None:
    body = CHAT | {"temperature": 0, "max_tokens": 9, "seed": 1, "stop": "."}

    response = httpx.post(url + CHAT_PATH, json=body)

    answer = response.json()
    assert response.status_code == 200
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": "test/tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello!", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": USAGE,
    }
    params = GenerateParams(max_tokens=9, temperature=0.0, seed=1, stop=(".",))
    assert driver.calls == [((Message(role="user", content="hi"),), params)]
    assert driver.completions[0].closed.is_set()


def test_a_stream_has_openai_s_shape(url: str, driver: FakeDriver) -> None:
    response = httpx.post(url + CHAT_PATH, json=CHAT | {"stream": True})

    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert {(c["object"], c["model"]) for c in parsed} == {("chat.completion.chunk", "test/tiny")}
    assert len({(c["id"], c["created"]) for c in parsed}) == 1
    assert not any("usage" in c for c in parsed)
    choices = [choice for c in parsed for choice in c["choices"]]
    assert [c["delta"] for c in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {"content": "!"},
        {},
    ]
    assert [c["finish_reason"] for c in choices] == [None, None, None, None, "stop"]
    assert {(c["index"], c["logprobs"]) for c in choices} == {(0, None)}
    assert driver.completions[0].closed.is_set()


def test_usage_comes_as_the_last_chunk_when_asked_for(url: str) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}

    response = httpx.post(url + CHAT_PATH, json=CHAT | options)

    *chunks, last, _ = [json.loads(e) if e != "[DONE]" else e for e in events(response.text)]
    assert all(c["usage"] is None for c in chunks)
    assert last["choices"] == []
    assert last["usage"] == USAGE


def test_the_openai_client_reads_a_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="test/tiny", messages=[{"role": "user", "content": "hi"}], stream=True
    )

    deltas = [chunk.choices[0].delta.content or "" for chunk in stream]

    assert "".join(deltas) == "Hello!"


def test_the_openai_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(
            model="test/tiny", messages=[{"role": "user", "content": "hi"}], store=True
        )

    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "store")
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (NoChain(model="m", missing="0:4"), 503, "PALS-NO-CHAIN"),
        (ContextTooLong(limit=1, total=2, prompt=1, completion=1), 400, "context_length_exceeded"),
        (QueueFull(queue="q", limit=64), 429, "PALS-QUEUE-FULL"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_driver_has_its_status(
    url: str, driver: FakeDriver, refusal: NoChain, status: int, code: str, stream: bool
) -> None:
    driver.refusal = refusal

    response = httpx.post(url + CHAT_PATH, json=CHAT | {"stream": stream})

    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert ("retry-after" in response.headers) == refusal.retryable


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_its_status(
    url: str, driver: FakeDriver, stream: bool
) -> None:
    driver.script = ()
    driver.end = ShardLost(peer="p", layers="0:2", problem="gone")

    response = httpx.post(url + CHAT_PATH, json=CHAT | {"stream": stream})

    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"
    assert driver.completions[0].closed.is_set()


def test_a_stream_that_fails_midway_ends_with_an_error_event(url: str, driver: FakeDriver) -> None:
    driver.end = ShardLost(peer="p", layers="0:2", problem="gone")

    response = httpx.post(url + CHAT_PATH, json=CHAT | {"stream": True})

    *_, last = events(response.text)
    assert json.loads(last)["error"]["code"] == "PALS-SHARD-LOST"
    assert driver.completions[0].closed.is_set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_closes_the_completion(url: str, driver: FakeDriver, stream: bool) -> None:
    driver.end = None
    closed = threading.Event()
    driver.on_close = closed.set
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    body = json.dumps(CHAT | {"stream": stream})
    connection.request("POST", CHAT_PATH, body, {"content-type": "application/json"})
    assert driver.asked.wait(20)
    if stream:
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()

    connection.close()

    assert closed.wait(20)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/schema", 404, "unknown_url"),
        ("GET", CHAT_PATH, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_unknown_routes_answer_with_the_error_object(
    url: str, method: str, path: str, status: int, code: str
) -> None:
    response = httpx.request(method, url + path)

    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] == code


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 5000, b'{"model": 1}'])
def test_malformed_bodies_answer_with_the_error_object(url: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}

    response = httpx.post(url + CHAT_PATH, content=body, headers=headers)

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_body_over_the_limit_is_refused_however_it_is_sent(url: str) -> None:
    headers = {"content-type": "application/json"}

    whole = httpx.post(url + CHAT_PATH, content=b" " * (5 << 20), headers=headers)
    chunked = httpx.post(url + CHAT_PATH, content=iter([b" " * (1 << 20)] * 5), headers=headers)

    assert (whole.status_code, chunked.status_code) == (413, 413)


def test_requests_of_web_pages_are_refused(url: str, driver: FakeDriver) -> None:
    rebound = httpx.get(f"{url}/v1/models", headers={"host": "evil.example"})
    foreign = httpx.post(url + CHAT_PATH, json=CHAT, headers={"origin": "http://evil.example"})
    simple = httpx.post(url + CHAT_PATH, content=b"{}", headers={"content-type": "text/plain"})
    preflight = httpx.options(url + CHAT_PATH, headers={"origin": "http://evil.example"})

    statuses = [r.status_code for r in (rebound, foreign, simple, preflight)]
    assert statuses == [421, 403, 415, 403]
    assert not driver.calls


def test_nothing_but_health_answers_without_the_key(driver: FakeDriver) -> None:
    key = "a key of enough length"
    with running(driver, api_key=key) as url:
        paths = ("/v1/models", "/nothing", "/health/../v1/models", "//v1/models", "/v1/models/x")
        statuses = {httpx.get(url + path).status_code for path in paths}
        health = httpx.get(f"{url}/health")
        allowed = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})

    assert statuses == {401}
    assert health.json() == {"status": "ok"}
    assert allowed.status_code == 200


def test_an_unexpected_failure_hides_its_text(url: str, driver: FakeDriver) -> None:
    driver.refusal = RuntimeError("the secret conversation")

    response = httpx.post(url + CHAT_PATH, json=CHAT)

    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


def test_the_chain_is_reported_with_its_timings(url: str) -> None:
    report = httpx.get(f"{url}/pals/chain").json()

    assert (report["schema"], report["model"]) == (1, "test/tiny")
    assert report["hops"][0] == {
        "peer": "peer-a",
        "layers": "0:2",
        "steps": 3,
        "step_ms": 2.0,
        "queue_ms": 0.1,
        "handover_ms": 0.4,
        "codec_ms": 0.2,
        "wire_ms": 0.3,
    }


def test_several_models_are_listed_and_each_answers_for_itself() -> None:
    drivers = {"test/one": FakeDriver(["one"]), "test/two": FakeDriver(["two"])}
    for name, driver in drivers.items():
        driver.model_id = name
    with running(*drivers.values()) as url:
        listed = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        answers = [
            httpx.post(url + CHAT_PATH, json=CHAT | {"model": name}).json() for name in drivers
        ]
        chains = [
            httpx.get(f"{url}/pals/chain", params=query).json()["model"]
            for query in ({}, {"model": "test/two"})
        ]
        absent = httpx.get(f"{url}/pals/chain", params={"model": "test/three"})

    assert listed == list(drivers)
    assert [answer["model"] for answer in answers] == list(drivers)
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts == ["one", "two"]
    assert chains == ["test/one", "test/two"]
    assert absent.status_code == 404
    assert "`test/one`, `test/two`" in absent.text
