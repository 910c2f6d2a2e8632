"""Summaries of made-up runs: correction per metric, costs as medians of ratios, older files."""

import json
import math

import pytest
from scipy.stats import ttest_rel

from lightning_aux.comparison import (
    Comparison,
    Measure,
    RunResult,
    Variant,
    read_result,
    summarise,
    write_result,
)
from lightning_aux.report.wording import remarks

SEEDS = (0, 1, 2)
VALUES = {
    "baseline": [0.50, 0.52, 0.55],
    "a": [0.60, 0.63, 0.64],
    "b": [0.54, 0.55, 0.61],
    "c": [0.51, 0.50, 0.58],
}


def comparison(*names):
    return Comparison(
        title="",
        description="",
        decides=Measure("acc"),
        also=(Measure("loss", "min"),),
        curve=None,
        reference="baseline",
        seeds=SEEDS,
        overrides={},
        variants={name: Variant(name, {}, {}, {}) for name in names},
    )


def runs(names, **changes):
    return [
        RunResult(
            name,
            seed,
            "",
            metrics={"acc": VALUES[name][seed], "loss": seed * VALUES[name][seed]},
            **changes,
        )
        for name in names
        for seed in SEEDS
    ]


def test_p_values_are_corrected_among_the_variants_of_each_metric():
    rows = summarise(comparison(*VALUES), runs(VALUES))
    plain = {n: ttest_rel(VALUES[n], VALUES["baseline"]).pvalue for n in ("a", "b", "c")}
    first, second, third = sorted(plain, key=plain.get)
    stepwise = [3 * plain[first], 2 * plain[second], plain[third]]
    expected = {
        first: stepwise[0],
        second: max(stepwise[:2]),
        third: max(stepwise),
    }
    found = {row.name: row.paired.p_adjusted for row in rows if row.paired}
    assert found == pytest.approx({name: min(1, p) for name, p in expected.items()})
    assert {row.name: row.verdict for row in rows} == {
        "baseline": None,
        "a": "better" if found["a"] < 0.05 else "no difference shown",
        "b": "better" if found["b"] < 0.05 else "no difference shown",
        "c": "no difference shown",
    }
    (row,) = [row.also[0] for row in rows if row.name == "a"]
    losses = [[s * VALUES[n][s] for s in SEEDS] for n in ("a", "baseline")]
    assert row.paired.p == pytest.approx(ttest_rel(*losses).pvalue)


def test_more_variants_can_take_a_verdict_away():
    few = summarise(comparison("baseline", "b"), runs(("baseline", "b")))
    many = summarise(comparison(*VALUES), runs(VALUES))
    b_few, b_many = (next(r for r in rows if r.name == "b") for rows in (few, many))
    assert b_few.paired.p == b_many.paired.p < 0.05 <= b_many.paired.p_adjusted
    assert (b_few.verdict, b_many.verdict) == ("better", "no difference shown")
    assert b_few.paired.low == b_many.paired.low, "intervals are not corrected"


def test_a_variant_without_finished_runs_is_not_counted():
    failed = [RunResult("c", seed, "", error="failed") for seed in SEEDS]
    with_failed = summarise(comparison(*VALUES), runs(("baseline", "a", "b")) + failed)
    without = summarise(comparison("baseline", "a", "b"), runs(("baseline", "a", "b")))
    adjusted = [[row.paired.p_adjusted for row in rows[1:3]] for rows in (with_failed, without)]
    assert adjusted[0] == adjusted[1]


def test_peak_memory_is_the_median_and_its_ratio_that_of_each_seed():
    results = runs(("baseline", "a"))
    for result, peak in zip(results, [100, 200, 400, 150, 220, None], strict=True):
        result.peak_bytes = peak
    baseline, a = summarise(comparison("baseline", "a"), results)
    assert (baseline.peak_bytes, baseline.peak_ratio) == (200, None)
    assert (a.peak_bytes, a.peak_ratio) == (185, pytest.approx((1.5 + 1.1) / 2))


def test_results_of_an_older_version_are_read(tmp_path):
    write_result(tmp_path, runs(("a",))[0])
    content = json.loads((tmp_path / "result.json").read_text())
    for new in ("peak_bytes", "device", "alone"):
        del content[new]
    (tmp_path / "result.json").write_text(json.dumps(content))
    result = read_result(tmp_path)
    assert (result.peak_bytes, result.device, result.alone) == (None, "", True)
    assert result.metrics["acc"] == VALUES["a"][0]


def test_it_is_said_when_costs_cannot_be_compared():
    assert remarks(runs(("a",), device="cpu")) == []
    (said,) = remarks(runs(("a",), device="cpu", alone=False))
    assert "side by side" in said
    (said,) = remarks([*runs(("a",), device="cpu"), *runs(("b",), device="NVIDIA H100")])
    assert "NVIDIA H100" in said
    assert remarks([RunResult("a", 0, "", error="lost", alone=False)]) == []


def test_one_seed_has_no_p_value():
    results = [run for run in runs(("baseline", "a")) if run.seed == 0]
    _, a = summarise(comparison("baseline", "a"), results)
    assert math.isnan(a.paired.p_adjusted)
    assert a.verdict == "one seed, no interval"
