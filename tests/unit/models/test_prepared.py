import logging
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pals.models import array_store, prepared
from pals.models.prepared import ARRAYS, ARRAYS_HASH, FREE_MARGIN_BYTES, PreparedLayers

MANIFEST = bytes(32)
PART = "layer-00003"
SOURCE_HASH = bytes(range(32))
DEADLINE_S = 60.0


def draw(seed: int = 0) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    return {
        "mlp.up_proj.weight.values": jnp.asarray(random.integers(-127, 128, (24, 40)), jnp.int8),
        "mlp.up_proj.weight.scales": jnp.asarray(random.random(24), jnp.float32),
        "self_attn.q_proj.weight.packed": jnp.asarray(random.integers(0, 256, (3, 8, 32)), "uint8"),
        "norm.weight": jnp.asarray(random.random(40), ml_dtypes.bfloat16),
    }


def shapes_of(arrays):
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}


def open_layers(kind: str = "int8", manifest: bytes = MANIFEST) -> PreparedLayers:
    return PreparedLayers.open(manifest, kind)


def assert_kept(layers: PreparedLayers, arrays) -> None:
    loaded = layers.load(PART, shapes_of(arrays))
    assert loaded is not None
    for found, expected in zip(loaded, arrays.values(), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def files_of(layers: PreparedLayers) -> list[Path]:
    return sorted(path for path in (layers.folder / PART).rglob("*") if path.is_file())


@pytest.fixture(params=[array_store.BLOCK_BYTES, 100])
def block_bytes(request, monkeypatch):
    """Arrays in one block each, and in many."""
    monkeypatch.setattr(array_store, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block_bytes")
def test_a_part_is_given_back_as_it_was_kept():
    layers, arrays = open_layers(), draw()
    layers.save(PART, arrays, source_hash=SOURCE_HASH)

    assert_kept(open_layers(), arrays)
    assert open_layers().read_source_hash(PART) == SOURCE_HASH


def test_what_was_not_kept_is_none():
    layers = open_layers()
    assert layers.load(PART, shapes_of(draw())) is None
    assert layers.read_source_hash(PART) is None

    layers.save(PART, draw())
    assert layers.read_source_hash(PART) is None
    assert layers.load("layer-00004", shapes_of(draw())) is None


def test_opening_and_asking_write_nothing():
    layers = open_layers()
    layers.load(PART, shapes_of(draw()))

    assert not layers.folder.exists()


def test_arrays_come_in_the_order_that_is_asked_for():
    layers, arrays = open_layers(), draw()
    layers.save(PART, arrays)

    assert_kept(layers, dict(reversed(arrays.items())))


def test_models_and_kinds_are_apart():
    open_layers("int4-32").save(PART, draw())

    for other in (open_layers("int4-64"), open_layers("int8"), open_layers("int4-32", b"\1" * 32)):
        assert other.load(PART, shapes_of(draw())) is None


def test_a_part_that_is_kept_stays():
    layers = open_layers()
    layers.save(PART, draw())
    layers.save(PART, draw(seed=1))

    assert_kept(layers, draw())


def test_a_removed_part_is_gone():
    layers = open_layers()
    layers.save(PART, draw())
    layers.remove(PART)

    assert layers.load(PART, shapes_of(draw())) is None


# --- damage --------------------------------------------------------------------------


def largest(layers: PreparedLayers) -> Path:
    return max(files_of(layers), key=lambda path: path.stat().st_size)


def truncate(layers: PreparedLayers) -> None:
    os.truncate(largest(layers), largest(layers).stat().st_size // 2)


def delete(layers: PreparedLayers) -> None:
    largest(layers).unlink()


def flip(layers: PreparedLayers) -> None:
    data = bytearray(largest(layers).read_bytes())
    data[len(data) // 2] ^= 0x10
    largest(layers).write_bytes(data)


def lose_the_hash(layers: PreparedLayers) -> None:
    (layers.folder / PART / ARRAYS_HASH).unlink()


def lose_the_arrays(layers: PreparedLayers) -> None:
    shutil.rmtree(layers.folder / PART / ARRAYS)


def add_a_file(layers: PreparedLayers) -> None:
    (layers.folder / PART / ARRAYS / "more").write_bytes(b"more")


@pytest.mark.parametrize(
    "damage", [truncate, delete, flip, lose_the_hash, lose_the_arrays, add_a_file]
)
def test_a_damaged_part_is_removed_and_can_be_made_again(damage, caplog):
    layers = open_layers()
    layers.save(PART, draw())
    damage(layers)

    assert layers.load(PART, shapes_of(draw())) is None
    assert f"{PART} is damaged and is prepared again" in caplog.text
    assert not (layers.folder / PART).exists()

    layers.save(PART, draw(seed=1))
    assert_kept(layers, draw(seed=1))


def test_a_truncated_file_whose_hash_is_right_is_damage_too():
    layers = open_layers()
    layers.save(PART, draw())
    truncate(layers)
    part = layers.folder / PART
    (part / ARRAYS_HASH).write_text(prepared.hash_files(part / ARRAYS))

    assert layers.load(PART, shapes_of(draw())) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"norm.weight": jax.ShapeDtypeStruct((41,), ml_dtypes.bfloat16)},
        {"norm.weight": jax.ShapeDtypeStruct((39,), ml_dtypes.bfloat16)},
        {"norm.weight": jax.ShapeDtypeStruct((40,), jnp.float32)},
        {"mlp.up_proj.weight.values": jax.ShapeDtypeStruct((40, 24), jnp.int8)},
        {"other.weight": jax.ShapeDtypeStruct((40,), jnp.float32)},
    ],
    ids=str,
)
def test_arrays_of_other_shapes_or_dtypes_are_damage(changed):
    layers = open_layers()
    layers.save(PART, draw())

    assert layers.load(PART, shapes_of(draw()) | changed) is None
    assert not (layers.folder / PART).exists()


def test_a_hash_of_the_source_that_is_none_is_not_believed():
    layers = open_layers()
    layers.save(PART, draw(), source_hash=SOURCE_HASH)
    (layers.folder / PART / prepared.SOURCE_HASH).write_text("no hash")

    assert layers.read_source_hash(PART) is None


# --- what goes wrong while a part is kept -----------------------------------------------


def leftovers(layers: PreparedLayers) -> set[str]:
    return {path.name for path in layers.folder.iterdir()} - {"lock"}


@pytest.mark.parametrize("error", [OSError("no space"), ValueError("tensorstore"), MemoryError()])
def test_an_error_leaves_nothing_half_made_and_fails_no_load(monkeypatch, caplog, error):
    def fail_late(path, arrays):
        write(path, arrays)
        raise error

    write = array_store.save_arrays
    monkeypatch.setattr(prepared, "save_arrays", fail_late)
    layers = open_layers()
    layers.save(PART, draw())

    assert leftovers(layers) == set()
    assert "cannot be kept" in caplog.text


def test_an_interrupt_leaves_nothing_half_made(monkeypatch):
    def interrupt(path, arrays):
        write(path, arrays)
        raise KeyboardInterrupt

    write = array_store.save_arrays
    monkeypatch.setattr(prepared, "save_arrays", interrupt)
    layers = open_layers()
    with pytest.raises(KeyboardInterrupt):
        layers.save(PART, draw())

    assert leftovers(layers) == set()


def test_a_full_disk_keeps_nothing_and_warns(monkeypatch, caplog):
    arrays = draw()
    size = sum(a.nbytes for a in arrays.values())
    free = [size + FREE_MARGIN_BYTES - 1, size + FREE_MARGIN_BYTES]
    usage = shutil.disk_usage("/")

    def disk_usage(folder):
        del folder
        return usage._replace(free=free.pop(0))

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    layers = open_layers()
    layers.save(PART, arrays)
    assert leftovers(layers) == set()
    assert "prepared layers are not kept" in caplog.text

    layers.save(PART, arrays)
    assert_kept(layers, arrays)


def test_a_folder_that_cannot_be_made_fails_no_load(tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file stands in the way")
    monkeypatch.setenv("PALS_CACHE_DIR", str(tmp_path / "cache"))
    open_layers().save(PART, draw())

    assert open_layers().load(PART, shapes_of(draw())) is None
    assert "cannot be kept" in caplog.text


def keep_and_wait(saved, released) -> None:
    """In a process of its own: write the arrays of a part, but do not finish it."""

    def save_arrays(path, arrays):
        write(path, arrays)
        saved.set()
        released.wait(DEADLINE_S)

    write, prepared.save_arrays = prepared.save_arrays, save_arrays
    open_layers().save(PART, draw())


@pytest.fixture
def spawn():
    """Start processes that have a jax of their own and end with the test."""
    context = multiprocessing.get_context("spawn")
    started = []

    def start(target, *arguments):
        started.append(context.Process(target=target, args=arguments, daemon=True))
        started[-1].start()
        return started[-1]

    start.context = context
    yield start
    for process in started:
        process.kill()
        process.join(DEADLINE_S)


def test_a_killed_process_leaves_nothing_that_counts(spawn):
    saved, released = spawn.context.Event(), spawn.context.Event()
    process = spawn(keep_and_wait, saved, released)
    assert saved.wait(DEADLINE_S)
    os.kill(process.pid, signal.SIGKILL)
    process.join(DEADLINE_S)

    layers = open_layers()
    assert leftovers(layers) == {f".{PART}.new"}
    assert layers.load(PART, shapes_of(draw())) is None

    layers.save(PART, draw(seed=1))
    assert leftovers(layers) == {PART}
    assert_kept(layers, draw(seed=1))


def keep_after(barrier, seed: int, failed) -> None:
    """In a process of its own: keep a part at the same time as another process."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: failed.set()
    logging.getLogger("pals").addHandler(handler)
    barrier.wait(DEADLINE_S)
    open_layers().save(PART, draw(seed))
    if open_layers().load(PART, shapes_of(draw())) is None:
        failed.set()


def test_two_processes_that_keep_a_part_at_once_keep_one(spawn):
    barrier, failed = spawn.context.Barrier(2), spawn.context.Event()
    processes = [spawn(keep_after, barrier, seed, failed) for seed in (1, 2)]
    for process in processes:
        process.join(DEADLINE_S)

    layers = open_layers()
    assert [process.exitcode for process in processes] == [0, 0]
    assert not failed.is_set()
    assert leftovers(layers) == {PART}
    loaded = layers.load(PART, shapes_of(draw()))
    assert loaded is not None
    first = np.asarray(loaded[0])
    candidates = [np.asarray(next(iter(draw(seed).values()))) for seed in (1, 2)]
    assert any(np.array_equal(first, candidate) for candidate in candidates)
