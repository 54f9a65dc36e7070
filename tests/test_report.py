"""Report: the terminal summary, the JSON for machines, the HTML page and the PNG, all from one record."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from PIL import Image
from rich.console import Console
from run_records import make_record, make_row, make_task

from compress.config import GateConfig
from compress.errors import ArtifactError
from compress.frontier import Frontier, SkippedRun, load_runs
from compress.gate import compare_with_baseline, update_baseline
from compress.html import render_report
from compress.html.charts import figures
from compress.record import check_record, read_record
from compress.report import print_summary, summary_json, write_report
from compress.units import format_bytes, format_ms, format_seconds, format_stderr
from compress.verdict import task_verdict, worst_layers

HOSTILE = "<script>alert(1)</script>&%{x}[bold]\"'"


def runs_of(tmp_path: Path, records: list[dict[str, Any]]) -> Frontier:
    for record in records:
        folder = Path(record["run_dir"])
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(record))
    quality = records[0]["quality"] or {}
    return load_runs(tmp_path, records[0]["source_sha256"], quality.get("dataset_sha256"))


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    return make_record("gptq4", kl=0.0351, run_dir=str(tmp_path / "gptq4"), warnings=["lm_head is tied and was kept"])


@pytest.fixture
def frontier(tmp_path: Path, record: dict[str, Any]) -> Frontier:
    others = [
        make_record("bf16", kl=0.0, weight_mb=61.8, decode_ms=9.0, transform="none", rounding="none", layers=[]),
        make_record("rtn4", kl=0.098, decode_ms=6.2),
        make_record("gptq3", kl=0.16, weight_mb=15.8, speed=None),
    ]
    for other in others:
        other["run_dir"] = str(tmp_path / other["name"])
    return runs_of(tmp_path, [record, *others])


def printed(record: dict[str, Any], frontier: Frontier, width: int = 150, **options: Any) -> str:
    buffer = io.StringIO()
    print_summary(record, frontier, Console(file=buffer, width=width), **options)
    return buffer.getvalue()


# -- record -----------------------------------------------------------------------------------------------


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of a nested record, first elements of lists standing for all."""
    if isinstance(value, list):
        return paths_of(value[0], (*prefix, 0)) if value and isinstance(value[0], dict) else []
    if not isinstance(value, dict):
        return []
    return [p for key, v in value.items() for p in [(*prefix, key), *paths_of(v, (*prefix, key))]]


# what readers look for but can do without
OPTIONAL = {
    *(("environment", key) for key in ("python", "torch", "transformers", "triton", "threads")),
    *(("speed", key) for key in ("backend", "mode", "n_samples")),
    *(("speed", "n_samples", key) for key in ("prefill", "decode")),
    ("speed", "rows", 0, "reference_bytes_moved"),
    *(("layers", 0, key) for key in ("scheme", "n_tokens", "error_of", "damping", "seconds")),
    *(("timings", key) for key in make_record()["timings"]),
}


@pytest.mark.parametrize("path", paths_of(make_record()), ids=lambda p: ".".join(map(str, p)))
def test_every_key_is_required_or_known_to_be_optional(path: tuple[Any, ...]) -> None:
    """Oracle: the written record less one key. A required one is named; without an optional one everything that
    reads the record still works."""
    record = make_record()
    target: Any = record
    for part in path[:-1]:
        target = target[part]
    del target[path[-1]]
    if path not in OPTIONAL:
        with pytest.raises(ArtifactError, match=str(path[-1])):
            check_record(record)
        return
    check_record(record)
    frontier = load_runs("/nonexistent", record["source_sha256"], record["quality"]["dataset_sha256"], record)
    assert frontier.points and printed(record, frontier) and figures(record, frontier) and summary_json(record)


def test_record_reader_names_the_file(tmp_path: Path) -> None:
    """Oracle: the path and the reason in the error."""
    for content, says in ((None, "cannot be read"), ("{", "not valid JSON"), ("{}", "missing")):
        path = tmp_path / "run.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ArtifactError, match=says) as error:
            read_record(path)
        assert str(path) in str(error.value)


# -- terminal ---------------------------------------------------------------------------------------------


