"""Damaged files of every architecture: a named error or an import, soon and in bounds."""

import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pals.errors import CorruptModel, ModelError
from pals.models.gguf import import_gguf
from tests.unit.models.gguf_files import ARCHITECTURES, TOKENS, hf_weights, to_gguf, write_gguf

MAX_MEMORY_BYTES = 8 << 20

KINDS = [*ARCHITECTURES, "sentencepiece"]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("valid")
    return {kind: make(folder / f"{kind}.gguf", kind) for kind in KINDS}


def make(path: Path, kind: str) -> bytes:
    architecture = "gemma3" if kind == "sentencepiece" else kind
    metadata: dict[str, object] = {}
    if kind == "sentencepiece":
        metadata = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": [-float(i) for i in range(len(TOKENS))],
            "tokenizer.ggml.merges": None,
        }
    weights = to_gguf(hf_weights(architecture), architecture)
    return write_gguf(path, weights, architecture=architecture, metadata=metadata).read_bytes()


few = settings(
    max_examples=25,
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def import_damaged(folder: Path, content: bytes) -> None:
    """Import into an empty folder; after an error it must be empty again."""
    path, out = folder / "m.gguf", folder / "out"
    path.write_bytes(content)
    shutil.rmtree(out, ignore_errors=True)
    tracemalloc.start()
    try:
        import_gguf(path, destination=out / "m")
    except ModelError:
        assert not out.exists() or os.listdir(out) == []
        raise
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MAX_MEMORY_BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_file_is_imported(valid: dict[str, bytes], tmp_path: Path, kind: str):
    """Guards the tests below: what they damage is good."""
    import_damaged(tmp_path, valid[kind])


@few
@pytest.mark.parametrize("kind", KINDS)
@given(where=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused_and_leaves_nothing(
    valid: dict[str, bytes], tmp_path: Path, kind: str, where: float
):
    with pytest.raises(CorruptModel):
        import_damaged(tmp_path, valid[kind][: int(where * len(valid[kind]))])


@few
@pytest.mark.parametrize("kind", KINDS)
@given(
    changes=st.lists(st.tuples(st.integers(0, 14_000), st.integers(0, 255)), min_size=1, max_size=3)
)
def test_changed_bytes_are_imported_or_refused_and_leave_nothing(
    valid: dict[str, bytes], tmp_path: Path, kind: str, changes: list[tuple[int, int]]
):
    content = bytearray(valid[kind])
    for at, value in changes:
        content[at] = value
    try:
        import_damaged(tmp_path, bytes(content))
    except ModelError:
        return
