"""The profile on disk, presets, and ``PALS_*`` variables (read nowhere else).

A profile is one folder (mode 0700)::

    identity.key              Ed25519 private key, PEM, 0600: the libp2p identity
    api.keys                  names and hashes of the endpoint's API keys, 0600: `pals.api.key_file`
    chat_history.json         what was typed in `pals run`, 0600
    node.lock                 held by the process that runs with this identity
    enrolment.lock            held by the process that enters a swarm, or changes one
    hosted.db, redeem.key, redeem.addresses  a backend inside the profile: `pals.net.hosted`
    swarms/<hex>/swarm.json   SwarmEntry, 0600: it holds the swarm secret
    swarms/<hex>/operator.key Ed25519 private key, PEM, 0600 (the operator only)
    swarms/<hex>/roster.bin   the last verified roster
    swarms/<hex>/known_peers.json  members that were reached, and where; 0600
    swarms/<hex>/invites/     texts of open invites, 0600 each (see `pals.swarm.kept`)
    swarms/<hex>/next.json    a secret that is about to be the swarm's, 0600
    swarms/<hex>/removals.bin removals that the backend has not taken yet, 0600

Files are written atomically; a secret that others can read is refused.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import platformdirs

from pals.errors import (
    AmbiguousSwarm,
    InvalidConfig,
    NoSuchSwarm,
    NoSwarm,
    ProfileExposed,
    ProfileInUse,
    ProfileMissing,
    SwarmSecretInvalid,
)
from pals.settings import Settings

SECRET_BYTES = 32
_SWARM_ID = re.compile(r"[0-9a-f]{64}")
MAX_CONFIG_BYTES = 1 << 20
MAX_KNOWN_PEERS = 64
MAX_KNOWN_ADDRESSES = 8
MAX_PEER_CHARS = 64
KnownAddress = Annotated[str, msgspec.Meta(max_length=256)]
PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700

SWARM_SECRET_VARIABLE = "PALS_SWARM_SECRET"  # noqa: S105 # the name of a variable
INVITE_VARIABLE = "PALS_INVITE"
API_KEY_VARIABLE = "PALS_API_KEY"
DATABASE_URL_VARIABLE = "PALS_DATABASE_URL"
CONFIG_DIR_VARIABLE = "PALS_CONFIG_DIR"
CACHE_DIR_VARIABLE = "PALS_CACHE_DIR"
DEBUG_VARIABLE = "PALS_DEBUG"
HUB_TELEMETRY_VARIABLE = "HF_HUB_DISABLE_TELEMETRY"


# --- environment ---------------------------------------------------------------------


def config_dir(option: Path | None = None) -> Path:
    """Return the profile folder: the option, else ``PALS_CONFIG_DIR``, else the XDG one."""
    if option is not None:
        return option
    return Path(os.environ.get(CONFIG_DIR_VARIABLE) or platformdirs.user_config_path("pals"))


def cache_dir() -> Path:
    """Return the folder of imported models and compiled programs."""
    return Path(os.environ.get(CACHE_DIR_VARIABLE) or platformdirs.user_cache_path("pals"))


def programs_dir() -> Path:
    """Return the folder of compiled programs."""
    return cache_dir() / "xla"


def debug_enabled() -> bool:
    """Return whether ``PALS_DEBUG`` asks for tracebacks of expected and unexpected errors."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def take_environment(variable: str) -> str | None:
    """Return a ``PALS_*`` variable and remove it, so that no child inherits it."""
    return os.environ.pop(variable, None) or None


def forbid_telemetry() -> None:
    """Keep the hub's client from telling the hub what runs here; before it is imported."""
    os.environ[HUB_TELEMETRY_VARIABLE] = "1"


def limit_compute_threads(threads: int | None) -> None:
    """Bound XLA's CPU thread pool; must run before jax makes its first client.

    XLA sizes the pool from ``NPROC`` and otherwise from the cores it may run on.
    """
    if threads is not None:
        os.environ["NPROC"] = str(threads)


