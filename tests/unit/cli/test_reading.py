"""What `pals ping`, `ps`, `paths`, `status` and `run` make of what they read."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from pals.cli import paths, ping, ps, status
from pals.cli import run as run_command
from pals.cli.app import run
from pals.config import Profile
from pals.errors import InvalidConfig
from pals.net.overview import ModelLines, Problem, ShardLine, SwarmReport
from pals.net.process_report import ProcessReport, RoleLine
from pals.net.report import PingReport, resident_bytes

Captured = pytest.CaptureFixture[str]


# --- ping ----------------------------------------------------------------------------


def test_tries_are_summed_up() -> None:
    found = ping.summarize([1.0, None, 3.0, 2.0])

    assert found == {"loss": 0.25, "min_ms": 1.0, "avg_ms": 2.0, "max_ms": 3.0}


@pytest.mark.parametrize("tries", [(), (None, None)])
def test_tries_that_were_not_answered_have_no_times(tries: tuple[None, ...]) -> None:
    found = ping.summarize(tries)

    assert found == {"loss": 1.0, "min_ms": None, "avg_ms": None, "max_ms": None}


def test_a_ping_is_printed_try_by_try(capsys: Captured) -> None:
    ping._print(PingReport(peer="P", path="relayed", relay="R", tries_ms=(1.25, None, 3.0)))

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "P  relayed by R"
    assert lines[1:4] == ["  1  1.2 ms", "  2  no answer", "  3  3.0 ms"]
    assert lines[4] == "3 tries, 33% lost, min/avg/max 1.2/2.1/3.0 ms"


def test_a_member_without_a_way_to_it_is_an_error_with_a_hint(capsys: Captured) -> None:
    ping._print(PingReport(peer="P", problem="nothing answers", hint="check it"))

    captured = capsys.readouterr()
    assert captured.out == "P  no way\n"
    assert captured.err == "error: nothing answers\n\nhint: check it\n"


# --- ps ------------------------------------------------------------------------------


def test_each_role_of_the_process_has_a_row(capsys: Captured) -> None:
    found = ProcessReport(
        pid=7,
        peer="P",
        swarm="home",
        swarm_id="ab",
        uptime_s=120.0,
        memory_bytes=3 << 20,
        addresses=("/ip4/127.0.0.1/tcp/1",),
        endpoint="http://127.0.0.1:8080",
        roles=(
            RoleLine(role="shard", model="m", layers="0:2", sessions=1, free_tokens=64),
            RoleLine(role="driver", model="m"),
            RoleLine(role="backend"),
        ),
    )

    ps._print(found)

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "PID",
        "ROLE",
        "MODEL",
        "LAYERS",
        "SESSIONS",
        "FREE",
        "TOKENS",
        "MEMORY",
        "UP",
    ]
    assert lines[1].split() == ["7", "shard", "m", "0:2", "1", "64", "3", "MiB", "2", "min"]
    assert lines[2].split() == ["7", "driver", "m", "0", "3", "MiB", "2", "min"]
    assert lines[3].split() == ["7", "backend", "3", "MiB", "2", "min"]
    assert "address  /ip4/127.0.0.1/tcp/1" in lines
    assert "serving  http://127.0.0.1:8080/v1" in lines


def test_a_profile_with_which_nothing_runs_is_no_failure(tmp_path: Path, capsys: Captured) -> None:
    Profile(tmp_path / "p").create_folder()

    assert run(["ps", "--config-dir", str(tmp_path / "p")]) == 0
    assert run(["ps", "--json", "--config-dir", str(tmp_path / "p")]) == 0

    captured = capsys.readouterr()
    assert "nothing runs" in captured.err
    assert json.loads(captured.out.splitlines()[-1]) == {"schema": 1, "processes": []}


def test_a_process_that_does_not_answer_yet_is_shown_as_starting(
    tmp_path: Path, capsys: Captured
) -> None:
    profile = Profile(tmp_path / "p")
    profile.create_folder()

    with profile.lock():
        assert run(["ps", "--json", "--config-dir", str(profile.path)]) == 0

    (process,) = json.loads(capsys.readouterr().out)["processes"]
    assert process == {"pid": os.getpid(), "roles": []}


def test_memory_is_read_in_pages_and_is_something_where_no_file_says(tmp_path: Path) -> None:
    statm = tmp_path / "statm"
    statm.write_text("900 25 3 4\n")

    assert resident_bytes(statm) == 25 * os.sysconf("SC_PAGE_SIZE")
    assert resident_bytes(tmp_path / "absent") > 1 << 20


# --- paths ---------------------------------------------------------------------------


def test_paths_are_those_of_the_profile_and_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("PALS_CACHE_DIR", str(tmp_path / "cache"))

    assert run(["paths", "--json", "--config-dir", str(tmp_path / "p")]) == 0

    found = json.loads(capsys.readouterr().out)["paths"]
    assert found["identity"] == str(tmp_path / "p" / "identity.key")
    assert found["models"] == str(tmp_path / "cache" / "models")
    assert found["programs"] == str(tmp_path / "cache" / "xla")
    assert found["logs"] is None


def test_variables_are_named_and_only_harmless_ones_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in list(os.environ):
        if name.startswith("PALS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PALS_DEBUG", "0")
    monkeypatch.setenv("PALS_API_KEY", "canary")
    monkeypatch.setenv("PALS_OF_ANOTHER_VERSION", "canary")

    assert paths.variables_in_force() == {
        "PALS_API_KEY": paths.HIDDEN,
        "PALS_DEBUG": "0",
        "PALS_OF_ANOTHER_VERSION": paths.HIDDEN,
    }


# --- status --------------------------------------------------------------------------


def test_a_model_is_shown_shard_by_shard(capsys: Captured) -> None:
    line = ShardLine(
        peer="ME",
        layers="0:2",
        dtype="int8",
        free_tokens=64,
        max_context_tokens=512,
        step_ms=1.25,
        state="serving",
    )
    model = ModelLines(
        model="m",
        manifest="ab",
        num_layers=4,
        chain=(),
        shards=(line,),
        problems=(Problem(text="layers 2:4 are served by nobody", hint="serve them"),),
    )

    status._print_model(model, "ME")

    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "m, 4 layers"
    assert lines[3].split() == [
        "0:2",
        "ME",
        "int8",
        "64",
        "512",
        "1.2",
        "this",
        "machine",
        "serving",
    ]
    assert status._models(SwarmReport(swarm_id="", peer="ME", models=(model,))) is not None
    assert status._models(None) is None


# --- run: what is asked --------------------------------------------------------------


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Give a function that puts a text on standard input."""
    with ExitStack() as stack:

        def put(text: str) -> None:
            reader, writer = os.pipe()
            with os.fdopen(writer, "w") as file:
                file.write(text)
            monkeypatch.setattr("sys.stdin", stack.enter_context(os.fdopen(reader)))

        yield put


