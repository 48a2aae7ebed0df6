from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from pals.cli import checks, doctor
from pals.cli.app import run
from pals.cli.checks import CHECKS, Check, Finding, Subject, run_checks


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(profile=tmp_path / "profile", port=0, model=None)


def test_a_check_is_skipped_when_one_that_it_needs_failed(subject: Subject) -> None:
    def fail(_: Subject) -> Finding:
        return Finding(state="fail", text="broken")

    def never(_: Subject) -> Finding:
        raise AssertionError

    chain = [
        Check(name="a", code="A", run=fail),
        Check(name="b", code="B", run=never, needs=("a",)),
        Check(name="c", code="C", run=never, needs=("b",)),
    ]

    found = run_checks(chain, subject)

    assert [found[n].state for n in "abc"] == ["fail", "skipped", "skipped"]


def test_the_registry_has_unique_codes_and_needs_only_what_ran_before() -> None:
    assert len({c.code for c in CHECKS}) == len(CHECKS)
    for index, check in enumerate(CHECKS):
        assert set(check.needs) <= {c.name for c in CHECKS[:index]}


def test_a_taken_port_is_a_warning(subject: Subject) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        finding = checks.check_port(Subject(profile=subject.profile, port=port, model=None))

    assert (finding.state, finding.hint) == ("warn", "choose another with `--port`")


@pytest.mark.parametrize(("now", "state"), [(0, "fail"), (1.8e9, "ok"), (5e9, "fail")])
def test_a_clock_outside_the_present_is_a_failure(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, now: float, state: str
) -> None:
    monkeypatch.setattr(time, "time", lambda: now)

    assert checks.check_clock(subject).state == state


def test_a_profile_that_others_can_read_is_a_failure(subject: Subject) -> None:
    subject.profile.mkdir(mode=0o700)
    secret = subject.profile / "identity.key"
    secret.touch(mode=0o600)
    private = checks.check_profile(subject)
    secret.chmod(0o644)
    exposed = checks.check_profile(subject)

    assert private.state == "ok"
    assert exposed.state == "fail"
    assert exposed.hint.startswith("run `chmod 600 ")


def test_no_profile_and_no_model_are_warnings(subject: Subject) -> None:
    assert checks.check_profile(subject).state == "warn"
    assert checks.check_model(subject).state == "warn"


def test_a_model_that_is_nowhere_is_a_failure(subject: Subject, tmp_path: Path) -> None:
    missing = Subject(profile=subject.profile, port=0, model=str(tmp_path / "nothing"))

    assert checks.check_model(missing).state == "fail"


def test_a_native_package_that_crashes_is_a_failure_not_a_crash(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_LIBP2P", "import os; os.abort()")

    finding = checks.check_libp2p(subject)

    assert (finding.state, finding.text) == ("fail", "exit status -6")


def test_the_document_lists_every_check_and_the_status_tells_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Check(name="x", code="X", run=lambda _: Finding(state="fail", text="t", hint="h"))
    monkeypatch.setattr(doctor, "CHECKS", (broken,))

    assert run(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "checks": [{"name": "x", "code": "X", "state": "fail", "text": "t", "hint": "h"}],
        "network": None,
    }


def test_the_table_puts_hints_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warned = Check(name="x", code="X", run=lambda _: Finding(state="warn", text="t", hint="h"))
    monkeypatch.setattr(doctor, "CHECKS", (warned,))

    assert run(["doctor"]) == 0

    captured = capsys.readouterr()
    assert captured.out == "CHECK  STATE  FOUND\nx      warn   t\n"
    assert captured.err == "x: h\n"
