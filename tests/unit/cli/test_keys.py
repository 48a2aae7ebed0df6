from __future__ import annotations

import json
from pathlib import Path

import pytest

from pals.api.key_file import FILE_NAME, KeyFile
from pals.cli.app import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "profile"


def test_a_key_is_printed_once_and_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "create", "laptop", "--config-dir", str(folder)]) == 0

    shown = capsys.readouterr()
    key = shown.out.strip()
    assert KeyFile(folder / FILE_NAME).name_of(key.encode()) == "laptop"
    assert key not in shown.err
    assert run(["keys", "list", "--config-dir", str(folder)]) == 0
    listed = capsys.readouterr().out
    assert "laptop" in listed
    assert key not in listed


def test_documents_are_for_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--json", "--config-dir", str(folder)]

    assert run(["keys", "list", *at]) == 0
    assert run(["keys", "create", "laptop", *at]) == 0
    assert run(["keys", "list", *at]) == 0
    assert run(["keys", "revoke", "laptop", *at]) == 0

    none, made, one, gone = map(json.loads, capsys.readouterr().out.splitlines())
    assert (none["keys"], gone["revoked"]) == ([], "laptop")
    assert made["key"].startswith("sk-pals-")
    assert [key["name"] for key in one["keys"]] == ["laptop"]
    assert {document["schema"] for document in (none, made, one, gone)} == {1}


def test_a_file_elsewhere_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other" / "keys"

    assert run(["keys", "create", "laptop", "--file", str(path)]) == 0

    assert KeyFile(path).name_of(capsys.readouterr().out.strip().encode()) == "laptop"


def test_a_key_in_the_place_of_a_name_is_not_repeated(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--config-dir", str(folder)]
    assert run(["keys", "create", "laptop", *at]) == 0
    key = capsys.readouterr().out.strip()

    assert run(["keys", "revoke", key, *at]) == 2
    assert run(["keys", "create", key, *at]) == 2
    assert run(["keys", "revoke", "laptop", key, *at]) == 2

    assert key not in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named_and_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "other" / "keys"

    assert run(["keys", "revoke", "laptop", "--file", str(missing)]) == 2
    assert run(["keys", "list", "--file", str(missing)]) == 2
    assert run(["keys", "revoke", "laptop", "--config-dir", str(tmp_path / "profile")]) == 2

    captured = capsys.readouterr()
    assert captured.err.count("there is no such file") == 3
    assert captured.err.count("hint: make a key with `pals keys create NAME`") == 3
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
