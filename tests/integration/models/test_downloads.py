"""Downloads through the real client of the hub, from a hub of the test's own."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from huggingface_hub import constants, scan_cache_dir

from pals.engine.shard import Shard
from pals.errors import (
    CorruptModel,
    DiskTooSmall,
    DownloadStalled,
    HubRefused,
    HubUnavailable,
    InvalidHubAnswer,
    LayersOutsideModel,
    ModelChanged,
    ModelNotFound,
    PalsError,
    UnsupportedModel,
)
from pals.models import fetch
from pals.models.download import Patience
from pals.models.hub import resolve_model
from pals.models.layer_hashes import layer_hashes
from pals.models.parts import is_needed
from pals.models.safetensors import WeightFiles, read_header
from pals.models.snapshot import Snapshot
from pals.types import EngineLimits, LayerRange
from tests import checkpoints
from tests.integration.models.conftest import NAME
from tests.integration.models.hub_server import TOKEN, Fault, HubServer, Repo

PATIENCE = Patience(
    attempts=3, backoff_s=0.01, max_wait_s=1.0, connect_s=2.0, read_s=2.0, stall_s=2.0
)
HASTY = Patience(attempts=2, backoff_s=0.01, max_wait_s=0.2, connect_s=1.0, read_s=0.3, stall_s=0.3)
LAYERS = 4


def resolve(layers: str | None = None, patience: Patience = PATIENCE, **options: str) -> Snapshot:
    span = None if layers is None else LayerRange.parse(layers)
    return resolve_model(NAME, span, patience=patience, **options)  # type: ignore[arg-type]


def source_of(repo: Repo) -> Path:
    return repo.folders["main"]


def weight_files(repo: Repo) -> list[Path]:
    return sorted(source_of(repo).glob("*.safetensors"))


def weight_requests(hub: HubServer) -> list[str]:
    return [r.path for r in hub.requests if r.server == "storage"]


def assert_same_weights(snapshot: Snapshot, repo: Repo, layers: str) -> None:
    """Compare every tensor that the range needs with the one on the hub."""
    here, there = snapshot.weights(), WeightFiles.open(source_of(repo))
    span = LayerRange.parse(layers)
    names = [name for name in there.file_of if is_needed(name, span, LAYERS, tied=True)]
    assert set(here.file_of) == set(there.file_of)
    found, expected = here.entries(names), there.entries(names)
    for name in names:
        np.testing.assert_array_equal(found[name].read(), expected[name].read())


def assert_disjoint(ranges: list[tuple[int, int]]) -> None:
    for (_, stop), (start, _) in itertools.pairwise(sorted(ranges)):
        assert stop <= start


def single_file(repo: Repo, tmp_path: Path, **shape: int) -> Path:
    """Put a model of a single weight file on the hub instead."""
    repo.folders["main"] = checkpoints.make_llama_checkpoint(tmp_path / "single", **shape)
    return repo.folders["main"] / "model.safetensors"


def hub_headers(repo: Repo, file: Path) -> dict[str, str]:
    """Return what the hub's own server says of a weight file."""
    return {
        "X-Repo-Commit": str(repo.commit_of("main")),
        "X-Linked-Size": str(file.stat().st_size),
        "X-Linked-ETag": f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"',
    }


# --- what is fetched -----------------------------------------------------------------


def test_a_driver_fetches_no_weights_and_names_the_same_model(hub: HubServer, repo: Repo):
    driver = resolve()
    assert not weight_requests(hub)
    assert resolve("1:2").manifest == driver.manifest


@pytest.mark.parametrize("layers", ["0:1", "1:3", "2:4", "0:4"])
def test_a_range_of_layers_arrives_as_it_is_on_the_hub(hub: HubServer, repo: Repo, layers: str):
    assert_same_weights(resolve(layers), repo, layers)


@pytest.mark.parametrize("layers", ["0:1", "1:3", "3:4", "0:4"])
def test_of_a_single_file_only_the_bytes_of_the_layers_are_fetched(
    hub: HubServer, repo: Repo, tmp_path: Path, layers: str
):
    file = single_file(repo, tmp_path)
    snapshot = resolve(layers)
    assert_same_weights(snapshot, repo, layers)
    needed = [
        entry.size_bytes
        for name, entry in read_header(file).items()
        if is_needed(name, LayerRange.parse(layers), LAYERS, tied=True)
    ]
    header = min(entry.offset for entry in read_header(file).values())
    fetched = sum(stop - start for start, stop in hub.ranges(file))
    if layers == "0:4":  # whole files are the hub's client's
        assert fetched == header + file.stat().st_size
    else:
        assert fetched == header + sum(needed)


