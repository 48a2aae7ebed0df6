"""What the benchmarks of the endpoint make of the answers that users got."""

from __future__ import annotations

import os

import pytest

from benchmarks import api, soak
from benchmarks.api import System, TimedAnswer, Window, see, summarise
from benchmarks.results import Subject
from pals.cli.demo import Endpoint

ENDPOINT = Endpoint(url="http://127.0.0.1:1", model="m")


def test_only_what_came_while_all_users_asked_is_counted() -> None:
    first = TimedAnswer(began_s=0.0, arrivals_s=[0.5, 2.0, 3.0], tokens=3)
    second = TimedAnswer(began_s=1.0, arrivals_s=[1.5, 2.5], tokens=4)
    late = TimedAnswer(began_s=10.5, arrivals_s=[11.0], tokens=1)

    window = see([first, second, late], users=2, window_s=10)

    # From 1 s, when the second user asked, to 10 s after the first did.
    assert window.tokens_per_s == pytest.approx((2 + 4) / 9)
    assert window.first_s == [0.5]
    assert sorted(window.gaps_s) == [1.0, 1.0, 1.5]


def test_pals_is_compared_with_llama_server_where_that_is_built() -> None:
    def system(name: str, tokens_per_s: float, first_s: float) -> System:
        subject = Subject(benchmark="api", system=name, setting={}, load=0.0)
        window = Window(tokens_per_s, [first_s] * 3, [0.01, 0.03])
        return System(subject=subject, endpoint=ENDPOINT, windows={8: [window, window]})

    lines = list(summarise([system("pals", 20, 0.1), system(api.LLAMA_SERVER, 10, 0.4)]))

    ratios = {line.metric: line.value for line in lines if line.setting.get("to") == "llama-server"}
    assert ratios == {"total_tokens_ratio": 2, "time_to_first_token_ratio": 0.25}
    assert {line.setting["sessions"] for line in lines} == {8}
    gaps = [line.value for line in lines if line.metric == "inter_token_p50_ms"]
    assert gaps == [pytest.approx(20), pytest.approx(20)]


def test_the_largest_of_one_sample_is_itself() -> None:
    assert api.percentile([3.0], 99) == 3.0


def test_memory_is_compared_after_the_caches_are_full() -> None:
    subject = Subject(benchmark="soak", system="pals", setting={}, load=0.0)
    readings = [{7: 50}, {7: 100}, {7: 110}]

    lines = {line.metric: line for line in soak.summarise(subject, {7: "serve"}, readings, 3)}

    assert lines["answers"].value == 3
    assert lines["resident_memory_ratio"].value == pytest.approx(1.1)
    assert lines["resident_bytes"].setting["process"] == "serve 0"


def test_no_process_of_another_parent_is_looked_at() -> None:
    assert os.getpid() not in soak.children()
