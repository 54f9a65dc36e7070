"""The command line as its users meet it: mistakes are answered in words, with exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_runs import ROOT, command_line, main_in_process, overrides, tiny_config, verify_in_process


@pytest.fixture
def tiny(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a whole tiny run; verification stays in this process."""
    verify_in_process(monkeypatch)
    return overrides(tiny_config(tiny_model_dir, tmp_path))


def test_import_brings_neither_torch_nor_transformers() -> None:
    """Oracle: sys.modules of a fresh interpreter, for the package and for the command line."""
    code = "import sys, compress, compress.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_mistyped_recipe_is_answered_at_once() -> None:
    """Oracle: the clock (of a fresh process, 2 s), the exit code, and the name of the recipe that was meant."""
    started = time.perf_counter()
    done = command_line("recipe=gptq44")
    seconds = time.perf_counter() - started
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'gptq4'?" in done.stderr and "Traceback" not in done.stderr
    assert seconds < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=zzzzzz"], "there is no recipe 'zzzzzz'; known are awq4, awq_gptq4, best2"),
        (["recip=awq4"], "there is no setting 'recip'; did you mean 'recipe'?"),
        (
            ["bits=4"],
            "no setting 'bits'; did you mean 'quant.scheme.bits' or 'quant.lm_head_scheme.bits' or 'budget.bits'?",
        ),
        (["quant.schme.bits=4"], "did you mean 'quant.scheme.bits'?"),
        (["quant.scheme.bitz=4"], "there is no setting 'quant.scheme.bitz'; did you mean 'quant.scheme.bits'?"),
        (["+foo=1"], "there is no setting 'foo'"),
        (["++quant.scheme.grupsize=1"], "did you mean 'quant.scheme.group_size'?"),
        (["quant.scheme.bits=four"], "quant.scheme.bits=four: Value 'four' of type 'str' could not be converted"),
        (["quant.scheme.bits=5"], "quant.scheme.bits=5 is not supported; use 2, 3, 4 or 8"),
        (["quant.rounding=gtpq"], "quant.rounding=gtpq: Invalid value 'gtpq', expected one of [none, rtn, gptq, hqq]"),
        (["eval.enabled=maybe"], "eval.enabled=maybe"),
        (["quant=3"], "quant=3"),
        (["foo"], "cannot read 'foo'"),
        (['quant.overrides={"*.x":{bits:8}}'], "dicts with bare keys"),
        (["quant.overrides={*.x:8}"], "quant.overrides={*.x:8}"),
        (["-m", "recipe=bf16,nosuch"], "there is no recipe 'nosuch'"),
        (
            ["gate.baseline=/no/such.json"],
            "gate.baseline=/no/such.json does not exist; write one with gate.update=true",
        ),
        ([f"publish.dest={ROOT}"], "already holds something else, which is never overwritten"),
        (["recipe=bf16", "publish.dest=/tmp/x"], "makes no artifact"),
    ],
)
def test_mistakes_told_before_anything_heavy_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2, the message, no traceback, nothing on stdout; the pipeline is never called."""
    monkeypatch.setattr("compress.pipeline.run_pipeline", lambda *_: pytest.fail("the pipeline was started"))
    assert main_in_process(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["device=cuda"], "torch sees no CUDA device; use device=cpu"),
        (["device=foo"], "device=foo is not a device; use auto, cpu, cuda"),
        (["model=/no/such/dir"], "model=/no/such/dir is no directory"),
        (["model=pyproject.toml"], "model=pyproject.toml is a file"),
        (["model=tests"], "config.json is missing"),
        (["model=some-org/some-model"], "some-org/some-model is no local directory and cannot be fetched"),
        (["quant.scheme.group_size=100"], "group_size=100 does not divide K=64; use one of [32, 64]"),
        (["quant.overrides={*.down_prj:{bits:8}}"], "'*.down_prj' matches none of the 14 linears; did you mean *.down"),
        (["quant.overrides={*.down_proj:{bitz:8}}"], "has no field 'bitz'; did you mean bits?"),
        (["quant.overrides={*.down_proj:{bits:5}}"], "bits=5 is not supported"),
        (["quant.ignore=[*]"], "leaves no linear to quantize"),
        (["quant.blocks=foo"], "quant.blocks=foo"),
        (["calibration.path=/no/such.txt"], "calibration.path=/no/such.txt is not a file"),
        (["calibration.n_sequences=4000"], "needs 128000"),
        (["calibration.sequence_length=1000"], "longer than the model's context of 512 tokens; lower it"),
        (["eval.path=/no/such.txt"], "eval.path=/no/such.txt is not a file"),
        (["bench.enabled=true", "bench.prompt_tokens=600"], "bench.prompt_tokens + bench.decode_tokens=632"),
        (["eval.tasks=[compress_heldout]", "eval.include_path=/no/such"], "eval.include_path=/no/such"),
        (["output_dir=/dev/null/x"], "a part of this path is a file"),
        (["-m", "output_dir=pyproject.toml", "recipe=rtn3,rtn4"], "cannot use pyproject.toml"),
        (["run_dir=tests"], "is not an earlier run; give a new or empty directory"),
    ],
)
def test_mistakes_told_before_the_first_block(
    tiny: list[str],
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: exit code 2, the message, no traceback, nothing on stdout; no block is ever quantized."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("compress.blocks.save_block", lambda *_: pytest.fail("a block was quantized"))
    if "device=cuda" in arguments:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    keys = {a.partition("=")[0] for a in arguments}
    kept = [a for a in tiny if a.partition("=")[0] not in keys]
    assert main_in_process(monkeypatch, *kept, *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err
    assert out == ""


def test_verbose_shows_where_an_error_came_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the traceback's own heading, and the message after it."""
    assert main_in_process(monkeypatch, "-v", "recipe=nosuch") == 2
    err = capsys.readouterr().err
    assert err.index("Traceback (most recent call last)") < err.index("error: there is no recipe 'nosuch'")


