"""Calibration sequences sampled from the original model: the right distribution, once and for all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import stages, tiny_config, verify_in_process

import compress.generate as generation
from compress.calibration import CalibrationSet
from compress.config import CalibrationConfig
from compress.errors import ConfigError, EnvironmentProblem
from compress.generate import (
    GenerateJob,
    beginnings,
    generate,
    generation_bytes,
    mixed,
    read_generated,
    sampling_batch,
)
from compress.models import load_model
from compress.pipeline import run_pipeline
from compress.sampling import continue_sequences

CPU = torch.device("cpu")


@pytest.fixture
def job(tiny_model_dir: Path, tmp_path: Path) -> GenerateJob:
    """Five sequences of 12 tokens in batches of 2, begun with 4 tokens of two windows."""
    config = CalibrationConfig(
        n_sequences=2, sequence_length=12, generated=5, generated_prompt=4, generated_batch_size=2
    )
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    text = CalibrationSet(ids, "made up")
    loaded = load_model(str(tiny_model_dir))
    return GenerateJob(loaded, text, config, CPU, torch.float32, tmp_path / "generated.safetensors", "mark")


def quiet(_done: int, _total: int) -> None:
    pass


def test_beginnings_use_every_window_before_going_further_in() -> None:
    """Oracle: by hand, on windows whose tokens say where they stand."""
    ids = torch.arange(24).view(2, 12)
    expected = [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [16, 17, 18, 19], [8, 9, 10, 11]]
    assert beginnings(ids, 5, 4, first_id=99).tolist() == expected
    assert beginnings(ids, 2, 0, first_id=99).tolist() == [[99], [99]]
    assert beginnings(ids, 3, 0, first_id=None).tolist() == [[0], [12], [1]]
    assert beginnings(ids, 40, 7, None).shape == (40, 7)  # wraps before the end of a window


def test_text_and_generated_are_spread_among_each_other() -> None:
    """Oracle: by hand; every sequence is there once, in its own order, and each third holds one of the text."""
    text = CalibrationSet(torch.arange(3).view(3, 1), "text")
    both = mixed(text, 10 + torch.arange(6).view(6, 1))
    assert both.input_ids.flatten().tolist() == [10, 0, 11, 12, 1, 13, 14, 2, 15]
    assert both.source == "text" and both.sha256 != text.sha256


def test_sampling_repeats_and_leaves_the_random_state_alone(job: GenerateJob) -> None:
    """Oracle: torch's own global state before and after; a second sampling elsewhere; another seed."""
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    facts = generate(job, quiet)
    assert torch.equal(torch.random.get_rng_state(), before)
    tokens = read_generated(job.file, facts["sha256"])
    assert tokens is not None and tokens.shape == (5, 12) and facts["n_tokens"] == 5 * 8
    assert torch.equal(tokens[:, :4], beginnings(job.text.input_ids, 5, 4, None))
    again = replace(job, file=job.file.with_name("again"))
    assert generate(again, quiet) == facts
    other = replace(job, file=job.file.with_name("other"), config=replace(job.config, generated_seed=1))
    assert generate(other, quiet)["sha256"] != facts["sha256"]


