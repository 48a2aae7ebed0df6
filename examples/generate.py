"""Run a model that is split into two shards, in one process and without any network.

    python examples/generate.py [QUESTION]

The model is the demo's: `make install` brings it.
"""

import sys

from pals.engine import LocalChain, Shard
from pals.models.gguf import DEMO_MODEL_ID, import_gguf, packaged_demo_model
from pals.models.hub import resolve_model
from pals.models.snapshot import Snapshot
from pals.text.detokenize import StreamDetokenizer
from pals.text.template import ChatTemplate
from pals.text.tokenizer import Tokenizer
from pals.types import EngineLimits, Sampling, split_layers

QUESTION = "What is the capital of France? Answer in one sentence."
MAX_NEW_TOKENS = 32
LIMITS = EngineLimits(
    max_rows=2,
    max_context_tokens=512,
    max_chunk_tokens=32,
    verify_tokens=1,
    kv_bytes=16 << 20,
)


def find_model() -> Snapshot:
    """Return the demo's model."""
    file = packaged_demo_model()
    if file is None:
        sys.exit("the demo's model is not installed: run `make install`")
    return resolve_model(str(import_gguf(file, model_id=DEMO_MODEL_ID).absolute()))


def load_chain(model: Snapshot) -> LocalChain:
    """Return the model in two shards, each with half of the layers."""
    halves = split_layers(model.config.num_layers, 2)
    return LocalChain([Shard.load(model, layers, dtype="bf16", limits=LIMITS) for layers in halves])


def main(question: str) -> None:
    """Print the answer token by token."""
    model = find_model()
    tokenizer, template = Tokenizer.load(model.path), ChatTemplate.load(model.path)
    text = template.render([{"role": "user", "content": question}])
    prompt = tokenizer.encode_prompt(text)
    chain, shown = load_chain(model), StreamDetokenizer(tokenizer)
    # The seed makes the answer the same each time; without a temperature it is greedy.
    sampling = Sampling(temperature=0.2, top_p=0.9, seed=1)
    for token in chain.generate(prompt, sampling, max_new_tokens=MAX_NEW_TOKENS):
        if token in tokenizer.eos_token_ids:
            break
        print(shown.push(token), end="", flush=True)
    print(shown.finish())


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or QUESTION)
