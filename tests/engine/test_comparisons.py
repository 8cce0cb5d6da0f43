"""Paired comparisons, by hand."""

import pytest

from engine.comparisons import interval, pair, with_feather
from engine.results import Statistic, find_runs, group_cells, read_runs
from tests.scripts.synthetic_runs import write_run


def cells_of(root):
    runs, problems = read_runs(find_runs(root))
    assert not problems
    return group_cells(runs)[0]


def write(root, method, accuracies, **settings):
    """One run per seed; `accuracies` by seed."""
    for seed, top1 in accuracies.items():
        write_run(root, method=method, seed=seed, top1=top1, **settings)


def test_mean_difference_and_interval_by_hand(tmp_path):
    write(tmp_path, "feather", {0: 60.0, 1: 62.0, 2: 64.0, 7: 99.0})
    write(tmp_path, "ste", {0: 59.0, 1: 60.5, 2: 62.0, 9: 1.0})
    (comparison,) = with_feather(cells_of(tmp_path))
    # differences -1, -1.5, -2: mean -1.5, deviation 0.5; half width t(0.975, 2) 0.5 / sqrt 3 = 4.302653 x 0.288675
    assert comparison.seeds == (0, 1, 2)
    assert comparison.difference.mean == pytest.approx(-1.5)
    assert comparison.interval == pytest.approx((-1.5 - 1.242069, -1.5 + 1.242069), abs=1e-5)
    assert comparison.verdict == "worse than Feather"
    assert comparison.mean(comparison.reference) == 62.0


def test_pairing_sees_what_the_seeds_spread_hides(tmp_path):
    write(tmp_path, "feather", {0: 50.0, 1: 60.0, 2: 70.0})
    write(tmp_path, "ste", {0: 50.9, 1: 61.0, 2: 71.1})
    (comparison,) = with_feather(cells_of(tmp_path))
    assert comparison.verdict == "better than Feather"


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({0: 59.0, 1: 60.5}, "n = 2: too few seeds to tell"),
        ({1: 20.0}, "n = 1: too few seeds to tell"),
        ({5: 59.0}, "no common seed: cannot be paired"),
    ],
)
def test_too_few_seeds_are_said_to_be_too_few(tmp_path, theirs, told):
    write(tmp_path, "feather", {0: 60.0, 1: 62.0, 2: 64.0})
    write(tmp_path, "ste", theirs)
    (comparison,) = with_feather(cells_of(tmp_path))
    assert comparison.interval is None
    assert comparison.verdict == told


def test_an_interval_around_zero_tells_nothing_apart(tmp_path):
    write(tmp_path, "feather", {0: 60.0, 1: 60.0, 2: 60.0})
    write(tmp_path, "ste", {0: 59.0, 1: 60.5, 2: 61.0})
    (comparison,) = with_feather(cells_of(tmp_path))
    low, high = comparison.interval
    assert low < 0 < high
    assert comparison.verdict == "interval includes 0: not told apart"


def test_the_interval_holds_the_true_difference_in_95_of_100(tmp_path):
    import numpy as np

    draws = np.random.default_rng(0).normal(0.3, 1.0, size=(4000, 4))
    hits = [low <= 0.3 <= high for low, high in (interval(Statistic.of(row.tolist())) for row in draws)]
    assert 0.94 < np.mean(hits) < 0.96


def test_the_reference_is_feather_with_its_defaults_under_the_same_conditions(tmp_path):
    seeds = {0: 60.0, 1: 61.0, 2: 62.0}
    write(tmp_path, "feather", seeds, sparsity=0.98)
    write(tmp_path, "feather", seeds, sparsity=0.98, theta=0.3)
    write(tmp_path, "feather", seeds, sparsity=0.98, framework="asl_plus")
    write(tmp_path, "feather", seeds, sparsity=0.98, config={"sparsity_schedule": {"name": "linear"}})
    write(tmp_path, "ste", seeds, sparsity=0.98)
    write(tmp_path, "ste", seeds, sparsity=0.98, epochs=8)  # nothing of its length to compare with
    write(tmp_path, "ste", seeds, sparsity=0.9)  # nor of its sparsity
    write(tmp_path, "dense", {0: 70.0}, sparsity=0.0)
    cells = cells_of(tmp_path)
    comparisons = with_feather(cells)
    assert len(comparisons) == 4
    assert len({c.reference.setting for c in comparisons}) == 1
    reference = comparisons[0].reference.setting
    assert (reference.framework, reference.theta, reference.epochs) == ("global", "auto", "4")
    assert "linear" not in reference.options


def test_feather_is_found_in_another_experiment_of_the_same_kind(tmp_path):
    write(tmp_path, "feather", {0: 60.0, 1: 61.0, 2: 62.0}, experiment="table")
    write(tmp_path, "feather", {0: 50.0, 1: 51.0, 2: 52.0}, experiment="ablation", theta=0.3)
    everything, ablation = cells_of(tmp_path), cells_of(tmp_path / "ablation")
    assert with_feather(ablation) == []
    (comparison,) = with_feather(ablation, everything)
    assert comparison.difference.mean == -10.0


def test_a_cell_compared_with_itself_does_not_differ(tmp_path):
    write(tmp_path, "feather", {0: 60.0, 1: 61.0, 2: 62.0})
    (cell,) = cells_of(tmp_path)
    assert pair(cell, cell).interval == (0.0, 0.0)