def test_a_file_that_is_needed_whole_is_an_ordinary_download(hub: HubServer, repo: Repo):
    snapshot = resolve("0:4")
    for file in weight_files(repo):
        assert (snapshot.path / file.name).read_bytes() == file.read_bytes()
        assert hub.ranges(file) == [(0, file.stat().st_size)]


@pytest.mark.parametrize("single", [False, True])
def test_ranges_of_two_slices_are_disjoint_but_for_a_tied_embedding(
    hub: HubServer, repo: Repo, tmp_path: Path, single: bool
):
    if single:
        single_file(repo, tmp_path)
    for layers in ("0:1", "1:3", "3:4"):
        assert_same_weights(resolve(layers), repo, layers)
    for file in weight_files(repo):
        assert_disjoint(hub.ranges(file))
    fetched = [span for file in weight_files(repo) for span in hub.ranges(file)]
    sizes = sum(file.stat().st_size for file in weight_files(repo))
    # on one machine even the tied embedding comes once
    assert sum(stop - start for start, stop in fetched) == sizes


@pytest.mark.parametrize("layers", ["0:2", "2:4", "0:4"])
def test_a_restart_downloads_nothing_again(hub: HubServer, repo: Repo, layers: str):
    first = resolve(layers)
    hub.forget()
    assert resolve(layers) == first
    assert not weight_requests(hub)
    assert {request.method for request in hub.requests if "/resolve/" in request.path} == {"HEAD"}


def test_layers_of_a_whole_file_in_the_cache_are_read_from_it(hub: HubServer, repo: Repo):
    resolve("0:4")
    hub.forget()
    for layers in ("0:1", "1:2", "2:4"):
        assert_same_weights(resolve(layers), repo, layers)
    assert not weight_requests(hub)


def test_what_came_by_parts_does_not_come_again_with_the_whole(hub: HubServer, repo: Repo):
    resolve("1:2")
    snapshot = resolve("0:4")
    assert_same_weights(snapshot, repo, "0:4")
    for file in weight_files(repo):
        assert_disjoint(hub.ranges(file))


def test_two_peers_at_once_download_nothing_twice(hub: HubServer, repo: Repo):
    with ThreadPoolExecutor(3) as pool:
        snapshots = list(pool.map(resolve, ["0:2", "1:3", "0:3"]))
    assert len({snapshot.manifest for snapshot in snapshots}) == 1
    partly = weight_files(repo)[1]
    assert_disjoint(hub.ranges(partly))


def test_the_hub_s_own_scan_finds_nothing_wrong(hub: HubServer, repo: Repo):
    resolve("0:1")
    resolve("2:3")
    report = scan_cache_dir(constants.HF_HUB_CACHE)
    assert report.warnings == []
    assert [repo.repo_id for repo in report.repos] == [NAME]


def test_a_vision_tower_and_extra_layers_are_never_fetched(
    hub: HubServer, repo: Repo, tmp_path: Path
):
    file = single_file(repo, tmp_path)
    tensors = {name: entry.read() for name, entry in read_header(file).items()}
    extra = {
        "vision_tower.encoder.layers.0.weight": np.ones((7, 5), np.float32),
        "model.layers.4.mlp.up_proj.weight": np.ones((3, 5), np.float32),
    }
    checkpoints.write_safetensors(file, tensors | extra)
    snapshot = resolve("0:4")
    assert not (snapshot.path / file.name).exists()
    unread = [read_header(file)[name] for name in extra]
    for start, stop in hub.ranges(file):
        assert not any(start < e.offset + e.size_bytes and e.offset < stop for e in unread)
    with pytest.raises(ModelNotFound, match="not downloaded"):
        snapshot.weights().entries(extra)


def test_a_range_past_the_model_is_refused_before_any_weights(hub: HubServer, repo: Repo):
    with pytest.raises(LayersOutsideModel):
        resolve("3:5")
    assert not weight_requests(hub)


def test_progress_counts_every_byte_once(hub: HubServer, repo: Repo):
    seen: list[tuple[int, int]] = []
    resolve_model(
        NAME, LayerRange(0, 2), patience=PATIENCE, on_progress=lambda d, t: seen.append((d, t))
    )
    totals = {total for _, total in seen}
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert totals == {done[-1]}
    assert done[0] == 0


