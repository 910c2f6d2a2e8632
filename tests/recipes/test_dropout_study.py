"""The study of early and late dropout runs, and its table is that of the numbers it found."""

from __future__ import annotations

from scipy.stats import ttest_rel

from recipes.mnist1d import dropout_study


def test_a_run_measures_losses_and_directions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = dropout_study.one_run({"width": 4, "samples": 200, "epochs": 10, "p": 0.1}, "early", 3)
    assert [at for at, _ in run["directions"]] == [step / 20 for step in range(20)]
    assert all(0 < found["variance"] < 1 for _, found in run["directions"])
    assert 0 < run["train_loss"] < 10
    assert 0 <= run["test_acc"] <= 100


def test_the_table_has_the_interval_of_the_paired_t_test():
    none, early = [1.0, 1.2, 1.1, 1.4], [0.9, 1.15, 1.0, 1.2]
    results = {
        "small": {
            kind: [{"train_loss": each, "test_acc": 50.0 + 10 * each} for each in losses]
            for kind, losses in (("none", none), ("early", early))
        }
    }
    row = dropout_study.table(results).splitlines()[-1]
    interval = ttest_rel(early, none).confidence_interval(0.95)
    assert f"-0.113 [{interval.low:+.3f}, {interval.high:+.3f}]" in row
