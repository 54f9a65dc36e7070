"""Regression gate: what counts as a regression, and what a baseline must be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_records import make_record, make_task

from compress.config import GateConfig
from compress.errors import ConfigError, GateFailure
from compress.gate import check_gate, compare_with_baseline, update_baseline

CONFIG = GateConfig()


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    path = tmp_path / "gate" / "awq4.json"
    update_baseline(make_record(), path)
    return path


def changed(**quality: Any) -> dict[str, Any]:
    """The baseline's run with other quality figures."""
    record = make_record()
    record["quality"] |= quality
    return record


def test_same_run_passes_with_every_metric(baseline: Path) -> None:
    """Oracle: a run against itself is worse by exactly 0 in every metric."""
    result = check_gate(make_record(), baseline, CONFIG)
    assert result.passed and not result.not_compared
    assert [row.metric for row in result.rows] == [
        "kl", "ppl", "top1", "weight_bytes", "arc_easy/acc", "hellaswag/acc", "wikitext/ppl",
    ]  # fmt: skip
    assert all(row.worse_by == 0 for row in result.rows)


def worse(metric: str, factor: float) -> dict[str, Any]:
    """A run whose one metric is worse by `factor`, relatively."""
    record = make_record()
    quality = record["quality"]
    match metric:
        case "kl" | "ppl":
            quality[metric] *= 1 + factor
        case "top1":
            quality["top1"] *= 1 - factor
        case "weight_bytes":
            record["size"]["weight_bytes"] *= 1 + factor
        case "arc_easy/acc":
            quality["tasks"][0]["value"] *= 1 - factor
        case "wikitext/ppl":
            quality["tasks"][2]["value"] *= 1 + factor
    return record


@pytest.mark.parametrize(
    ("metric", "limit"),
    [
        ("kl", 0.10),
        ("ppl", 0.02),
        ("top1", 0.01),
        ("weight_bytes", 0.01),
        ("arc_easy/acc", 0.02),
        ("wikitext/ppl", 0.02),
    ],
)
def test_each_metric_fails_just_beyond_its_limit(baseline: Path, metric: str, limit: float) -> None:
    """Oracle: the limits of GateConfig; for arc_easy two standard errors (0.0113, 1.9 %) lie above the limit."""
    assert check_gate(worse(metric, 0.9 * limit), baseline, CONFIG).passed
    with pytest.raises(GateFailure) as failure:
        check_gate(worse(metric, 1.1 * limit), baseline, CONFIG)
    (line,) = [line for line in str(failure.value).splitlines() if "REGRESSED" in line]
    assert line.startswith(metric)
    assert failure.value.exit_code == 3


def test_improvement_never_fails(baseline: Path) -> None:
    """Oracle: by hand; each metric is much better."""
    record = changed(kl=0.001, ppl=10.0, top1=0.999, tasks=[make_task(difference=0.2)])
    record["size"]["weight_bytes"] = 1
    assert check_gate(record, baseline, CONFIG).passed


def test_noise_alone_does_not_fail(tmp_path: Path) -> None:
    """Oracle: KL rises by 30 % of itself, but by 1.8 standard errors of the difference; then by 2.2."""
    record = make_record(kl=0.01)
    record["quality"]["kl_stderr"] = 0.003 / 1.8 / math.sqrt(2)
    update_baseline(record, tmp_path / "b.json")
    record["quality"]["kl"] = 0.013
    assert check_gate(record, tmp_path / "b.json", CONFIG).passed
    record["quality"]["kl"] = 0.01 + 0.003 * 2.2 / 1.8
    with pytest.raises(GateFailure):
        check_gate(record, tmp_path / "b.json", CONFIG)


def test_spread_of_the_text_does_not_hide_a_loss(baseline: Path) -> None:
    """Oracle: a perplexity 3 % higher is within two of its own standard errors (0.61 of 45.7, twice), yet 12 of the
    paired ones; the gate must fail."""
    record = changed(ppl=make_record()["quality"]["ppl"] * 1.03)
    rise = record["quality"]["ppl"] * (1 - 1 / 1.03)
    assert rise < 2 * math.hypot(0.61, 0.61)
    with pytest.raises(GateFailure, match=r"ppl .*REGRESSED"):
        check_gate(record, baseline, CONFIG)


