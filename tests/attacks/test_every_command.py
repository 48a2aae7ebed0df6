"""M11: no command shows a secret, but the one that it was asked for.

Every command of the program is played, as a process, with secrets in its profile and its
environment: as it should go, and against a backend that is away. What others of the
machine can see is watched meanwhile, and what was said and written is searched afterwards.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cyclopts import App

from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.cli.app import build_app
from pals.config import Profile
from pals.swarm.identity import Identity, load_or_create_identity
from tests.attacks.forks import open_forks
from tests.attacks.watch import Watch, assert_files_are_private, found_in
from tests.checkpoints import make_llama_checkpoint
from tests.integration.backends import running_backend
from tests.integration.processes import END_S, Finished, Pals

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

Run = Callable[..., Finished]

GONE = "http://127.0.0.1:1"
API_KEY = "canary-api-key-0123456789"
SHORT_KEY = API_KEY[:15]
PASSWORD = "canary-database-password"
HUB_TOKEN = "hf_canaryHubToken0123456789"
IN_ENVIRONMENT = {
    "PALS_API_KEY": API_KEY,
    "PALS_DATABASE_URL": f"postgresql://pals:{PASSWORD}@127.0.0.1:1/pals",
}
DEMO_S = 480.0
SMALL = ("--threads", "1", "--context", "64", "--sessions", "1", "--dtype", "f32")
LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0", "--no-upnp")
NOWHERE = ("--listen", "/ip4/300.1.1.1/tcp/1")


@dataclass(kw_only=True)
class Stage:
    """Where commands are played; remembers what they said and what must not be in it."""

    folder: Path
    url: str
    model: Path
    start: Run
    played: set[str] = field(default_factory=set)
    said: list[str] = field(default_factory=list)
    secrets: set[bytes] = field(
        default_factory=lambda: {
            text.encode() for text in (API_KEY, SHORT_KEY, PASSWORD, HUB_TOKEN)
        }
    )

    def profile(self, name: str) -> Profile:
        return Profile(self.folder / name)

    def run(
        self,
        command: str,
        *arguments: str | Path,
        of: str = "operator",
        status: int | None = 0,
        shows: bool = False,
        stdin: str = "",
        **variables: str,
    ) -> Finished:
        """Play one command with the profile ``of`` somebody.

        What it shows is not searched if it ``shows`` a secret because it was asked to.
        """
        at = {"PALS_CONFIG_DIR": str(self.profile(of).path)}
        done = self.start(*command.split(), *arguments, stdin=stdin, **at, **variables)
        assert status in (None, done.status), (command, done.out, done.err)
        assert "Traceback" not in done.err or "PALS_DEBUG" in variables, done.err
        self.played.add(command)
        self.said += [done.err] if shows else [done.out, done.err]
        return done

    def invite(self, *options: str) -> str:
        """Have the operator make an invite, and remember it as a secret."""
        done = self.run("invite create", "--json", *options, shows=True)
        text = str(json.loads(done.out)["invite"])
        parts = (text, *text.removeprefix("pp_inv_").split("."))
        self.secrets |= {part.encode() for part in parts}
        return text

    def note_profile(self, name: str) -> None:
        """Remember the secrets that a profile holds now."""
        profile = self.profile(name)
        raw = [load_or_create_identity(profile).reveal_seed()]
        for entry in profile.load_swarms():
            texts = (entry.swarm_secret, entry.peer_credential)
            self.secrets |= {text.encode() for text in texts if text}
            key = profile.operator_key_path(entry.swarm_id)
            if key.exists():
                pem = key.read_bytes()
                self.secrets |= set(pem.splitlines()[1:-1])
                raw.append(Identity.from_pem(pem).reveal_seed())
        self.secrets |= {form for seed in raw for form in (seed, seed.hex().encode())}


# --- every command, as it should go -----------------------------------------------------------


def play_beginning(stage: Stage) -> None:
    """Make a swarm of an operator, a member and a guest."""
    stage.run("init")
    names = ("--name", "home", "--model", str(stage.model), "--backend", stage.url)
    stage.run("swarm create", *names)
    stage.run("login", of="member", PALS_INVITE=stage.invite())
    stage.run("login", of="guest", stdin=stage.invite("--note", "guest"))
    for name in ("operator", "member", "guest"):
        stage.note_profile(name)


def play_membership(stage: Stage) -> None:
    stage.invite()
    invites = json.loads(stage.run("invite list", "--json", "--status", "open").out)["invites"]
    key = invites[0]["id"]
    stage.run("invite resend", key, "--json", shows=True)
    stage.run("invite revoke", key)
    member, guest = (
        load_or_create_identity(stage.profile(name)).peer_id for name in ("member", "guest")
    )
    for command in ("status", "swarm list", "swarm show", "peers list"):
        stage.run(command, *(["--offline"] if command in ("peers list", "status") else []))
    stage.run("ps")
    stage.run("ping", member, "--count", "1", status=None)
    stage.run("swarm move", stage.url)
    stage.run("swarm appoint", member)
    key_file = stage.folder / "kept" / "operator.pem"
    key_file.parent.mkdir(mode=0o700)
    stage.run("swarm export-key", key_file)
    stage.run("swarm import-key", key_file, of="member")
    stage.run("peers kick", guest)
    stage.run("swarm rotate")
    stage.note_profile("operator")
    stage.run("swarm leave", of="guest", status=None)


def play_models(stage: Stage) -> None:
    stage.run("models list")
    stage.run("models show", stage.model)
    for verb in ("pull", "remove", "verify"):
        stage.run(f"models {verb}", "nobody/no-model", status=None)
    stage.run("models import", stage.folder / "absent.gguf", status=2)
    stage.run("warmup", "nobody/no-model", "--layers", "0:2", status=None)


def play_keys(stage: Stage) -> None:
    made = stage.run("keys create", "laptop", "--json", shows=True)
    key = str(json.loads(made.out)["key"])
    stage.secrets.add(key.encode())
    stage.run("keys create", "laptop", status=2)
    stage.run("keys list")
    stage.run("keys revoke", key, status=2)
    stage.run("keys revoke", "laptop")


def play_refusals(stage: Stage) -> None:
    """Play what takes a secret with one that is in the wrong place, or of no use."""
    invite = stage.invite("--backend", GONE)
    secret = stage.profile("operator").load_swarm().swarm_secret
    damaged_invite, damaged_secret = invite[:-4], secret[:-4]
    stage.secrets |= {damaged_invite.encode(), damaged_secret.encode()}
    stage.run("login", of="late", PALS_INVITE=invite, status=3)
    stage.run("login", of="late", stdin=damaged_invite, status=2)
    stage.run("backend", "--port", "0", status=None, PALS_DEBUG="1", **IN_ENVIRONMENT)
    held = {"PALS_SWARM_SECRET": secret, "PALS_API_KEY": API_KEY}
    stage.run("shard", "--layers", "0:2", *NOWHERE, status=2, **held)
    stage.run("shard", "--layers", "0:2", status=2, PALS_SWARM_SECRET=damaged_secret)
    stage.run("serve", "--port", "0", *NOWHERE, status=2, **held)
    stage.run("run", stage.model, "a prompt", *NOWHERE, status=2, **held)
    stage.run("run", stage.model, *NOWHERE, stdin="a prompt", status=2, **held)
    stage.run("serve", "--port", "0", status=2, **(held | {"PALS_API_KEY": SHORT_KEY}))


def play_one_for_two(stage: Stage) -> None:
    """Make a swarm, and join one, by the commands that go on as a shard which is refused."""
    layers = ("--layers", "0:2", *NOWHERE)
    stage.run("create", stage.model, "--backend", stage.url, *layers, of="founder", status=2)
    stage.run("join", *layers, of="joiner", status=2, PALS_INVITE=stage.invite())
    for name in ("founder", "joiner"):
        stage.note_profile(name)


def play_without_backend(stage: Stage) -> None:
    """Play what asks the backend when it is away, and have the traceback shown too."""
    profile = stage.profile("operator")
    (path,) = profile.path.glob("swarms/*/swarm.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"backend_url": GONE}))
    member = load_or_create_identity(stage.profile("member")).peer_id
    for command, *arguments in (
        ["invite create"],
        ["invite list"],
        ["invite resend", "00000000"],
        ["invite revoke", "00000000"],
        ["swarm create", "--model", "m", "--backend", GONE],
        ["swarm move", GONE],
        ["swarm appoint", member],
        ["swarm rotate"],
        ["peers list", "--offline"],
        ["peers kick", member],
        ["status"],
    ):
        stage.run(command, *arguments, status=None, PALS_DEBUG="1", **IN_ENVIRONMENT)


def play_short_servers(stage: Stage) -> None:
    """Play what takes long in other tests up to where its secrets are read."""
    stage.run("doctor", "--offline", status=None, **IN_ENVIRONMENT)
    stage.run("demo", "--shards", "0", status=2, **IN_ENVIRONMENT)
    stage.run("paths", **IN_ENVIRONMENT)
    stage.run("completion", "bash")
    stage.run("models plan", stage.model, "--memory", "much", status=2)


# --- the two forms of the scan -----------------------------------------------------------------


def commands_of(app: App, prefix: str = "") -> set[str]:
    """Return every command of an application by its whole name."""
    found: set[str] = set()
    for name, command in app.resolved_commands().items():
        if not name.startswith("-"):
            found |= commands_of(command, f"{prefix}{name} ") or {f"{prefix}{name}"}
    return found


@contextmanager
def watched(tmp_path: Path) -> Iterator[tuple[Pals, Watch, Stage]]:
    """Give a stage with a backend; at the end, search for every secret that it knows."""
    folder = tmp_path / "watched"
    folders = {name: folder / name for name in ("cache", "hub", "temporary")}
    for path in folders.values():
        path.mkdir(parents=True, mode=0o700)
    pals = Pals(
        {
            "HF_HOME": str(folders["hub"]),
            "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": HUB_TOKEN,
            "NO_COLOR": "1",
            "PALS_CACHE_DIR": str(folders["cache"]),
            "TMPDIR": str(folders["temporary"]),
        }
    )
    watch = Watch(pals)
    service = BackendService(sqlite_url(folder / "backend" / "backend.db"))
    model = make_llama_checkpoint(tmp_path / "tiny", num_layers=4)
    with running_backend(service) as url, watch.running():
        stage = Stage(folder=folder, url=url, model=model, start=pals.run)
        yield pals, watch, stage
    service.close()
    assert stage.played == commands_of(build_app())
    secrets = sorted(stage.secrets)
    said = "".join(stage.said).encode()
    assert not found_in(secrets, said)
    assert not found_in(set(secrets) - {HUB_TOKEN.encode()}, *watch.inherited.values())
    assert_files_are_private(folder, secrets)


@pytest.mark.timeout(180)
def test_m11_no_command_shows_a_secret(tmp_path: Path) -> None:
    """In forked processes, and as far as the servers read their secrets."""
    with watched(tmp_path) as (pals, watch, stage), open_forks(pals, tmp_path) as forks:
        stage.start = forks.run
        watch.shells.add(forks.process_id)
        play_beginning(stage)
        play_keys(stage)
        play_refusals(stage)
        with stage.profile("operator").lock():  # as a server holds it, which tells the members
            play_membership(stage)
        play_models(stage)
        play_one_for_two(stage)
        play_short_servers(stage)
        play_without_backend(stage)
    assert not found_in(stage.secrets, *watch.command_lines)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_m11_no_command_shows_a_secret_in_processes_of_their_own(tmp_path: Path) -> None:
    """In whole processes, servers that run and answer among them."""
    with watched(tmp_path) as (pals, watch, stage):
        play_beginning(stage)
        play_servers(stage, pals)
        play_keys(stage)
        play_refusals(stage)
        typed = stage.invite()
        stage.run("login", typed, of="late", status=2)
        play_membership(stage)
        play_models(stage)
        play_one_for_two(stage)
        play_short_servers(stage)
        stage.run("models plan", stage.model)
        stage.run("doctor", status=None, **IN_ENVIRONMENT)
        play_demo(stage, pals)
        play_without_backend(stage)
    lines = [line for line in watch.command_lines if typed.encode() not in line]
    assert len(lines) >= len(stage.played)
    assert not found_in(stage.secrets, *lines)


def play_servers(stage: Stage, pals: Pals) -> None:
    """Run a backend, a shard and an endpoint until each is ready, and end them in order."""
    of = {
        name: {"PALS_CONFIG_DIR": str(stage.profile(name).path)} for name in ("operator", "member")
    }
    data = stage.folder / "other" / "backend.db"
    layers = ("--layers", "0:4", *SMALL, *LOOPBACK)
    with (
        pals.start(
            "backend", "--port", "0", "--p2p-port", "0", "--data", data, "--json"
        ) as backend,
        pals.start("shard", *layers, "--verbose", "--json", **of["member"]) as shard,
        pals.start(
            "serve",
            "--port",
            "0",
            *LOOPBACK,
            "--verbose",
            "--json",
            **of["operator"],
            PALS_API_KEY=API_KEY,
        ) as server,
    ):
        backend.wait_for_event("ready")
        shard.wait_for_event("shard-ready")
        server.wait_for_event("ready")
        for process in (server, shard, backend):
            process.signal(signal.SIGTERM)
            done = process.wait(within_s=END_S)
            stage.said += [done.out, done.err]


def play_demo(stage: Stage, pals: Pals) -> None:
    """Run the whole demo, whose processes end with it or with the test."""
    with pals.start("demo", "--json", "--shards", "1", **IN_ENVIRONMENT) as demo:
        done = demo.wait(within_s=DEMO_S)
    assert done.status == 0, done.err
    stage.played.add("demo")
    stage.said += [done.out, done.err]