def test_a_shard_loads_the_same_parameters_from_what_it_downloaded(hub: HubServer, repo: Repo):
    limits = EngineLimits(max_sessions=1, max_context_tokens=16, max_chunk_tokens=16)
    local = resolve_model(str(source_of(repo)))
    for layers in (LayerRange(0, 2), LayerRange(2, 4)):
        here = Shard.load(resolve(str(layers)), layers, dtype="f32", limits=limits)
        there = Shard.load(local, layers, dtype="f32", limits=limits)
        assert here.is_head == there.is_head
        for leaf, expected in zip(here._leaves, there._leaves, strict=True):
            np.testing.assert_array_equal(leaf, expected)


# --- revisions -----------------------------------------------------------------------


def test_a_revision_is_fetched_by_its_name_and_by_its_commit(
    hub: HubServer, repo: Repo, tmp_path: Path
):
    repo.folders["v2"] = checkpoints.make_llama_checkpoint(tmp_path / "v2", seed=7, files=3)
    main, v2 = resolve("0:1"), resolve("0:1", revision="v2")
    assert main.manifest != v2.manifest
    commit = repo.commit_of("v2")
    assert commit is not None
    assert resolve("0:1", revision=commit) == v2


def test_a_weight_file_that_a_new_revision_kept_is_not_fetched_again(
    hub: HubServer, repo: Repo, tmp_path: Path
):
    resolve("1:2")
    repo.folders["v2"] = shutil.copytree(source_of(repo), tmp_path / "v2")
    (repo.folders["v2"] / "generation_config.json").write_text('{"temperature": 0.5}')
    hub.forget()
    assert_same_weights(resolve("1:2", revision="v2"), repo, "1:2")
    assert not weight_requests(hub)


def test_an_unknown_revision_is_named(hub: HubServer, repo: Repo):
    with pytest.raises(ModelNotFound, match="no revision `v9`"):
        resolve(revision="v9")


# --- offline -------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, "1:2", "0:4"])
def test_offline_what_was_fetched_serves(
    hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch, layers: str | None
):
    first = resolve(layers)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget()
    assert resolve(layers) == first
    assert not hub.requests


def test_offline_layers_that_were_not_fetched_are_named(
    hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
):
    resolve("1:2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="offline") as caught:
        resolve("0:2")
    assert "not downloaded" in str(caught.value.__cause__)


def test_when_the_hub_is_down_what_was_fetched_serves(hub: HubServer, repo: Repo):
    first = resolve("1:2")
    hub.add(Fault(server="hub", path="/api/models", status=503, times=99))
    assert resolve("1:2") == first
    with pytest.raises(HubUnavailable, match="503"):
        resolve("0:2")


def test_a_hub_that_nobody_runs_is_unavailable(
    hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubUnavailable):
        resolve(patience=HASTY)


# --- who may -------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_and_never_to_the_storage(
    hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
):
    repo.needs_token = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    resolve("0:2")
    resolve("2:4")
    tokens = {
        server: {
            r.has_token
            for r in hub.requests
            if r.server == server and r.path != "/api/agent-harnesses"
        }
        for server in hub.servers
    }
    assert tokens == {"hub": {True}, "storage": {False}}


def refused(**options: str) -> PalsError:
    with pytest.raises((HubRefused, ModelNotFound)) as caught:
        resolve("0:1", **options)
    return caught.value


def test_a_gated_model_says_where_to_accept_its_terms(
    hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
):
    repo.gated = True
    without = refused()
    assert isinstance(without, HubRefused)
    assert f"{hub.url}/{NAME}" in without.hint
    assert "set HF_TOKEN" in without.hint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "the account that HF_TOKEN belongs to" in refused().hint


