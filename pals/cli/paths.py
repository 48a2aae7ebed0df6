"""`pals paths`: where everything is, and which variables are in force."""

from __future__ import annotations

import os
from pathlib import Path

from pals import config
from pals.cli import console
from pals.cli.options import ConfigDir, Json
from pals.config import Profile

SHOWN_VARIABLES = frozenset(
    {config.CONFIG_DIR_VARIABLE, config.CACHE_DIR_VARIABLE, config.DEBUG_VARIABLE}
)
"""Variables that hold no secret; of every other one the value stays hidden."""
HIDDEN = "(set, and not shown)"


def paths(*, config_dir: ConfigDir = None, json: Json = False) -> None:
    """Show where the profile, models, caches and logs are, and the variables in force.

    Args:
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    found = places(config.config_dir(config_dir))
    variables = variables_in_force()
    if json:
        listed = {name: None if path is None else str(path) for name, path in found.items()}
        console.json({"schema": 1, "paths": listed, "variables": variables})
        return
    rows = [(name, path or "standard error alone", _state(path)) for name, path in found.items()]
    console.table(("what", "where", "state"), rows)
    console.out("")
    console.table(("variable", "value"), list(variables.items()))


def places(profile: Path) -> dict[str, Path | None]:
    """Return where everything is kept, by its name; None for what is written nowhere."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = config.cache_dir()
    return {
        "profile": profile,
        "identity": Profile(profile).identity_path,
        "swarms": profile / "swarms",
        "cache": cache,
        "models": cache / "models",
        "programs": config.programs_dir(),
        "hub cache": Path(HF_HUB_CACHE),
        "presets": config.presets_folder(),
        "logs": None,
    }


def variables_in_force() -> dict[str, str]:
    """Return every ``PALS_*`` variable that is set; only harmless ones with their values."""
    return {
        name: value if name in SHOWN_VARIABLES else HIDDEN
        for name, value in sorted(os.environ.items())
        if name.startswith("PALS_")
    }


def _state(path: Path | None) -> str:
    if path is None:
        return ""
    return "there" if path.exists() else "not made yet"
