"""What benchmarks print and write, on made-up samples."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import msgspec
import pytest

from benchmarks.__main__ import BENCHMARKS, parse_arguments
from benchmarks.demo import hop_results
from benchmarks.markdown import update_tables
from benchmarks.one_process import encode_prompt
from benchmarks.results import Result, Subject, compare
from pals.cli.demo import HopLine
from tests.checkpoints import make_llama_checkpoint

ALONE = Subject(benchmark="demo", system="one-process", setting={"threads": 1}, load=0.5)
CHAIN = Subject(benchmark="demo", system="pals", setting={"threads": 1, "shards": 2}, load=1.0)


def rates(subject: Subject, *samples: float) -> Result:
    return subject.summarise("decode_tokens_per_s", "tokens/s", samples)


def test_a_line_holds_the_median_and_the_range():
    line = msgspec.json.decode(msgspec.json.encode(rates(CHAIN, 30.0, 10.0, 11.0)))
    assert line == {
        "benchmark": "demo",
        "system": "pals",
        "metric": "decode_tokens_per_s",
        "unit": "tokens/s",
        "value": 11.0,
        "min": 10.0,
        "max": 30.0,
        "n": 3,
        "setting": {"threads": 1, "shards": 2},
        "load": 1.0,
    }


def test_a_ratio_names_the_other_side_and_spans_every_pair_of_samples():
    chain, alone = rates(CHAIN, 10.0, 20.0, 30.0), rates(ALONE, 40.0, 50.0)
    ratio = compare(chain, alone, metric="decode_ratio", to="one-process")
    assert (ratio.value, ratio.min, ratio.max) == (20 / 45, 10 / 50, 30 / 40)
    assert (ratio.metric, ratio.unit, ratio.n) == ("decode_ratio", "ratio", 2)
    assert ratio.setting == {"threads": 1, "shards": 2, "to": "one-process"}
    assert "to" not in chain.setting


def test_the_parts_of_a_hop_are_taken_over_the_shards():
    hops = [
        HopLine(peer=peer, layers="0:1", steps=9, step_ms=step, queue_ms=1, codec_ms=2, wire_ms=4)
        for peer, step in (("a", 10.0), ("b", 20.0))
    ]
    lines = {line.metric: line for line in hop_results(CHAIN, hops)}
    assert lines["hop_compute_ms"].value == 15.0
    assert (lines["hop_compute_ms"].min, lines["hop_compute_ms"].max) == (10.0, 20.0)
    assert lines["hop_software_ms"].value == 7.0
    assert {line.n for line in lines.values()} == {2}


def test_both_sides_of_the_comparison_are_asked_the_same(tmp_path: Path):
    folder = make_llama_checkpoint(tmp_path)
    start, end = 257, 258
    expected = [start, *b"user\nHi", end, *b"\n", start, *b"assistant\n"]
    assert encode_prompt(folder, "Hi") == expected


def test_tables_are_replaced_and_prose_stays(tmp_path: Path):
    file = tmp_path / "performance.md"
    other = "<!-- results: other -->\nkept\n<!-- end of results -->\n"
    file.write_text(f"Before\n<!-- results: demo -->\nold\n<!-- end of results -->\n{other}After\n")
    chain = rates(CHAIN, 10.0)
    results = [chain, compare(chain, rates(ALONE, 40.0), metric="decode_ratio", to="one-process")]
    update_tables(file, [rates(ALONE, 40.0), *results])
    assert (
        file.read_text()
        == f"""Before
<!-- results: demo -->

|  | one-process | pals, shards 2 |
| --- | --- | --- |
| decode_tokens_per_s | 40 (40 to 40) | 10 (10 to 10) |
| decode_ratio to one-process |  | 0.25 (0.25 to 0.25) |
| load | 0.50 | 1.00 |

In all columns: threads 1.

<!-- end of results -->
{other}After
"""
    )


def test_every_benchmark_can_be_run():
    assert all(callable(import_module(module).run) for module in BENCHMARKS.values())


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(["--quick", "dmeo"])
    assert exit_.value.code == 2
    assert "no benchmark `dmeo`: choose any of demo" in capsys.readouterr().err
