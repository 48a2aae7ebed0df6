"""Removes a model from this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import scan_cache_dir

from pals.errors import ModelNotFound, ModelNotRemoved
from pals.models.inventory import hub_cache
from pals.models.names import check_model_id, imported_folder


def removable_folders(name: str) -> list[Path]:
    """Return the folders that `remove_model` deletes: the import, and all of the cache's.

    Raises:
        ModelNotFound: Nothing of it is on this machine.
    """
    check_model_id(name)
    cached = hub_cache() / f"models--{name.replace('/', '--')}"
    folders = [folder for folder in (imported_folder(name), cached) if folder.is_dir()]
    if not folders:
        raise ModelNotFound(model=name, problem="nothing of it is on this machine")
    return folders


def remove_model(name: str) -> None:
    """Delete an import, and a hub model with all its revisions and downloaded parts.

    Run again after a failure, it deletes what is left.

    Raises:
        ModelNotFound: Nothing of it is on this machine.
        ModelNotRemoved: A file cannot be deleted.
    """
    for folder in removable_folders(name):
        try:
            if folder.parent == hub_cache():
                _delete_revisions(folder)
            if folder.exists():
                shutil.rmtree(folder)
        except OSError as error:
            problem = error.strerror or str(error)
            raise ModelNotRemoved(folder=folder, problem=problem) from error


def _delete_revisions(folder: Path) -> None:
    """Let the hub's client delete what it knows of, for models may share files."""
    cache = scan_cache_dir(folder.parent)
    commits = [
        revision.commit_hash
        for repo in cache.repos
        if repo.repo_path == folder.resolve()
        for revision in repo.revisions
    ]
    if commits:
        cache.delete_revisions(*commits).execute()
