"""Recipes and other tools side by side: what is asked, what comes out, and what is said when it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import main_in_process, verify_in_process, write_text

from compress.calibration import CalibrationSet
from compress.errors import ConfigError, EnvironmentProblem
from compress.eval import compare, peers, side_by_side
from compress.eval.peers import Peer, PeerTask, installed_version, run_peer, wanted_peers
from compress.eval.side_by_side import composed_config
from compress.methods.rtn import rtn_quantize
from compress.models import linear_weight, load_model
from compress.quant import QuantScheme

# A package that rounds to nearest stands in for the real ones, which tests cannot install; the worker is the real one.
_STAND_IN = """
import sys, types
import torch

class Quantizer:
    @staticmethod
    def quantize(weight, nbits, group_size, **_):
        groups = weight.view(-1, group_size)
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = (high - low).clamp(min=1e-9) / (2**nbits - 1)
        return torch.round((groups - low) / scale), (scale, low)

    @staticmethod
    def dequantize(codes, meta):
        return codes * meta[0] + meta[1]
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`hqq` 9.9 for the worker's process: a module and the metadata of its distribution."""
    site = tmp_path / "site"
    (site / "hqq" / "core").mkdir(parents=True)
    for folder in (site / "hqq", site / "hqq" / "core"):
        (folder / "__init__.py").touch()
    (site / "hqq" / "core" / "quantize.py").write_text(_STAND_IN)
    (site / "hqq-9.9.dist-info").mkdir()
    (site / "hqq-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: hqq\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    return site


@pytest.fixture
def task(tiny_model_dir: Path, tmp_path: Path) -> PeerTask:
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    windows = CalibrationSet(ids, "made up")
    return PeerTask(tiny_model_dir, windows, windows, torch.device("cpu"), torch.float32, tmp_path / "peers", 1, 4, {})


PEER = Peer("hqq", "HQQ", QuantScheme(4, group_size=32, symmetric=False), zero_bits=16)


def test_a_peer_is_evaluated_on_the_weights_it_left(stand_in: Path, task: PeerTask) -> None:
    """Oracles: KL of our own asymmetric round-to-nearest, which the stand-in nearly is; the size by hand: 14 linears at
    4 bits and 32 for each group of 32, everything else in float32."""
    row = run_peer(PEER, task)
    loaded = load_model(str(task.model))
    n = sum(linear_weight(m).numel() for b in loaded.blocks for m in b.linears.values())
    others = sum(loaded.source.raw(t).nbytes for t in loaded.source.names()) - 4 * n
    assert row["weight_bytes"] == n * 5 // 8 + others and row["bits_per_weight"] == 5.0
    assert row["name"] == "hqq 9.9: HQQ" and row["scheme"] == "w4g32 asym" and row["quantize_s"] > 0
    weights = {}
    for block in loaded.blocks:
        for name in block.linears:
            full = f"{block.name}.{name}.weight"
            scheme = QuantScheme(4, group_size=32, symmetric=False)
            weights[full] = rtn_quantize(loaded.tensor(full).float(), scheme).dequantize()
    facts = {"version": "1", "seconds": 1.0, "changed": [n.removesuffix(".weight") for n in weights]}
    ours = peers._evaluated(PEER, task, weights, facts)
    assert row["kl"] == pytest.approx(ours["kl"], rel=0.2) and row["kl"] > 0
    assert row["ppl_reference"] == ours["ppl_reference"]
    assert not list(task.folder.glob("hqq*.safetensors"))
    assert torch.equal(load_file(task.folder / "windows.safetensors")["input_ids"], task.windows.input_ids)


def test_a_peer_that_leaves_linears_alone_is_no_comparison(task: PeerTask) -> None:
    """Oracle: the rule in words; and names or shapes that are not the model's."""
    facts = {"version": "1", "seconds": 1.0, "changed": ["model.layers.0.mlp.up_proj"]}
    with pytest.raises(ConfigError, match=r"left 13 of 14 linears as they were, first model.layers.0.mlp.down_proj"):
        peers._evaluated(PEER, task, {}, facts)
    model = load_model(str(task.model)).model
    for name, value in (("no.such.weight", torch.zeros(1)), ("model.norm.weight", torch.zeros(3))):
        with pytest.raises(ConfigError, match="has no place in LlamaForCausalLM"):
            peers.put_weights(model, {name: value})


@pytest.fixture
def broken_python(tmp_path: Path) -> str:
    """An interpreter that has every package, at version 1, and fails at everything else."""
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\n[ "$3" = --version ] && { echo \'{"version": "1"}\'; exit 0; }\n'
        "echo Traceback >&2; echo ValueError: no such device >&2; exit 9\n"
    )
    script.chmod(0o755)
    return str(script)


def test_a_peer_that_fails_says_why(broken_python: str, task: PeerTask) -> None:
    """Oracle: the process's own last words and exit code; its log is kept."""
    with pytest.raises(EnvironmentProblem, match=r"hqq-4g32 failed \(exit 9.*ValueError: no such device"):
        run_peer(PEER, replace(task, pythons={"hqq": broken_python}))
    assert "Traceback" in (task.folder / "hqq-4g32.log").read_text()


def test_what_is_installed_is_asked_of_the_interpreter_that_would_run_it(stand_in: Path) -> None:
    """Oracle: the stand-in's metadata; a package that is nowhere; an interpreter that is none."""
    assert installed_version("hqq", sys.executable) == "9.9"
    assert installed_version("auto-round", sys.executable) is None
    with pytest.raises(EnvironmentProblem, match=r"/no/python cannot be run"):
        installed_version("hqq", "/no/python")


def test_which_peers_a_request_means() -> None:
    """Oracle: by hand; HQQ is run at its own group of 64 too, once."""
    names = [p.name for p in wanted_peers(["llmcompressor", "hqq"], ["4g128", "3g64"])]
    assert names == ["llmcompressor-4g128", "hqq-4g64", "hqq-4g128", "llmcompressor-3g64", "hqq-3g64"]
    assert wanted_peers([], ["4g128"]) == []
    for packages, schemes, message in ((["gptq"], ["4g128"], "known are"), (["hqq"], ["w4"], "<bits>g<group size>")):
        with pytest.raises(ConfigError, match=message):
            wanted_peers(packages, schemes)


def test_settings_are_those_of_the_command_line() -> None:
    """Oracle: the recipe and the override by name; a key that is none is refused as the command line refuses it."""
    config = composed_config(["recipe=gptq4", "calibration.n_sequences=7"])
    assert config.name == "gptq4" and config.calibration.n_sequences == 7 and config.quant.gptq.gptaq
    with pytest.raises(ConfigError, match=r"did you mean 'calibration.n_sequences'"):
        composed_config(["recipe=gptq4", "calibration.n_sequence=7"])


def _compare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    try:
        compare.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_one_command_makes_the_whole_table(
    stand_in: Path,
    broken_python: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Oracle: the parts asked for, each named in table and figures: a recipe, round-to-nearest at its scheme and at the
    peer's, the peer, one that is not installed and one that fails; then exit code 2. KL / RTN is their quotient."""
    verify_in_process(monkeypatch)

    def in_process(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            return subprocess.CompletedProcess(command, main_in_process(patch, *command[3:]))

    monkeypatch.setattr(side_by_side, "subprocess", SimpleNamespace(run=in_process))
    out = tmp_path / "out"
    train, test = (write_text(tmp_path / f"{name}.txt", seed) for seed, name in enumerate(("train", "test")))
    settings = [
        f"model={tiny_model_dir}", f"calibration.path={train}", "calibration.n_sequences=4",
        "calibration.sequence_length=32", f"eval.path={test}", "eval.n_sequences=4", "eval.sequence_length=32",
        "eval.tasks=[]", "bench.enabled=false", "device=cpu", "quant.scheme.group_size=32",
    ]  # fmt: skip
    code = _compare(
        monkeypatch, "--recipes", "gptq4", "--peers", "hqq,auto-round,llmcompressor", "--peer-schemes", "4g64",
        "--peer-python", f"llmcompressor={broken_python}", "--out", str(out), "--markdown", str(tmp_path / "t.md"),
        *settings,
    )  # fmt: skip
    text = capsys.readouterr().out
    assert code == 2
    figures = json.loads(text.splitlines()[-1])
    assert json.loads((out / "compare.json").read_text()) == figures
    (table,) = figures["tables"]
    by_name = {row["name"]: row for row in table}
    assert set(by_name) == {"gptq4", "rtn4_g32", "rtn4_g64", "hqq 9.9: HQQ"}
    assert [by_name[n]["scheme"] for n in ("rtn4_g32", "rtn4_g64")] == ["w4g32 sym", "w4g64 sym"]
    for name, baseline in (("gptq4", "rtn4_g32"), ("hqq 9.9: HQQ", "rtn4_g64")):
        assert by_name[name]["kl_ratio_to_rtn"] == by_name[name]["kl"] / by_name[baseline]["kl"]
    assert figures["not_installed"] == ["auto-round"]
    assert list(figures["failed"]) == ["llmcompressor-4g64"] and "no such device" in str(figures["failed"])
    written = (tmp_path / "t.md").read_text()
    assert written == (out / "compare.md").read_text() and written in text
    assert "auto-round: not installed" in written and "llmcompressor-4g64: failed:" in written
    assert "decode" not in written  # nothing was benchmarked


def test_options_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Oracle: exit code 2 and the documented words."""
    for arguments, message in (
        ([], "nothing to compare"),
        (["--recipes", "rtn4", "outputs"], "'outputs' is no setting"),
        (["--recipes", "rtn4", "--peer-python", "gptq=python"], "packages are"),
    ):
        assert _compare(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
