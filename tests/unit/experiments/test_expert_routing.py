import itertools
import json

import numpy as np
import pytest

from experiments.expert_routing import analysis


def test_an_even_load_is_balanced():
    found = analysis.load_balance(np.array([5, 5, 5, 5]))

    assert found == {"cv": 0.0, "max_over_mean": 1.0, "entropy": pytest.approx(1.0), "idle": 0.0}


def test_one_busy_expert_is_not():
    found = analysis.load_balance(np.array([20, 0, 0, 0]))

    assert found["max_over_mean"] == 4.0
    assert found["entropy"] == 0.0
    assert found["idle"] == 0.75


def test_coactivation_counts_each_pair_of_a_token():
    counts = analysis.coactivation(np.array([[0, 1], [1, 0], [1, 2]]), 4)

    assert counts.tolist() == [[0, 2, 0, 0], [2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_experts_that_meet_are_placed_together():
    pairs = np.array([[0, 5], [1, 4], [2, 3]] * 10)
    counts = analysis.coactivation(pairs, 6)

    groups = analysis.greedy_groups(counts, 3)

    assert sorted(groups) == [[0, 5], [1, 4], [2, 3]]
    assert analysis.estimate_traffic(pairs, groups).remote_machines == 0.0
    contiguous = analysis.contiguous_groups(6, 3)
    assert analysis.estimate_traffic(pairs, contiguous).remote_machines == pytest.approx(2 / 3)


@pytest.mark.parametrize(("num_experts", "machines"), [(7, 3), (8, 8), (5, 2)])
def test_every_expert_is_placed_once_and_evenly(num_experts, machines):
    random = np.random.default_rng(0)
    ids = np.argsort(random.random((50, num_experts)), axis=1)[:, :2]

    groups = analysis.greedy_groups(analysis.coactivation(ids, num_experts), machines)

    assert sorted(itertools.chain(*groups)) == list(range(num_experts))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_lift_tells_chance_from_partners():
    random = np.random.default_rng(0)
    by_chance = np.argsort(random.random((20000, 16)), axis=1)[:, :2]
    partners = 2 * random.integers(0, 8, (20000, 1)) + [0, 1]

    assert analysis.coactivation_lift(by_chance, 16) == pytest.approx(1.0, abs=0.25)
    assert analysis.coactivation_lift(partners, 16) > 5


def test_equal_logits_agree():
    logits = np.random.default_rng(0).standard_normal((5, 9))

    assert analysis.compare_logits(logits, logits) == {"top1_agreement": 1.0, "mean_kl": 0.0}


def test_divergence_is_that_of_the_definition():
    base, changed = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])

    found = analysis.compare_logits(base, changed)

    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert found["mean_kl"] == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_of_the_readme_run_on_a_random_model(tmp_path):
    pytest.importorskip("matplotlib")
    from experiments.expert_routing.__main__ import main

    main(["all", "--out", str(tmp_path), "--texts", "2", "--tokens", "16", "--dtype", "f32"])

    ablation = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["num_experts_per_tok"] for row in ablation] == [1, 2, 3, 4] * 2
    assert ablation[3]["top1_agreement"] == 1.0
    assert ablation[0]["mean_kl"] > ablation[2]["mean_kl"] > ablation[3]["mean_kl"] == 0.0
    load = json.loads((tmp_path / "load.json").read_text())
    assert [row["layer"] for row in load] == [0, 1, 2]
    placement = json.loads((tmp_path / "placement.json").read_text())
    assert len(placement) == 3 * 3 * 2
    assert all(0 <= row["remote_machines"] <= 3 for row in placement)
    written = {path.name for path in tmp_path.glob("*.png")}
    assert {"load.png", "ablation.png", "placement.png", "coactivation_2.png"} <= written


def test_a_text_needs_a_tokenizer(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    from experiments.expert_routing.__main__ import main

    with pytest.raises(SystemExit):
        main(["load", "--text", "t.txt", "--out", str(tmp_path)])

    assert "--text needs --model" in capsys.readouterr().err
