"""The process that loads hostile folders: one JSON request a line, one JSON answer a line.

It takes each folder the whole way of a shard and of a driver: config, weights, tokenizer,
template. What it measures is its own: CPU seconds, and how far its peak memory grew.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from pals.engine.shard import Shard
from pals.errors import PalsError
from pals.models.hub import resolve_model
from pals.text.template import ChatTemplate
from pals.text.tokenizer import Tokenizer
from pals.types import EngineLimits, LayerRange

LIMITS = EngineLimits(max_sessions=1, max_context_tokens=64, max_chunk_tokens=16)
PROMPT = [{"role": "user", "content": "a" * 30 + "!"}]
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def load(folder: str, layers: str, dtype: str) -> None:
    """Do with a folder what a shard and a driver do with it."""
    span = LayerRange.parse(layers)
    snapshot = resolve_model(folder, span)
    Shard.load(snapshot, span, dtype=dtype, limits=LIMITS)
    tokenizer = Tokenizer.load(Path(folder))
    template = ChatTemplate.load(Path(folder))
    try:
        tokenizer.encode(template.render(PROMPT), add_special_tokens=False)
    finally:
        template.close()


def attempt(request: dict[str, str]) -> dict[str, object]:
    """Load one folder and describe the error that it ends in, if any."""
    started_s, peak = time.process_time(), peak_bytes()
    answer: dict[str, object] = {"error": None, "named": True, "message": ""}
    try:
        load(request["folder"], request["layers"], request["dtype"])
    except BaseException as error:  # whatever comes out is what the test is about
        answer = {
            "error": type(error).__name__,
            "named": isinstance(error, PalsError),
            "message": str(error),
        }
    return answer | {"cpu_s": time.process_time() - started_s, "grown": peak_bytes() - peak}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(attempt(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
