"""The experiments as commands; see README.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from experiments.expert_routing import analysis, plots
from experiments.expert_routing.model import RoutedModel, Source
from pals.models.configs.moe import MoEConfig, RouterOverride, SparseConfig
from pals.text.tokenizer import Tokenizer

BYTES_PER_VALUE = 2
"""Hidden states cross machines in bf16."""


@dataclass(frozen=True)
class Run:
    """One model and the texts that are run through it."""

    model: RoutedModel
    texts: list[np.ndarray]
    out: Path

    def moe(self) -> MoEConfig:
        """Return the first MoE layer's config; all layers of a family are alike."""
        config = self.model.config
        assert isinstance(config, SparseConfig)
        return next(moe for moe in config.moe if moe is not None)

    def choices(self) -> dict[int, list[np.ndarray]]:
        """Return the experts [T, A] of every text, by layer."""
        by_layer: dict[int, list[np.ndarray]] = {}
        for text in self.texts:
            for record in self.model.run(text)[1]:
                by_layer.setdefault(record.layer, []).append(record.expert_ids)
        return by_layer

    def write(self, name: str, rows: list[dict[str, object]]) -> None:
        """Write the rows of one experiment as JSON."""
        (self.out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


def run_load(run: Run) -> None:
    """Measure the load balance of each layer."""
    num_experts = run.moe().router.num_experts
    loads = {
        layer: np.bincount(np.concatenate(ids).ravel(), minlength=num_experts)
        for layer, ids in run.choices().items()
    }
    run.write(
        "load",
        [{"layer": layer, **analysis.load_balance(load)} for layer, load in loads.items()],
    )
    plots.plot_load(loads, run.out / "load.png")


def run_ablation(run: Run) -> None:
    """Measure what fewer experts, and weights that are all alike, do to the next token."""
    base = [run.model.run(text)[0] for text in run.texts]
    most = run.moe().router.num_experts_per_tok
    rows: list[dict[str, object]] = []
    for kind in (None, "uniform_topk"):
        for count in range(1, most + 1):
            changed = run.model.with_override(RouterOverride(kind=kind, num_experts_per_tok=count))
            found = [changed.run(text)[0] for text in run.texts]
            compared = analysis.compare_logits(np.concatenate(base), np.concatenate(found))
            rows.append({"kind": kind or "own", "num_experts_per_tok": count, **compared})
    run.write("ablation", rows)
    plots.plot_ablation(rows, run.out / "ablation.png")


def run_placement(run: Run) -> None:
    """Measure which experts meet, and what machines that share a layer would send."""
    num_experts = run.moe().router.num_experts
    rows: list[dict[str, object]] = []
    for layer, texts in run.choices().items():
        fitted, judged = analysis.split_halves(texts)
        counts = analysis.coactivation(fitted, num_experts)
        lift = analysis.coactivation_lift(judged, num_experts)
        for machines in (m for m in (2, 4, 8) if m <= num_experts):
            placements = {
                "contiguous": analysis.contiguous_groups(num_experts, machines),
                "greedy": analysis.greedy_groups(counts, machines),
            }
            for name, groups in placements.items():
                rows.append(
                    {"layer": layer, "lift": lift, "machines": machines, "placement": name}
                    | traffic_row(run, judged, groups)
                )
        plots.plot_coactivation(counts, layer, run.out / f"coactivation_{layer}.png")
    run.write("placement", rows)
    plots.plot_placement(rows, run.out / "placement.png")


def traffic_row(run: Run, expert_ids: np.ndarray, groups: analysis.Groups) -> dict[str, object]:
    """Return the traffic of one placement; a token's state goes there and comes back."""
    traffic = analysis.estimate_traffic(expert_ids, groups)
    state_bytes = run.model.config.hidden_size * BYTES_PER_VALUE
    return {**asdict(traffic), "bytes_per_token": 2 * state_bytes * traffic.remote_machines}


EXPERIMENTS = {"load": run_load, "ablation": run_ablation, "placement": run_placement}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.expert_routing")
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--model", type=Path, help="folder of a MoE checkpoint; else random")
    parser.add_argument("--text", type=Path, help="UTF-8 text; else random tokens")
    parser.add_argument("--texts", type=int, default=8, help="pieces that are run")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each piece")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parsed = parser.parse_args(arguments)
    if parsed.text is not None and parsed.model is None:
        parser.error("--text needs --model, whose tokenizer reads it")
    if parsed.texts < 2:
        parser.error(
            "--texts is 2 or more: placements are made on one half and judged on the other"
        )
    return parsed


def read_texts(parsed: argparse.Namespace, vocab_size: int) -> list[np.ndarray]:
    """Return pieces of equal length, of the text or of random tokens.

    Raises:
        SystemExit: The text is too short.
    """
    shape = (parsed.texts, parsed.tokens)
    if parsed.text is None:
        return list(np.random.default_rng(parsed.seed).integers(0, vocab_size, shape))
    text = parsed.text.read_text(encoding="utf-8")
    ids = Tokenizer.load(parsed.model).encode(text, add_special_tokens=True)
    needed = parsed.texts * parsed.tokens
    if len(ids) < needed:
        raise SystemExit(f"{parsed.text} has {len(ids)} tokens, {needed} are needed")
    return list(np.array(ids[:needed]).reshape(shape))


def main(arguments: Sequence[str]) -> None:
    """Run one experiment, or all."""
    parsed = parse_arguments(arguments)
    model = RoutedModel(Source(parsed.model, parsed.dtype, parsed.seed))
    if not (isinstance(model.config, SparseConfig) and any(model.config.moe)):
        raise SystemExit(f"{model.config.family} has no experts")
    parsed.out.mkdir(parents=True, exist_ok=True)
    run = Run(model, read_texts(parsed, model.config.vocab_size), parsed.out)
    for name, experiment in EXPERIMENTS.items():
        if parsed.experiment in (name, "all"):
            experiment(run)


if __name__ == "__main__":
    main(sys.argv[1:])
