"""Small tokenizers of the kinds that models come with, made in the test."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests import checkpoints

METASPACE = "▁"


def save_byte_level(folder: Path) -> Path:
    """Byte-level BPE with tokens that begin and end inside of a character."""
    alphabet = {byte: char for char, byte in checkpoints.byte_vocabulary().items()}
    vocabulary = checkpoints.byte_vocabulary()
    merges = []
    for left, right in (("€".encode()[:1], "€".encode()[1:2]), (b"\x80", b"\xf0"), (b" ", b"a")):
        pair = ["".join(alphabet[byte] for byte in part) for part in (left, right)]
        merges.append((pair[0], pair[1]))
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool ü>", normalized=False)])
    return save(folder, tokenizer, eos_token="<|end|>")


def save_sentencepiece(folder: Path, decoder: str) -> Path:
    """Llama 2's kind: words begin with ▁, and unknown characters are byte tokens.

    ``decoder`` is ``sequence`` (Llama 2, Mistral), ``unstripped`` (Gemma, which adds no
    space before a text, and whose added tokens may be runs of spaces) or ``metaspace``.
    """
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [METASPACE, "a", "b", "é", METASPACE + "a", METASPACE + METASPACE, "\ufffd"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [(METASPACE, "a"), (METASPACE, METASPACE)]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    prepend = [] if decoder == "unstripped" else [normalizers.Prepend(METASPACE)]
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", METASPACE)])
    tokenizer.decoder = {
        "unstripped": decoders.Sequence(
            [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        ),
        "sequence": decoders.Sequence(
            [
                decoders.Replace(METASPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
        "metaspace": decoders.Metaspace(),
    }[decoder]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in tokens[:3]])
    if decoder == "unstripped":
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("   ", "\n\n", "<a>")])
    return save(folder, tokenizer, bos_token="<s>", eos_token="</s>")


def save(folder: Path, tokenizer: Tokenizer, **special_tokens: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special_tokens))
    return folder
