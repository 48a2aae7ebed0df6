"""gpt-oss as OpenAI publishes it: experts in MXFP4, which transformers dequantises too."""

import json

import numpy as np
import pytest

from pals.config import CACHE_DIR_VARIABLE
from pals.models.snapshot import Snapshot
from tests.parity.matrix import ATOL, COMMON, PROMPT, Chain, Reference, save_random_model

pytestmark = pytest.mark.parity

NUM_EXPERTS, HIDDEN, INTERMEDIATE, LAYERS = 3, 64, 32, 2
CONFIG = {
    **COMMON,
    "experts_implementation": "eager",
    "head_dim": 8,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_local_experts": NUM_EXPERTS,
    "sliding_window": 9,
}


def draw_packed(random, rows, columns):
    """Return blocks [E, rows, columns / 32, 16] and their exponents, of values near 0.1."""
    import torch

    shape = (NUM_EXPERTS, rows, columns // 32)
    blocks = random.integers(0, 256, (*shape, 16), dtype=np.uint8)
    exponents = random.integers(121, 125, shape, dtype=np.uint8)
    return torch.tensor(blocks), torch.tensor(exponents)


def pack_experts(model, folder):
    """Give a saved model experts in MXFP4, on disk and, dequantised, in memory."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(5)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for layer in range(LAYERS):
        experts = model.model.layers[layer].mlp.experts
        for name, rows, columns in (
            ("gate_up_proj", 2 * INTERMEDIATE, HIDDEN),
            ("down_proj", HIDDEN, INTERMEDIATE),
        ):
            full_name = f"model.layers.{layer}.mlp.experts.{name}"
            blocks, exponents = draw_packed(random, rows, columns)
            del tensors[full_name]
            tensors |= {f"{full_name}_blocks": blocks, f"{full_name}_scales": exponents}
            values = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
            getattr(experts, name).data.copy_(values)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def reference(tmp_path_factory, shared_cache):
    folder = tmp_path_factory.mktemp("mxfp4")
    model = save_random_model(folder, "GptOssForCausalLM", CONFIG, seed=3)
    pack_experts(model, folder)
    config_path = folder / "config.json"
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    values = json.loads(config_path.read_text()) | {"quantization_config": quantization}
    config_path.write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_DIR_VARIABLE, str(shared_cache))
        yield Reference(model, Snapshot.open(folder, "test/model"))


@pytest.mark.parametrize("cuts", [[0], [0, 1]], ids=str)
def test_logits_equal_those_of_the_dequantised_model(reference: Reference, cuts):
    found = Chain(reference.snapshot, cuts).logits(PROMPT)

    np.testing.assert_allclose(found, reference.logits(PROMPT), atol=ATOL)
