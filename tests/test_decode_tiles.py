"""Decode steps under different tiles, at a tiny shape on whatever device there is; their times are not judged."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.decoder import StepTiles
from compress.errors import ConfigError
from compress.eval import decode, decode_tiles
from compress.kernels.decode_attention import AttentionConfig
from compress.kernels.dense_decode import DenseConfig
from compress.kernels.w4a16_decode import DecodeConfig

ARGS = ["--shape", "tiny", "--cache", "20", "--steps", "1", "--rounds", "2"]


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe takes a second; a round figure checks the formula better."""
    monkeypatch.setattr(decode, "copy_bandwidth", lambda options: 1e10)


def test_a_run_is_complete_and_names_what_no_kernel_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: definitions of the module's docstring from a row's own fields; a product that the model does not have
    fails the run, without a time that looks as if it had been tried."""
    with pytest.raises(SystemExit, match="failed"):
        decode_tiles.main([*ARGS, "--try", "attention=16,2,4,2", "--try", "999x256=8,16,4,2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "decode_tiles_tiny_1.json").read_text())
    assert json.loads(out.splitlines()[-1]) == result
    rules, attention, wrong = result["rows"]
    assert [row["tiles"] for row in result["rows"]] == ["rules", "attention=16,2,4,2", "999x256=8,16,4,2"]
    for row in (rules, attention):
        assert len(row["rounds_ms"]) == 2 and row["p50_ms"] == statistics.median(row["rounds_ms"]) > 0
        assert row["roofline_fraction"] == pytest.approx(result["bytes_moved"] / 1e10 / row["p50_ms"] * 1e3)
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["p50_ms"]) and row["failure"] is None
    assert rules["difference"] == 0 and attention["difference"] < 1e-2
    assert wrong["p50_ms"] is None and not wrong["rounds_ms"] and "no product of this step" in wrong["failure"]
    assert "FAILED" in out


@pytest.mark.gpu
def test_tiles_of_every_kernel_on_a_gpu() -> None:
    """Oracle: the logits under the rules."""
    decode_tiles.main([*ARGS, "--try", "head=8,256,4", "--try", "256x512=8,16,4,2 512x256=8,32,4,1 attention=16,2"])


def test_logits_that_differ_have_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a second step whose rotary embedding is off by one position."""
    right = decode_tiles.Decoder

    def off_by_one(*args: object, tiles: StepTiles, **kwargs: object) -> object:
        decoder = right(*args, tiles=tiles, **kwargs)  # type: ignore[arg-type]
        if tiles.attention:
            decoder.rope = (decoder.rope[0].roll(-1, 0), decoder.rope[1].roll(-1, 0))
        return decoder

    monkeypatch.setattr(decode_tiles, "Decoder", off_by_one)
    with pytest.raises(SystemExit, match="failed"):
        decode_tiles.main([*ARGS, "--try", "attention=16,2,4,2"])
    assert "FAILED  attention=16,2,4,2: ValueError: logits differ by" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_logits_that_are_no_numbers_are_recorded_as_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the file, which is JSON, and the other step's times in it."""
    right = decode_tiles.Decoder

    def no_numbers(*args: object, tiles: StepTiles, **kwargs: object) -> object:
        decoder = right(*args, tiles=tiles, **kwargs)  # type: ignore[arg-type]
        if tiles.attention:
            decoder.rope[0].fill_(float("nan"))
        return decoder

    monkeypatch.setattr(decode_tiles, "Decoder", no_numbers)
    with pytest.raises(SystemExit, match="failed"):
        decode_tiles.main([*ARGS, "--try", "attention=16,2,4,2", "--out", str(tmp_path)])
    rules, wrong = json.loads((tmp_path / "decode_tiles_tiny_1.json").read_text())["rows"]
    assert rules["p50_ms"] > 0 and wrong["difference"] is wrong["p50_ms"] is None
    assert "inf" in wrong["failure"]


def test_tiles_are_read() -> None:
    """Oracle: fields in order, by hand."""
    assert decode_tiles.parse_tiles("head=8,1024,8 4096x14336=8,32,8,2,1,168 attention=64,16 6144x4096=8,16,4,4") == (
        StepTiles(
            AttentionConfig(64, 16),
            {(4096, 14336): DecodeConfig(8, 32, 8, 2, 1, 168), (6144, 4096): DecodeConfig(8, 16, 4, 4)},
            DenseConfig(8, 1024, 8),
        )
    )
    assert decode_tiles.parse_tiles("") == StepTiles()
    for text, said in (("heads=1", "name attention, head or the N x K"), ("head=1,2,3,4", "block_n, block_k, warps"),
                       ("4096=8,16,4,4", "'4096=8,16,4,4'"), ("attention=a", "block_t, splits")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            decode_tiles.parse_tiles(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "10"], "needs a cache of 56 or more"),
        (["--rounds", "0"], "a round"),
        (["--try", "head=wide"], "numbers for block_n"),
        (["--shape", "huge"], "invalid choice"),
    ],
)
def test_unfit_arguments_are_refused(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    """Oracle: argparse's exit code 2, and the value and the rule."""
    assert message in " ".join(refused(decode_tiles.parse, arguments).split())


def test_without_gpu_and_interpreter_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """Oracle: the message, which names the device."""
    monkeypatch.setattr(decode_tiles.common, "INTERPRETED", False)
    assert "CUDA GPU, not on cpu" in refused(decode_tiles.parse, ["--device", "cpu"])