def test_summary_shows_what_matters(record: dict[str, Any], frontier: Frontier) -> None:
    """Oracle: figures computed by hand from the record, and the paths."""
    text = printed(record, frontier)
    for fact in (
        "reference", "w4g128 sym, awq + rtn", "61.8 MB -> 19.4 MB", "0.03510 ± 0.00042", "44.32 ± 0.60", "verified",
        "-0.0120 ± 0.0040", "within noise", "0.88x", "1.50x", "AMD EPYC 9R14", "model.layers.5.mlp.down_proj",
        "fallback in model.layers.1.mlp.down_proj: damping raised to 0.1", "lm_head is tied", "dominated by gptq4",
        "on the frontier by KL and size alone", record["run_dir"], record["artifact"],
    ):  # fmt: skip
        assert fact in text, fact


def test_summary_of_disabled_stages(record: dict[str, Any]) -> None:
    """Oracle: what was not measured is said, and no table of it appears."""
    bare = record | {"quality": None, "speed": None, "calibration": None, "layers": [], "verified": None}
    text = printed(bare, Frontier(()))
    assert "eval.enabled=false" in text and "bench.enabled=false" in text
    assert "Tasks" not in text and "speedup" not in text and "Worst" not in text
    assert re.search(r"verified +no", text)


def test_summary_names_unreadable_and_incomparable_runs(record: dict[str, Any]) -> None:
    """Oracle: the names and reasons of runs that are not on the frontier."""
    frontier = Frontier((), (SkippedRun("llama", "/x", "other source weights"),), (SkippedRun("bad", "/y", "cut off"),))
    text = printed(record, frontier)
    assert "llama: other source weights" in text and "run bad left out of the frontier: cut off" in text


def test_summary_does_not_read_markup_in_names(record: dict[str, Any]) -> None:
    """Oracle: `[bold]` and `[/]` are printed as they are; the latter would raise if rich read it."""
    record |= {"model": "[bold]m[/]", "warnings": ["[/red] odd"], "name": "[/x]"}
    record["layers"][0]["name"] = "[/layer]"
    record["layers"][0]["error"] = 9.0
    text = printed(record, Frontier(()))
    assert all(name in text for name in ("[bold]m[/]", "[/red] odd", "[/x]", "[/layer]"))


def test_task_verdicts() -> None:
    """Oracle: by hand; two standard errors are 0.008, and lower is better for perplexity."""
    assert task_verdict(make_task(difference=-0.009)) == "worse"
    assert task_verdict(make_task(difference=0.009)) == "better"
    assert task_verdict(make_task(difference=-0.007)) == "within noise"
    assert task_verdict(make_task(difference=-0.5, difference_stderr=None)) == "no stderr"
    assert task_verdict(make_task(difference=0.5, higher_is_better=False)) == "worse"


def test_worst_layers_ignore_those_kept() -> None:
    """Oracle: sorted by hand; kept layers have no error."""
    layer = {"status": "quantized", "error_rtn": None, "fallback": None}
    layers = [layer | {"name": n, "error": e} for n, e in (("a", 0.1), ("b", None), ("c", 0.3), ("d", 0.2))]
    assert [x["name"] for x in worst_layers({"layers": layers}, 2)] == ["c", "d"]


