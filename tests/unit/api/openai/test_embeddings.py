from __future__ import annotations

import base64
import json

import msgspec
import numpy as np
import pytest

from pals.api.openai.embeddings import embedding_list
from pals.api.openai.fields import EMBEDDING_FIELDS
from pals.api.openai.reading import read_request
from pals.api.openai.schema.embeddings import EmbeddingList, EmbeddingRequest
from pals.driver.interface import Embedding
from pals.errors import InvalidRequest
from tests.openai_schema import component, problems

FOUND = [
    Embedding(vector=np.array([3, 4, 12, 84], np.float32), tokens=5),
    Embedding(vector=np.array([0, 0, 0, 2], np.float32), tokens=2),
]


def answer(**fields: object) -> EmbeddingList:
    body = msgspec.json.encode({"model": "m", "input": "x"} | fields)
    return embedding_list(read_request(body, EMBEDDING_FIELDS, EmbeddingRequest), FOUND)


def test_vectors_have_length_one_and_openai_s_form() -> None:
    written = json.loads(msgspec.json.encode(answer()))

    vectors = [data["embedding"] for data in written["data"]]
    assert vectors[0] == pytest.approx(np.array([3, 4, 12, 84]) / 85)
    assert vectors[1] == [0, 0, 0, 1]
    assert written["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert problems(written, component("CreateEmbeddingResponse")) == []


def test_fewer_dimensions_are_the_first_ones_at_length_one() -> None:
    [first, second] = answer(dimensions=2).data

    assert first.embedding == pytest.approx([0.6, 0.8])
    assert second.embedding == [0, 0]


def test_base64_holds_the_same_numbers() -> None:
    coded = [data.embedding for data in answer(encoding_format="base64").data]

    for written, plain in zip(coded, answer().data, strict=True):
        assert np.frombuffer(base64.b64decode(str(written)), "<f4").tolist() == plain.embedding


@pytest.mark.parametrize("fields", [{"dimensions": 0}, {"encoding_format": "x"}])
def test_what_cannot_be_given_is_refused_by_name(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        answer(**fields)

    assert caught.value.fields["param"] in fields
