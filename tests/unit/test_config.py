from __future__ import annotations

import base64
import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import platformdirs
import pytest

from pals import config
from pals.config import (
    MAX_KNOWN_PEERS,
    KnownPeer,
    Profile,
    SwarmEntry,
    SwarmSecret,
    load_settings,
    read_private,
    write_private,
)
from pals.errors import (
    AmbiguousSwarm,
    InvalidConfig,
    NoSuchSwarm,
    NoSwarm,
    PalsError,
    ProfileExposed,
    ProfileInUse,
    ProfileMissing,
    SwarmSecretInvalid,
)
from pals.settings import BackendSettings, NodeSettings, Settings

KEY = bytes(range(32))
TEXT = base64.b64encode(KEY).decode()
SWARM = "ab" * 32
ENTRY = SwarmEntry(
    swarm_id=SWARM,
    name="home",
    model="org/model",
    backend_url="http://127.0.0.1:8470",
    epoch=2,
    swarm_secret=TEXT,
    peer_credential="pp_peer_canary",
)


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    made = Profile(tmp_path / "profile")
    made.create_folder()
    return made


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


# --- environment ---------------------------------------------------------------------


def test_option_wins_over_variable_and_variable_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PALS_CONFIG_DIR", "/from/variable")
    assert config.config_dir(Path("/from/option")) == Path("/from/option")
    assert config.config_dir() == Path("/from/variable")
    monkeypatch.setenv("PALS_CONFIG_DIR", "")
    assert config.config_dir() == platformdirs.user_config_path("pals")
    monkeypatch.setenv("PALS_CACHE_DIR", "/cache")
    assert config.cache_dir() == Path("/cache")


def test_taken_variable_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALS_INVITE", "pp_inv_canary")
    assert config.take_environment("PALS_INVITE") == "pp_inv_canary"
    assert "PALS_INVITE" not in os.environ
    assert config.take_environment("PALS_INVITE") is None


def test_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALS_API_KEY", "")
    assert config.take_environment("PALS_API_KEY") is None


def test_child_inherits_no_secret_but_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PALS_SWARM_SECRET", "PALS_INVITE", "PALS_API_KEY"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("PALS_DEBUG", "1")
    environment = config.child_environment({"PALS_API_KEY": "wanted"})
    assert "canary" not in environment.values()
    assert environment["PALS_API_KEY"] == "wanted"
    assert environment["PALS_DEBUG"] == "1"
    assert os.environ["PALS_INVITE"] == "canary"


@pytest.mark.parametrize(
    ("value", "enabled"), [("1", True), ("yes", True), ("0", False), ("", False)]
)
def test_debug_variable(monkeypatch: pytest.MonkeyPatch, value: str, enabled: bool) -> None:
    monkeypatch.setenv("PALS_DEBUG", value)
    assert config.debug_enabled() is enabled


@pytest.mark.parametrize(("threads", "wanted"), [(3, "3"), (None, "8")])
def test_compute_threads_are_bounded_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, wanted: str
) -> None:
    monkeypatch.setenv("NPROC", "8")
    config.limit_compute_threads(threads)
    assert os.environ["NPROC"] == wanted


# --- secrets -------------------------------------------------------------------------


def test_secret_survives_its_text() -> None:
    secret = SwarmSecret.parse(TEXT)
    assert secret.reveal() == KEY
    assert secret.to_text() == TEXT
    assert len(TEXT) == 44


def test_generated_secrets_differ() -> None:
    first, second = SwarmSecret.generate(), SwarmSecret.generate()
    assert len(first.reveal()) == 32
    assert first.reveal() != second.reveal()


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        " ",
        TEXT[:-1],
        TEXT + "\n",
        " " + TEXT,
        TEXT[:20] + "\n" + TEXT[20:],
        base64.b64encode(KEY[:-1]).decode(),
        base64.b64encode(KEY + b"x").decode(),
        base64.urlsafe_b64encode(b"\xff" * 32).decode(),
        KEY.hex(),
        "é" * 44,
    ],
)
def test_malformed_secret_is_refused_without_repeating_it(text: str | None) -> None:
    with pytest.raises(SwarmSecretInvalid) as caught:
        SwarmSecret.parse(text)
    shown = f"{caught.value} {caught.value.hint} {caught.value!r}"
    assert not text or not text.strip() or text not in shown
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_secret_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(SwarmSecretInvalid):
        SwarmSecret(bytes(size))


