"""`pals completion`: what a shell needs to complete the commands and options."""

from __future__ import annotations

from typing import Literal

from pals.cli import console


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that lets a shell complete commands and options.

    Args:
        shell: Which shell it is for.
    """
    from pals.cli.app import build_app

    console.out(build_app().generate_completion(shell=shell), end="")
