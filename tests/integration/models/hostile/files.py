"""Weight files and folders that lie: headers, indexes, links, and what is no weight at all."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

from tests import checkpoints
from tests.integration.models.hostile.cases import (
    Case,
    Spoil,
    config_with,
    corrupt,
    file_with,
    link_to,
    unsupported,
    weights_of_model,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
Header = dict[str, dict[str, object]]


def raw_header(content: bytes, *, claimed: int | None = None) -> Spoil:
    """Write a weight file that begins with this header."""
    size = len(content) if claimed is None else claimed
    return file_with(SINGLE, struct.pack("<Q", size) + content + bytes(64))


def header_changed(change: Callable[[Header], object]) -> Spoil:
    """Change the header of the weight file and leave its data."""

    def spoil(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        encoded = json.dumps(header).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[end:])

    return spoil


def entry_changed(**changes: object) -> Spoil:
    return header_changed(lambda header: header[NORM].update(changes))


def offsets_moved(begin: int, end: int) -> Spoil:
    """Move the ends of one tensor, whose shape then follows."""

    def change(header: Header) -> None:
        first, last = header[NORM]["data_offsets"]  # type: ignore[misc]
        moved = [first + begin, last + end]
        header[NORM] |= {"data_offsets": moved, "shape": [max(0, moved[1] - moved[0]) // 4]}

    return header_changed(change)


def sharded(folder: Path) -> dict[str, str]:
    """Turn the folder into one of two weight files and return its index."""
    (folder / SINGLE).unlink()
    checkpoints.write_weights(folder, weights_of_model(), files=2)
    return json.loads((folder / INDEX).read_text())["weight_map"]


def index_changed(change: Callable[[dict[str, object]], object]) -> Spoil:
    """Change the index of a model of two weight files."""

    def spoil(folder: Path) -> None:
        weight_map: dict[str, object] = dict(sharded(folder))
        change(weight_map)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return spoil


def index_names(file_name: object) -> Spoil:
    """Let the index put one tensor into another file."""
    return index_changed(lambda weight_map: weight_map.update({NORM: file_name}))


def resized(change: int) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / SINGLE
        os.truncate(path, path.stat().st_size + change)

    return spoil


def special(name: str, make: Callable[[Path], object]) -> Spoil:
    """Put something that is no regular file in a file's place."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def pickles_only(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch ../PWNED'\ntR.")


def bombs(count: int, item: str) -> str:
    return "[" + ",".join([item] * count) + "]"


HEADER_CASES: dict[str, Case] = {
    "header_of_2_63": corrupt(raw_header(b"{}", claimed=1 << 63), SINGLE, "header claims"),
    "header_past_file": corrupt(raw_header(b"{}", claimed=1000), SINGLE, "header claims"),
    "header_cut": corrupt(file_with(SINGLE, b"\x10\0\0"), SINGLE),
    "header_empty_file": corrupt(file_with(SINGLE, b""), SINGLE),
    "header_no_utf_8": corrupt(raw_header(b'{"\xff": 1}'), SINGLE, "not valid JSON"),
    "header_no_object": corrupt(raw_header(b"[1, 2]"), SINGLE, "JSON object"),
    "header_begins_with_space": corrupt(raw_header(b" {}"), SINGLE),
    "header_name_twice": corrupt(raw_header(b'{"a": 1, "a": 2}'), SINGLE, "twice"),
    "header_deep": corrupt(raw_header(b'{"a":' + b"[" * 10**6), SINGLE, "not valid JSON"),
    "header_of_objects": corrupt(raw_header(bombs(5 * 10**6, "{}").encode()), SINGLE),
    "header_of_many_digits": corrupt(raw_header(b'{"a": ' + b"9" * 10**6 + b"}"), SINGLE),
    "dtype_unknown": unsupported(entry_changed(dtype="F4"), SINGLE, NORM, "F4"),
    "dtype_of_another_size": corrupt(entry_changed(dtype="BF16"), SINGLE, NORM),
    "dtype_no_float": unsupported(entry_changed(dtype="I32"), NORM, "I32"),
    "shape_huge": corrupt(entry_changed(shape=[1 << 40, 1 << 40]), SINGLE, NORM),
    "shape_overflows": corrupt(entry_changed(shape=[1 << 32, 1 << 32, 64]), SINGLE, NORM),
    "shape_negative": corrupt(entry_changed(shape=[-8, -8]), SINGLE, NORM),
    "shape_of_floats": corrupt(entry_changed(shape=[64.0]), SINGLE, NORM),
    "shape_long": corrupt(entry_changed(shape=[1] * 10**5), SINGLE, NORM),
    "shape_wrong": corrupt(entry_changed(shape=[8, 8]), NORM, "has shape"),
    "offsets_past_file": corrupt(offsets_moved(0, 1 << 20), SINGLE),
    "offsets_far": corrupt(offsets_moved(1 << 62, 1 << 62), SINGLE, NORM),
    "offsets_negative": corrupt(offsets_moved(-(1 << 40), -(1 << 40)), SINGLE, NORM),
    "offsets_overlap": corrupt(offsets_moved(-64, 0), SINGLE, "overlaps"),
    "offsets_leave_gap": corrupt(offsets_moved(4, 0), SINGLE, "gap"),
    "offsets_reversed": corrupt(entry_changed(data_offsets=[256, 0]), SINGLE, NORM),
    "file_truncated": corrupt(resized(-1), SINGLE, "end at byte"),
    "file_trailing": corrupt(resized(+1), SINGLE, "end at byte"),
    "file_sparse": corrupt(resized(1 << 40), SINGLE, "end at byte"),
    "tensor_missing": corrupt(
        header_changed(lambda header: header.update(other=header.pop(NORM))), NORM, "is missing"
    ),
    "tensor_extra": corrupt(
        header_changed(
            lambda header: header.update({"model.x.weight": {
                "dtype": "F32", "shape": [0], "data_offsets": [0, 0],
            }})
        ),
        "model.x.weight",
        "unexpected",
    ),
    "tensor_name_long": corrupt(
        header_changed(lambda header: header.update({"x" * 10**6: header.pop(NORM)})),
        "no name of a tensor",
    ),
}  # fmt: skip

