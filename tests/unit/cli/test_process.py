from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pals.cli import serve as serve_command
from pals.cli.app import build_app, run
from pals.cli.arguments import without_option
from pals.cli.process import ServerOptions, ShardOptions, load_member, replace_process
from pals.config import Profile, SwarmEntry, SwarmSecret
from pals.errors import NoSwarm, SwarmSecretInvalid
from pals.settings import ShardSettings

SECRET = SwarmSecret(bytes(range(32))).to_text()
OTHER_SECRET = SwarmSecret(bytes(range(32, 64))).to_text()
KEY = "a-key-of-an-endpoint"


class Replaced(Exception):
    """What `os.execve` was called with."""

    def __init__(self, path: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        super().__init__()
        self.path = path
        self.arguments = list(arguments)
        self.environment = environment


@pytest.fixture(autouse=True)
def execve(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(path: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        raise Replaced(path, arguments, environment)

    monkeypatch.setattr(os, "execve", replace)


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    made = Profile(tmp_path / "profile")
    made.create_folder()
    made.save_swarm(
        SwarmEntry(
            swarm_id="ab" * 32,
            name="home",
            model="org/model",
            backend_url="http://127.0.0.1:1",
            epoch=0,
            swarm_secret=SECRET,
            peer_credential="credential",
        )
    )
    return made


# --- starting again with secrets in the environment ----------------------------------


def test_member_without_the_secret_starts_again_with_that_of_its_profile(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pals", "shard", "--layers", "0:2"])
    monkeypatch.setenv("PALS_INVITE", "canary")
    with pytest.raises(Replaced) as caught:
        load_member(profile, keep={"PALS_API_KEY": KEY})
    replaced = caught.value
    assert replaced.path == sys.executable
    assert replaced.arguments == [sys.executable, "-m", "pals", "shard", "--layers", "0:2"]
    assert replaced.environment["PALS_SWARM_SECRET"] == SECRET
    assert replaced.environment["PALS_API_KEY"] == KEY
    assert "PALS_INVITE" not in replaced.environment


def test_member_takes_the_secret_of_the_environment_and_hands_it_on_to_nobody(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PALS_SWARM_SECRET", OTHER_SECRET)
    member = load_member(profile)
    assert member.secret.to_text() == OTHER_SECRET
    assert "PALS_SWARM_SECRET" not in os.environ
    assert SECRET not in repr(member)
    assert OTHER_SECRET not in repr(member)


@pytest.mark.parametrize("text", ["x", SECRET[:-2], SECRET + SECRET])
def test_malformed_secret_in_the_environment_is_not_replaced_by_that_of_the_profile(
    profile: Profile, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("PALS_SWARM_SECRET", text)
    with pytest.raises(SwarmSecretInvalid):
        load_member(profile)


def test_malformed_secret_in_the_profile_starts_nothing(profile: Profile) -> None:
    path = profile.swarm_folder("ab" * 32) / "swarm.json"
    path.write_bytes(path.read_bytes().replace(SECRET.encode(), b"x"))
    with pytest.raises(SwarmSecretInvalid):
        load_member(profile)


def test_profile_of_no_swarm_starts_nothing(tmp_path: Path) -> None:
    empty = Profile(tmp_path / "empty")
    empty.create_folder()
    with pytest.raises(NoSwarm):
        load_member(empty)


@pytest.mark.parametrize(("libc", "tunable"), [("glibc", "glibc.malloc.hugetlb=1"), ("", None)])
def test_huge_pages_are_asked_of_glibc_alone(
    monkeypatch: pytest.MonkeyPatch, libc: str, tunable: str | None
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr("platform.libc_ver", lambda: (libc, ""))
    with pytest.raises(Replaced) as caught:
        replace_process({}, ["shard"])
    assert caught.value.environment.get("GLIBC_TUNABLES") == tunable


def test_tunables_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    with pytest.raises(Replaced) as caught:
        replace_process({}, ["shard"])
    assert caught.value.environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


# --- a key on the command line -------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["serve", "--api-key", KEY, "--json"], ["serve", "--json"]),
        (["serve", f"--api-key={KEY}", "--json"], ["serve", "--json"]),
        (["serve", "--api_key", KEY, "--json"], ["serve", "--json"]),
        (["serve", f"--api_key={KEY}", "--json"], ["serve", "--json"]),
        (["serve", "--api-key=", "--json"], ["serve", "--json"]),
        (["serve", "--api-key", "a=b", "model"], ["serve", "model"]),
        (["serve", "--json", "--api-key", KEY], ["serve", "--json"]),
        (["serve", "--api-key"], ["serve"]),
        (["serve", "--port=1", "my_model"], ["serve", "--port=1", "my_model"]),
        (["serve", "--api-keys", "x"], ["serve", "--api-keys", "x"]),
    ],
)
def test_option_is_taken_out_with_its_value(arguments: list[str], kept: list[str]) -> None:
    assert without_option(arguments, "--api-key") == kept


@pytest.mark.parametrize(
    "option", [["--api-key", KEY], [f"--api-key={KEY}"], ["--api_key", KEY], [f"--api_key={KEY}"]]
)
def test_every_spelling_of_a_key_leaves_the_command_line_and_does_not_return(
    monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    """A spelling that stayed would start the command again for ever."""
    arguments = ["serve", *option, "--port", "0"]
    monkeypatch.setattr(sys, "argv", ["pals", *arguments])
    monkeypatch.setenv("PALS_SWARM_SECRET", SECRET)
    with pytest.raises(Replaced) as caught:
        build_app()(arguments)
    replaced = caught.value
    assert replaced.arguments[3:] == ["serve", "--port", "0"]
    assert replaced.environment["PALS_API_KEY"] == KEY
    assert replaced.environment["PALS_SWARM_SECRET"] == SECRET


def test_key_in_the_environment_starts_nothing_again_but_for_the_secret(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_command, "check_public_bind", lambda host, has_keys: None)
    monkeypatch.setattr(sys, "argv", ["pals", "serve"])
    monkeypatch.setenv("PALS_API_KEY", KEY)
    with pytest.raises(Replaced) as caught:
        build_app()(["serve", "--config-dir", str(profile.path)])
    assert caught.value.environment["PALS_API_KEY"] == KEY
    assert caught.value.environment["PALS_SWARM_SECRET"] == SECRET


def test_public_bind_without_a_key_is_refused_before_any_secret_is_read(
    profile: Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", "--host", "0.0.0.0", "--config-dir", str(profile.path)]) == 2
    assert "without an API key" in capsys.readouterr().err


# --- options over presets ------------------------------------------------------------


def test_options_win_over_the_preset(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text(
        "[node]\nlisten = '/ip4/1.2.3.4/tcp/1'\npeers = ['/a']\nsession_idle_s = 9\n"
        "prefill_codec = 'int8'\n"
    )
    node = ServerOptions(preset=str(preset)).load_settings().node
    assert (node.listen, node.peers) == ("/ip4/1.2.3.4/tcp/1", ("/a",))
    assert node.prefill_codec == "int8"
    options = ServerOptions(
        preset=str(preset),
        listen="/ip4/5.6.7.8/tcp/2",
        peer=("/b", "/c"),
        prefill_codec="raw",
    )
    node = options.load_settings().node
    assert (node.listen, node.peers) == ("/ip4/5.6.7.8/tcp/2", ("/b", "/c"))
    assert node.prefill_codec == "raw"
    assert node.session_idle_s == 9


FORWARD = "/dns4/home.example.org/tcp/4001"


def test_options_of_being_reached_win_over_the_preset_either_way(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text("[node]\nannounce = ['/ip4/1.2.3.4/tcp/1']\nupnp = false\nuse_relay = true\n")

    kept = ServerOptions(preset=str(preset)).load_settings().node
    changed = ServerOptions(
        preset=str(preset), announce=(FORWARD,), upnp=True, allow_relay=True, use_relay=False
    )

    assert (kept.announce, kept.upnp, kept.allow_relay, kept.use_relay) == (
        ("/ip4/1.2.3.4/tcp/1",),
        False,
        False,
        True,
    )
    node = changed.load_settings().node
    assert (node.announce, node.upnp, node.allow_relay, node.use_relay) == (
        (FORWARD,),
        True,
        True,
        False,
    )


def test_an_announced_address_that_nobody_can_dial_is_refused_before_anything_starts(
    profile: Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shard", "--announce", "203.0.113.7:4001", "--config-dir", str(profile.path)]

    assert run(command) == 2
    assert "announced address `203.0.113.7:4001`" in capsys.readouterr().err


def test_nothing_is_relayed_unless_the_user_says_so() -> None:
    node = ServerOptions().load_settings().node

    assert (node.allow_relay, node.use_relay) == (False, False)


def test_config_dir_option_names_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PALS_CONFIG_DIR", "/from/variable")
    assert ServerOptions(config_dir=tmp_path).profile.path == tmp_path
    assert ServerOptions().profile.path == Path("/from/variable")


# --- options of a shard --------------------------------------------------------------


def test_devices_are_those_of_the_option_or_else_of_the_settings():
    settings = ShardSettings(devices=2)

    assert ShardOptions().spec_within(settings).devices == 2
    assert ShardOptions(devices=4).spec_within(settings).devices == 4


# --- a shard besides -----------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "run"])
@pytest.mark.parametrize(
    ("options", "problem", "hint"),
    [
        (["--devices", "4"], "error: --devices: ", "hint: add `--layers auto`"),
        (["--kv-memory", "8GiB"], "error: --kv-memory: ", "hint: add `--layers auto`"),
        (["--layers", "0:2", "--memory", "8GiB"], "error: --memory: ", "leave out `--layers`"),
        (["--layers", "2:1"], "error: not a layer range", "`--layers 0:10`"),
    ],
)
def test_options_of_no_shard_are_refused_before_anything_starts(
    profile: Profile,
    capsys: pytest.CaptureFixture[str],
    command: str,
    options: list[str],
    problem: str,
    hint: str,
) -> None:
    assert run([command, *options, "--config-dir", str(profile.path)]) == 2

    err = capsys.readouterr().err
    assert problem in err
    assert hint in err


def test_without_layers_nothing_is_served_besides() -> None:
    ShardOptions().check_also(None)
    ShardOptions(devices=4, memory=1 << 30).check_also("auto")

    assert ShardOptions().make_also("org/model", None, ShardSettings(), json=False) is None