def test_secrets_show_in_no_repr() -> None:
    secret = SwarmSecret.parse(TEXT)
    shown = f"{secret} {secret!r} {[secret]} {ENTRY} {ENTRY!r} {[ENTRY]}"
    assert TEXT not in shown
    assert "canary" not in shown
    assert str(KEY) not in shown
    assert not hasattr(secret, "__dict__")


# --- private files -------------------------------------------------------------------


def test_private_file_is_written_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "inner" / "secret"
    previous = os.umask(0)
    try:
        write_private(path, b"data")
    finally:
        os.umask(previous)
    assert read_private(path) == b"data"
    made = (path, path.parent, path.parent.parent)
    assert [mode_of(one) for one in made] == [0o600, 0o700, 0o700]


def test_file_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    synced: list[tuple[int, bool]] = []

    def note(handle: int) -> None:
        synced.append((os.fstat(handle).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    write_private(path, b"data")
    assert synced == [(4, False)]


def test_rewritten_file_replaces_a_file_that_others_could_read(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o644)
    write_private(path, b"new")
    assert mode_of(path) == 0o600
    assert read_private(path) == b"new"


def test_writing_replaces_a_symlink_and_leaves_its_target(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "secret"
    target.write_bytes(b"other's")
    path.symlink_to(target)
    write_private(path, b"mine")
    assert target.read_bytes() == b"other's"
    assert not path.is_symlink()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "secret"
    write_private(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o601, 0o610, 0o644, 0o777])
def test_file_that_others_have_any_right_to_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    write_private(path, b"data")
    path.chmod(mode)
    with pytest.raises(ProfileExposed) as caught:
        read_private(path)
    assert caught.value.fields == {"path": path, "mode": mode, "wanted": 0o600}
    assert f"chmod 600 {path}" in caught.value.hint


def test_symlink_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write_private(target, b"data")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ProfileMissing):
        read_private(tmp_path / "link")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileMissing) as caught:
        read_private(tmp_path / "absent")
    assert caught.value.fields == {"path": tmp_path / "absent"}


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(InvalidConfig):
        read_private(tmp_path / "folder")


def test_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InvalidConfig):
        read_private(tmp_path / "pipe")


def test_file_is_read_up_to_its_limit_and_refused_beyond(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_private(path, bytes(100))
    assert len(read_private(path, max_bytes=100)) == 100
    with pytest.raises(InvalidConfig):
        read_private(path, max_bytes=99)


def test_reading_leaves_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o700)
    write_private(tmp_path / "secret", b"data")
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        read_private(tmp_path / "secret")
        with pytest.raises(InvalidConfig):
            read_private(tmp_path / "folder")
    assert len(os.listdir("/dev/fd")) == before


# --- profile -------------------------------------------------------------------------


def test_profile_folder_is_made_for_its_owner_only(profile: Profile) -> None:
    assert mode_of(profile.path) == 0o700
    profile.create_folder()


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o711, 0o755])
def test_profile_that_others_may_look_into_is_refused(profile: Profile, mode: int) -> None:
    profile.path.chmod(mode)
    for use in (profile.create_folder, profile.check_folder, profile.load_swarm):
        with pytest.raises(ProfileExposed) as caught:
            use()
        assert caught.value.fields["wanted"] == 0o700


def test_missing_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileMissing):
        Profile(tmp_path / "absent").load_swarm()


def test_swarm_survives_the_disk_in_private_files(profile: Profile) -> None:
    profile.save_swarm(ENTRY)
    assert profile.load_swarm() == ENTRY
    files = [p for p in profile.path.rglob("*") if p.is_file()]
    assert [mode_of(p) for p in files] == [0o600]
    assert profile.swarm_ids() == [SWARM]


def test_known_peers_survive_the_disk_in_a_private_file(profile: Profile) -> None:
    known = [KnownPeer(peer="a", addresses=("/ip4/192.0.2.1/tcp/1",), reached_at=9)]
    assert profile.load_known_peers("00") == ()
    profile.save_known_peers("00", known)
    assert profile.load_known_peers("00") == tuple(known)
    path = profile.swarm_folder("00") / "known_peers.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_more_known_peers_are_kept_than_are_read(profile: Profile) -> None:
    many = [KnownPeer(peer=str(n), addresses=(), reached_at=n) for n in range(100)]
    profile.save_known_peers("00", many)
    assert profile.load_known_peers("00") == tuple(many[:MAX_KNOWN_PEERS])


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b'[{"peer": "a"}]', b'[{"peer":"a","addresses":["x"],"reached_at":"1"}]'],
)
def test_damaged_known_peers_are_named(profile: Profile, content: bytes) -> None:
    profile.save_known_peers("00", [])
    path = profile.swarm_folder("00") / "known_peers.json"
    path.write_bytes(content)
    with pytest.raises(InvalidConfig, match=r"known_peers\.json"):
        profile.load_known_peers("00")


