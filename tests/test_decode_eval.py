"""The benchmark of decode steps, at a tiny shape on whatever device there is; its times are not judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.eval import decode
from compress.eval.random_models import SHAPES, random_pair
from compress.kernels.reference import relative_error
from compress.qlinear import QuantLinear

ARGS = ["--device", "cpu", "--shape", "tiny", "--cache", "40", "--steps", "4", "--batches", "1,3"]


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe takes a second; a round figure checks the formula better."""
    monkeypatch.setattr(decode, "copy_bandwidth", lambda options: 1e10)


def test_a_run_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the definitions of the module's docstring, recomputed from a row's own fields and from the tiny shape;
    the last line of stdout is the written file."""
    decode.main([*ARGS, "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "decode_cpu.json").read_text())
    assert json.loads(lines[-1]) == result
    ways = ["transformers", "engine", "engine int4"]
    assert [(r["batch"], r["way"]) for r in result["rows"]] == [(b, way) for b in (1, 3) for way in ways]
    linears, head = 2 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512), 512 * 256
    for row in result["rows"]:
        assert row["failure"] is None and 0 <= row["error"] < 1e-4
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["p50_ms"] * 1e3)
        assert row["roofline_fraction"] == pytest.approx(row["bytes_moved"] / 1e10 / row["p50_ms"] * 1e3)
        assert row["mean_cached_tokens"] == 40 - 2.5  # 36, 37, 38 and 39 tokens before the four timed steps
        weights = linears * (0.5 + 4 / 128 + 1 / 128) if row["way"] == "engine int4" else linears * 4
        cache = 2 * 2 * 2 * 64 * 4 * (row["mean_cached_tokens"] + 1)  # keys and values, layers, KV heads, head size
        assert row["bytes_moved"] == weights + 4 * (head + 5 * 256) + row["batch"] * (256 * 4 + cache)
    table = [line for line in lines if line.startswith("tiny")]
    assert len(table) == 6 and all("1.00x" in line for line in table if "int4" not in line and "engine" not in line)


def test_wrong_logits_have_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: an engine whose rotary embedding is off by one position: no figure of it, the run fails, and what was
    right is still reported."""
    right = decode.Decoder

    def off_by_one(*args: Any) -> Any:
        decoder = right(*args)
        decoder.rope = tuple(table.roll(-1, 0) for table in decoder.rope)
        return decoder

    monkeypatch.setattr(decode, "Decoder", off_by_one)
    with pytest.raises(SystemExit, match="failed"):
        decode.main(ARGS)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    for row in rows:
        if row["way"] == "transformers":
            assert row["p50_ms"] > 0
        else:
            assert row["p50_ms"] is None and "logits are off" in row["failure"] and row["error"] > 0.01


def test_unfit_arguments_are_refused(refused: Callable[..., str]) -> None:
    """Oracle: exit code 2 and a message that names the value."""
    for wrong, message in (["--cache", "9"], "--cache 9"), (["--steps", "0"], "--steps 0"), (["--breakdown"], "CUDA"):
        assert message in refused(decode.parse, [*ARGS, *wrong])


def test_random_pair_is_one_function() -> None:
    """Oracle: the dense model's logits equal those of the model of 4-bit layers, whose other weights are the same."""
    before = torch.get_rng_state()
    dense, quantized = random_pair(SHAPES["tiny"], torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    ids = torch.arange(24).view(2, 12) * 21 % 512
    with torch.no_grad():
        assert relative_error(quantized(ids).logits, dense(ids).logits) < 1e-5
    layers = [m for m in quantized.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14 and not any(isinstance(m, QuantLinear) for m in dense.modules())
    assert all(m is quantized.lm_head for m in quantized.modules() if isinstance(m, nn.Linear))  # type: ignore[union-attr]
    assert quantized.lm_head.weight is dense.lm_head.weight  # type: ignore[union-attr]


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    """Oracle: the run itself, which exits with a failure where logits disagree: compiled transformers, captured
    engine, kernels by name."""
    decode.main(["--shape", "tiny", "--cache", "80", "--batches", "1,5", "--breakdown", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "decode_cuda.json").read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        names = " ".join(kernel["kernel"] for kernel in row["breakdown"])
        assert ("_attention_kernel" in names) == (row["way"] != "transformers")