def compute_threads() -> int:
    """Return how many threads XLA's CPU pool has, for which it also divides what it compiles."""
    named = os.environ.get("NPROC", "")
    if named.isdecimal():
        return int(named)
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def compiler_flags() -> str:
    """Return what the environment asks of XLA's compilers."""
    return " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")).strip()


def share_device_memory() -> None:
    """Let jax take device memory only as it needs it; must run before its first client.

    By default it takes most of a GPU at once, where a shard may be running.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


# --- secrets -------------------------------------------------------------------------


class SwarmSecret:
    """The 32 random bytes of one epoch; its text form never shows in a repr."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if len(key) != SECRET_BYTES:
            raise SwarmSecretInvalid(problem=f"{len(key)} bytes long instead of {SECRET_BYTES}")
        self._key = key

    @classmethod
    def generate(cls) -> SwarmSecret:
        return cls(os.urandom(SECRET_BYTES))

    @classmethod
    def parse(cls, text: str | None) -> SwarmSecret:
        """Read the 44-character base64 form.

        Raises:
            SwarmSecretInvalid: ``text`` is missing or malformed.
        """
        if not text:
            raise SwarmSecretInvalid(problem="missing")
        try:
            return cls(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            raise SwarmSecretInvalid(problem="malformed: not standard base64") from None

    def reveal(self) -> bytes:
        return self._key

    def to_text(self) -> str:
        return base64.b64encode(self._key).decode()

    def __repr__(self) -> str:
        return "SwarmSecret(…)"


# --- files ---------------------------------------------------------------------------


def write_private(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` with mode 0600, all of it or nothing."""
    _write_whole(path, data, os.replace)


def create_private(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` like `write_private`, and replace nothing.

    Raises:
        FileExistsError: Something is there, be it that another process was faster.
    """
    _write_whole(path, data, os.link)


def make_private_folder(folder: Path) -> None:
    """Make a folder and what it lies in, each for this user alone; leave what is there."""
    if not folder.is_dir():
        make_private_folder(folder.parent)
        folder.mkdir(exist_ok=True, mode=PRIVATE_FOLDER)


def _write_whole(path: Path, data: bytes, place: Callable[[str, Path], None]) -> None:
    make_private_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        place(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def read_private(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> bytes:
    """Read a secret file.

    Raises:
        ProfileMissing: There is no such regular file.
        ProfileExposed: Others may read it.
        InvalidConfig: It is larger than a profile file can be.
    """
    try:
        # Without O_NONBLOCK a named pipe would hold the program up.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ProfileMissing(path=path) from error
    try:
        status = os.fstat(handle)
        check_private(path, status, PRIVATE_FILE)
        if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
            raise InvalidConfig(
                source=path,
                problem=f"not a regular file of at most {max_bytes} bytes",
                advice="restore it from a backup or make a new profile",
            )
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(max_bytes)
    finally:
        os.close(handle)


def check_private(path: Path, status: os.stat_result, wanted: int) -> None:
    """Raise `ProfileExposed` when group or others have any right to ``path``."""
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise ProfileExposed(path=path, mode=mode, wanted=wanted)


# --- profile -------------------------------------------------------------------------


class SwarmEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What a profile knows of one swarm; the file that holds it is 0600."""

    swarm_id: str
    name: str
    model: str
    backend_url: str
    epoch: int
    swarm_secret: str
    peer_credential: str

    def is_called(self, wanted: str) -> bool:
        """Return whether ``wanted`` is the swarm's name, or begins its id."""
        return wanted == self.name or (wanted != "" and self.swarm_id.startswith(wanted.lower()))

    def __repr__(self) -> str:
        return f"SwarmEntry(swarm_id={self.swarm_id[:8]}…, name={self.name!r})"


class KnownPeer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A member that was reached, to be tried first another time.

    Attributes:
        peer: Its peer id.
        addresses: Multiaddrs at which it was or said to be.
        reached_at: Unix seconds when it was last connected.
    """

    peer: Annotated[str, msgspec.Meta(max_length=MAX_PEER_CHARS)]
    addresses: Annotated[tuple[KnownAddress, ...], msgspec.Meta(max_length=MAX_KNOWN_ADDRESSES)]
    reached_at: int


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile folder; methods read and write its files."""

    path: Path

    @property
    def identity_path(self) -> Path:
        return self.path / "identity.key"

    def create_folder(self) -> None:
        """Make the folder with mode 0700, or check the one that is there."""
        make_private_folder(self.path)
        self.check_folder()

    def check_folder(self) -> None:
        """Raise unless the folder exists and is private.

        Raises:
            ProfileMissing: There is no such folder.
            ProfileExposed: Others may look into it.
        """
        if not self.path.is_dir():
            raise ProfileMissing(path=self.path)
        check_private(self.path, self.path.stat(), PRIVATE_FOLDER)

    def swarm_folder(self, swarm_id: str) -> Path:
        return self.path / "swarms" / swarm_id

    def operator_key_path(self, swarm_id: str) -> Path:
        return self.swarm_folder(swarm_id) / "operator.key"

    def roster_path(self, swarm_id: str) -> Path:
        return self.swarm_folder(swarm_id) / "roster.bin"

    def swarm_ids(self) -> list[str]:
        """Return the ids (hex) of the swarms that this profile belongs to."""
        folders = (p.parent.name for p in (self.path / "swarms").glob("*/swarm.json"))
        return sorted(name for name in folders if _SWARM_ID.fullmatch(name))

    def save_swarm(self, entry: SwarmEntry) -> None:
        folder = self.swarm_folder(entry.swarm_id)
        write_private(folder / "swarm.json", msgspec.json.format(msgspec.json.encode(entry)))

    def load_swarm(self, wanted: str | None = None) -> SwarmEntry:
        """Return one of the profile's swarms.

        Args:
            wanted: Its name, or the first characters of its id; the only one when None.

        Raises:
            ProfileMissing: The folder is not there.
            ProfileExposed: A secret can be read by others.
            NoSwarm: The profile belongs to no swarm.
            NoSuchSwarm: To none that is called so.
            AmbiguousSwarm: To several that are; or to several and ``wanted`` is None.
            InvalidConfig: A file is damaged.
        """
        swarms = self.load_swarms()
        if not swarms:
            raise NoSwarm(path=self.path)
        found = [swarm for swarm in swarms if wanted is None or swarm.is_called(wanted)]
        if len(found) == 1:
            return found[0]
        listed = ", ".join(f"{s.name} ({s.swarm_id[:8]})" for s in found or swarms)
        if not found:
            raise NoSuchSwarm(wanted=wanted, known=listed)
        raise AmbiguousSwarm(path=self.path, known=listed)

    def load_swarms(self) -> list[SwarmEntry]:
        """Return all swarms of the profile, ordered by their ids.

        Raises:
            ProfileMissing: The folder is not there.
            ProfileExposed: A secret can be read by others.
            InvalidConfig: A file is damaged.
        """
        self.check_folder()
        return [self._load_entry(swarm_id) for swarm_id in self.swarm_ids()]

    def _load_entry(self, swarm_id: str) -> SwarmEntry:
        path = self.swarm_folder(swarm_id) / "swarm.json"
        try:
            entry = msgspec.json.decode(read_private(path), type=SwarmEntry)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _damaged(path, str(error)) from error
        if entry.swarm_id != swarm_id:
            raise _damaged(path, f"it names another swarm than its folder: {entry.swarm_id!r}")
        return entry

    def forget_swarm(self, swarm_id: str) -> None:
        """Delete all that the profile holds of a swarm, its keys and secrets included."""
        folder = self.swarm_folder(swarm_id)
        # Under a name that is no swarm's first: half a folder would be a damaged swarm.
        leaving = folder.with_name(f".{swarm_id}")
        folder.rename(leaving)
        shutil.rmtree(leaving)

    def save_known_peers(self, swarm_id: str, peers: Sequence[KnownPeer]) -> None:
        """Remember members that were reached, the first `MAX_KNOWN_PEERS` of them."""
        path = self._known_peers_path(swarm_id)
        data = msgspec.json.encode(peers[:MAX_KNOWN_PEERS])
        write_private(path, msgspec.json.format(data))

    def load_known_peers(self, swarm_id: str) -> tuple[KnownPeer, ...]:
        """Return the members that were reached before; none if none are remembered.

        Raises:
            ProfileExposed: Others can read the file.
            InvalidConfig: The file is damaged.
        """
        path = self._known_peers_path(swarm_id)
        try:
            return _known_peers.decode(read_private(path))
        except ProfileMissing:
            return ()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidConfig(
                source=path, problem=str(error), advice="remove it; it is written anew"
            ) from error

    def _known_peers_path(self, swarm_id: str) -> Path:
        return self.swarm_folder(swarm_id) / "known_peers.json"

    @contextmanager
    def lock(self) -> Generator[None]:
        """Hold the identity: two processes with one libp2p identity confuse every peer.

        Raises:
            ProfileInUse: Another process holds it.
            InvalidConfig: The lock file cannot be made or opened.
        """
        with self._held("node.lock"):
            yield

    @contextmanager
    def enrolment_lock(self) -> Generator[None]:
        """Hold the right to change a membership: of two at once, one would lose its files.

        Raises:
            ProfileInUse: Another process holds it.
            InvalidConfig: The lock file cannot be made or opened.
        """
        with self._held("enrolment.lock"):
            yield

    @contextmanager
    def _held(self, name: str) -> Generator[None]:
        path = self.path / name
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, PRIVATE_FILE)
        except OSError as error:
            advice = "remove what is there, and check the rights of the profile's folder"
            raise InvalidConfig(source=path, problem=str(error), advice=advice) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                pid = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
                raise ProfileInUse(path=self.path, pid=pid) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(handle)


_known_peers = msgspec.json.Decoder(
    Annotated[tuple[KnownPeer, ...], msgspec.Meta(max_length=MAX_KNOWN_PEERS)]
)


def _damaged(path: Path, problem: str) -> InvalidConfig:
    return InvalidConfig(
        source=path, problem=problem, advice="restore it, or join again with a new invite"
    )


# --- presets -------------------------------------------------------------------------


def presets_folder() -> Path:
    """Return the folder of the shipped presets, installed or in the source tree."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def load_settings(preset: str | None = None) -> Settings:
    """Read a preset by its name in configs/, or by its path.

    Raises:
        InvalidConfig: There is no such preset, or it does not parse.
    """
    path = preset_path(preset or "default")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        settings = msgspec.toml.decode(data, type=Settings)
    # ValueError: the file is not UTF-8, or the path has a zero byte
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _bad_preset(path, str(error)) from error
    if len(data) > MAX_CONFIG_BYTES:
        raise _bad_preset(path, f"longer than {MAX_CONFIG_BYTES} bytes")
    return settings


def _bad_preset(path: Path, problem: str) -> InvalidConfig:
    return InvalidConfig(
        source=path, problem=problem, advice="compare it with configs/default.toml"
    )


def preset_path(preset: str) -> Path:
    """Return the file of a preset: a path when it has a slash or a suffix, else a name."""
    if "/" in preset or preset.endswith(".toml"):
        return Path(preset)
    path = presets_folder() / f"{preset}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in presets_folder().glob("*.toml")))
        raise InvalidConfig(
            source=f"preset `{preset}`",
            problem="there is none of that name",
            advice=f"choose one of: {known}",
        )
    return path


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without any ``PALS_*`` secret, plus ``extra``."""
    secrets = {
        SWARM_SECRET_VARIABLE,
        INVITE_VARIABLE,
        API_KEY_VARIABLE,
        DATABASE_URL_VARIABLE,
    }
    return {k: v for k, v in os.environ.items() if k not in secrets} | dict(extra)
