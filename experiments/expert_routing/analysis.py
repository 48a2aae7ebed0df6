"""What routing records say; numpy only, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Groups = list[list[int]]
"""The experts of each machine."""


def load_balance(load: np.ndarray) -> dict[str, float]:
    """Describe how evenly the tokens of one layer spread, from each expert's count [E].

    Returns:
        ``cv`` is the standard deviation over the mean, ``max_over_mean`` what the busiest
        expert gets, ``entropy`` is 1 for an even spread and 0 for one expert, and
        ``idle`` is the share of experts that got nothing.
    """
    shares = load / load.sum()
    positive = shares[shares > 0]
    return {
        "cv": float(load.std() / load.mean()),
        "max_over_mean": float(load.max() / load.mean()),
        "entropy": float(-(positive * np.log(positive)).sum() / np.log(len(load))),
        "idle": float((load == 0).mean()),
    }


def coactivation(expert_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Count how often two experts are chosen by one token, [E, E], from [R, A]."""
    chosen = np.zeros((len(expert_ids), num_experts), np.int64)
    np.put_along_axis(chosen, expert_ids, 1, axis=1)
    counts = chosen.T @ chosen
    np.fill_diagonal(counts, 0)
    return counts


def coactivation_lift(expert_ids: np.ndarray, num_experts: int) -> float:
    """Return how much more often the 1 % closest pairs meet than by their loads alone."""
    counts = coactivation(expert_ids, num_experts)
    load = np.bincount(expert_ids.ravel(), minlength=num_experts).astype(float)
    expected = np.outer(load, load)
    np.fill_diagonal(expected, 0)
    expected *= counts.sum() / expected.sum()
    upper = np.triu_indices(num_experts, 1)
    found, expected = counts[upper], expected[upper]
    top = np.argsort(found)[::-1][: max(1, len(found) // 100)]
    return float(found[top].sum() / expected[top].sum())


def contiguous_groups(num_experts: int, machines: int) -> Groups:
    """Return neighbouring experts, as a range of ids would place them."""
    return [list(map(int, part)) for part in np.array_split(np.arange(num_experts), machines)]


def greedy_groups(counts: np.ndarray, machines: int) -> Groups:
    """Put experts that meet often on one machine, each of which holds equally many.

    A machine starts with the free expert that meets others most, and takes the free
    expert that meets those it holds most until it is full.
    """
    free = set(range(len(counts)))
    groups: Groups = []
    for size in map(len, contiguous_groups(len(counts), machines)):
        group: list[int] = []
        while len(group) < size:
            score = counts[:, group].sum(axis=1) if group else counts[:, sorted(free)].sum(axis=1)
            best = max(sorted(free), key=lambda expert: score[expert])
            group.append(best)
            free.remove(best)
        groups.append(sorted(group))
    return groups


@dataclass(frozen=True)
class Traffic:
    """What a placement costs on the tokens of one layer.

    Attributes:
        remote_machines: Mean number of other machines that a token's hidden state must
            visit, where the machine of its best expert is at home.
        max_share: The busiest machine's share of all expert runs.
    """

    remote_machines: float
    max_share: float


def estimate_traffic(expert_ids: np.ndarray, groups: Groups) -> Traffic:
    """Estimate the traffic of tokens [R, A] over a placement."""
    machine_of = np.empty(sum(map(len, groups)), np.int64)
    for machine, group in enumerate(groups):
        machine_of[group] = machine
    machines = machine_of[expert_ids]
    visited = np.zeros((len(machines), len(groups)), bool)
    np.put_along_axis(visited, machines, True, axis=1)
    runs = np.bincount(machines.ravel(), minlength=len(groups))
    return Traffic(
        remote_machines=float(visited.sum(axis=1).mean() - 1),
        max_share=float(runs.max() / runs.sum()),
    )


def compare_logits(base: np.ndarray, changed: np.ndarray) -> dict[str, float]:
    """Return agreement of the best token, and the mean KL(base || changed), of [T, V]."""
    base_log, changed_log = log_softmax(base), log_softmax(changed)
    divergence = (np.exp(base_log) * (base_log - changed_log)).sum(axis=1)
    return {
        "top1_agreement": float((base.argmax(axis=1) == changed.argmax(axis=1)).mean()),
        "mean_kl": float(divergence.mean()),
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities [T, V] in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def split_halves(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the choices of the first half of the texts, and those of the second.

    A placement that is judged on the tokens it was made from looks better than it is.
    """
    middle = max(1, len(texts) // 2)
    return np.concatenate(texts[:middle]), np.concatenate(texts[middle:])