def test_profile_without_a_swarm_says_so(profile: Profile) -> None:
    (profile.path / "swarms" / "not-an-id").mkdir(parents=True)
    (profile.path / "swarms" / "not-an-id" / "swarm.json").write_text("{}")
    with pytest.raises(NoSwarm):
        profile.load_swarm()


@pytest.fixture
def two_swarms(profile: Profile) -> Profile:
    profile.save_swarm(ENTRY)
    profile.save_swarm(msgspec.structs.replace(ENTRY, swarm_id="cd" * 32, name="other"))
    return profile


def test_several_swarms_are_listed_when_none_is_named(two_swarms: Profile) -> None:
    profile = two_swarms
    with pytest.raises(AmbiguousSwarm) as caught:
        profile.load_swarm()
    assert caught.value.fields["known"] == f"{ENTRY.name} (abababab), other (cdcdcdcd)"


@pytest.mark.parametrize("wanted", ["other", "cd", "CDCD", "cd" * 32])
def test_one_of_several_swarms_is_chosen_by_its_name_or_the_start_of_its_id(
    two_swarms: Profile, wanted: str
) -> None:
    assert two_swarms.load_swarm(wanted).swarm_id == "cd" * 32


@pytest.mark.parametrize("wanted", ["", "oth", "dc", "cd" * 33])
def test_swarm_that_is_called_otherwise_is_refused(two_swarms: Profile, wanted: str) -> None:
    with pytest.raises(NoSuchSwarm) as caught:
        two_swarms.load_swarm(wanted)
    assert "other (cdcdcdcd)" in str(caught.value)


def test_of_two_swarms_with_one_name_none_is_chosen(two_swarms: Profile) -> None:
    two_swarms.save_swarm(msgspec.structs.replace(ENTRY, swarm_id="ce" * 32, name="other"))
    with pytest.raises(AmbiguousSwarm) as caught:
        two_swarms.load_swarm("other")
    assert caught.value.fields["known"] == "other (cdcdcdcd), other (cececece)"


def test_forgotten_swarm_leaves_nothing_and_the_other_stays(two_swarms: Profile) -> None:
    write_private(two_swarms.operator_key_path("cd" * 32), b"key")
    two_swarms.forget_swarm("cd" * 32)
    assert two_swarms.load_swarm() == ENTRY
    assert [p.name for p in (two_swarms.path / "swarms").iterdir()] == [SWARM]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"[]", id="other type"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b'{"swarm_id":"\xff"}', id="text that is not UTF-8"),
        pytest.param(b"[" * 100_000, id="deep nesting"),
        pytest.param(
            msgspec.json.encode(ENTRY).replace(b'"epoch":2', b'"epoch":"2"'), id="wrong field"
        ),
        pytest.param(msgspec.json.encode(ENTRY).replace(b"abab", b"cdcd"), id="other swarm"),
    ],
)
def test_damaged_swarm_file_is_named_and_no_secret_shown(profile: Profile, content: bytes) -> None:
    path = profile.swarm_folder(SWARM) / "swarm.json"
    write_private(path, content)
    with pytest.raises(InvalidConfig) as caught:
        profile.load_swarm()
    assert caught.value.fields["source"] == path
    assert TEXT not in str(caught.value)
    assert "canary" not in str(caught.value)


def test_swarm_file_that_others_can_read_is_refused(profile: Profile) -> None:
    profile.save_swarm(ENTRY)
    (profile.swarm_folder(SWARM) / "swarm.json").chmod(0o640)
    with pytest.raises(ProfileExposed):
        profile.load_swarm()


