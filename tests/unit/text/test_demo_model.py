"""The tokenizer and template of the real demo model, against what transformers made of them."""

from pathlib import Path

import pytest

from pals.text.detokenize import StreamDetokenizer
from pals.text.template import ChatTemplate
from pals.text.tokenizer import Tokenizer
from tests.demo_model import import_demo_model, load_goldens
from tests.golden.make_goldens import weights_sha256

GOLDENS = load_goldens()
PROMPTS = GOLDENS["prompts"]


@pytest.fixture(scope="module")
def folder(shared_cache: Path) -> Path:
    return import_demo_model(shared_cache)


def test_the_import_gives_the_weights_of_the_goldens(folder: Path):
    assert weights_sha256(folder) == GOLDENS["weights_sha256"]


@pytest.mark.parametrize("golden", PROMPTS, ids=range(len(PROMPTS)))
def test_prompts_are_those_of_transformers(folder: Path, golden: dict):
    prompt = ChatTemplate.load(folder).render(golden["messages"])
    assert prompt == golden["prompt_text"]
    assert Tokenizer.load(folder).encode(prompt, add_special_tokens=False) == golden["prompt_ids"]


@pytest.mark.parametrize("golden", PROMPTS, ids=range(len(PROMPTS)))
def test_answers_stream_to_the_text_of_transformers(folder: Path, golden: dict):
    detokenizer = StreamDetokenizer(Tokenizer.load(folder))
    pieces = [detokenizer.push(token_id) for token_id in golden["token_ids"]]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == golden["text"]


def test_the_answer_ends_at_the_model_s_end_token(folder: Path):
    assert PROMPTS[0]["token_ids"][-1] in Tokenizer.load(folder).eos_token_ids
