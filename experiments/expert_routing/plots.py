"""Figures of the results, written as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt


def plot_load(loads: dict[int, np.ndarray], path: Path) -> None:
    """Draw the share of each expert, sorted, for every layer."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for layer, load in loads.items():
        axes.plot(np.sort(load)[::-1] / load.mean(), label=f"layer {layer}")
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=0.8)
    axes.set(xlabel="experts, busiest first", ylabel="load / mean load")
    if len(loads) <= 12:
        axes.legend()
    _save(figure, path)


def plot_ablation(rows: list[dict[str, object]], path: Path) -> None:
    """Draw agreement and KL over the number of experts of each token."""
    learned = [row for row in rows if row["kind"] == "own"]
    uniform = [row for row in rows if row["kind"] != "own"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, metric in zip(panels, ("top1_agreement", "mean_kl"), strict=True):
        for label, part in (("own weights", learned), ("uniform weights", uniform)):
            counts = [cast("int", row["num_experts_per_tok"]) for row in part]
            axes.plot(counts, [cast("float", row[metric]) for row in part], "o-", label=label)
        axes.set(xlabel="experts per token", ylabel=metric)
        axes.legend()
    _save(figure, path)


def plot_coactivation(counts: np.ndarray, layer: int, path: Path) -> None:
    """Draw how often two experts of one layer meet."""
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    image = axes.imshow(counts, cmap="magma")
    axes.set(title=f"layer {layer}", xlabel="expert", ylabel="expert")
    figure.colorbar(image, label="tokens that chose both")
    _save(figure, path)


def plot_placement(rows: list[dict[str, object]], path: Path) -> None:
    """Draw the machines that a token visits, by placement and number of machines."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for placement in ("contiguous", "greedy"):
        part = [row for row in rows if row["placement"] == placement]
        machines = sorted({cast("int", row["machines"]) for row in part})
        means = [
            np.mean([cast("float", r["remote_machines"]) for r in part if r["machines"] == count])
            for count in machines
        ]
        axes.plot(machines, means, "o-", label=placement)
    axes.set(xlabel="machines that share a layer", ylabel="remote machines per token and layer")
    axes.legend()
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