def test_summary_json_is_one_line_of_json(record: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: a JSON round trip, and the record's own values under the promised keys."""
    update_baseline(record, tmp_path / "b.json")
    gate = compare_with_baseline(record, tmp_path / "b.json", GateConfig())
    line = json.dumps(summary_json(record, gate), allow_nan=False)
    data = json.loads(line)
    assert "\n" not in line
    assert (data["model"], data["recipe"], data["verified"]) == ("reference", "gptq4", True)
    assert data["quality"]["kl"] == 0.0351 and data["quality"]["tasks"]["arc_easy/acc"]["difference"] == -0.012
    assert data["size"] == record["size"] and data["speed"]["rows"][1]["speedup"] == 1.5
    assert data["gate"]["passed"] is True
    assert summary_json(record | {"quality": None, "speed": None})["quality"] is None


# -- files ------------------------------------------------------------------------------------------------


def test_write_report(record: dict[str, Any], frontier: Frontier) -> None:
    """Oracle: the files parse; the JSON holds the record and the frontier; nothing temporary is left."""
    folder = Path(record["run_dir"])
    write_report(folder, record, frontier)
    assert sorted(p.name for p in folder.iterdir()) == ["frontier.png", "report.html", "report.json", "run.json"]
    data = json.loads((folder / "report.json").read_text())
    assert {key: data[key] for key in record} == record and data["gate"] is None
    assert {p["label"]: p["dominated_by"] for p in data["frontier"]["points"]}["rtn4"] == ["gptq4"]
    with Image.open(folder / "frontier.png") as image:
        assert image.format == "PNG" and image.size == (1600, 720)
        # both halves hold something drawn in the colour of this run
        blue = image.convert("RGB").point(lambda v: v)
        pixels = blue.load()
        assert pixels is not None
        found = [x for x in range(1600) for y in range(0, 720, 2) if pixels[x, y] == (0x24, 0x57, 0xD6)]
        assert min(found) < 800 < max(found)


class Page(HTMLParser):
    """Elements, scripts and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A report whose every string is hostile, the keys of free-form sections too."""

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        keep = ("phase", "source_sha256", "dataset_sha256", "run_dir", "device", "rounding")
        return f"{value}{HOSTILE}" if isinstance(value, str) and key not in keep else value

    tmp_path = tmp_path_factory.mktemp("hostile")
    bad = poison(make_record("gptq4", kl=0.0351, run_dir=str(tmp_path / "gptq4"), warnings=["w"], command=["c"]))
    bad["timings"] |= {HOSTILE: 1.0}
    bad["environment"] |= {HOSTILE: HOSTILE}
    other = poison(make_record("rtn4", run_dir=str(tmp_path / "rtn4"), source_sha256="0" * 64))
    (tmp_path / HOSTILE.replace("/", "")).mkdir()
    (tmp_path / HOSTILE.replace("/", "") / "run.json").write_text("{")
    frontier = runs_of(tmp_path, [bad, other])
    assert frontier.incomparable and frontier.unreadable and frontier.points
    write_report(bad["run_dir"], bad, frontier)
    return Page((Path(bad["run_dir"]) / "report.html").read_text(encoding="utf-8"))


def test_hostile_strings_are_only_text(hostile_page: Page) -> None:
    """Oracle: Python's HTML parser sees three scripts (data, plotly, ours) and the strings as text."""
    assert [attrs.get("type") for tag, attrs in hostile_page.tags if tag == "script"] == [
        "application/json",
        None,
        None,
    ]
    assert hostile_page.text.count("<script>alert(1)</script>") > 20
    assert not [attrs for _, attrs in hostile_page.tags if any(name.startswith("on") for name in attrs)]
    data = json.loads(hostile_page.scripts[0])
    labels = [t for trace in data["frontier-size"]["data"] for t in trace.get("text", [])]
    assert labels and all("<" not in label for label in labels)


def test_page_is_self_contained(hostile_page: Page) -> None:
    """Oracle: no element loads anything, and the policy admits exactly the two scripts that are there."""
    loading = [a for t, a in hostile_page.tags if t in ("link", "img", "iframe") or a.get("src") or a.get("href")]
    assert loading == []
    (policy,) = [a["content"] for t, a in hostile_page.tags if t == "meta" and "http-equiv" in a]
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in hostile_page.scripts[1:]]
    assert policy is not None and policy.startswith("default-src 'none'")
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes


def test_every_figure_is_valid_and_has_its_place(record: dict[str, Any], frontier: Frontier) -> None:
    """Oracle: plotly's own validation of each specification, and an element of the page for each."""
    drawn = figures(record, frontier)
    assert set(drawn) == {"frontier-size", "frontier-latency", "speed-prefill", "speed-decode", "roofline", "layers"}
    page = Page(render_report(record, frontier))
    ids = [attrs.get("id") for _, attrs in page.tags]
    for name, figure in drawn.items():
        go.Figure(figure)
        assert ids.count(name) == 1
    assert json.loads(page.scripts[0]) == json.loads(json.dumps(drawn))


def test_frontier_figure_plots_the_points(record: dict[str, Any], frontier: Frontier) -> None:
    """Oracle: the runs' own KL and sizes; the axis is a square root, so squares give KL back. gptq3 has no latency
    and appears in the plot of sizes alone."""
    drawn = figures(record, frontier)
    traces = {t["name"]: t for t in drawn["frontier-size"]["data"] if t.get("name")}
    assert traces["this run"]["y"][0] ** 2 == pytest.approx(0.0351) and traces["this run"]["x"] == [19.4]
    assert sorted(y**2 for y in traces["on the frontier"]["y"]) == pytest.approx([0.0, 0.16])
    assert traces["dominated"]["text"] == ["rtn4"]
    low, high = drawn["frontier-size"]["layout"]["yaxis"]["range"]
    assert low < 0 < 0.16**0.5 < high
    labels = [text for t in drawn["frontier-latency"]["data"] for text in t.get("text", [])]
    assert sorted(labels) == ["bf16", "gptq4", "rtn4"]


