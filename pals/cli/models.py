"""`pals models`: the models on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pals.cli import console
from pals.cli.options import Json
from pals.errors import CorruptModel, InvalidConfig
from pals.types import LayerRange

if TYPE_CHECKING:
    from pals.models.inventory import LocalModel

Revision = Annotated[
    str | None,
    Parameter(name="--revision", help="Branch, tag or commit on the hub; `main` when left out."),
]

EXIT_DAMAGED = CorruptModel.exit_code


def list_models(*, json: Json = False) -> None:
    """List the models on this machine: imported ones and those in the hub's cache."""
    # Reading models pulls in numpy, which `pals --help` does without.
    from pals.models.inventory import local_models

    models = local_models()
    if json:
        console.json({"schema": 2, "models": [_describe(model) for model in models]})
        return
    rows = [
        (m.model_id, m.source, _layers_text(m), _gigabytes(m.size_bytes), m.folder) for m in models
    ]
    console.table(("model", "source", "layers", "size", "path"), rows)


def show(model: str, /, *, revision: Revision = None, json: Json = False) -> None:
    """Show a model: its family, layers, files and licence, and what of it is here.

    Of a model on the hub, config and tokenizer are fetched, and no weights.

    Args:
        model: `org/name`, or the path of a folder.
        revision: Branch, tag or commit on the hub; `main` when left out.
        json: Print one JSON document on standard output.
    """
    from pals.models.hub import resolve_model
    from pals.models.inventory import describe_model

    found = describe_model(resolve_model(model, revision=revision).path)
    if json:
        console.json({"schema": 1} | _describe(found))
        return
    total = sum(file.size_bytes for file in found.files)
    lines = {
        "model": found.model_id,
        "family": found.family,
        "layers": f"{found.num_layers}, here: {_layers_text(found)}",
        "weights": f"{_gigabytes(total)} in {len(found.files)} files",
        "on disk": _gigabytes(found.size_bytes),
        "licence": found.licence or "not stated",
        "source": f"{found.source} {found.revision}".rstrip(),
        "path": str(found.folder),
    }
    for name, value in lines.items():
        console.out(f"{name:8}  {value}")
    console.table(("file", "size"), [(f.name, _gigabytes(f.size_bytes)) for f in found.files])


def pull(
    model: str, /, *, layers: str | None = None, revision: Revision = None, json: Json = False
) -> None:
    """Download a model from the hub, or the layers of it that this machine is to serve.

    Args:
        model: `org/name`.
        layers: Half-open range such as `0:10`; all layers when left out.
        revision: Branch, tag or commit on the hub; `main` when left out.
        json: Print one JSON document on standard output.
    """
    from pals.cli.progress import download_progress
    from pals.models.hub import resolve_model
    from pals.models.inventory import describe_model

    span = None if layers is None else LayerRange.parse(layers)
    with download_progress(model) as on_progress:
        # the config says how many layers there are; it is fetched before any weights
        num_layers = resolve_model(model, revision=revision).config.num_layers
        snapshot = resolve_model(
            model,
            span or LayerRange(0, num_layers),
            revision=revision,
            on_progress=on_progress,
        )
    found = describe_model(snapshot.path)
    if json:
        console.json({"schema": 1} | _describe(found))
    else:
        console.out(f"{found.model_id}  {_layers_text(found)}  {found.folder}")


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
    from pals.models.inventory import describe_model

    snapshot = resolve_model(str(import_gguf(file, model_id=model).absolute()))
    found = describe_model(snapshot.path)
    if json:
        console.json({"schema": 1} | _describe(found))
    else:
        console.out(f"{found.model_id}  {found.folder}")


def remove(model: str, /, *, yes: bool = False, json: Json = False) -> int:
    """Remove a model from this machine: its import and all of it in the hub's cache.

    Args:
        model: `org/name`.
        yes: Delete; without it the command only shows what it would delete.
        json: Print one JSON document on standard output.
    """
    from pals.models.inventory import folder_bytes
    from pals.models.removal import removable_folders, remove_model

    folders = [(str(folder), folder_bytes(folder)) for folder in removable_folders(model)]
    if yes:
        remove_model(model)
    if json:
        listed = [{"path": path, "size_bytes": size_bytes} for path, size_bytes in folders]
        console.json({"schema": 1, "model": model, "removed": yes, "folders": listed})
    else:
        console.table(("path", "size"), [(p, _gigabytes(size)) for p, size in folders])
        console.note("removed" if yes else "nothing was removed: run it again with `--yes`")
    return 0


def verify(model: str, /, *, json: Json = False) -> int:
    """Read a model's files again and name those that are damaged.

    Args:
        model: `org/name`.
        json: Print one JSON document on standard output.
    """
    from pals.models.inventory import find_local
    from pals.models.verify import damaged_files

    found = [(folder, damaged_files(folder)) for folder in find_local(model)]
    damaged = [{"path": str(folder), "file": name} for folder, names in found for name in names]
    if json:
        console.json({"schema": 1, "model": model, "whole": not damaged, "damaged": damaged})
    elif damaged:
        console.table(("damaged", "in"), [(entry["file"], entry["path"]) for entry in damaged])
    else:
        console.out(f"{model}  whole")
    if damaged and not json:
        console.note(
            f"`pals models pull {model}` fetches damaged layers again; of other files, "
            f"run `pals models remove {model} --yes` first"
        )
    return EXIT_DAMAGED if damaged else 0


def _describe(model: LocalModel) -> dict[str, object]:
    return {
        "model": model.model_id,
        "source": model.source,
        "revision": model.revision,
        "family": model.family,
        "num_layers": model.num_layers,
        "layers": [str(layers) for layers in model.layers],
        "licence": model.licence,
        "path": str(model.folder),
        "size_bytes": model.size_bytes,
        "files": [
            {"name": f.name, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in model.files
        ],
    }


def _layers_text(model: LocalModel) -> str:
    return ",".join(map(str, model.layers)) or "none"


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
