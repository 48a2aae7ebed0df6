import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def results():
    """Return what four virtual devices computed, by the kind of the mesh's axis."""
    script = [sys.executable, "-W", "error", "-m", "tests.unit.models.split_experts"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.parametrize("axis", ["Auto", "Explicit"]),
]


def test_experts_split_over_devices_equal_those_of_one(results, axis):
    assert len(results[axis]["differences"]) == 6
    assert max(results[axis]["differences"]) <= 1e-5


def test_split_layers_deliver_one_record_for_each_step(results, axis):
    assert results[axis]["records"] == [1, 5]


def test_an_array_is_assembled_on_the_devices_that_hold_it(results, axis):
    assert results[axis]["assembled"]
