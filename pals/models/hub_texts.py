"""The small files of a model on the hub, and the list of its weight files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import (
    HfApi,
    hf_hub_download,  # pyright: ignore[reportUnknownVariableType] a bare dict in its type
    try_to_load_from_cache,
)
from huggingface_hub.hf_api import BlobLfsInfo, ModelInfo
from huggingface_hub.utils import tqdm

from pals.errors import InvalidHubAnswer, ModelNotFound
from pals.models.download import (
    HUB_ERRORS,
    MALFORMED_ANSWERS,
    Patience,
    Tries,
    check_answers,
)
from pals.models.hashes import SHA256
from pals.models.hub_errors import explain, reason
from pals.models.listing import MAX_LICENCE_CHARACTERS, ListedFile, Listing
from pals.models.safetensors import INDEX_NAME
from pals.models.snapshot import CONFIG_NAME, refuse_pickles, weight_names
from pals.models.store import WeightStore
from pals.types import MAX_TOKENIZER_BYTES

HUB_DEADLINE_S = 10.0
DEFAULT_REVISION = "main"
TEXT_ATTEMPTS = 3
"""Nothing is lost yet when a hub does not answer at the start."""
TEXT_FILES = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    INDEX_NAME,
)


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """Return the folder of a revision in the hub's cache, None where it is not there."""
    path = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def fetch_texts(name: str, revision: str | None, patience: Patience, *, has_fallback: bool) -> Path:
    """Fetch config, tokenizer and index of a revision and keep the list of its weights.

    Returns:
        The snapshot folder, which is named by the commit.

    Raises:
        HubUnavailable: And other errors of `resolve_model`.
    """
    attempts = 1 if has_fallback else min(TEXT_ATTEMPTS, patience.attempts)
    tries = Tries(name, patience, threading.Event(), attempts=attempts)
    try:
        return tries.call(lambda: _fetch_texts_once(name, revision))
    except HUB_ERRORS as error:
        raise explain(error, name, revision) from error


def _fetch_texts_once(name: str, revision: str | None) -> Path:
    check_answers()
    info = _describe(name, revision)
    config_file = fetch_file(name, CONFIG_NAME, revision or DEFAULT_REVISION)
    commit = config_file.parent.name
    if info.sha != commit:  # it moved on between the two
        info = _describe(name, commit)
    listed = {file.rfilename for file in info.siblings or ()}
    for file in TEXT_FILES:
        if file in listed:
            fetch_file(name, file, commit)
    _keep_listing(config_file.parent, name, info)
    return config_file.parent


def _describe(name: str, revision: str | None) -> ModelInfo:
    """Return what the hub states of a revision.

    Raises:
        InvalidHubAnswer: It is not what the hub's client expects, as the page of a network
            that wants a login first.
    """
    try:
        info = HfApi().model_info(
            name, revision=revision, files_metadata=True, timeout=HUB_DEADLINE_S
        )
    except HUB_ERRORS:
        raise
    except MALFORMED_ANSWERS as error:
        raise InvalidHubAnswer(model=name, file="model card", problem=reason(error)) from error
    names: list[object] = [file.rfilename for file in info.siblings or ()]
    if not all(isinstance(file, str) for file in names):
        raise InvalidHubAnswer(model=name, file="model card", problem="a file has no name")
    return info


def fetch_file(
    name: str, file: str, revision: str, *, on_bytes: Callable[[int], None] | None = None
) -> Path:
    """Fetch a whole file with the hub's own client, unless it is in the cache.

    Args:
        name: ``org/name``.
        file: Name of the file.
        revision: Branch, tag or commit.
        on_bytes: Told how many bytes came, and may raise; left out, no more are taken than
            a text file may have.

    Raises:
        InvalidHubAnswer: More bytes come, or the answer makes no sense.
    """
    bar = counting_bar(on_bytes or _at_most(MAX_TOKENIZER_BYTES))
    try:
        path = hf_hub_download(
            name, file, revision=revision, etag_timeout=HUB_DEADLINE_S, tqdm_class=bar
        )
    except HUB_ERRORS:
        raise
    except MALFORMED_ANSWERS as error:
        raise InvalidHubAnswer(model=name, file=file, problem=reason(error)) from error
    return Path(path)


def _at_most(size_bytes: int) -> Callable[[int], None]:
    left = size_bytes

    def count(taken: int) -> None:
        nonlocal left
        left -= taken
        if left < 0:
            raise OverflowError(f"it has more than {size_bytes} bytes")

    return count


def counting_bar(on_bytes: Callable[[int], None]) -> type[tqdm]:
    """Return a silent progress bar that the hub's client makes and feeds."""

    class Bar(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            silent = options | {"disable": True}
            super().__init__(*args, **silent)  # pyright: ignore[reportUnknownMemberType]

        def update(self, n: float | None = 1) -> bool | None:
            on_bytes(int(n or 0))
            return super().update(n)

        # A client that has these two makes one bar for what it receives and writes.
        def update_transfer(self, n: float) -> None:
            """Count nothing: `update` counts what is written."""

        def set_transfer_postfix_str(self, text: str, *, refresh: bool = True) -> None:
            """Show nothing."""

    return Bar


def _keep_listing(folder: Path, name: str, info: ModelInfo) -> None:
    """Keep size and SHA-256 of every weight file, as the hub states them for LFS files.

    Raises:
        ModelNotFound: The model has no safetensors, or the hub states no hash of a file.
        InvalidHubAnswer: The hub states something that is no hash or no size.
    """
    store = WeightStore.of(folder)
    assert store is not None
    if store.read_listing(folder.name) is not None:
        return
    stated = {file.rfilename: file.lfs for file in info.siblings or ()}
    files = {file: _listed_file(name, file, stated) for file in weight_names(folder)}
    store.keep_listing(folder.name, Listing(files=files, licence=_licence(info)))


def _listed_file(name: str, file: str, stated: Mapping[str, BlobLfsInfo | None]) -> ListedFile:
    if file not in stated:
        refuse_pickles(name, stated)
        problem = f"it has no `{file}`; only safetensors are read"
        raise ModelNotFound(model=name, problem=problem)
    lfs = stated[file]
    if lfs is None:
        raise ModelNotFound(model=name, problem=f"the hub states no hash of `{file}`")
    size_bytes: object = lfs.size
    if type(size_bytes) is not int or size_bytes < 0 or not SHA256.fullmatch(str(lfs.sha256)):
        problem = "the hub states no valid size and hash"
        raise InvalidHubAnswer(model=name, file=file, problem=problem)
    return ListedFile(name=file, size_bytes=size_bytes, sha256=lfs.sha256)


def _licence(info: ModelInfo) -> str:
    texts = [str(tag) for tag in info.tags or ()]
    tags = [tag.removeprefix("license:") for tag in texts if tag.startswith("license:")]
    return tags[0][:MAX_LICENCE_CHARACTERS] if tags else ""
