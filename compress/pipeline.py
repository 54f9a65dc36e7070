"""The stages of a run, in order: load, calibrate, quantize, save, verify, benchmark, evaluate, report, publish.

Each finished stage is kept in the run directory with a fingerprint of everything that decided its result, so a
run that was killed, or is started again, does only what is not done.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import artifact as artifacts
from compress import environment
from compress.allocate import allocate, apply_allocation, check_budget, describe
from compress.atomic import write_json
from compress.blocks import EngineInputs, LayerReport, compress_blocks
from compress.calibration import CalibrationSet
from compress.config import CalibrationConfig, RunConfig, to_plain
from compress.config_quant import Transform
from compress.errors import ArtifactError, ConfigError
from compress.forecast import Forecast, Load, check_forecast, check_lengths, context_length, forecast
from compress.generate import GenerateJob, generate, generation_bytes, mixed, read_generated
from compress.measure import measure_quality, measure_size, measure_speed
from compress.models import LoadedModel, choose_device, load_model, untie
from compress.plan import make_plan
from compress.progress import progress
from compress.rotation import attach_rotation
from compress.run import Run, calibration_mark, compute_dtype, default_run_dir, quantize_mark
from compress.source import sha256_file
from compress.state import RunState, code_sha256, fingerprint, locked
from compress.texts import calibration_set, default_tasks, evaluation_set
from compress.tune import FOLDER as TUNED_FOLDER
from compress.tune import tune_model
from compress.units import format_bytes
from compress.verify import check_kept, save_expected, verify_artifact

log = logging.getLogger(__name__)

_VERIFY_TOKENS = 64
_EXPECTED = "verify.safetensors"
_GENERATED = "generated.safetensors"
_RUN_CODE = ("qlinear.py", "loading.py", "kernels", "measure.py")
_DECODE_CODE = ("decoder.py", "decode_weights.py")


def run_pipeline(config: RunConfig, command: list[str] | None = None) -> dict[str, Any]:
    """Everything `python -m compress` does for one recipe; returns the run record, also written to run.json.

    Args:
        command: the command line that makes this run again, for the record.

    Raises:
        CompressError: and its subclasses, for anything a user can act on.
    """
    device = choose_device(config.device)
    loaded = load_model(config.model, config.revision, config.trust_remote_code, config.quant.blocks)
    notes = _untie(loaded) if config.quant.untie else []
    plan = make_plan(loaded, config.quant)
    if config.budget.enabled:
        check_budget(plan, config.budget)
    check_lengths(config, loaded)
    dtype = compute_dtype(config.compute_dtype, device, loaded.dtype)
    source_sha256 = loaded.source.sha256()
    mark = quantize_mark(config, source_sha256, device, dtype)
    run_dir = Path(config.run_dir or default_run_dir(config, mark))
    with locked(run_dir):
        state = RunState(run_dir, config.force)
        run = Run(config, loaded, source_sha256, plan, device, dtype, run_dir, state, warnings=notes)
        write_json(run_dir / "config.json", to_plain(config))
        record = _run_stages(run, mark)
        if command is not None:
            record["command"] = command
        write_json(run_dir / "run.json", record)
    return record


def _untie(loaded: LoadedModel) -> list[str]:
    """Break the tie of embedding and head; what that costs, a sentence.

    Raises:
        ConfigError: there is no tie.
    """
    broken = untie(loaded)
    if not broken:
        raise ConfigError("quant.untie=true, but the head of this model has a tensor of its own; leave quant.untie out")
    return [
        f"quant.untie: {name} is stored beside {holder}, {loaded.model.get_parameter(holder).numel():,} weights more"
        for name, holder in broken.items()
    ]


def _run_stages(run: Run, mark: dict[str, Any]) -> dict[str, Any]:
    config = run.config
    log.info("%s: %s -> %s", config.name, config.model, run.run_dir)
    evaluation = tasks = None
    if config.eval.enabled:  # read before the first hour of work, so that a wrong path costs nothing
        evaluation = evaluation_set(config.eval, run.loaded, run.tokenizer())
        tasks = default_tasks(config.eval, run.loaded)
        if config.eval.tasks and "eval" not in run.state.stages:
            from compress.eval.task_index import load_tasks

            load_tasks(config.eval.tasks, config.eval.include_path)
    quantized, calibration = _quantize(run, mark) if not run.is_baseline else (None, None)
    content = quantized["manifest_sha256"] if quantized else run.source_sha256
    code = code_sha256(*_RUN_CODE)
    verified = _verify(run, content, code) if quantized else None

    speed = quality = None
    place = {"device": environment.device_name(run.device), "dtype": str(run.dtype)}
    if config.bench.enabled:
        inputs = {
            "content": content,
            "bench": to_plain(config.bench),
            "code": code,
            **place,
            "eval": code_sha256("eval", *_DECODE_CODE),
        }
        speed = run.stage("bench", inputs, lambda: measure_speed(run))
    if evaluation is not None:
        inputs = {"content": content, "eval": to_plain(config.eval), "tokens": evaluation.sha256, "tasks": tasks,
                  "code": code, **place, "eval_code": code_sha256("eval")}  # fmt: skip
        quality = run.stage("eval", inputs, lambda: measure_quality(run, evaluation, tasks or []))
    size = measure_size(run.loaded, quantized["manifest"] if quantized else None, run.artifact, run.plan)
    return _record(run, mark, quantized, calibration, verified, size, speed, quality)


def _quantize(run: Run, mark: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Quantize and save. Returns {"manifest", "manifest_sha256", "layers", ...} and the calibration facts."""
    config = run.config
    calibration, tuning_ids, facts = _calibrate(run) if config.needs_calibration else (None, None, None)
    inputs = {**mark, "calibration": facts}
    if config.budget.enabled:
        assert calibration is not None
        inputs["allocation"] = run.allocation = _allocate(run, calibration, inputs)
        run.plan = apply_allocation(run.plan, run.allocation)
    schemes = [*run.plan.schemes(), *([run.plan.head.scheme] if run.plan.head is not None else [])]
    if len(set(schemes)) > 1 and not all(scheme is None or scheme.symmetric for scheme in schemes):
        run.warnings.append(
            "several schemes with zero points among them: transformers with compressed-tensors up to 0.20 cannot "
            "read this artifact, compress.load can; with symmetric schemes both can"
        )
    checkpoints = run.run_dir / "checkpoints" / fingerprint(inputs)[:16]
    if config.force:
        shutil.rmtree(checkpoints, ignore_errors=True)
    result = run.stage(
        "quantize",
        inputs,
        lambda: _quantize_and_save(run, calibration, tuning_ids, facts, checkpoints),
        lambda result: _artifact_damage(run, result),
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    with suppress(OSError):  # those of other settings may be in there
        checkpoints.parent.rmdir()
    return {**result, "manifest": artifacts.read_manifest(run.artifact)}, facts


def _sampling(run: Run) -> CalibrationConfig:
    """The settings that sampling goes by: without tuning, nothing is sampled for it."""
    config = run.config.calibration
    return config if run.config.quant.tune.enabled else replace(config, tune_generated=0)


def _calibrate(run: Run) -> tuple[CalibrationSet, Tensor | None, dict[str, Any]]:
    """Tokens to calibrate on, those int64 [R, T] for end-to-end tuning alone, and what the record says of them:
    n_sequences of text, and those that were generated."""
    config = _sampling(run)
    text = calibration_set(config, run.loaded, run.tokenizer())
    n, t = text.input_ids.shape
    facts: dict[str, Any] = {"source": text.source, "sha256": text.sha256, "n_sequences": n, "sequence_length": t}
    if not config.n_sampled:
        return text, None, facts
    check_forecast(_forecast(run, text.n_tokens + config.generated * t), run.device, run.run_dir)
    inputs = {"source": run.source_sha256, "text": text.sha256, "calibration": calibration_mark(config),
              "device": run.device.type, "dtype": str(run.dtype),
              "code": code_sha256("generate.py", "sampling.py")}  # fmt: skip
    file = run.run_dir / _GENERATED
    if run.config.force:
        file.unlink(missing_ok=True)
    job = GenerateJob(
        run.loaded, text, config, run.device, run.dtype, file, fingerprint(inputs), run.config.trust_remote_code
    )

    def work() -> dict[str, Any]:
        with progress(f"sampling {config.n_sampled} sequences") as report:
            return generate(job, report)

    def damage(result: dict[str, Any]) -> str | None:
        return None if read_generated(file, result["sha256"]) is not None else f"{file} changed since or is gone"

    generated = run.stage("generate", inputs, work, damage)
    tokens = read_generated(file, generated["sha256"])
    if tokens is None:
        raise ArtifactError(f"{file} changed while the run was reading it; run again")
    calibration, tuning_ids = mixed(text, tokens[: config.generated]), tokens[config.generated :]
    facts |= {"sha256": calibration.sha256, "generated": generated}
    return calibration, tuning_ids if len(tuning_ids) else None, facts


def _forecast(run: Run, n_tokens: int) -> Forecast:
    config = _sampling(run)
    load = Load(n_tokens, config.batch_size * config.sequence_length)
    if n_tokens:
        load.tuning_tokens = config.tune_generated * config.sequence_length
        load.generation_bytes = generation_bytes(run.loaded, config, run.device, run.dtype)
    return forecast(run.loaded, run.plan, load, run.dtype)


def _allocate(run: Run, calibration: CalibrationSet, inputs: dict[str, Any]) -> dict[str, Any]:
    """Which scheme each group of linears gets within the budget."""
    config = run.config

    def work() -> dict[str, Any]:
        with progress(f"sensitivities of {config.name}") as report:
            return allocate(
                run.loaded, run.plan, config.budget, calibration.input_ids, config.calibration.batch_size,
                run.device, run.dtype, report, config.trust_remote_code,
            )  # fmt: skip

    allocation: dict[str, Any] = run.stage("allocate", inputs, work)
    log.info("%s", describe(allocation))
    return allocation


def _artifact_damage(run: Run, result: dict[str, Any]) -> str | None:
    """What is wrong with the files that quantizing left; None when they are as they were."""
    try:
        artifacts.check_manifest(run.artifact)
    except ArtifactError as error:
        return str(error)
    if artifacts.manifest_sha256(run.artifact) != result["manifest_sha256"]:
        return f"{run.artifact / artifacts.MANIFEST} changed since"
    expected = run.run_dir / _EXPECTED
    if not expected.is_file() or sha256_file(expected) != result["expected_sha256"]:
        return f"{expected} changed since or is gone"
    return None


def _quantize_and_save(
    run: Run,
    calibration: CalibrationSet | None,
    tuning_ids: Tensor | None,
    facts: dict[str, Any] | None,
    checkpoints: Path,
) -> dict[str, Any]:
    config, loaded = run.config, run.loaded
    batch = config.calibration.batch_size
    expected = _forecast(run, calibration.n_tokens if calibration else 0)
    log.info(
        "forecast: %s on %s at the peak of quantization, %s of activations, %s of disk",
        format_bytes(expected.device_bytes), run.device, format_bytes(expected.host_bytes),
        format_bytes(expected.disk_bytes),
    )  # fmt: skip
    check_forecast(expected, run.device, run.run_dir)
    notes = []
    if config.quant.transform is Transform.hadamard:
        notes = attach_rotation(loaded, run.plan, config.quant.hadamard, run.device)
        for line in notes:
            log.info("%s", line)
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)  # type: ignore[operator,union-attr]
    generator = torch.Generator().manual_seed(0)
    n_tokens_verified = min(_VERIFY_TOKENS, context_length(loaded) or _VERIFY_TOKENS)
    verify_ids = torch.randint(0, vocabulary, (config.verify.n_sequences, n_tokens_verified), generator=generator)
    inputs = EngineInputs(
        loaded, run.plan, calibration.input_ids if calibration else None, verify_ids, batch,
        run.device, run.dtype, checkpoints, tuning_ids,
    )  # fmt: skip
    with progress(f"quantizing {config.name}") as report:
        result = compress_blocks(inputs, report)
    if result.n_resumed:
        log.info("resumed: %d of %d blocks were finished before", result.n_resumed, len(loaded.blocks))
    verify_logits, tuned = result.verify_logits, None
    if config.quant.tune.enabled:
        assert result.teacher is not None
        with progress(f"tuning {config.name}") as report:
            note, verify_logits = tune_model(inputs, result.teacher, report, result.tuning)
        tuned = asdict(note)
        log.info(
            "tuned: KL on held-out calibration text %.4f -> %.4f in %d of %d steps, %.1f %% of codes changed",
            note.kl_before, note.kl_after, note.steps, note.steps_planned, 100 * note.changed,
        )  # fmt: skip
        checkpoints = checkpoints / TUNED_FOLDER
    saved = artifacts.ArtifactFacts(
        config.model, run.source_sha256, to_plain(config.quant) | {"name": config.name} | _budget(run), facts,
        environment.versions(), [layer.without_time() for layer in result.layers],
    )  # fmt: skip
    artifacts.save_artifact(loaded, checkpoints, run.artifact, saved)
    save_expected(run.run_dir / _EXPECTED, verify_ids, verify_logits)
    return {
        "manifest_sha256": artifacts.manifest_sha256(run.artifact),
        "expected_sha256": sha256_file(run.run_dir / _EXPECTED),
        "layers": [asdict(layer) for layer in result.layers],
        "tuned": tuned,
        "forecast": expected.to_plain(),
        "peak_memory_bytes": _peak_memory_bytes(run.device),
        "notes": notes,
    }


