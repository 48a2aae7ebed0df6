import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what four virtual devices computed."""
    folder = str(tmp_path_factory.mktemp("arrays"))
    script = [sys.executable, "-W", "error", "-m", "tests.unit.models.spread_experts", folder]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_experts_spread_over_devices_equal_those_of_one(results):
    assert len(results["differences"]) == 6
    assert max(results["differences"]) <= 1e-5


def test_layers_on_several_devices_deliver_one_record_for_each_step(results):
    assert results["records"] == [1, 5]


def test_an_array_is_assembled_on_the_devices_that_hold_it_and_kept_whole(results):
    assert results["assembled"] == [True] * 4
    assert results["shares"] == [0.25, 0.25, 0.25, 1.0]
