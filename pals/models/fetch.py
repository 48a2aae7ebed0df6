"""Fetches the weights of a range of layers into the hub's cache, and nothing twice."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from pals.errors import DiskTooSmall, DownloadStalled, InvalidHubAnswer
from pals.models.download import (
    HUB_ERRORS,
    Cancelled,
    Patience,
    RangeReader,
    Tries,
    bound_waits,
    will_pass,
)
from pals.models.hub_errors import explain, not_written
from pals.models.hub_texts import fetch_file
from pals.models.listing import ListedFile, Listing
from pals.models.part_writer import PartWriter, kept_bytes, partial_path
from pals.models.parts import part_of
from pals.models.safetensors import SINGLE_NAME, TensorEntry, check_index
from pals.models.store import WeightStore, has_file, parse_source, tensors_by_part

T = TypeVar("T")

OnProgress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from any thread, one call at a time."""

PARALLEL_DOWNLOADS = 4
LOCK_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One download: ``run`` counts its bytes, ``size_bytes`` in all."""

    size_bytes: int
    run: Callable[[Callable[[int], None]], None]


class WeightFetcher:
    """Fetches parts of one revision of a model.

    Args:
        model: ``org/name``.
        folder: The snapshot folder, named by its commit.
        listing: The revision's weight files.
        patience: How long to wait.
        on_progress: Told about the bytes.
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        listing: Listing,
        *,
        patience: Patience,
        on_progress: OnProgress | None,
    ) -> None:
        store = WeightStore.of(folder)
        assert store is not None
        self._model = model
        self._folder = folder
        self._listing = listing
        self._store = store
        self._patience = patience
        self._on_progress = on_progress or _ignore
        self._cancelled = threading.Event()

    def fetch(self, parts: frozenset[str], index: Mapping[str, str] | None) -> None:
        """Fetch what is missing of the tensors of ``parts``.

        Of a file whose every tensor is needed the hub's client fetches the whole; of any
        other only byte ranges are fetched.

        Args:
            parts: Names of `pals.models.parts`.
            index: The file of each tensor; None for a model of a single file.

        Raises:
            DiskTooSmall: It does not fit; nothing was fetched then.
            CorruptModel: The head of a file is malformed.
            HubUnavailable: And the other errors of `RangeReader.read`.
            DownloadStalled: Another process holds a part and does not go on with it.
        """
        bound_waits(self._patience)
        jobs = self._plan(parts, index)
        self._check_disk(sum(job.size_bytes for job in jobs))
        progress = _Progress(sum(job.size_bytes for job in jobs), self._on_progress)
        if jobs:
            progress.count(0)
        self._run([lambda job=job: job.run(progress.count) for job in jobs])

    # --- what to fetch ---------------------------------------------------------------

    def _plan(self, parts: frozenset[str], index: Mapping[str, str] | None) -> list[_Job]:
        found = _parts_of_files(index)
        files = [
            self._listing.files[name]
            for name in sorted(found)
            if not has_file(self._folder, name) and (parts & found[name] or index is None)
        ]
        plans = self._run([lambda file=file: self._plan_file(file, parts, index) for file in files])
        return [job for jobs in plans for job in jobs]

    def _plan_file(
        self, file: ListedFile, parts: frozenset[str], index: Mapping[str, str] | None
    ) -> list[_Job]:
        """Return the downloads of one file: the whole, or those of its parts.

        Whoever keeps the file's head decides, for every process, that it comes by parts.
        """
        reader = self._reader(file)
        with self._held_file(file):
            if has_file(self._folder, file.name):
                return []
            source = self._store.read_source(file)
            if source is None:
                names = {name for name in index or () if index and index[name] == file.name}
                if names and set(map(part_of, names)) <= parts:
                    return [self._whole_job(reader, parts)]
                source = self._fetch_source(reader, parts)
        if source is None:
            return [self._whole_job(reader, parts)]
        self._check_source(file, source, index)
        return self._part_jobs(reader, source, parts)

    def _fetch_source(
        self, reader: RangeReader, parts: frozenset[str]
    ) -> dict[str, TensorEntry] | None:
        """Fetch and keep the head of a file; None where it shows that all is needed."""
        head = reader.read_head()
        path = self._folder / reader.file.name
        source = parse_source(head, path, reader.file.size_bytes)
        if set(map(part_of, source)) <= parts:
            return None
        self._store.keep_source(reader.file, head)
        return source

    def _check_source(
        self, file: ListedFile, source: Mapping[str, TensorEntry], index: Mapping[str, str] | None
    ) -> None:
        if index is not None:
            check_index(index, source, file.name, self._folder / file.name)

    def _part_jobs(
        self, reader: RangeReader, source: Mapping[str, TensorEntry], parts: frozenset[str]
    ) -> list[_Job]:
        return [
            self._part_job(reader, part, tensors)
            for part, tensors in sorted(tensors_by_part(source).items())
            if part in parts and self._store.read_part(reader.file, part, tensors) is None
        ]

    def _check_disk(self, needed: int) -> None:
        folder = self._store.folder
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise self._disk_too_small(needed, free)

    def _disk_too_small(self, needed: int, free: int) -> DiskTooSmall:
        return DiskTooSmall(
            model=self._model,
            folder=self._store.folder.parent,
            needed=needed / 1e9,
            free=free / 1e9,
        )

    # --- one download ----------------------------------------------------------------

    def _reader(self, file: ListedFile) -> RangeReader:
        return RangeReader(
            self._model,
            self._folder.name,
            file,
            patience=self._patience,
            cancelled=self._cancelled,
        )

    def _part_job(self, reader: RangeReader, part: str, tensors: list[TensorEntry]) -> _Job:
        path = self._store.part_path(reader.file, part)
        size_bytes = sum(entry.size_bytes for entry in tensors) - kept_bytes(path, tensors)

        def run(count: Callable[[int], None]) -> None:
            with self._held(path.with_suffix(".lock"), lambda: _size(partial_path(path))):
                # another process may have been faster, or have left more of it
                if self._store.read_part(reader.file, part, tensors) is not None:
                    count(size_bytes)
                    return
                with PartWriter(path, tensors) as writer:
                    count(size_bytes - writer.missing_bytes)
                    for start, stop in writer.missing_ranges():
                        reader.read(start, stop, lambda block: _take(writer, block, count))
                    writer.finish()

        return _Job(size_bytes=size_bytes, run=run)

    def _whole_job(self, reader: RangeReader, parts: frozenset[str]) -> _Job:
        file = reader.file

        def run(count: Callable[[int], None]) -> None:
            counted = _Counted(count, file.size_bytes, self._cancelled)
            with self._held_file(file):
                # another process may have begun with a part of it meanwhile
                source = self._store.read_source(file)
                if source is None:
                    Tries(self._model, self._patience, self._cancelled).call(
                        lambda: self._download(file.name, counted)
                    )
            for job in self._part_jobs(reader, source or {}, parts):
                job.run(counted.add)
            counted.finish()

        return _Job(size_bytes=file.size_bytes, run=run)

    def _download(self, name: str, counted: _Counted) -> None:
        """Fetch a whole file with the hub's own client."""
        try:
            fetch_file(self._model, name, self._folder.name, on_bytes=counted.add)
        except OverflowError as error:
            raise InvalidHubAnswer(model=self._model, file=name, problem=str(error)) from error
        except HUB_ERRORS as error:
            if will_pass(error):
                raise
            raise explain(error, self._model, self._folder.name) from error

    def _held_file(self, file: ListedFile) -> AbstractContextManager[None]:
        """Hold the lock of a weight file: of its head, and of fetching it whole."""
        blobs = self._folder.parents[1] / "blobs"
        return self._held(
            self._store.file_folder(file) / "file.lock",
            lambda: sum(map(_size, blobs.glob(f"{file.sha256}*"))),
        )

    @contextmanager
    def _held(self, lock_path: Path, progress: Callable[[], int]) -> Generator[None]:
        """Hold a lock that other processes respect; wait while its holder goes on.

        Raises:
            DownloadStalled: Another holds it, and ``progress`` does not grow.
            Cancelled: The download is given up.
        """
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path)
        seen, since = progress(), time.monotonic()
        while not _acquired(lock):
            now, size = time.monotonic(), progress()
            if size != seen:
                seen, since = size, now
            elif now - since > self._patience.stall_s:
                raise DownloadStalled(file=lock_path.with_suffix(""), waited_s=now - since)
            if self._cancelled.is_set():
                raise Cancelled
        try:
            yield
        finally:
            lock.release()

    # --- several at once -------------------------------------------------------------

    def _run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Run calls in a few threads; the first failure ends them all and is raised."""
        pool = ThreadPoolExecutor(PARALLEL_DOWNLOADS, thread_name_prefix="download")
        futures = [pool.submit(call) for call in calls]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            failure = _first_failure(futures)
            if failure is not None:
                raise failure
            return [future.result() for future in futures]
        except OSError as error:
            raise not_written(error) from error
        finally:
            if any(not future.done() for future in futures):
                self._cancelled.set()
            pool.shutdown(cancel_futures=True)


def _acquired(lock: FileLock) -> bool:
    """Wait a moment for a lock and return whether it is held now."""
    try:
        lock.acquire(timeout=LOCK_POLL_S)
    except Timeout:
        return False
    return True


def _parts_of_files(index: Mapping[str, str] | None) -> dict[str, set[str | None]]:
    """Return the parts in each file; none for a single file, whose head says it."""
    if index is None:
        return {SINGLE_NAME: set()}
    parts: dict[str, set[str | None]] = {}
    for tensor, file in index.items():
        parts.setdefault(file, set()).add(part_of(tensor))
    return parts


def _first_failure(futures: Sequence[Future[T]]) -> BaseException | None:
    failures = [f.exception() for f in futures if f.done() and not f.cancelled()]
    real = [failure for failure in failures if failure is not None]
    return next((f for f in real if not isinstance(f, Cancelled)), next(iter(real), None))


def _take(writer: PartWriter, block: bytes, count: Callable[[int], None]) -> None:
    writer.write(block)
    count(len(block))


def _ignore(done: int, total: int) -> None:
    del done, total


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class _Progress:
    """Adds up the bytes of all jobs."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self._total = total
        self._done = 0
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def count(self, size_bytes: int) -> None:
        with self._lock:
            self._done += size_bytes
            self._on_progress(self._done, self._total)


class _Counted:
    """Counts the bytes of a whole file as the hub's client fetches it, and bounds them."""

    def __init__(
        self, count: Callable[[int], None], size_bytes: int, cancelled: threading.Event
    ) -> None:
        self._count = count
        self._size_bytes = size_bytes
        self._cancelled = cancelled
        self._done = 0

    def add(self, size_bytes: int) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        self._done += size_bytes
        if self._done > self._size_bytes:
            raise OverflowError("it is longer than the hub listed")
        self._count(size_bytes)

    def finish(self) -> None:
        """Count what came from an earlier attempt, or from elsewhere in the cache."""
        self._count(self._size_bytes - self._done)
