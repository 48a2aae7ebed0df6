"""The golden answers are what transformers says today about the imported demo model."""

from pathlib import Path

import pytest

from tests.demo_model import import_demo_model, load_goldens
from tests.golden.make_goldens import PROMPTS, answer, load_model

pytestmark = pytest.mark.parity

GOLDENS = load_goldens()


@pytest.fixture(scope="module")
def folder(shared_cache: Path) -> Path:
    return import_demo_model(shared_cache)


@pytest.fixture(scope="module")
def reference(folder: Path):
    return load_model(folder)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_transformers_still_gives_the_golden_answer(reference: tuple, number: int):
    model, tokenizer = reference
    assert answer(model, tokenizer, PROMPTS[number]) == GOLDENS["prompts"][number]
