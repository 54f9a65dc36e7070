"""Whole runs of the tiny model: every stage, what it leaves behind, and what is done again when started again."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import hashes, scheme, stages, tiny_config, verify_in_process

from compress import state
from compress.atomic import disk_errors, write_atomically
from compress.config import BenchConfig, RunConfig
from compress.config_quant import QuantConfig, Rounding, Transform
from compress.errors import ConfigError, EnvironmentProblem, GateFailure, ModelFileError, RunLocked, VerifyError
from compress.finish import finish_run
from compress.pipeline import run_pipeline
from compress.record import read_record
from compress.run import quantize_mark
from compress.state import RunState, code_sha256, locked


@pytest.fixture
def quick_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_in_process(monkeypatch)


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(tiny_model_dir, tmp_path)


@pytest.fixture
def rounded(config: RunConfig) -> RunConfig:
    """Round to nearest: no calibration, for tests about something else."""
    return replace(config, quant=QuantConfig(Transform.none, Rounding.rtn, scheme()))


def test_whole_run(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the record's own checker, arithmetic on sizes, and what every stage promises to leave. Verification runs
    in its fresh process; benchmark and shipped tasks are real, on little data."""
    config = replace(
        config,
        bench=BenchConfig(batch_sizes=[1], prompt_tokens=8, decode_tokens=2, repeats=2, warmup=0),
        eval=replace(config.eval, tasks=None, limit=2),
    )
    record = run_pipeline(config, ["python", "-m", "compress", "recipe=tiny"])
    summary = finish_run(record, config)
    run_dir = Path(record["run_dir"])

    assert read_record(run_dir / "run.json") == record
    assert stages(run_dir) == ["bench", "eval", "quantize", "verify"]
    assert record["verified"] and record["verify"]["relative_error"] <= config.verify.max_relative_error
    assert record["verify"]["source_tensors"] == {"quantized": 14, "kept": 3, "folded": 4}
    assert len(record["layers"]) == 14 and not (run_dir / "checkpoints").exists()
    files = [p for p in Path(record["artifact"]).iterdir() if p.name != "README.md"]
    assert record["size"]["artifact_bytes"] == sum(p.stat().st_size for p in files)
    assert {r["phase"] for r in record["speed"]["rows"]} == {"prefill", "decode"}
    assert {t["task"] for t in record["quality"]["tasks"]} >= {"compress_minimal_pairs"}
    assert record["quality"]["kl"] > 0

    for name in ("report.json", "report.html", "frontier.png", "artifact/README.md"):
        assert (run_dir / name).stat().st_size > 0, name
    assert json.loads(json.dumps(summary, allow_nan=False))["recipe"] == "tiny"
    assert "verified" in capsys.readouterr().out


def test_finished_stages_are_reused_until_forced_or_changed(config: RunConfig, quick_verify: None) -> None:
    """Oracle: the text of state.json, which holds each stage's seconds to the nanosecond: unchanged when reused,
    changed for the stages that ran again."""
    run_dir = Path(run_pipeline(config)["run_dir"])
    first = _seconds(run_dir)
    run_pipeline(config)
    assert _seconds(run_dir) == first

    run_pipeline(replace(config, eval=replace(config.eval, n_sequences=3)))
    second = _seconds(run_dir)
    assert {k for k in first if first[k] != second[k]} == {"eval"}

    before = hashes(run_dir / "artifact")
    run_pipeline(replace(config, force=True))
    third = _seconds(run_dir)
    assert all(second[k] != third[k] for k in second)
    assert hashes(run_dir / "artifact") == before


def _seconds(run_dir: Path) -> dict[str, float]:
    return {k: v["seconds"] for k, v in json.loads((run_dir / "state.json").read_text())["stages"].items()}


def test_whatever_decides_the_weights_decides_the_run_directory(config: RunConfig, quick_verify: None) -> None:
    """Oracle: two recipes under one name differ in one setting of the weights, and must not share a directory."""
    other = replace(config, quant=replace(config.quant, awq=replace(config.quant.awq, n_grid=3)))
    assert run_pipeline(config)["run_dir"] != run_pipeline(other)["run_dir"]


def test_replaying_steps_does_not_decide_the_run_directory(config: RunConfig) -> None:
    """Oracle: the settings differ in nothing but how steps are launched: the same mark; another rate, another one."""
    learn, tune = replace(config.quant.learn, graphs=False), replace(config.quant.tune, graphs=False)
    calibration = replace(config.calibration, generated_graphs=False)
    plain = replace(config, quant=replace(config.quant, learn=learn, tune=tune), calibration=calibration)
    slower = replace(config, quant=replace(config.quant, tune=replace(tune, scale_rate=1e-5)))
    marks = [quantize_mark(c, "source", torch.device("cuda"), torch.float32) for c in (config, plain, slower)]
    assert marks[0] == marks[1] != marks[2]


