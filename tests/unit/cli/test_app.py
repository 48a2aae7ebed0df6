from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
from cyclopts import App

from pals import __version__
from pals.cli import app as application
from pals.cli import console
from pals.cli.app import COMMANDS, run
from pals.errors import NoChain, PortInUse

# it takes 361 on Python 3.11
MOST_MODULES = 450
HEAVY = ("jax", "flax", "libp2p", "litestar", "sqlalchemy", "numpy", "trio")


def command_that_raises(error: BaseException) -> App:
    made = App(
        name="pals",
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )

    @made.command
    def boom() -> None:
        raise error

    return made


@pytest.fixture
def boom(monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs a command which raises, and gives its exit status."""

    def run_raising(error: BaseException) -> int:
        monkeypatch.setattr(application, "build_app", lambda: command_that_raises(error))
        return run(["boom"])

    return run_raising


def test_help_imports_little_and_nothing_heavy() -> None:
    program = (
        "import sys; from pals.cli.app import run; status = run(['--help']);"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules];"
        "print(heavy, len(sys.modules), file=sys.stderr); sys.exit(status)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode == 0
    heavy, _, count = done.stderr.strip().rpartition(" ")
    assert heavy == "[]"
    assert int(count) < MOST_MODULES
    assert "shard" in done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_resolves_and_is_documented(name: str) -> None:
    target, summary = COMMANDS[name]
    module, _, function = target.partition(":")

    command = getattr(import_module(module), function)

    assert command.__doc__
    assert summary.endswith(".")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*name.split(), "--help"]) == 0
    assert f"pals {name}" in capsys.readouterr().out


def test_no_process_dumps_its_memory_nor_does_its_child() -> None:
    program = (
        "import resource, subprocess, sys; from pals.cli import app;"
        "resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, resource.RLIM_INFINITY))"
        " if resource.getrlimit(resource.RLIMIT_CORE)[1] == resource.RLIM_INFINITY else None;"
        "app.run = lambda _: subprocess.call([sys.executable, '-c',"
        "'import resource; print(resource.getrlimit(resource.RLIMIT_CORE))']); app.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout.strip() == "(0, 0)"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("tokens", "suggestion"),
    [(["shrd"], "pals shard"), (["peers", "lst"], "pals peers list"), (["sevre"], "pals serve")],
)
def test_an_unknown_command_suggests_the_nearest(
    tokens: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tokens) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: unknown command: ")
    assert f"hint: did you mean `{suggestion}`?" in captured.err


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "list", "--frobnicate"]) == 2
    assert "--frobnicate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "suggestion"),
    [
        (["serve", "--prot", "1"], "--port"),
        (["serve", "--prot=1"], "--port"),
        (["status", "--jsn"], "--json"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(
    tokens: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tokens) == 2

    err = capsys.readouterr().err
    assert err.startswith("error: unknown option: --")
    assert f"hint: did you mean `{suggestion}`?" in err


@pytest.mark.parametrize("tokens", [["--frobnicate=canary"], [], ["P", "--count", "canary"]])
def test_a_usage_error_names_the_help_of_its_command(
    tokens: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ping", *tokens]) == 2

    assert "hint: run `pals ping --help` to see what it takes" in capsys.readouterr().err


def test_an_unknown_option_is_named_without_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "list", "--frobnicate=canary"]) == 2

    err = capsys.readouterr().err
    assert err.startswith("error: unknown option: --frobnicate\n")
    assert "canary" not in err


def test_completion_knows_the_commands_and_their_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["completion", "bash"]) == 0

    script = capsys.readouterr().out
    assert [name for name in COMMANDS if name.split()[-1] not in script] == []
    assert "wait-for-peers" in script


def test_an_expected_error_is_printed_with_its_hint_and_status(
    boom, capsys: pytest.CaptureFixture[str]
) -> None:
    assert boom(NoChain(model="m", missing="0:4")) == 3

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: no chain covers `m`: layers 0:4 are served by nobody reachable\n"
        "\n"
        "hint: start one with `pals shard m --layers 0:4`\n"
    )


def test_an_error_out_of_nested_nurseries_is_printed_like_any_other(boom) -> None:
    error = PortInUse(host="h", port=1, problem="taken")

    assert boom(ExceptionGroup("outer", [ExceptionGroup("inner", [error])])) == 2


def test_an_interrupt_ends_with_130(boom) -> None:
    assert boom(KeyboardInterrupt()) == 130
    assert boom(BaseExceptionGroup("nursery", [KeyboardInterrupt()])) == 130


def test_an_unexpected_error_shows_its_traceback_only_when_asked(
    boom, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PALS_DEBUG", raising=False)
    assert boom(ZeroDivisionError("the secret")) == 1
    quiet = capsys.readouterr().err
    monkeypatch.setenv("PALS_DEBUG", "1")
    assert boom(ZeroDivisionError("the secret")) == 1
    loud = capsys.readouterr().err

    assert quiet.startswith("error: internal error: ZeroDivisionError\n")
    assert "secret" not in quiet
    assert "Traceback" in loud


def test_a_closed_output_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pals", "models", "list"],
            stdout=writer,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(writer)

    assert (done.returncode, done.stderr) == (141, b"")


def test_escapes_from_elsewhere_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.out("a\x1b[31mb\x9bc\u202ed")
    console.error("x\x1b]0;title\x07y")

    captured = capsys.readouterr()
    assert captured.out == "a\ufffd[31mb\ufffdc\ufffdd\n"
    assert "\x1b" not in captured.err


def test_a_table_is_aligned_under_its_headers(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("peer", "layers"), [("a", "0:10"), ("longer", "10:20")])

    assert capsys.readouterr().out == "PEER    LAYERS\na       0:10\nlonger  10:20\n"


def test_json_is_one_document_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.json({"schema": 1, "text": "two\nlines"})

    assert capsys.readouterr().out == '{"schema":1,"text":"two\\nlines"}\n'