def test_help_and_cfg_name_recipes_and_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the recipes on disk and the settings declared in code."""
    from compress.cli import config_keys, recipes
    from compress.config import RunConfig

    assert main_in_process(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in recipes())
    named = [word.strip(",") for word in text.split() if word.strip(",") in set(config_keys(RunConfig))]
    assert {"model", "quant.scheme.bits", "calibration.path", "gate.baseline"} <= set(named)
    assert main_in_process(monkeypatch, "recipe=rtn3", "--cfg", "job") == 0
    assert "bits: 3" in capsys.readouterr().out


def test_sweep_goes_on_after_a_failed_job(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: of three jobs the middle one names a pattern that matches nothing: exit code 2, the other two print a
    JSON object each, and the last lines of stderr say which failed."""
    arguments = [a for a in tiny if not a.startswith("recipe=")]
    sweep = "quant.ignore=[*.v_proj],[*.nothing],[]"
    assert main_in_process(monkeypatch, *arguments, "-m", "recipe=rtn4", sweep, "quant.allow_split_fused=true") == 2
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [r["recipe"] for r in records] == ["rtn4", "rtn4"]
    assert len({r["run_dir"] for r in records}) == 2
    assert "matches none of the 14 linears" in err and "Traceback" not in err
    assert "quant.ignore=[*.nothing]" in err.splitlines()[-1] and err.splitlines()[-1].startswith("failed: ")


def test_interrupt_says_how_to_go_on(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a real SIGINT after the first block: exit code 130, one line, nothing on stdout; the same command goes
    on after that block."""
    from compress import blocks

    real = blocks.save_block

    def interrupted(folder: Path, index: int, state: blocks.BlockState) -> None:
        real(folder, index, state)
        if index == 0:
            os.kill(os.getpid(), signal.SIGINT)

    # a shell's background job, as CI may be, starts with SIGINT ignored
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "save_block", interrupted)
            assert main_in_process(patch, *tiny) == 130
    finally:
        signal.signal(signal.SIGINT, inherited)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1] == "interrupted; the same command goes on from here"
    assert main_in_process(monkeypatch, *tiny) == 0
    assert "resumed: 1 of 2 blocks" in capsys.readouterr().err


def test_gate_regression_exits_3_without_json(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a baseline written by this very run passes; one with half its weight bytes fails with exit code 3;
    one that another recipe wrote is bad input."""
    baseline = tmp_path / "baseline.json"
    assert main_in_process(monkeypatch, *tiny, f"gate.baseline={baseline}", "gate.update=true") == 0
    assert main_in_process(monkeypatch, *tiny, f"gate.baseline={baseline}") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["gate"]["passed"]

    data = json.loads(baseline.read_text())
    data["metrics"]["weight_bytes"]["value"] //= 2
    baseline.write_text(json.dumps(data))
    assert main_in_process(monkeypatch, *tiny, f"gate.baseline={baseline}") == 3
    out, err = capsys.readouterr()
    assert "gate FAILED" in err and not any(line.startswith("{") for line in out.splitlines())

    baseline.write_text(json.dumps(data | {"name": "other"}))
    assert main_in_process(monkeypatch, *tiny, f"gate.baseline={baseline}") == 2
    assert "name='other'" in capsys.readouterr().err


def test_recorded_command_is_the_jobs_own(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the arguments that were given."""
    assert main_in_process(monkeypatch, *tiny, "quant.transform=none", "quant.rounding=rtn") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    record = json.loads((Path(summary["run_dir"]) / "run.json").read_text())
    assert record["command"][:3] == ["python", "-m", "compress"]
    assert set(record["command"][3:]) >= {"recipe=awq_gptq4", "quant.rounding=rtn", "bench.enabled=false"}


class _Listener:
    """Counts who connects to a port of this machine, and hangs up on them."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()


def test_embedded_default_never_touches_the_network(tmp_path: Path) -> None:
    """Oracle: a listener that stands for the hub and for every HTTP proxy, in a run that is not told to stay offline:
    nobody connects, while the same listener does see a run that names a hub model."""
    listener = _Listener()
    where = f"http://127.0.0.1:{listener.port}"
    environment = {
        "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": where, "HTTP_PROXY": where, "HTTPS_PROXY": where, "ALL_PROXY": where, "NO_PROXY": "",
    }  # fmt: skip
    small = ["calibration.n_sequences=1", "calibration.sequence_length=32", "eval.n_sequences=2",
             "eval.sequence_length=32", "eval.limit=2", "bench.enabled=false", "device=cpu"]  # fmt: skip
    arguments = [*small, f"output_dir={tmp_path}"]
    done = command_line("recipe=gptq4", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert listener.connections == 0
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["model"], summary["recipe"], summary["verified"]) == ("reference", "gptq4", True)
    assert summary["quality"]["kl"] > 0 and summary["size"]["ratio"] > 2
    assert "compress_minimal_pairs/acc" in summary["quality"]["tasks"]

    done = command_line("model=some-org/some-model", *arguments, **environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert listener.connections > 0
    listener.server.close()
