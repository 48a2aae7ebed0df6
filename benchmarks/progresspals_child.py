"""Times answers of ProgressPals over servers of its own, in the environment that it is in.

Run by that environment's Python, so nothing of Pals is imported. Called with the folder of a
Llama, its number of layers, how many servers have them, and the tokens and number of answers;
prints the tokens per second of each answer as a JSON list.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time

PREFIX = "pals-benchmark"
HOST = "/ip4/127.0.0.1/tcp/0"
ADDRESS = re.compile(r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+")
PROMPT_TOKENS = 32
SPARE_TOKENS = 8


def main(folder: str, layers: int, servers: int, tokens: int, answers: int) -> None:
    """Start the servers, answer, and end them."""
    processes: list[subprocess.Popen[str]] = []
    addresses: list[str] = []
    try:
        for number in range(servers):
            blocks = f"{layers * number // servers}:{layers * (number + 1) // servers}"
            processes.append(start_server(folder, blocks, addresses))
            addresses = addresses or [read_address(processes[0])]
        print(json.dumps(time_answers(folder, addresses, tokens, answers)))
    finally:
        for process in processes:
            process.kill()


def start_server(folder: str, blocks: str, addresses: list[str]) -> subprocess.Popen[str]:
    """Serve some layers; the first server begins a swarm, which the others join."""
    swarm = ["--initial_peers", *addresses] if addresses else ["--new_swarm"]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "progresspals.cli.run_server", folder, *swarm),
            *("--block_indices", blocks, "--dht_prefix", PREFIX, "--host_maddrs", HOST),
            *("--device", "cpu", "--torch_dtype", "bfloat16", "--throughput", "1"),
        ],
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )


def read_address(server: subprocess.Popen[str]) -> str:
    """Return where a server listens, and let what it writes later go nowhere."""
    assert server.stdout is not None
    for line in server.stdout:
        if (found := ADDRESS.search(line)) is not None:
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return found[0]
    raise RuntimeError(f"a server ended with {server.wait()}")


def time_answers(folder: str, addresses: list[str], tokens: int, answers: int) -> list[float]:
    """Return the tokens per second of each answer, after its first token."""
    import torch
    from progresspals import AutoDistributedModelForCausalLM

    model = AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=addresses, dht_prefix=PREFIX, torch_dtype=torch.bfloat16
    )
    prompt = torch.ones((1, PROMPT_TOKENS), dtype=torch.long)
    rates: list[float] = []
    for _ in range(answers):
        with model.inference_session(max_length=PROMPT_TOKENS + tokens + SPARE_TOKENS):
            model.generate(prompt, max_new_tokens=1, do_sample=False)
            started_s = time.perf_counter()
            model.generate(None, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            rates.append(tokens / (time.perf_counter() - started_s))
    return rates


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
