"""A hub, or whoever answers in its place, that makes things up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pals.errors import HubUnavailable, InvalidHubAnswer, PalsError
from pals.models import hub_texts
from pals.models.download import Patience
from pals.models.hub import resolve_model
from pals.types import LayerRange
from tests.integration.models.conftest import NAME
from tests.integration.models.hub_server import Fault, HubServer, Repo

PATIENCE = Patience(
    attempts=2, backoff_s=0.01, max_wait_s=0.5, connect_s=2.0, read_s=2.0, stall_s=2.0
)
ALWAYS = 100


def resolve(layers: str = "0:1") -> None:
    resolve_model(NAME, LayerRange.parse(layers), patience=PATIENCE)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>please sign in</html>",
        b"",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"siblings": 5}',
        b'{"siblings": [5]}',
        b'{"siblings": [{"rfilename": ["config.json"]}]}',
        b'{"siblings": [{"rfilename": "config.json", "lfs": 5}]}',
    ],
)
@pytest.mark.usefixtures("repo")
def test_a_description_that_is_none_is_refused(hub: HubServer, body: bytes):
    hub.add(Fault("hub", "/api/models", times=ALWAYS, status=200, body=body))

    with pytest.raises(InvalidHubAnswer):
        resolve()


@pytest.mark.usefixtures("repo")
def test_tags_and_sizes_of_another_kind_are_no_crash(hub: HubServer, repo: Repo):
    values = {"id": NAME, "sha": 5, "tags": [5, None], "siblings": [{"rfilename": "config.json"}]}
    hub.add(Fault("hub", "/api/models", times=ALWAYS, status=200, body=json.dumps(values).encode()))

    with pytest.raises(PalsError):
        resolve()


@pytest.mark.parametrize(
    ("file", "layers"),
    [("config.json", "0:1"), (".safetensors", "0:1"), (".safetensors", "0:4")],
    ids=["text", "ranges", "whole"],
)
@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag", "X-Repo-Commit"])
@pytest.mark.parametrize("value", ["../../../../escaped", "/tmp/escaped", "..\\escaped", "a b"])
@pytest.mark.usefixtures("repo")
def test_a_name_that_leads_out_of_the_cache_is_refused(
    hub: HubServer, tmp_path: Path, file: str, layers: str, header: str, value: str
):
    quoted = value if header == "X-Repo-Commit" else f'"{value}"'
    hub.add(Fault("hub", file, method="HEAD", times=ALWAYS, headers={header: quoted}))

    with pytest.raises(InvalidHubAnswer, match=header):
        resolve(layers)
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name]


@pytest.mark.usefixtures("repo")
def test_a_text_file_without_end_is_cut_off(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub_texts, "MAX_TOKENIZER_BYTES", 1 << 16)
    endless = b"x" * (8 << 20)
    hub.add(Fault("hub", "config.json", method="HEAD", headers={"Content-Length": "8388608"}))
    hub.add(Fault("hub", "config.json", times=ALWAYS, status=200, body=endless))

    with pytest.raises(InvalidHubAnswer, match="more than 65536 bytes"):
        resolve()
    assert not [path for path in tmp_path.rglob("snapshots/*/config.json") if path.exists()]


@pytest.mark.parametrize("location", ["http://[", "http://\x7f/"])
@pytest.mark.usefixtures("repo")
def test_a_redirect_to_no_address_is_refused(hub: HubServer, location: str):
    hub.add(
        Fault("hub", ".safetensors", method="HEAD", times=ALWAYS, headers={"Location": location})
    )

    with pytest.raises((InvalidHubAnswer, HubUnavailable)):
        resolve()


@pytest.mark.parametrize("value", ["Mon, 01 Jan 0001 00:00:00 -0000", "9" * 5000, "never", "-5"])
def test_a_retry_after_that_is_no_time_is_no_crash(hub: HubServer, repo: Repo, value: str):
    hub.add(
        Fault("storage", times=ALWAYS, status=503, headers={"Retry-After": value}),
    )

    with pytest.raises(PalsError):
        resolve()
