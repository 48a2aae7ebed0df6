"""Our Llama against transformers', on tiny random checkpoints that torch writes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pals.config import CACHE_DIR_VARIABLE
from pals.engine.cache import build_cache, cache_positions
from pals.engine.shard import Shard
from pals.models.llama import Llama
from pals.models.snapshot import Snapshot
from pals.models.weights import load_parameters
from pals.types import EngineLimits, LayerRange
from tests.checkpoints import EOS_ID, VOCAB_SIZE, write_tokenizer
from tests.unit.engine.chains import decode, load_chain, prefill

pytestmark = [pytest.mark.parity, pytest.mark.timeout(600)]

LIMITS = EngineLimits(max_sessions=2, max_context_tokens=160, max_chunk_tokens=32)
PROMPT = [256, *b"In the beginning there was a small random model."]
NEW_TOKENS = 32
ATOL = 1e-4

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES = {
    "tied-gqa": {"tie_word_embeddings": True},
    "untied-mha": {"num_key_value_heads": 4},
    "mqa-wide-heads": {"num_key_value_heads": 1, "head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
}


@pytest.fixture(autouse=True)
def shared_compile_cache(isolated_environment, tmp_path_factory, monkeypatch):
    """Compile the programs that several splits share once."""
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path_factory.getbasetemp() / "compiled"))


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def reference(request, tmp_path_factory):
    """Return transformers' model and our snapshot of what it saved."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB_SIZE,
            "initializer_range": 0.3,
            "max_position_embeddings": 512,
            "bos_token_id": 256,
            "eos_token_id": EOS_ID,
            "rms_norm_eps": 1e-5,
        }
        | FAMILIES[request.param]
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_DIR_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield model, Snapshot.open(folder, "test/model")


def splits(num_layers):
    """Return every way to cut the layers into shards, as the shards' first layers."""
    inner = range(1, num_layers)
    return [
        [0, *cuts] for count in range(num_layers) for cuts in itertools.combinations(inner, count)
    ]


def reference_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def reference_answer(model, prompt):
    import torch

    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def build_model(snapshot, layers):
    """Return our model over ``layers``, its parameters read from the snapshot."""
    dtype = jnp.dtype(jnp.float32)
    model = nnx.eval_shape(lambda: Llama(snapshot.config, layers, dtype=dtype))
    graphdef, state = nnx.split(model)
    shapes, treedef = jax.tree.flatten(state)
    parameters = dict(zip(nnx.to_flat_state(state).paths, shapes, strict=True))
    leaves = load_parameters(snapshot.path, snapshot.config, layers, parameters)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))


def chain_logits(snapshot, cuts, tokens, chunk):
    """Return our logits [T, V] after running ``tokens`` in chunks over every shard."""
    ends = [*cuts[1:], snapshot.config.num_layers]
    ranges = [LayerRange(start, stop) for start, stop in zip(cuts, ends, strict=True)]
    models = [build_model(snapshot, layers) for layers in ranges]
    caches = [
        build_cache(snapshot.config, num_layers=len(r), limits=LIMITS, dtype=jnp.dtype(jnp.float32))
        for r in ranges
    ]
    logits = []
    for start in range(0, len(tokens), chunk):
        x = jnp.array([tokens[start : start + chunk]])
        for number, model in enumerate(models):
            x, caches[number] = model(
                x,
                caches[number],
                slots=jnp.array([1]),
                starts=jnp.array([start]),
                context=cache_positions(LIMITS),
            )
        logits.append(models[-1].forward_logits(x[0]))
    return np.concatenate(logits)


@pytest.mark.parametrize("cuts", splits(3), ids=str)
def test_logits_equal_those_of_transformers(reference, cuts):
    model, snapshot = reference

    expected = reference_logits(model, PROMPT)

    np.testing.assert_allclose(chain_logits(snapshot, cuts, PROMPT, 64), expected, atol=ATOL)


def test_logits_of_cached_steps_equal_one_forward(reference):
    model, snapshot = reference
    tokens = PROMPT[:20]

    found = chain_logits(snapshot, [0], tokens, 1)

    np.testing.assert_allclose(found, reference_logits(model, tokens), atol=ATOL)


@pytest.mark.parametrize("cuts", splits(3), ids=str)
def test_greedy_tokens_equal_those_of_transformers(reference, cuts):
    model, snapshot = reference
    expected = reference_answer(model, PROMPT)
    assert len(set(expected)) > 2

    chain: list[Shard] = load_chain(snapshot, cuts, "f32", LIMITS)
    tokens = [prefill(chain, 1, PROMPT, chunk=20)]
    for position in range(len(PROMPT), len(PROMPT) + NEW_TOKENS - 1):
        tokens += decode(chain, [1], [position], tokens[-1:])

    assert tokens == expected
