"""What `pals.engine` gives to programs of one's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pals.engine


def test_the_package_loads_no_jax_until_something_of_it_is_asked_for():
    program = (
        "import sys, pals.engine; before = 'jax' in sys.modules; pals.engine.Shard;"
        "print(before, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize("name", pals.engine.__all__)
def test_every_name_is_there(name: str):
    assert getattr(pals.engine, name).__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute `Shrad`"):
        pals.engine.Shrad  # noqa: B018
