"""Write smollm2_135m_instruct.json: what transformers answers to a few prompts.

Runs where torch and transformers are installed (`make parity` makes such a place), on
the folder that `pals models import` made of the demo model::

    python tests/golden/make_goldens.py MODEL_FOLDER

Weights are the checkpoint's bf16 values, computed in float32 with eager attention on one
thread, greedily. The file changes only when the import of the weights does.
"""

import argparse
import hashlib
import json
from pathlib import Path

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GOLDEN_FILE = Path(__file__).with_name("smollm2_135m_instruct.json")
NEW_TOKENS = 48

PROMPTS = (
    [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
    [{"role": "user", "content": "Repeat exactly: 😀🎉🌍 日本語"}],
    [
        {"role": "system", "content": "You are a terse assistant."},
        {"role": "user", "content": "Name three colours."},
        {"role": "assistant", "content": "Red, green, blue."},
        {"role": "user", "content": "And three animals?"},
    ],
    [{"role": "user", "content": "Write a Python function that adds 12345 and a number."}],
    [{"role": "user", "content": "Tell me a very short story about a fox and the sea."}],
)


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of the model's one weight file, as its manifest states it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest["files"]["model.safetensors"]["sha256"]


def load_model(folder: Path):
    """Load the checkpoint in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def answer(model, tokenizer, messages: list[dict[str, str]]) -> dict[str, object]:
    """Return prompt and greedy answer of one conversation; the end token is included."""
    import torch

    prompt_text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
    token_ids = output[0, len(prompt_ids) :].tolist()
    return {
        "messages": messages,
        "prompt_text": prompt_text,
        "prompt_ids": prompt_ids,
        "token_ids": token_ids,
        "text": tokenizer.decode(token_ids, skip_special_tokens=True),
    }


def make_goldens(folder: Path) -> dict[str, object]:
    """Return the contents of the golden file."""
    import torch
    import transformers

    model, tokenizer = load_model(folder)
    return {
        "model": MODEL_ID,
        "weights_sha256": weights_sha256(folder),
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompts": [answer(model, tokenizer, messages) for messages in PROMPTS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the imported model")
    goldens = make_goldens(parser.parse_args().folder)
    GOLDEN_FILE.write_text(json.dumps(goldens, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
