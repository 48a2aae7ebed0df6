"""The `pals` application: which command lives where, and how failures end it.

Commands are registered by import path, so that each start loads only its own.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import NoReturn, cast

from cyclopts import App, CycloptsError, UnknownCommandError, UnknownOptionError

from pals import __version__, config
from pals.cli import console
from pals.errors import PalsError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_OUTPUT_CLOSED = 141
EXIT_TERMINATED = 143

GROUPS = {
    "swarm": "Make and look at the private groups of machines.",
    "invite": "Let other machines in, or no longer.",
    "peers": "See and remove members.",
    "keys": "Give programs and people keys to the endpoint of this machine.",
    "models": "See, download and import models on this machine.",
}

COMMANDS = {
    "demo": ("pals.cli.demo:demo", "Run the whole product on this machine with a small model."),
    "create": ("pals.cli.create:create", "Make a swarm for a model, and serve layers of it."),
    "join": ("pals.cli.create:join", "Join a swarm with an invite, and serve layers."),
    "run": ("pals.cli.run:run", "Talk to a model of the swarm in the terminal."),
    "init": ("pals.cli.init:init", "Make this machine's profile and identity."),
    "swarm create": ("pals.cli.swarm:create", "Make a swarm and become its operator."),
    "swarm list": ("pals.cli.swarm:list_swarms", "List the swarms that the profile belongs to."),
    "swarm show": ("pals.cli.swarm:show", "Show a swarm that the profile belongs to."),
    "swarm rotate": ("pals.cli.swarm:rotate", "Give the swarm a new secret."),
    "swarm move": ("pals.cli.swarm:move", "Follow the backend to another address."),
    "swarm leave": ("pals.cli.swarm:leave", "Leave a swarm and delete what is kept of it."),
    "swarm appoint": ("pals.cli.swarm:appoint", "Let a member invite and remove, or end that."),
    "swarm export-key": ("pals.cli.swarm:export_key", "Write the operator's key to a file."),
    "swarm import-key": ("pals.cli.swarm:import_key", "Become an operator with such a file."),
    "invite create": ("pals.cli.invite:create", "Make an invite for another machine."),
    "invite list": ("pals.cli.invite:list_invites", "List the swarm's invites."),
    "invite resend": ("pals.cli.invite:resend", "Print the command of an open invite again."),
    "invite revoke": ("pals.cli.invite:revoke", "End an invite."),
    "login": ("pals.cli.login:login", "Join a swarm with an invite."),
    "peers list": ("pals.cli.peers:list_peers", "List the members of the swarm."),
    "peers kick": ("pals.cli.peers:kick", "Remove a member and give the swarm a new secret."),
    "status": ("pals.cli.status:status", "Show the swarms, their shards and what to do next."),
    "ps": ("pals.cli.ps:ps", "Show what runs on this machine with the profile."),
    "ping": ("pals.cli.ping:ping", "Measure how long a message takes to a member and back."),
    "paths": ("pals.cli.paths:paths", "Show where everything is, and the variables in force."),
    "shard": ("pals.cli.shard:shard", "Serve a slice of a model's layers to the swarm."),
    "warmup": ("pals.cli.warmup:warmup", "Compile what a shard runs, ahead of time."),
    "serve": ("pals.cli.serve:serve", "Serve an OpenAI-compatible endpoint on this machine."),
    "keys create": ("pals.cli.keys:create", "Make a key and print it once."),
    "keys list": ("pals.cli.keys:list_keys", "List the keys, without the keys themselves."),
    "keys revoke": ("pals.cli.keys:revoke", "End a key, also at a running endpoint."),
    "backend": ("pals.cli.backend:backend", "Run the membership backend."),
    "models list": ("pals.cli.models:list_models", "List the models on this machine."),
    "models show": ("pals.cli.models:show", "Show a model: its layers, files and licence."),
    "models pull": ("pals.cli.models:pull", "Download a model, or some of its layers."),
    "models remove": ("pals.cli.models:remove", "Remove a model from this machine."),
    "models verify": ("pals.cli.models:verify", "Check the files of a model for damage."),
    "models import": ("pals.cli.models:import_model", "Import a model from a GGUF file."),
    "models plan": ("pals.cli.plan:plan", "Say what a model takes and which machines hold it."),
    "doctor": ("pals.cli.doctor:doctor", "Check this machine and say what to mend."),
    "completion": ("pals.cli.completion:completion", "Print what a shell completes with."),
}
"""Command -> where its function is, and its line in the help."""


def build_app() -> App:
    """Return the application with every command registered by its import path."""
    app = App(
        name="pals",
        help="Pool machines you trust and run one model across them.",
        version=__version__,
        backend="trio",
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    groups = {name: App(name=name, help=summary) for name, summary in GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for name, (target, summary) in COMMANDS.items():
        noun, _, verb = name.partition(" ")
        parent = groups[noun] if verb else app
        parent.command(target, name=verb or noun, help=summary)
    return app


def run(tokens: Sequence[str]) -> int:
    """Run one command line and return its exit status; failures end up on stderr."""
    try:
        status = build_app()(list(tokens))
    except CycloptsError as error:
        return _report_usage(error)
    except console.OutputClosed:
        return EXIT_OUTPUT_CLOSED
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else EXIT_FAILURE
    # The outermost frame of the program: whatever gets here becomes an exit status.
    except BaseException as error:
        return _report(error)
    return status if isinstance(status, int) else 0


def main() -> NoReturn:
    """Run the command line of this process and exit with its status."""
    config.forbid_telemetry()
    forbid_core_dumps()
    status = run(sys.argv[1:])
    if threading.active_count() > 1:
        # A thread that is still compiling would abort the process when the interpreter is
        # taken down under it; every file is closed or was written whole by now.
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def forbid_core_dumps() -> None:
    """Keep a crash from writing the secrets in memory to disk, here and in every child."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _report_usage(error: CycloptsError) -> int:
    if isinstance(error, UnknownCommandError):
        # Its own text would import every command to find the nearest name.
        typed = " ".join([*(error.command_chain or ()), *(error.unused_tokens or ())[:1]])
        nearest = get_close_matches(typed, [*COMMANDS, *GROUPS], n=1)
        hint = f"did you mean `pals {nearest[0]}`?" if nearest else _see_help()
        console.error(f"unknown command: `pals {typed}`", hint=hint)
    elif isinstance(error, UnknownOptionError):
        _report_unknown_option(error)
    else:
        text, _, guess = str(error).strip().partition(". Did you mean ")
        text = text.removesuffix(".")
        known = guess.strip('?."')
        hint = f"did you mean `{known}`?" if known else _see_help(error.command_chain)
        console.error(text[:1].lower() + text[1:], hint=hint)
    return EXIT_USAGE


