"""What benchmarks print and write, on made-up samples."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import msgspec
import pytest

from benchmarks.__main__ import BENCHMARKS, parse_arguments
from benchmarks.demo import System, summarise, summarise_hops
from benchmarks.markdown import update_tables
from benchmarks.one_process import Timing, encode_prompt
from benchmarks.results import Result, Subject
from benchmarks.transport import Sample
from benchmarks.transport import summarise as summarise_transport
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


def test_a_ratio_pairs_the_samples_of_a_round_and_names_the_other_side():
    ratio = CHAIN.compare("decode_ratio", [10.0, 20.0, 30.0], [20.0, 80.0, 30.0], to="other")
    assert (ratio.value, ratio.min, ratio.max, ratio.n) == (0.5, 0.25, 1.0, 3)
    assert (ratio.metric, ratio.unit) == ("decode_ratio", "ratio")
    assert ratio.setting == {"threads": 1, "shards": 2, "to": "other"}
    assert "to" not in CHAIN.setting


def test_rounds_without_a_pair_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        CHAIN.compare("decode_ratio", [1.0, 2.0], [1.0], to="other")


def hop(peer: str, step_ms: float) -> HopLine:
    parts = {"queue_ms": 1, "handover_ms": 8, "codec_ms": 2, "wire_ms": 4}
    return HopLine(peer=peer, layers="0:1", steps=9, step_ms=step_ms, **parts)


def test_the_parts_of_a_hop_are_taken_over_the_shards():
    lines = {line.metric: line for line in summarise_hops(CHAIN, [hop("a", 10), hop("b", 20)])}
    compute = lines["hop_compute_ms"]
    assert (compute.value, compute.min, compute.max) == (15, 10, 20)
    assert lines["hop_software_ms"].value == 15
    assert {line.n for line in lines.values()} == {2}


def test_swarms_are_compared_with_one_process_and_with_the_smallest_swarm():
    def system(subject: Subject, rate: float, *hops: HopLine) -> System:
        timing = Timing(time_to_first_token_s=1.0, tokens_per_s=rate)
        return System(subject=subject, samples=[timing], hops=hops)

    one = replace(CHAIN, setting={"shards": 1})
    results = summarise(
        [system(ALONE, 40), system(one, 20, hop("a", 1)), system(CHAIN, 10, hop("b", 1))]
    )
    ratios = [(r.setting["shards"], r.setting["to"], r.value) for r in results if r.unit == "ratio"]
    assert ratios == [(1, "one-process", 0.5), (2, "one-process", 0.25), (2, "1 shard", 0.5)]
    speeds = [r.value for r in results if r.metric == "decode_tokens_per_s"]
    assert speeds == [40, 20, 10]
    assert "hop_compute_ms" not in {r.metric for r in results if r.system == "one-process"}


def test_both_sides_of_the_comparison_are_asked_the_same(tmp_path: Path):
    folder = make_llama_checkpoint(tmp_path)
    start, end = 257, 258
    expected = [start, *b"user\nHi", end, *b"\n", start, *b"assistant\n"]
    assert encode_prompt(folder, "Hi") == expected


def test_tables_are_replaced_and_prose_stays(tmp_path: Path):
    file = tmp_path / "performance.md"
    other = "<!-- results: other -->\nkept\n<!-- end of results -->\n"
    file.write_text(f"Before\n<!-- results: demo -->\nold\n<!-- end of results -->\n{other}After\n")
    ratio = CHAIN.compare("decode_ratio", [10.0], [40.0], to="one-process")
    update_tables(file, [rates(ALONE, 40.0), rates(CHAIN, 10.0), ratio])
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


def test_a_table_by_system_has_settings_in_its_rows(tmp_path: Path):
    file = tmp_path / "performance.md"
    file.write_text("<!-- results: demo by system -->\n<!-- end of results -->\n")
    ratio = CHAIN.compare("decode_ratio", [10.0], [40.0], to="one-process")
    update_tables(file, [rates(ALONE, 40.0), rates(CHAIN, 10.0), ratio])
    assert (
        file.read_text()
        == """<!-- results: demo by system -->

|  | one-process | pals |
| --- | --- | --- |
| decode_tokens_per_s | 40 (40 to 40) |  |
| shards 2, decode_tokens_per_s |  | 10 (10 to 10) |
| shards 2, decode_ratio to one-process |  | 0.25 (0.25 to 0.25) |

In all columns: threads 1, load 0.50 to 1.00.

<!-- end of results -->
"""
    )


def test_every_benchmark_can_be_run():
    assert all(callable(import_module(module).run) for module in BENCHMARKS.values())


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(["--quick", "dmeo"])
    assert exit_.value.code == 2
    assert "no benchmark `dmeo`: choose any of demo" in capsys.readouterr().err


def test_the_transport_is_compared_with_stock_and_with_bare_sockets():
    def samples(scale: float) -> list[Sample]:
        rounds = [scale, 2 * scale]
        return [Sample(request_us=r, mb_per_s=10 / r, cpu_ms_per_mb=3 * r) for r in rounds]

    results = summarise_transport(
        {"pals": samples(1), "stock": samples(4), "raw-trio": samples(0.5)}, load=0.5
    )

    ratios = {(r.metric, r.setting["to"]): r.value for r in results if r.unit == "ratio"}
    assert ratios == {
        ("request_us_ratio", "stock"): 0.25,
        ("throughput_mb_per_s_ratio", "stock"): 4.0,
        ("cpu_ms_per_mb_ratio", "stock"): 0.25,
        ("request_us_ratio", "raw-trio"): 2.0,
        ("throughput_mb_per_s_ratio", "raw-trio"): 0.5,
        ("cpu_ms_per_mb_ratio", "raw-trio"): 2.0,
    }
    assert {r.system for r in results} == {"pals", "stock", "raw-trio"}
