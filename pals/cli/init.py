"""`pals init`."""

from __future__ import annotations

from pals import config
from pals.cli import console
from pals.cli.options import ConfigDir


def init(*, config_dir: ConfigDir = None) -> None:
    """Make this machine's profile and identity; an existing one is kept."""
    from pals.swarm.identity import load_or_create_identity

    profile = config.Profile(config.config_dir(config_dir))
    profile.create_folder()
    identity = load_or_create_identity(profile)
    console.out(f"profile  {profile.path}")
    console.out(f"peer id  {identity.peer_id}")
    if not profile.swarm_ids():
        console.note("next: `pals swarm create`, or `pals login` with an invite")