def test_a_token_that_is_wrong_or_too_weak_is_explained(
    hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "not valid" in str(refused())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.denied.add(TOKEN)
    assert "does not allow" in str(refused())


def test_a_model_that_is_private_or_none_is_not_found(
    hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
):
    repo.needs_token = True
    assert "set HF_TOKEN" in str(refused())
    hub.repos.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "may see" in str(refused())


# --- failures on the way -------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("server", ["hub", "storage"])
def test_a_passing_failure_is_tried_again(hub: HubServer, repo: Repo, status: int, server: str):
    hub.add(Fault(server=server, status=status, times=2))
    hub.add(Fault(server="hub", method="HEAD", path="safetensors", status=status))
    assert_same_weights(resolve("1:2"), repo, "1:2")


def test_retry_after_is_followed(hub: HubServer, repo: Repo):
    hub.add(Fault(status=429, headers={"Retry-After": "1"}))
    assert_same_weights(resolve("1:2"), repo, "1:2")


@pytest.mark.parametrize("wait", ["3600", "Fri, 31 Dec 2100 23:59:59 GMT"])
@pytest.mark.parametrize("layers", ["1:2", "0:4"])
def test_a_retry_after_of_hours_ends_the_download(
    hub: HubServer, repo: Repo, wait: str, layers: str
):
    hub.add(Fault(status=429, headers={"Retry-After": wait}, times=99))
    with pytest.raises(HubUnavailable, match="asks to come back"):
        resolve(layers)


@pytest.mark.parametrize("status", [429, 500])
def test_a_lasting_failure_ends_after_some_attempts(hub: HubServer, repo: Repo, status: int):
    hub.add(Fault(status=status, times=99))
    with pytest.raises(HubUnavailable, match=str(status)):
        resolve("1:2")
    assert len(weight_requests(hub)) <= PATIENCE.attempts * 3


@pytest.mark.parametrize("chunked", [False, True])
def test_a_cut_connection_goes_on_from_where_it_ended(
    hub: HubServer, repo: Repo, tmp_path: Path, chunked: bool
):
    file = single_file(repo, tmp_path)
    hub.add(Fault(skip=2, cut=20_000, times=2, chunked=chunked))
    assert_same_weights(resolve("1:2"), repo, "1:2")
    fetched = hub.ranges(file)[2:]
    starts = [start for start, _ in fetched]
    assert any(later - first == 20_000 for first, later in itertools.pairwise(starts))


def test_an_interrupted_download_goes_on_in_the_next_process(
    hub: HubServer, repo: Repo, tmp_path: Path
):
    file = single_file(repo, tmp_path)
    hub.add(Fault(skip=2, cut=30_000))
    hub.add(Fault(skip=2, status=500, times=99))
    with pytest.raises(HubUnavailable):
        resolve("1:2")
    store = Path(constants.HF_HUB_CACHE, "models--org--tiny/pals/weights")
    assert [path.suffix for path in store.rglob("layer*") if path.suffix != ".lock"] == [".partial"]
    hub.faults.clear()
    hub.forget()
    assert_same_weights(resolve("1:2"), repo, "1:2")
    needed = sum(e.size_bytes for n, e in read_header(file).items() if ".layers.1." in n)
    assert sum(stop - start for start, stop in hub.ranges(file)) == needed - 30_000


def test_a_partial_file_of_something_else_is_not_gone_on_with(
    hub: HubServer, repo: Repo, tmp_path: Path
):
    single_file(repo, tmp_path)
    hub.add(Fault(skip=2, cut=30_000))
    hub.add(Fault(skip=2, status=500, times=99))
    with pytest.raises(HubUnavailable):
        resolve("1:2")
    (partial,) = Path(constants.HF_HUB_CACHE).rglob("*.partial")
    partial.write_bytes(b"\0" * 50_000)
    hub.faults.clear()
    assert_same_weights(resolve("1:2"), repo, "1:2")


@pytest.mark.parametrize("drip_s", [None, 0.02])
def test_an_answer_that_drips_or_hangs_is_given_up(
    hub: HubServer, repo: Repo, tmp_path: Path, drip_s: float | None
):
    single_file(repo, tmp_path)
    hub.add(Fault(skip=2, hang_after=100, drip_s=drip_s, times=99))
    with pytest.raises(HubUnavailable):
        resolve("1:2", HASTY)


# --- answers that lie ----------------------------------------------------------------


def lie(hub: HubServer, fault: Fault) -> PalsError:
    hub.add(fault)
    with pytest.raises(PalsError) as caught:
        resolve("1:2")
    store = Path(constants.HF_HUB_CACHE, "models--org--tiny/pals/weights")
    assert not list(store.rglob("layer-*.safetensors"))
    return caught.value


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ({"ignore_range": True}, "status 200"),
        ({"headers": {"Content-Range": "bytes 0-7/99"}}, "instead of"),
        ({"headers": {"Content-Range": ""}}, "instead of"),
        ({"headers": {"Content-Encoding": "gzip"}}, "compressed"),
        ({"extra": 5}, "length"),
        ({"extra": 5, "chunked": True}, "more bytes"),
    ],
)
def test_an_answer_that_is_not_the_range_is_refused(
    hub: HubServer, repo: Repo, tmp_path: Path, fault: dict[str, object], match: str, skip: int
):
    single_file(repo, tmp_path)
    error = lie(hub, Fault(skip=skip, times=99, **fault))  # type: ignore[arg-type]
    if skip and fault.get("ignore_range"):
        assert isinstance(error, ModelChanged)
    else:
        assert isinstance(error, InvalidHubAnswer)
        assert match in str(error)


