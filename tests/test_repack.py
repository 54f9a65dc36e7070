"""Repacking a model's linears from disk's words to the kernels' layout: what is timed, and that wrong layouts show.

Without a GPU the tiny shape is repacked on the CPU; Triton's interpreter stands for the device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when the kernels are decorated, at import

from compress.checkpoint import encode
from compress.eval import repack
from compress.eval.random_models import SHAPES
from compress.kernels import w4a16, wna16_layout
from compress.kernels.problem import Scheme
from compress.packing import packed_words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEMES = ["w4g128", "w4g32-asym", "w8-channel", "w3g64", "w2g128"]


def test_shapes_are_those_of_the_models_linears() -> None:
    """Oracle: Llama 3 8B's linears by hand, 6.98 G weights in 32 blocks; Qwen3 names its head size."""
    llama = repack.linear_shapes(SHAPES["llama-3-8b"])
    assert llama == [
        (4096, 4096),
        (1024, 4096),
        (1024, 4096),
        (4096, 4096),
        (14336, 4096),
        (14336, 4096),
        (4096, 14336),
    ]
    assert 32 * sum(n * k for n, k in llama) == 6_979_321_856
    assert repack.linear_shapes(SHAPES["qwen3-1.7b"])[:2] == [(2048, 2048), (1024, 2048)]


def test_a_run_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: bytes written out by hand from the two formats, rates from a row's own fields; the last line of stdout is
    the file."""
    repack.main(["--shape", "tiny", "--schemes", ",".join(SCHEMES), "--repeats", "2", "--device", DEVICE,
                 "--out", str(tmp_path)])  # fmt: skip
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / f"repack_{DEVICE}.json").read_text())
    assert (tmp_path / f"repack_{DEVICE}.md").read_text() in out
    shapes = repack.linear_shapes(SHAPES["tiny"])
    weights = 2 * sum(n * k for n, k in shapes)
    assert [row["scheme"] for row in result["rows"]] == SCHEMES
    for row in result["rows"]:
        assert row["wrong"] == [] and row["linears"] == 14 and row["weights"] == weights
        assert row["first_s"] > 0 and row["GB_per_s"] == pytest.approx(row["bytes_moved"] / row["median_s"] / 1e9)
    by_scheme = {row["scheme"]: row["bytes_moved"] for row in result["rows"]}
    shape_tensors = 14 * 16  # two int64 each
    units = 2 * 2 * sum(n for n, _ in shapes)  # one of 16 bits a row of each linear, in the kernel layout at 4 bits
    assert by_scheme["w4g128"] == 2 * (weights // 2 + weights // 128 * 2) + units + shape_tensors
    groups = weights // 32
    assert by_scheme["w4g32-asym"] == 2 * (weights // 2 + 2 * groups) + groups // 2 + groups + units + shape_tensors
    assert by_scheme["w2g128"] == 2 * (weights // 4 + weights // 128 * 2) + shape_tensors


@pytest.mark.parametrize("label", SCHEMES)
def test_repacked_layers_hold_the_codes_that_were_stored(label: str) -> None:
    """Oracle: the layout made from the codes themselves; and codes with one bit changed are seen to differ."""
    scheme = repack.quant_scheme(Scheme.parse(label))
    q = repack.random_weight(48, 256, scheme, torch.device(DEVICE), 3)
    assert scheme.symmetric == bool((q.zero == scheme.mid_code).all())
    tensors = encode(q)
    assert tensors["weight_packed"].shape == (48, packed_words(256, scheme.bits))
    layer = repack.repack(tensors, scheme)
    zero = None if scheme.symmetric else q.zero
    if scheme.bits == 4:
        expected: Any = w4a16.pack_kernel_layout(q.codes, q.scale, zero)
    else:
        expected = wna16_layout.pack(q.codes, q.scale, zero, scheme.bits)
    weight = layer.kernel_weight()
    assert torch.equal(weight.words, expected.words) and torch.equal(weight.scale, expected.scale)
    assert (weight.zero is None) == scheme.symmetric and (zero is None or torch.equal(weight.zero, expected.zero))
    assert repack.holds(layer, q.codes)
    q.codes[47, 255] ^= 1
    assert not repack.holds(layer, q.codes)


def test_a_wrong_layout_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a packer that forgets its last row of words."""
    right = w4a16.pack_kernel_layout

    def wrong(*arguments: Any) -> Any:
        weight = right(*arguments)
        weight.words[:, -1] = 0
        return weight

    monkeypatch.setattr(w4a16, "pack_kernel_layout", wrong)
    with pytest.raises(SystemExit, match="does not hold the codes"):
        repack.main(["--shape", "tiny", "--repeats", "1", "--device", DEVICE])
    assert "wrong at 256x256, 128x256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schemes", "w4"], "they read w4g128"),
        (["--schemes", "w8a8"], "leave it out"),
        (["--repeats", "0"], "one or more"),
    ],
)
def test_arguments_that_cannot_be_run(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    """Oracle: argparse's exit code 2, and what to give instead."""
    assert message in refused(repack.parse, arguments)