INDEX_CASES: dict[str, Case] = {
    **{
        f"idx_{name}": corrupt(index_names(file_name), says)
        for name, file_name, says in [
            ("parent", "../secret.safetensors", "secret"),
            ("parents", "../../../../etc/passwd.safetensors", "passwd"),
            ("absolute", "/etc/passwd.safetensors", "passwd"),
            ("backslash", "..\\secret.safetensors", "secret"),
            ("nul", "model\0.safetensors", "plain file name"),
            ("newline", "model\n.safetensors", "plain file name"),
            ("pickle", "pytorch_model.bin", "safetensors"),
            ("hidden", ".model.safetensors", "plain file name"),
            ("number", 7, "safetensors"),
            ("list", ["model.safetensors"], "safetensors"),
            ("long", "x" * 10**6 + ".safetensors", "plain file name"),
            ("itself", INDEX, "safetensors"),
        ]
    },
    "idx_file_missing": Case(
        spoil=index_names("model-00003-of-00003.safetensors"),
        error="ModelNotFound",
        says=("model-00003-of-00003.safetensors",),
    ),
    "idx_tensor_not_in_file": corrupt(
        index_names("model-00001-of-00002.safetensors"), "the index", NORM
    ),
    "idx_tensor_not_in_index": corrupt(
        index_changed(lambda weight_map: weight_map.pop(NORM)), NORM
    ),
    "idx_tensor_only_in_index": corrupt(
        index_changed(lambda m: m.update({"model.x.weight": "model-00001-of-00002.safetensors"})),
        "model.x.weight",
    ),
    "idx_no_map": corrupt(file_with(INDEX, b'{"weight_map": []}'), INDEX, "JSON object"),
    "idx_deep": corrupt(file_with(INDEX, b'{"weight_map": ' + b"[" * 10**6), INDEX),
    "idx_name_deep": corrupt(
        file_with(INDEX, ('{"weight_map": {"a": ' + "[" * 940 + "]" * 940 + "}}").encode()), INDEX
    ),
    "idx_of_objects": corrupt(
        file_with(INDEX, f'{{"weight_map": {bombs(10**7, "{}")}}}'.encode()), INDEX
    ),
    "idx_large": corrupt(file_with(INDEX, b" " * (100 << 20)), INDEX, "larger than"),
    "idx_many": corrupt(
        file_with(
            INDEX,
            json.dumps({"weight_map": {str(n): SINGLE for n in range(300_000)}}).encode(),
        ),
        INDEX,
        "300000 tensors",
    ),
}

FOLDER_CASES: dict[str, Case] = {
    "symlink_out": corrupt(link_to(SINGLE, "/etc/passwd"), SINGLE, "link out of"),
    "symlink_to_folder": corrupt(link_to(SINGLE, ".."), SINGLE),
    "symlink_loop": Case(spoil=link_to(SINGLE, SINGLE), error="*", says=(SINGLE,)),
    "symlink_config": corrupt(link_to("config.json", "../secret.json"), "config.json"),
    "symlink_config_loop": Case(
        spoil=link_to("config.json", "config.json"), error="*", says=("config.json",)
    ),
    "symlink_tokenizer": corrupt(link_to("tokenizer.json", "../secret.json"), "tokenizer.json"),
    "symlink_tokenizer_loop": Case(
        spoil=link_to("tokenizer.json", "tokenizer.json"), error="*", says=("tokenizer.json",)
    ),
    "symlink_settings": corrupt(
        link_to("special_tokens_map.json", "../secret.json"), "special_tokens_map.json"
    ),
    "symlink_template": corrupt(
        link_to("chat_template.jinja", "../secret.json"), "chat_template.jinja"
    ),
    **{
        f"{kind}_{name.split('.')[0]}": Case(spoil=special(name, make), error="*", says=(name,))
        for kind, make in {"fifo": os.mkfifo, "folder": Path.mkdir}.items()
        for name in (SINGLE, "config.json", "tokenizer.json", "tokenizer_config.json")
    },
    "device_weights": corrupt(link_to(SINGLE, "/dev/zero"), SINGLE),
    "pickle_only": unsupported(pickles_only, "pytorch_model.bin", "safetensors"),
    "remote_code": unsupported(
        config_with(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}), "auto_map"
    ),
    "remote_code_of_others": unsupported(
        config_with(auto_map={"AutoConfig": "org/name--configuration_x.X"}), "auto_map"
    ),
    "custom_pipelines": unsupported(
        config_with(custom_pipelines={"x": {"impl": "evil.Pipe"}}), "custom_pipelines"
    ),
}

CASES = HEADER_CASES | INDEX_CASES | FOLDER_CASES