def test_an_answer_that_always_ends_early_is_given_up(hub: HubServer, repo: Repo, tmp_path: Path):
    single_file(repo, tmp_path)
    assert isinstance(lie(hub, Fault(cut=0, chunked=True, times=99)), HubUnavailable)


def test_a_file_that_changes_between_two_ranges_is_noticed(
    hub: HubServer, repo: Repo, tmp_path: Path
):
    single_file(repo, tmp_path)
    error = lie(hub, Fault(skip=1, headers={"ETag": '"another"'}, times=99))
    assert isinstance(error, ModelChanged)
    first, second = (r for r in hub.requests if r.server == "storage")
    assert not first.if_range
    assert second.if_range.startswith('"storage-')


@pytest.mark.parametrize("lie_of", ["X-Linked-ETag", "X-Linked-Size"])
def test_a_file_that_is_not_the_listed_one_is_noticed(
    hub: HubServer, repo: Repo, tmp_path: Path, lie_of: str
):
    headers = hub_headers(repo, single_file(repo, tmp_path))
    headers |= {"Location": f"{hub.storage_url}/x", lie_of: "12"}
    fault = Fault("hub", "model.safetensors", "HEAD", times=99, status=302, headers=headers)
    assert isinstance(lie(hub, fault), ModelChanged)


def test_an_address_that_expired_is_asked_for_again(hub: HubServer, repo: Repo, tmp_path: Path):
    single_file(repo, tmp_path)
    hub.add(Fault(skip=2, status=403))
    assert_same_weights(resolve("1:2"), repo, "1:2")
    asked = [r for r in hub.requests if r.method == "HEAD" and "model.safetensors" in r.path]
    assert len(asked) == 2


def rewrite_header(file: Path, change: dict[str, object] | None, *, claim: int | None) -> None:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size]) | (change or {})
    encoded = json.dumps(header).encode()
    length = len(encoded) if claim is None else claim
    file.write_bytes(length.to_bytes(8, "little") + encoded + data[8 + size :])


@pytest.mark.parametrize("claim", [0, 7, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_remote_header_of_a_false_size_is_refused(
    hub: HubServer, repo: Repo, tmp_path: Path, claim: int
):
    file = single_file(repo, tmp_path)
    rewrite_header(file, None, claim=claim)
    with pytest.raises(CorruptModel):
        resolve("1:2")
    assert sum(stop - start for start, stop in hub.ranges(file)) < 1 << 20


@pytest.mark.parametrize("offsets", [[0, 1 << 40], [-4, 0], [4, 8], [1 << 62, (1 << 62) + 4]])
def test_a_remote_header_whose_offsets_lie_is_refused(
    hub: HubServer, repo: Repo, tmp_path: Path, offsets: list[int]
):
    file = single_file(repo, tmp_path)
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": offsets}
    rewrite_header(file, {"model.layers.1.extra": tensor}, claim=None)
    with pytest.raises(CorruptModel):
        resolve("1:2")
    assert len(hub.ranges(file)) == 2


@pytest.mark.parametrize(
    "lfs",
    [
        {"sha256": "../../../../escaped", "size": 1, "pointerSize": 1},
        {"sha256": "a" * 64, "size": -1, "pointerSize": 1},
        {"sha256": "a" * 64, "size": "1", "pointerSize": 1},
    ],
)
def test_a_hash_that_is_none_names_no_folder(
    hub: HubServer, repo: Repo, tmp_path: Path, lfs: dict[str, object]
):
    single_file(repo, tmp_path)
    hub.lfs["model.safetensors"] = lfs
    with pytest.raises(InvalidHubAnswer, match="no valid size and hash"):
        resolve("0:1")
    assert not list(tmp_path.rglob("escaped*"))


def test_a_model_of_pickles_is_refused_and_none_is_fetched(hub: HubServer, repo: Repo):
    for file in [*weight_files(repo), source_of(repo) / "model.safetensors.index.json"]:
        file.unlink()
    (source_of(repo) / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedModel, match="only safetensors"):
        resolve("0:1")
    assert not [request for request in hub.requests if ".bin" in request.path]


def test_an_index_that_names_a_tensor_the_file_lacks_is_refused(hub: HubServer, repo: Repo):
    path = source_of(repo) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.1.extra"] = "model-00002-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptModel, match=r"model\.layers\.1\.extra"):
        resolve("1:2")


# --- this machine --------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_noticed_before_any_weights(
    hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
):
    resolve()
    usage = SimpleNamespace(free=1)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskTooSmall) as caught:
        resolve("0:2")
    assert caught.value.fields["free"] == 1e-9
    assert caught.value.fields["needed"] > 1e-4
    assert all(stop - start < 4096 for f in weight_files(repo) for start, stop in hub.ranges(f))