def test_what_is_piped_comes_after_the_prompt(piped: Callable[[str], None]) -> None:
    piped("the file\n")
    assert run_command._question("sum this up:", must=False) == "sum this up:\n\nthe file"
    piped("only this\n")
    assert run_command._question(None, must=False) == "only this"
    piped("")
    assert run_command._question("only that", must=False) == "only that"


def test_an_empty_question_is_refused_and_a_terminal_means_to_talk(
    piped: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped("\n")
    with pytest.raises(InvalidConfig, match="it is empty"):
        run_command._question(None, must=False)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    assert run_command._question(None, must=False) is None
    for prompt, must in (("", False), (None, True)):
        with pytest.raises(InvalidConfig, match="it is empty"):
            run_command._question(prompt, must=must)


def test_standard_input_is_read_up_to_a_limit(
    piped: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_command, "MAX_PROMPT_CHARS", 8)
    piped("x" * 9)

    with pytest.raises(InvalidConfig, match="more than 8 characters"):
        run_command._question(None, must=False)


# --- status: looking again -----------------------------------------------------------


@pytest.mark.trio
async def test_status_is_shown_anew_until_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    shown: list[float] = []

    async def look_at_all(*_: object) -> list[object]:
        return []

    async def ask(*_: object, offline: bool) -> dict[str, object]:
        assert offline
        return {}

    monkeypatch.setattr(status, "_look_at_all", look_at_all)
    monkeypatch.setattr(status, "_ask_about_shards", ask)
    monkeypatch.setattr(status, "_print_json", lambda *_: shown.append(trio.current_time()))
    show = partial(status._show, Profile(Path()), [], offline=True, json=True)
    with trio.move_on_after(11):
        await show(watch=5)
    began = len(shown)
    await show(watch=None)

    assert [round(at - shown[0]) for at in shown[:began]] == [0, 5, 10]
    assert len(shown) == began + 1


@pytest.mark.trio
async def test_status_goes_on_when_the_process_it_watches_ends(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock, capsys: Captured
) -> None:
    shown: list[object] = []
    answers = iter(({"a": 1}, InvalidConfig(source="node.sock", problem="cut", advice=""), {}))

    async def look_at_all(*_: object) -> list[object]:
        return []

    async def ask(*_: object, offline: bool) -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(status, "_look_at_all", look_at_all)
    monkeypatch.setattr(status, "_ask_about_shards", ask)
    monkeypatch.setattr(status, "_print_json", lambda _, reports: shown.append(reports))
    with trio.move_on_after(11):
        await status._show(Profile(Path()), [], watch=5, offline=False, json=True)

    assert shown == [{"a": 1}, {}]
    assert "warning: node.sock: cut" in capsys.readouterr().err


@pytest.mark.trio
@pytest.mark.parametrize(("of", "shown"), [("a", True), ("b", False)])
async def test_a_process_is_shown_only_for_the_swarm_in_which_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, of: str, shown: bool
) -> None:
    report = SwarmReport(swarm_id="a", peer="P", models=())

    async def ask_shards(_: Path) -> SwarmReport:
        return report

    monkeypatch.setattr("pals.net.report_socket.ask_shards", ask_shards)
    standing = SimpleNamespace(entry=SimpleNamespace(swarm_id=of))
    found = await status._ask_about_shards(Profile(Path()), [standing], offline=False)

    assert found == ({"a": report} if shown else {})
    assert ("in another swarm" in capsys.readouterr().err) is not shown


# --- run: what also serves -----------------------------------------------------------


class LeavingShard:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def leave(self) -> None:
        self.calls.append("leave")

    def wait_until_left(self) -> None:
        self.calls.append("wait")


@pytest.mark.parametrize("ends_with", [None, SystemExit(143)])
def test_a_shard_beside_a_conversation_leaves_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends_with: BaseException | None
) -> None:
    shard = LeavingShard()

    @contextmanager
    def open_endpoint(*_: object, **__: object) -> Iterator[object]:
        yield SimpleNamespace(drivers={"m": "driver"}, shard=shard)
        shard.calls.append("closed")

    monkeypatch.setattr("pals.cli.endpoint.open_endpoint", open_endpoint)
    member = SimpleNamespace(profile=Profile(tmp_path))
    expected = pytest.raises(SystemExit) if ends_with else nullcontext()
    with expected, run_command._opened(member, None, "m", None) as driver:
        assert driver == "driver"
        if ends_with is not None:
            raise ends_with

    assert shard.calls == ["leave", "wait", *([] if ends_with else ["closed"])]