@given(
    st.floats(0, 0.2), st.floats(0, 0.2), st.floats(0, 0.02), st.floats(0, 0.02), st.floats(0, 1)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_rule_for_kl(
    tmp_path_factory: pytest.TempPathFactory, ours: float, theirs: float, se_a: float, se_b: float, limit: float
) -> None:
    """Oracle: the rule as written: beyond the limit and beyond two standard errors of the difference."""
    path = tmp_path_factory.mktemp("gate") / "b.json"
    old, new = make_record(), make_record()
    old["quality"] |= {"kl": theirs, "kl_stderr": se_b}
    new["quality"] |= {"kl": ours, "kl_stderr": se_a}
    update_baseline(old, path)
    (row, *_) = compare_with_baseline(new, path, GateConfig(max_kl_rise=limit)).rows
    rise = ours - theirs
    assert row.regressed == (rise > limit * theirs and rise > 2 * math.hypot(se_a, se_b))


def test_failure_says_by_how_much(baseline: Path) -> None:
    """Oracle: value, baseline, rise and limit computed by hand: 0.05 - 0.0379 = 0.0121, limit 0.00379."""
    with pytest.raises(GateFailure) as failure:
        check_gate(changed(kl=0.05), baseline, CONFIG)
    (line,) = [line for line in str(failure.value).splitlines() if "REGRESSED" in line]
    assert line.split()[:5] == ["kl", "0.05", "0.0379", "0.0121", "0.00379"]
    assert str(baseline) in str(failure.value)


def test_tasks_of_one_side_are_named(baseline: Path) -> None:
    """Oracle: by hand; one shared task, two that only the baseline has, one that only this run has."""
    record = changed(tasks=[make_task(), make_task("piqa")])
    result = check_gate(record, baseline, CONFIG)
    assert "arc_easy/acc" in [row.metric for row in result.rows]
    assert result.not_compared == ("hellaswag/acc", "piqa/acc", "wikitext/ppl")
    assert "piqa/acc" in result.table()


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", "gptq4"), ("scheme", "w3g128 sym"), ("rounding", "gptq"), ("transform", "none"), ("model", "x/y"),
     ("source_sha256", "bb" * 32)],
)  # fmt: skip
def test_baseline_of_something_else_is_refused(baseline: Path, key: str, value: str) -> None:
    """Oracle: the error names the key, both values and the remedy."""
    with pytest.raises(ConfigError) as error:
        check_gate(make_record() | {key: value}, baseline, CONFIG)
    assert all(part in str(error.value) for part in (key, value, str(make_record()[key]), "gate.update=true"))


@pytest.mark.parametrize("quality", [{"dataset_sha256": "ee" * 32}, {"n_tokens": 17}])
def test_other_evaluation_data_is_refused(baseline: Path, quality: dict[str, Any]) -> None:
    """Oracle: the error names what differs."""
    with pytest.raises(ConfigError, match=next(iter(quality))):
        check_gate(changed(**quality), baseline, CONFIG)


@pytest.mark.parametrize(
    "content",
    [None, "{", "[]", "{}", '{"schema": 1}', '{"schema": 7, "metrics": {}}', '{"schema": 1, "metrics": {"kl": {}}}',
     '{"schema": 1, "metrics": {"kl": {"value": "x", "stderr": 0}}}', '{"schema": 1, "metrics": []}'],
)  # fmt: skip
def test_missing_or_damaged_baseline(tmp_path: Path, content: str | None) -> None:
    """Oracle: every damage is a ConfigError that names the file and the remedy."""
    path = tmp_path / "b.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as error:
        check_gate(make_record(), path, CONFIG)
    assert str(path) in str(error.value) and "gate.update=true" in str(error.value)


@pytest.mark.parametrize("cut", ["metrics", "metrics.ppl", "n_tokens", "metrics.kl.value", "metrics.top1.stderr"])
def test_incomplete_baseline(baseline: Path, cut: str) -> None:
    """Oracle: a good baseline less one key is refused with the remedy, not with a traceback."""
    data = json.loads(baseline.read_text())
    target, (*path, last) = data, cut.split(".")
    for part in path:
        target = target[part]
    del target[last]
    baseline.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"gate\.update=true"):
        check_gate(make_record(), baseline, CONFIG)


def test_no_quality_no_gate(baseline: Path, tmp_path: Path) -> None:
    """Oracle: a run without evaluation can neither be gated nor become a baseline."""
    for act in (lambda r: check_gate(r, baseline, CONFIG), lambda r: update_baseline(r, tmp_path / "n.json")):
        with pytest.raises(ConfigError, match=r"eval\.enabled=true"):
            act(make_record(quality=None))
    assert not (tmp_path / "n.json").exists()


def test_baseline_file_is_stable(tmp_path: Path) -> None:
    """Oracle: two runs that measured the same give the same bytes, wherever and whenever they ran; keys are sorted."""
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    update_baseline(make_record(), a)
    update_baseline(make_record(run_dir="/elsewhere", finished="2030-01-01", timings={}, fingerprint="x"), b)
    assert a.read_bytes() == b.read_bytes()
    assert list(json.loads(a.read_text())) == sorted(json.loads(a.read_text()))
    assert [p.name for p in tmp_path.iterdir()].count("a.json") == 1 and len(list(tmp_path.iterdir())) == 2
