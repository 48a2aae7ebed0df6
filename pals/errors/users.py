"""Errors of commands: flags, files, the profile and this machine."""

from __future__ import annotations

from pals.errors.base import PalsError, UserError


class InvalidLayerRange(UserError):
    """A layer range that is not ``a:b`` with ``0 <= a < b``."""

    code = "PALS-USER-LAYERS"
    message = "not a layer range: `{text}`"
    hint_template = "write a half-open range such as `--layers 0:10`"


class LayersOutsideModel(UserError):
    """A layer range that reaches past the model's last layer."""

    code = "PALS-USER-LAYERS-OUTSIDE"
    message = "layers `{layers}` reach past the model, which has {num_layers} layers"
    hint_template = "choose a range within `0:{num_layers}`"


class InvalidConfig(UserError):
    """A configuration file, preset or environment variable that cannot be used."""

    code = "PALS-USER-CONFIG"
    message = "{source}: {problem}"
    hint_template = "{advice}"


class TooFewDevices(UserError):
    """A shard over more devices than this machine has."""

    code = "PALS-USER-DEVICES"
    message = "{devices} devices are asked for, and there are {found} of kind `{kind}` here"
    hint_template = "choose `--devices {found}` or fewer"


class CannotDivide(UserError):
    """A model, or a way to hold it, that cannot be divided among so many devices."""

    code = "PALS-USER-DEVICES-DIVIDE"
    message = "{count} {what} cannot be divided among {devices} devices"
    hint_template = "{advice}"


class ProfileMissing(UserError):
    """The profile folder or a file in it does not exist."""

    code = "PALS-USER-PROFILE-MISSING"
    message = "no profile at `{path}`"
    hint_template = "run `pals init`, then `pals swarm create` or `pals login`"


class ProfileExposed(UserError):
    """A secret of the profile that other users of the machine can read."""

    code = "PALS-USER-PROFILE-EXPOSED"
    message = "`{path}` can be read by other users: mode {mode:o}"
    hint_template = (
        "run `chmod {wanted:o} {path}`, and rotate the secret if others use this machine"
    )


class ProfileInUse(UserError):
    """Another process already runs with this profile's identity."""

    code = "PALS-USER-PROFILE-IN-USE"
    message = "the identity in `{path}` is in use by process {pid}"
    hint_template = (
        "stop it, or ask the endpoint that runs with any client; `pals serve --layers a:b` and "
        "`pals run --layers a:b` are a shard too in one process, and `--config-dir` takes a "
        "second profile"
    )


class NoSwarm(UserError):
    """The profile belongs to no swarm."""

    code = "PALS-USER-NO-SWARM"
    message = "the profile at `{path}` belongs to no swarm"
    hint_template = "run `pals swarm create`, or redeem an invite with `pals login`"


class NoSuchSwarm(UserError):
    """A name or id that none of the profile's swarms has."""

    code = "PALS-USER-NO-SUCH-SWARM"
    message = "the profile belongs to no swarm `{wanted}`, but to: {known}"
    hint_template = "name one of these with `--swarm`"
    http_status = 404


class AmbiguousSwarm(UserError):
    """Several of the profile's swarms, of which a command takes one."""

    code = "PALS-USER-SWARMS"
    message = "the profile at `{path}` belongs to several swarms: {known}"
    hint_template = "choose one with `--swarm`, by its name or the first characters of its id"


class SwarmSecretInvalid(UserError):
    """``PALS_SWARM_SECRET`` is missing or malformed; there is no plaintext mode."""

    code = "PALS-USER-SWARM-SECRET"
    message = "the swarm secret is {problem}"
    hint_template = (
        "start through the `pals` command, which reads it from the profile, "
        "or run `pals login` again"
    )


class SecretOnCommandLine(UserError):
    """A secret was given as a command-line argument, where every user can read it."""

    code = "PALS-USER-SECRET-ARGV"
    message = "secrets are not taken from the command line: {name}"
    hint_template = "pass it in the environment as `{variable}`, or on standard input"


class PublicBindWithoutKey(UserError):
    """A bind that other machines can reach, without an API key."""

    code = "PALS-USER-PUBLIC-BIND"
    message = "refusing to listen on `{host}` without an API key"
    hint_template = "set `PALS_API_KEY`, or bind to `127.0.0.1`"


class PortInUse(UserError):
    """The address is taken by another process."""

    code = "PALS-USER-PORT"
    message = "cannot listen on {host}:{port}: {problem}"
    hint_template = "choose another port with `--port`, or stop what listens there"


class MissingExtra(UserError):
    """An optional package that a command needs is not installed."""

    code = "PALS-USER-EXTRA"
    message = "`{package}` is not installed"
    hint_template = "run `pip install 'pals[{extra}]'`"


class ProgramsDamaged(UserError):
    """A file of compiled programs that is none, or is not whole."""

    code = "PALS-PROGRAMS-DAMAGED"
    message = "{file} holds no compiled programs that could be used: {problem}"
    hint_template = "copy it again, or make it anew with `pals warmup --export`"


class ProgramsDoNotFit(UserError):
    """Compiled programs of another machine, version or shard than this one."""

    code = "PALS-PROGRAMS-FIT"
    message = "the programs in {file} do not fit here: {differences}"
    hint_template = (
        "export them on a machine of the same kind and with the same options, "
        "or compile them here: `pals warmup` without `--import`"
    )


class ProgramsNotWritten(UserError):
    """Compiled programs that this machine could not store, as on a full disk."""

    code = "PALS-PROGRAMS-NOT-WRITTEN"
    message = "the programs cannot be written to {path}: {problem}"
    hint_template = "free some space there, or name another place"


class ChildFailed(PalsError):
    """A process that `pals demo` started did not come up."""

    code = "PALS-DEMO-CHILD"
    message = "{name} did not start: {problem}\n{log}"
    hint_template = "run `pals doctor` to check this machine"
