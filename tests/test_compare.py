"""The comparison table and the scale benchmark, on records and models made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_records import make_record

from compress.errors import ConfigError
from compress.eval import scale
from compress.eval.compare import comparable_groups, find_records, markdown, rows


def write(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True)
    path = folder / "run.json"
    path.write_text(json.dumps(make_record(**changes)))
    return path


def test_table_gives_kl_as_a_ratio_to_rtn_of_as_many_bits(tmp_path: Path) -> None:
    """Oracle: the quotient of the two records' KL, by hand."""
    write(tmp_path / "a", name="rtn4", transform="none", rounding="rtn")
    write(tmp_path / "b", name="gptq4", transform="none", rounding="gptq")
    records = find_records([str(tmp_path)])
    for record in records:
        record["quality"]["kl"] = {"rtn4": 0.1, "gptq4": 0.04}[record["name"]]
    (group,) = comparable_groups(records)
    by_name = {r["name"]: r for r in rows(group)}
    assert by_name["gptq4"]["kl_ratio_to_rtn"] == pytest.approx(0.4)
    assert by_name["rtn4"]["kl_ratio_to_rtn"] == 1
    table = markdown(group)
    assert table.index("| gptq4 ") < table.index("| rtn4 ")  # best first


def test_runs_of_other_data_are_never_in_one_table(tmp_path: Path) -> None:
    """Oracle: a table compares like with like, so another evaluation hash makes another table."""
    records = [make_record(name="rtn4"), make_record(name="gptq4")]
    records[1]["quality"]["dataset_sha256"] = "f" * 64
    assert len(comparable_groups(records)) == 2


def test_nothing_to_compare_is_an_error(tmp_path: Path) -> None:
    """Oracle: the rule that an empty search is said, not shown as an empty table."""
    with pytest.raises(ConfigError, match=r"no run\.json"):
        find_records([str(tmp_path)])
    with pytest.raises(ConfigError, match="neither"):
        find_records([str(tmp_path / "absent")])


def test_peak_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the streaming engine's claim. 24 blocks weigh 21 blocks more than 3 do; the peak of quantizing them may
    not rise by even a quarter of that."""
    monkeypatch.setitem(scale.SHAPES, "test", (128, 1024, 4, 2, 256))
    peaks = {}
    for blocks in (3, 24):
        figures = scale.measure(scale.Job("test", blocks, "rtn4", 2, 64, 2), torch.device("cpu"), tmp_path)
        peaks[blocks] = figures["peak_bytes"]
        assert figures["seconds"] > 0 and figures["model_bytes"] > blocks * figures["block_bytes"]
    float32_growth = 21 * 2 * figures["block_bytes"]
    assert peaks[24] - peaks[3] < float32_growth / 4