def test_a_part_that_changed_on_the_disk_is_fetched_again(
    hub: HubServer, repo: Repo, tmp_path: Path
):
    single_file(repo, tmp_path)
    resolve("1:2")
    (part,) = Path(constants.HF_HUB_CACHE).rglob("layer-00001.safetensors")
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    hub.forget()
    assert_same_weights(resolve("1:2"), repo, "1:2")
    assert weight_requests(hub)


def test_a_part_that_was_only_touched_is_not_fetched_again(
    hub: HubServer, repo: Repo, tmp_path: Path
):
    single_file(repo, tmp_path)
    resolve("1:2")
    (part,) = Path(constants.HF_HUB_CACHE).rglob("layer-00001.safetensors")
    part.touch()
    hub.forget()
    assert_same_weights(resolve("1:2"), repo, "1:2")
    assert not weight_requests(hub)


def test_a_download_that_another_process_holds_is_waited_for_and_then_given_up(
    hub: HubServer, repo: Repo, tmp_path: Path
):
    single_file(repo, tmp_path)
    resolve("1:2")
    (part,) = Path(constants.HF_HUB_CACHE).rglob("layer-00001.safetensors")
    part.unlink()
    with FileLock(part.with_suffix(".lock")), pytest.raises(DownloadStalled):
        resolve("1:2", HASTY)
    assert_same_weights(resolve("1:2"), repo, "1:2")


def test_one_failure_ends_the_other_downloads(hub: HubServer, repo: Repo, tmp_path: Path):
    file = single_file(repo, tmp_path)
    slow = hub.add(Fault(skip=2, hang_after=1))
    hub.add(Fault(skip=2, ignore_range=True, times=99))
    with pytest.raises(ModelChanged):
        resolve("0:3", Patience(attempts=2, backoff_s=0.01, read_s=5.0, stall_s=5.0))
    assert slow.reached.is_set()
    assert len(hub.ranges(file)) < 8


# --- hashes of layers ----------------------------------------------------------------


def test_layer_hashes_are_those_of_the_source_however_it_came(
    hub: HubServer, repo: Repo, tmp_path: Path
):
    span = LayerRange(0, LAYERS)
    expected = layer_hashes(WeightFiles.open(source_of(repo)), span)
    parts = resolve("1:2").weights()
    assert layer_hashes(parts, LayerRange(1, 2)) == expected[1:2]
    for layers in ("0:1", "2:4"):
        resolve(layers)
    assert layer_hashes(resolve("0:4").weights(), span) == expected
    single_file(repo, tmp_path)
    assert layer_hashes(WeightFiles.open(source_of(repo)), span) == expected


def test_a_layer_that_was_not_fetched_has_no_hash(hub: HubServer, repo: Repo):
    with pytest.raises(ModelNotFound):
        layer_hashes(resolve("1:2").weights(), LayerRange(0, 1))


def test_threads_end_with_the_download(hub: HubServer, repo: Repo):
    resolve("0:2")
    assert not [t for t in threading.enumerate() if t.name.startswith("download")]


def test_a_redirect_on_the_way_does_not_carry_the_token_on(
    hub: HubServer, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = single_file(repo, tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    headers = hub_headers(repo, file)
    # the hub gives no address of a storage, and sends each request there by itself
    hub.add(Fault("hub", "model.safetensors", "HEAD", times=99, status=200, headers=headers))
    assert_same_weights(resolve("1:2"), repo, "1:2")
    fetched = [r for r in hub.requests if r.method == "GET" and r.range is not None]
    assert {(r.server, r.has_token) for r in fetched} == {("hub", True), ("storage", False)}
