"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

ConfigDir = Annotated[
    Path | None,
    Parameter(
        name="--config-dir",
        help="Profile folder; `PALS_CONFIG_DIR` or the user's configuration folder when left out.",
    ),
]
"""The profile a command works on; pass it to `pals.config.config_dir`."""

Json = Annotated[
    bool,
    Parameter(name="--json", negative="", help="Print one JSON document on standard output."),
]
"""Whether to print a document for programs instead of lines for people."""