def test_sampling_goes_on_where_it_was_stopped(job: GenerateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an undisturbed sampling. Stopped in the second of three batches, the first is not drawn again; a file of
    another job, and half a file, are not taken."""
    expected = generate(replace(job, file=job.file.with_name("whole")), quiet)

    def stop(done: int, _total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(job, stop)
    totals: list[int] = []
    assert generate(job, lambda _done, total: totals.append(total)) == expected
    assert set(totals) == {2 * 8}  # two batches of eight draws
    monkeypatch.setattr(generation, "continue_sequences", lambda *_: pytest.fail("sampled again"))
    assert generate(job, quiet) == expected
    monkeypatch.undo()
    totals.clear()
    generate(replace(job, mark="another"), lambda _done, total: totals.append(total))
    assert set(totals) == {3 * 8}
    job.file.write_bytes(job.file.read_bytes()[:-40])
    assert read_generated(job.file, expected["sha256"]) is None and generate(job, quiet) == expected


def test_a_model_too_large_to_sample_from_says_so(job: GenerateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the weights alone in float32 are more than is free."""
    monkeypatch.setattr(generation, "free_bytes", lambda _: 4 * 80_000)
    with pytest.raises(EnvironmentProblem, match=r"set calibration.generated_batch_size lower, or calibration.gen"):
        generate(job, quiet)


def test_sequences_for_tuning_come_after_the_others(job: GenerateJob) -> None:
    """Oracle: the sampling without them: what blocks are calibrated on does not depend on how many there are."""
    alone = generate(replace(job, file=job.file.with_name("alone")), quiet)
    more = generate(replace(job, config=replace(job.config, tune_generated=4)), quiet)
    tokens = read_generated(job.file, more["sha256"])
    first = read_generated(job.file.with_name("alone"), alone["sha256"])
    assert tokens is not None and first is not None and tokens.shape == (9, 12) and torch.equal(tokens[:5], first)
    assert (more["n_sequences"], more["n_tuning"], more["n_tokens"]) == (5, 4, 9 * 8)


def test_batch_of_a_sampling(job: GenerateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracles: the settings; on a GPU half of its memory, by the bytes of one more doubling; never more sequences than
    are wanted."""

    def rows(device: str, total: int = 2**40, free: int = 2**40, **changes: int | None) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
        config = replace(job.config, **{"generated": 5000, "generated_batch_size": None} | changes)
        return sampling_batch(job.loaded, config, torch.device(device), torch.float32)

    assert rows("cpu") == 64 and rows("cpu", generated=5) == 5 and rows("cpu", generated_batch_size=7) == 7
    assert rows("cuda") == 2048 and rows("cuda", generated=300) == 300 and rows("cuda", generated_batch_size=7) == 7
    one, two = (
        generation_bytes(job.loaded, replace(job.config, generated=9, generated_batch_size=n), CPU, torch.float32)
        for n in (1, 2)
    )
    fits = one + 99 * (two - one)  # a hundred sequences
    assert rows("cuda", total=2 * fits) == rows("cuda", free=fits) == 64
    assert rows("cuda", free=1) == 1


def test_settings_that_leave_nothing_to_sample() -> None:
    """Oracle: the rules in words; without generated sequences the prompt is not looked at."""
    with pytest.raises(ConfigError, match=r"generated_prompt=16 leaves nothing to sample of sequence_length=16"):
        CalibrationConfig(sequence_length=16, generated=1, generated_prompt=16)
    CalibrationConfig(sequence_length=16, generated_prompt=16)
    with pytest.raises(ConfigError, match="generated_temperature=0"):
        CalibrationConfig(generated=1, generated_temperature=0.0)


def test_a_run_calibrates_on_both_and_says_so(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the record, the manifest and the card name the sequences; a second run samples nothing, with other graphs
    neither; a run whose file is gone samples the same again."""
    verify_in_process(monkeypatch)
    plain = tiny_config(tiny_model_dir, tmp_path)
    calibration = replace(plain.calibration, generated=3, generated_prompt=8, generated_batch_size=2)
    config = replace(plain, calibration=calibration, run_dir=str(tmp_path / "run"))
    record = run_pipeline(config)
    made = record["calibration"]["generated"]
    assert made["n_sequences"] == 3 and made["n_tokens"] == 3 * 24
    assert record["calibration"]["n_sequences"] == 4
    assert {layer["n_tokens"] for layer in record["layers"]} == {7 * 32}
    manifest: dict[str, Any] = json.loads((tmp_path / "run" / "artifact" / "manifest.json").read_text())
    assert manifest["calibration"] == record["calibration"]
    assert "generate" in stages(tmp_path / "run") and record["timings"]["generate"] > 0
    from compress.card import model_card

    assert "3 x 32 sampled from the original model (72 tokens drawn after 8 tokens of the text" in model_card(record)

    monkeypatch.setattr(generation, "continue_sequences", lambda *_: pytest.fail("sampled again"))
    assert run_pipeline(config)["calibration"] == record["calibration"]
    plainly = replace(config, calibration=replace(calibration, generated_graphs=False))
    assert run_pipeline(plainly)["calibration"] == record["calibration"]
    monkeypatch.setattr(generation, "continue_sequences", continue_sequences)
    (tmp_path / "run" / "generated.safetensors").unlink()
    assert run_pipeline(config)["calibration"] == record["calibration"]
    assert run_pipeline(replace(plain, run_dir=str(tmp_path / "plain")))["calibration"]["sha256"] != made["sha256"]
