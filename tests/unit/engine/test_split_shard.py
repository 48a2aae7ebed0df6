import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what four virtual devices generated, whole and split."""
    folder = str(tmp_path_factory.mktemp("models"))
    script = [sys.executable, "-W", "error", "-m", "tests.unit.engine.split_shard", folder]
    done = subprocess.run(script, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["0-f32", "1-int8", "2-int8"])
def test_split_experts_answer_as_whole_ones(results, kind):
    (tokens, shares), (split_tokens, split_shares) = results[kind]

    assert split_tokens == tokens
    assert shares == [1.0, 1.0]
    assert split_shares == [0.25, 1.0]


def test_a_model_without_experts_stays_on_one_device(results):
    assert results["dense"][1] == [1.0, 1.0]


def test_experts_that_do_not_divide_are_refused_with_a_way_on(results):
    assert "6 experts cannot be split over 4 devices" in results["uneven"]