@pytest.mark.parametrize("changed", ["w4.py", "tables/H100.json", "tasks/pairs/_template_yaml"])
def test_tables_and_tasks_count_as_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    """Oracle: a tree laid out as a checkout: the hash of its folder changes with each kind of file, and comes back with
    the content; notes and bytecode leave it alone."""
    monkeypatch.setattr(state, "__file__", str(tmp_path / "compress" / "state.py"))
    folder = tmp_path / "kernels"
    for name in ("w4.py", "tables/H100.json", "tasks/pairs/_template_yaml", "NOTES.md", "__pycache__/w4.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1")
    before = code_sha256("kernels")
    for note in ("NOTES.md", "__pycache__/w4.pyc"):
        (folder / note).write_text("2")
    assert code_sha256("kernels") == before
    (folder / changed).write_text("2")
    assert code_sha256("kernels") != before
    (folder / changed).write_text("1")
    assert code_sha256("kernels") == before


def _flip_bit(artifact: Path) -> None:
    path = artifact / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)


def _edit_config(artifact: Path) -> None:
    path = artifact / "config.json"
    path.write_text(path.read_text().replace('"silu"', '"gelu"'))


def _edit_manifest(artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema":  1'))


@pytest.mark.parametrize(
    "damage",
    [
        _flip_bit,
        _edit_config,
        _edit_manifest,
        lambda artifact: (artifact / "tokenizer.json").unlink(),
        lambda artifact: (artifact / "model.safetensors").unlink(),
        lambda artifact: (artifact / "manifest.json").write_text("{}"),
        lambda artifact: (artifact.parent / "verify.safetensors").unlink(),
    ],
)
def test_damaged_artifact_is_not_reused(
    damage: Any, rounded: RunConfig, quick_verify: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the first run's bytes. The second run says what is wrong, and makes and measures everything again."""
    run_dir = Path(run_pipeline(rounded)["run_dir"])
    before, seconds = hashes(run_dir / "artifact"), _seconds(run_dir)
    damage(run_dir / "artifact")
    with caplog.at_level("WARNING"):
        assert run_pipeline(rounded)["verified"]
    assert "doing everything again" in caplog.text
    assert hashes(run_dir / "artifact") == before
    assert all(seconds[k] != after for k, after in _seconds(run_dir).items())


@pytest.mark.parametrize("content", ["", "[]", '{"stages": {"quantize": {}}}'])
def test_damaged_state_costs_time_only(
    content: str, rounded: RunConfig, quick_verify: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the first run's bytes; the damage is told."""
    run_dir = Path(run_pipeline(rounded)["run_dir"])
    before = hashes(run_dir / "artifact")
    (run_dir / "state.json").write_text(content)
    with caplog.at_level("WARNING"):
        run_pipeline(rounded)
    assert "state.json is damaged" in caplog.text
    assert hashes(run_dir / "artifact") == before


def test_broken_record_of_another_run_does_not_stop_this_one(rounded: RunConfig, quick_verify: None) -> None:
    """Oracle: a run.json that is no JSON lies beside; the run ends, with its own point on the frontier."""
    record = run_pipeline(rounded)
    other = Path(record["run_dir"]).parent / "other"
    other.mkdir()
    (other / "run.json").write_text("{broken")
    summary = finish_run(record, rounded)
    report = json.loads((Path(record["run_dir"]) / "report.json").read_text())
    assert summary["verified"] and [p["run_dir"] for p in report["frontier"]["points"]] == [record["run_dir"]]


def test_baseline_run_has_no_artifact_and_no_kl(config: RunConfig) -> None:
    """Oracle: a model compared with itself: KL 0, top-1 agreement 1, size ratio 1."""
    config = replace(config, name="bf16", quant=QuantConfig(Transform.none, Rounding.none))
    record = run_pipeline(config)
    assert record["artifact"] is None and record["verified"] is None
    assert (record["quality"]["kl"], record["quality"]["top1"], record["size"]["ratio"]) == (0, 1, 1)
    assert stages(Path(record["run_dir"])) == ["eval"]
    assert finish_run(record, config)["artifact"] is None


def test_mismatch_found_by_verification_fails_the_run(
    rounded: RunConfig, quick_verify: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an engine that reports logits 1 % away from what it saved. The run stops, nothing is recorded as
    verified, and the next run stops as well."""
    from compress import pipeline

    real = pipeline.save_expected
    monkeypatch.setattr(pipeline, "save_expected", lambda path, ids, logits: real(path, ids, logits * 1.01))
    for _ in range(2):
        with pytest.raises(VerifyError, match="relative_error"):
            run_pipeline(rounded)
    (run_dir,) = (p.parent for p in Path(rounded.output_dir).glob("*/*/state.json"))
    assert stages(run_dir) == ["quantize"] and not (run_dir / "run.json").exists()


def test_verification_in_a_process_that_dies(
    rounded: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Oracle: a Python that ends with exit code 7 and says why; both stand in the error."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such luck >&2\nexit 7\n")
    python.chmod(0o755)
    monkeypatch.setattr("compress.verify.sys.executable", str(python))
    with pytest.raises(VerifyError, match=r"exit 7.*no such luck"):
        run_pipeline(rounded)


def test_gate_failure_leaves_reports(rounded: RunConfig, quick_verify: None, tmp_path: Path) -> None:
    """Oracle: a baseline of this run with half its size; the report is there although the gate failed."""
    record = run_pipeline(rounded)
    baseline = tmp_path / "baseline.json"
    finish_run(record, replace(rounded, gate=replace(rounded.gate, baseline=str(baseline), update=True)))
    data = json.loads(baseline.read_text())
    data["metrics"]["weight_bytes"]["value"] //= 2
    baseline.write_text(json.dumps(data))
    (Path(record["run_dir"]) / "report.html").unlink()
    with pytest.raises(GateFailure, match="weight_bytes"):
        finish_run(record, replace(rounded, gate=replace(rounded.gate, baseline=str(baseline))))
    assert (Path(record["run_dir"]) / "report.html").is_file()


def test_run_dir_with_something_else_in_it_is_left_alone(config: RunConfig, tiny_model_dir: Path) -> None:
    """Oracle: the model's own directory, byte for byte as before: a run there would overwrite its config.json."""
    before = hashes(tiny_model_dir)
    with pytest.raises(ConfigError, match="not an earlier run"):
        run_pipeline(replace(config, run_dir=str(tiny_model_dir)))
    assert hashes(tiny_model_dir) == before


def test_model_without_tokenizer(config: RunConfig, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: the same model with its tokenizer files left out."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((tiny_model_dir / name).read_bytes())
    with pytest.raises(ModelFileError, match="no tokenizer"):
        run_pipeline(replace(config, model=str(model)))


@pytest.mark.parametrize("where", ["compress.checkpoint.save_file", "compress.artifact.save_file"])
def test_full_disk_loses_nothing(
    where: str, rounded: RunConfig, quick_verify: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a writer that fails on its second file as safetensors does on a full disk; the error says so, no
    half-written file stays, and with room again the same bytes come out as from a run that never failed."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    clean = hashes(Path(run_pipeline(replace(rounded, run_dir=rounded.output_dir + "/clean"))["artifact"]))
    calls = 0

    def full(tensors: Any, path: Any, metadata: Any = None) -> None:
        nonlocal calls
        calls += 1
        if calls == (2 if "checkpoint" in where else 1):
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    config = replace(rounded, run_dir=rounded.output_dir + "/full")
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(EnvironmentProblem, match=r"cannot write .*the disk is full; free space"):
            run_pipeline(config)
    run_dir = Path(config.run_dir or "")
    assert not (run_dir / "artifact").exists() and not list(run_dir.rglob("*.tmp"))[1:]
    assert hashes(Path(run_pipeline(config)["artifact"])) == clean
    assert not list(run_dir.rglob("*tmp"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EFBIG, errno.EIO])
def test_disk_errors_name_path_and_remedy(code: int, tmp_path: Path) -> None:
    """Oracle: the path, and words of the system or a remedy; the temporary file is gone, the old content stays."""
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(code, "from the system")

    with pytest.raises(EnvironmentProblem, match=f"cannot write {target}: ....") as caught:
        write_atomically(target, fail)
    assert isinstance(caught.value.__cause__, OSError)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and target.read_text() == "old"


def test_other_errors_pass_through_disk_errors(tmp_path: Path) -> None:
    """Oracle: an error that is not the disk's keeps its type."""
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        _ = 1 / 0


def test_lock_excludes_and_dies_with_its_holder(tmp_path: Path) -> None:
    """Oracle: flock itself: held, a second lock is refused with the holder's process id; released, it is granted."""
    with locked(tmp_path / "run"), pytest.raises(RunLocked, match=r"in use by process \d+"), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass


def test_stage_result_is_the_stored_one(tmp_path: Path) -> None:
    """Oracle: what JSON makes of the value: a resumed run must not see other types than a first one did."""
    state = RunState(tmp_path, force=False)
    state.run("one", {"a": 1}, lambda: {"x": [1, 2.5, None]})
    again = RunState(tmp_path, force=False).run("one", {"a": 1}, lambda: pytest.fail("done again"))
    assert again.reused and again.result == {"x": [1, 2.5, None]}
    assert not RunState(tmp_path, force=False).run("one", {"a": 2}, lambda: 0).reused


@pytest.mark.gpu
def test_whole_run_on_a_gpu(config: RunConfig) -> None:
    """Oracle: the record: everything ran on the CUDA device, and verification passed in a fresh process."""
    config = replace(config, device="cuda", quant=replace(config.quant, scheme=scheme(4)))
    record = run_pipeline(config)
    assert record["verified"] and record["environment"]["device"].startswith("cuda")
    assert torch.cuda.get_device_name() == record["environment"]["device_name"]
    assert 0 < record["quality"]["kl"] < 1
