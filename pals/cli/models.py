"""`pals models`: the models on this machine."""

from __future__ import annotations

from pathlib import Path

from pals.cli import console
from pals.cli.options import Json
from pals.errors import InvalidConfig


def list_models(*, json: Json = False) -> None:
    """List the models that were imported on this machine."""
    # Reading models pulls in numpy, which `pals --help` does without.
    from pals.models.hub import imported_models

    models = [_describe(snapshot.model_id, snapshot.path) for snapshot in imported_models()]
    if json:
        console.json({"schema": 1, "models": models})
    else:
        rows = [(m["model"], _gigabytes(int(m["size_bytes"])), m["path"]) for m in models]
        console.table(("model", "size", "path"), rows)


def import_model(file: Path, /, *, model: str | None = None, json: Json = False) -> None:
    """Import a model from a GGUF file into the cache folder.

    Args:
        file: The `.gguf` file.
        model: Name to give it, as `org/name`; taken from the file when left out.
        json: Print one JSON document on standard output.
    """
    if not file.is_file():
        raise InvalidConfig(source=file, problem="not a file", advice="check the path")
    from pals.models.gguf import import_gguf
    from pals.models.hub import resolve_model

    snapshot = resolve_model(str(import_gguf(file, model_id=model).absolute()))
    description = _describe(snapshot.model_id, snapshot.path)
    if json:
        console.json({"schema": 1} | description)
    else:
        console.out(f"{description['model']}  {description['path']}")


def _describe(model: str, folder: Path) -> dict[str, str | int]:
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return {"model": model, "path": str(folder), "size_bytes": size}


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