def _budget(run: Run) -> dict[str, Any]:
    """The allocation as the manifest's recipe has it; nothing where no budget was set."""
    return {"allocation": run.allocation} if run.allocation is not None else {}


def _verify(run: Run, content: str, code: str) -> dict[str, Any]:
    config = run.config

    def work() -> dict[str, Any]:
        manifest = artifacts.check_manifest(run.artifact)
        kept = check_kept(run.loaded.source, manifest)
        figures = verify_artifact(
            run.artifact, run.run_dir / _EXPECTED, str(run.device),
            str(run.dtype).removeprefix("torch."), config.verify, config.trust_remote_code,
        )  # fmt: skip
        counts: dict[str, int] = {}
        for entry in manifest["source_tensors"].values():
            counts[entry["status"]] = counts.get(entry["status"], 0) + 1
        return {**figures, "kept_tensors_checked": kept, "source_tensors": counts}

    inputs = {"content": content, "verify": to_plain(config.verify), "code": code, "device": str(run.device)}
    figures: dict[str, Any] = run.stage("verify", inputs, work)
    log.info(
        "verified: fresh process, relative error of logits %.1e (served in %s by %s: %.1e); source tensors %s",
        figures["relative_error"], figures["runtime_dtype"], " and ".join(figures["runtime_backends"]),
        figures["runtime_relative_error"],
        ", ".join(f"{n} {status}" for status, n in sorted(figures["source_tensors"].items())),
    )  # fmt: skip
    return figures