def test_roofline_points_are_operations_over_time(record: dict[str, Any], frontier: Frontier) -> None:
    """Oracle: operations / median time of each row, which the fraction of the roof must reproduce."""
    roof, reference, compressed = figures(record, frontier)["roofline"]["data"]
    rows = record["speed"]["rows"]
    assert compressed["y"] == pytest.approx([r["flops"] / (r["p50_ms"] / 1e3) / 1e9 for r in rows])
    assert reference["y"] == pytest.approx([r["flops"] / (r["reference_p50_ms"] / 1e3) / 1e9 for r in rows])
    assert max(roof["y"]) == pytest.approx(record["speed"]["flops_per_s"] / 1e9)


@pytest.mark.parametrize(
    "change",
    [
        {"quality": None},
        {"speed": None},
        {"layers": []},
        {"calibration": None, "artifact": None, "verified": None, "timings": {}},
        {"quality": None, "speed": None, "layers": [], "calibration": None},
    ],
    ids=str,
)
def test_report_of_partial_records(change: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: what is missing has no plot and no heading, and is announced where a reader looks first."""
    record = make_record(run_dir=str(tmp_path / "r")) | change
    frontier = runs_of(tmp_path, [record])
    write_report(record["run_dir"], record, frontier)
    page = Page((tmp_path / "r" / "report.html").read_text(encoding="utf-8"))
    drawn = json.loads(page.scripts[0])
    assert ("frontier-size" in drawn) == (record["quality"] is not None)
    assert ("speed-decode" in drawn) == ("roofline" in drawn) == (record["speed"] is not None)
    assert ("layers" in drawn) == bool(record["layers"])
    assert ("quality was not measured" in page.text) == (record["quality"] is None)
    assert ("speed was not measured" in page.text) == (record["speed"] is None)
    assert ("do not ship" in page.text) == (record["verified"] is not True)


def test_slower_than_the_original_is_a_warning(tmp_path: Path) -> None:
    """Oracle: a speedup below 1 is named at the top of the page."""
    record = make_record(run_dir=str(tmp_path / "r"))
    record["speed"]["rows"] = [make_row("decode", 8, 10.0, 7.5)]
    page = Page(render_report(record, runs_of(tmp_path, [record])))
    assert "decode at batch 8 is slower than the unquantized model (0.75×)" in page.text


def test_failed_gate_is_on_the_page(record: dict[str, Any], frontier: Frontier, tmp_path: Path) -> None:
    """Oracle: the gate's own table, regression included."""
    update_baseline(record, tmp_path / "b.json")
    record["quality"]["kl"] *= 2
    gate = compare_with_baseline(record, tmp_path / "b.json", GateConfig())
    page = Page(render_report(record, frontier, gate))
    assert "The regression gate failed" in page.text and gate.table() in page.text


def test_reproduce_command_is_the_recorded_one(record: dict[str, Any], frontier: Frontier) -> None:
    """Oracle: the recorded arguments, quoted for a shell."""
    record["command"] = ["python", "-m", "compress", "recipe=gptq4", "calibration.path=my texts.txt"]
    page = Page(render_report(record, frontier))
    assert "python -m compress recipe=gptq4 'calibration.path=my texts.txt'" in page.text


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.0379, 0.00041, "0.03790 ± 0.00041"),
        (44.32, 0.6, "44.32 ± 0.60"),
        (1234.5, 33.0, "1234 ± 33"),
        (0.0, 0.0, "0"),
        (0.5, None, "0.5"),
        (1e-10, 1e-11, "1e-10 ± 1.0e-11"),
        (0.0379, 0.0996, "0.038 ± 0.100"),
    ],
)
def test_values_with_standard_error(value: float, stderr: float | None, text: str) -> None:
    """Oracle: by hand; two significant digits of the standard error."""
    assert format_stderr(value, stderr) == text


def test_units() -> None:
    """Oracle: by hand."""
    assert [format_bytes(b) for b in (None, 512, 19_400_000, 999_600_000, 1.5e12)] == [
        "–", "512 B", "19.4 MB", "1000 MB", "1.5 TB",
    ]  # fmt: skip
    assert [format_ms(t) for t in (None, 0.01234, 9, 99.5, 140.2, 12_345)] == [
        "–", "0.0123 ms", "9.00 ms", "99.5 ms", "140 ms", "12.3 s",
    ]  # fmt: skip
    assert [format_seconds(t) for t in (0.42, 31, 59.7, 724, 11_223)] == [
        "0.42 s", "31 s", "60 s", "12 min 04 s", "3 h 07 min",
    ]  # fmt: skip
