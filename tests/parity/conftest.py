"""What the parity tests share: the engine's steps are those of the product.

What is computed operation by operation is compiled as in all other tests: no step of the
product is made of programs like these.
"""

import pytest

from tests.as_shipped import compile_as_shipped


@pytest.fixture(scope="session", autouse=True)
def as_shipped():
    with pytest.MonkeyPatch.context() as patch:
        compile_as_shipped(patch)
        yield