def _report_unknown_option(error: UnknownOptionError) -> None:
    # Without its value, which may be a secret.
    typed = (error.token.keyword or error.token.value).partition("=")[0]
    known = [name for argument in error.argument_collection for name in argument.names]
    nearest = get_close_matches(typed, known, n=1)
    hint = f"did you mean `{nearest[0]}`?" if nearest else _see_help(error.command_chain)
    console.error(f"unknown option: {typed}", hint=hint)


def _see_help(command: Sequence[str] | None = None) -> str:
    return f"run `{' '.join(['pals', *(command or ())])} --help` to see what it takes"


def _report(error: BaseException) -> int:
    """Print what ended the command and return the exit status it stands for."""
    causes = list(_leaves(error))
    known = next((cause for cause in causes if isinstance(cause, PalsError)), None)
    if known is not None:
        _print_traceback(error)
        console.error(known)
        return known.exit_code
    if all(isinstance(cause, KeyboardInterrupt) for cause in causes):
        return EXIT_INTERRUPTED
    if any(isinstance(cause, console.OutputClosed) for cause in causes):
        return EXIT_OUTPUT_CLOSED
    return _report_unexpected(error)


def _report_unexpected(error: BaseException) -> int:
    _print_traceback(error)
    console.error(
        f"internal error: {type(error).__name__}",
        hint="run it again with `PALS_DEBUG=1` and report the traceback",
    )
    return EXIT_FAILURE


def _leaves(error: BaseException) -> list[BaseException]:
    """Return the exceptions inside nested groups, which a trio nursery makes."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return [leaf for inner in group.exceptions for leaf in _leaves(inner)]
    return [error]


def _print_traceback(error: BaseException) -> None:
    if config.debug_enabled():
        console.note("".join(traceback.format_exception(error)))