# --- lock ----------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from pals.config import Profile
with Profile(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_of_another_process_is_refused_until_that_ends(profile: Profile) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(profile.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(ProfileInUse) as caught, profile.lock():
                pass
            assert caught.value.fields == {"path": profile.path, "pid": str(holder.pid)}
        finally:
            holder.kill()
    with profile.lock():
        assert (profile.path / "node.lock").read_text() == str(os.getpid())


def test_enrolment_has_a_lock_of_its_own(profile: Profile) -> None:
    with profile.lock(), profile.enrolment_lock():
        with pytest.raises(ProfileInUse), profile.enrolment_lock():
            pass
        with pytest.raises(ProfileInUse), profile.lock():
            pass
    with profile.enrolment_lock():
        assert mode_of(profile.path / "enrolment.lock") == 0o600


def test_lock_is_given_back_when_its_block_fails(profile: Profile) -> None:
    with pytest.raises(ZeroDivisionError), profile.lock():
        raise ZeroDivisionError
    with profile.lock(), pytest.raises(ProfileInUse), profile.lock():
        pass
    assert mode_of(profile.path / "node.lock") == 0o600


def test_lock_states_the_process_alone(profile: Profile) -> None:
    (profile.path / "node.lock").write_text("9" * 30)
    with profile.lock():
        assert (profile.path / "node.lock").read_text() == str(os.getpid())


def test_lock_file_that_is_a_symlink_is_refused(profile: Profile, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"other's")
    (profile.path / "node.lock").symlink_to(target)
    with pytest.raises(InvalidConfig), profile.lock():
        pass
    assert target.read_bytes() == b"other's"


# --- presets -------------------------------------------------------------------------


def load_text(tmp_path: Path, text: bytes) -> Settings:
    path = tmp_path / "preset.toml"
    path.write_bytes(text)
    return load_settings(str(path))


def test_default_preset_states_the_defaults() -> None:
    assert load_settings() == load_settings("default") == Settings()


def test_every_shipped_preset_loads() -> None:
    names = sorted(path.stem for path in config.presets_folder().glob("*.toml"))
    assert {"default", "loopback-3", "cuda", "tpu"} <= set(names)
    for name in names:
        assert isinstance(load_settings(name), Settings)


def test_preset_says_only_what_differs(tmp_path: Path) -> None:
    settings = load_text(tmp_path, b"[backend]\nport = 9\n[node]\nstep_deadline_s = 5\n")
    assert settings.backend == BackendSettings(port=9)
    assert settings.node == NodeSettings(step_deadline_s=5.0)
    assert settings.shard == Settings().shard


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"[node]\npool_interval_s = 3\n", "pool_interval_s"),
        (b"[nodes]\n", "nodes"),
        (b"[backend]\nport = 'x'\n", "$.backend.port"),
        (b"[backend]\nport = 65536\n", "$.backend.port"),
        (b"[serve]\nport = -1\n", "$.serve.port"),
        (b"[node]\nstep_deadline_s = 0\n", "$.node.step_deadline_s"),
        (b"[node]\npoll_interval_s = nan\n", "$.node.poll_interval_s"),
        (b"[node]\nmax_stale_s = 299\n", "$.node.max_stale_s"),
        (b"[node]\nmax_stale_s = 2592001\n", "$.node.max_stale_s"),
        (b"[node]\nsession_idle_s = inf\n", "$.node.session_idle_s"),
        (b"[shard]\ndtype = 'f16'\n", "$.shard.dtype"),
        (b"a = 1\na = 2\n", "overwrite"),
        (b"\xff\xfe", "utf-8"),
        (b"a = " + b"[" * 100_000, ""),
        (b"#" * (config.MAX_CONFIG_BYTES + 1), "longer than 1048576 bytes"),
    ],
)
def test_bad_preset_is_named_with_its_problem(tmp_path: Path, text: bytes, problem: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_text(tmp_path, text)
    assert caught.value.fields["source"] == tmp_path / "preset.toml"
    assert problem in str(caught.value.fields["problem"])


def test_preset_may_be_as_long_as_the_limit(tmp_path: Path) -> None:
    assert load_text(tmp_path, b"#" * config.MAX_CONFIG_BYTES) == Settings()


def test_preset_with_a_slash_or_a_suffix_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, preset in (("mine.toml", "mine.toml"), ("mine", "./mine")):
        (tmp_path / name).write_text("[backend]\nport = 9\n")
        assert load_settings(preset).backend.port == 9


def test_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_settings("defautl")
    assert "default, loopback-3" in caught.value.hint


@pytest.mark.parametrize("preset", ["./absent.toml", "absent.toml", "folder/", "a\0.toml"])
def test_preset_path_that_cannot_be_read_is_refused(tmp_path: Path, preset: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(PalsError):
        load_settings(f"{tmp_path}/{preset}")