def _record(
    run: Run,
    mark: dict[str, Any],
    quantized: dict[str, Any] | None,
    calibration: dict[str, Any] | None,
    verified: dict[str, Any] | None,
    size: dict[str, Any],
    speed: dict[str, Any] | None,
    quality: dict[str, Any] | None,
) -> dict[str, Any]:
    config = run.config
    layers = quantized["layers"] if quantized else [
        asdict(LayerReport(p.name, "kept", (p.n, p.k))) for p in run.plan.linears
    ]  # fmt: skip
    run.warnings += quantized["notes"] if quantized else []
    raised = [r["name"] for r in layers if r["damping_steps"]]
    if raised:
        run.warnings.append(f"damping was raised for {len(raised)} linears, first {raised[0]}")
    return {
        "schema": 1,
        "name": config.name,
        "model": config.model,
        "source_sha256": run.source_sha256,
        "fingerprint": fingerprint(mark),
        "run_dir": str(run.run_dir),
        "artifact": str(run.artifact) if quantized else None,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "compress_version": environment.versions()["compress"],
        "verified": True if verified else None,
        "verify": verified,
        "scheme": run.plan.label() or str(run.loaded.dtype).removeprefix("torch."),
        "transform": config.quant.transform.value,
        "rounding": config.quant.rounding_label,
        "environment": environment.describe(run.device, run.dtype),
        "calibration": calibration,
        "allocation": run.allocation,
        "quality": quality,
        "size": size,
        "speed": speed,
        "layers": layers,
        "tuned": quantized["tuned"] if quantized else None,
        "timings": run.timings,
        "memory": {"forecast": quantized["forecast"], "peak_bytes": quantized["peak_memory_bytes"]}
        if quantized
        else None,
        "warnings": run.warnings,
    }


def _peak_memory_bytes(device: torch.device) -> int:
    """Peak of this process so far: allocated on the GPU, or resident in host memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
