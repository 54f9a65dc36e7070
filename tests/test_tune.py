"""End-to-end training of codes: where a weight begins in its rounding cell, the gradient, the steps, the whole run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import token_ids
from safetensors.torch import load_file
from test_blocks import deep_model_dir, engine_inputs, tensors_of  # noqa: F401 (a fixture)
from test_head import tied_model_dir  # noqa: F401 (a fixture)
from test_learn import SCHEMES, TUNE, blocks_of, learn_config, nothing, random_weight, rounded
from tiny_runs import tiny_config, verify_in_process
from torch import Tensor, nn
from torch.nn import functional as F

from compress import tune
from compress.blocks import EngineInputs, EngineResult, compress_blocks
from compress.checkpoint import checkpoint_path, load_block
from compress.config import RunConfig
from compress.config_quant import HadamardConfig, LearnConfig, QuantConfig, SchemeConfig, Transform, TuneConfig
from compress.errors import ConfigError, NumericalError
from compress.forecast import Load, forecast
from compress.methods import adam as adam_file
from compress.methods.adam import Adam
from compress.methods.distill import TunedLinear
from compress.methods.signround import LearnedWeight, cell_offsets, pack_offsets, unpack_offsets
from compress.models import load_dense, load_model
from compress.pipeline import run_pipeline
from compress.quant import QuantScheme
from compress.rotation import attach_rotation
from compress.streams import tail_logits
from compress.tune import FOLDER, TuneNote, tune_model

CPU = torch.device("cpu")
CODES = replace(TUNE, epochs=5, batch_sequences=32, code_rate=1e-2)


# where a weight begins


@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.label)
def test_offsets_say_where_the_real_weight_lies(scheme: QuantScheme) -> None:
    """Oracle: the real weight itself, made again from code, offset and scale; where it lies outside of its code's cell,
    the edge of the cell on its side."""
    weight = random_weight()
    start = rounded(scheme, weight)
    offsets = cell_offsets(start, weight)
    scale = start.scale.float().repeat_interleave(weight.numel() // start.scale.numel(), -1).reshape(-1, 64)
    made = start.dequantize() + offsets * scale
    inside = offsets.abs() < 0.5
    torch.testing.assert_close(made[inside], weight.expand_as(made)[inside])
    beyond = (weight - start.dequantize())[~inside]
    assert inside.float().mean() > 0.8 and bool((beyond.sign() == offsets[~inside].sign()).all())


def test_offsets_in_a_byte() -> None:
    """Oracles: every byte comes back; every offset does to half a unit, 1/508 of a step, and stays in its cell."""
    packed = torch.arange(-127, 128).to(torch.int8)
    assert torch.equal(pack_offsets(unpack_offsets(packed)), packed)
    offsets = torch.linspace(-0.5, 0.5, 1001)
    again = unpack_offsets(pack_offsets(offsets))
    assert float((again - offsets).abs().max()) <= 1 / 508 + 1e-6 and float(again.abs().max()) == 0.5


# the gradient and the steps


@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.label)
def test_gradient_of_codes(scheme: QuantScheme) -> None:
    """Oracle: autograd through (codes + u - u.detach()) * scale in a dense product, where round(u) is a code; beyond
    the last code 0. The product itself is that of the codes."""
    weight, x = random_weight(), torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    start = rounded(scheme, weight)
    linear = TunedLinear(start, None, 0.9 * cell_offsets(start, weight))
    learned = linear.learned
    assert isinstance(learned.u, nn.Parameter)
    with torch.no_grad():  # some far outside, on both sides
        learned.u[0] += 2 * scheme.max_code
        learned.u[1] -= 2 * scheme.max_code
    y = linear(x)
    y.square().sum().backward()

    u = learned.u.detach().clone().requires_grad_()
    grouped, low, high = u.reshape(learned.shape), learned.low.unsqueeze(-1), learned.high.unsqueeze(-1)
    codes = torch.minimum(torch.maximum(grouped.detach().round(), low), high)
    inside = (grouped.detach() > low - 0.5) & (grouped.detach() < high + 0.5)
    through = codes + torch.where(inside, grouped - grouped.detach(), torch.zeros(()))
    expected = F.linear(x, (through * start.scale.float().unsqueeze(-1)).reshape(weight.shape))
    torch.testing.assert_close(y, expected)
    expected.square().sum().backward()
    assert learned.u.grad is not None and u.grad is not None
    torch.testing.assert_close(learned.u.grad, u.grad, rtol=1e-4, atol=1e-3)
    assert not learned.u.grad[:2].any() and bool(learned.u.grad[2:].any())
    assert torch.equal(F.linear(x, learned.quantized().dequantize()), y.detach())


@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.label)
def test_a_learned_state_comes_back(scheme: QuantScheme) -> None:
    """Oracles: the weight when the state was taken, bit for bit; the range of the codes, however far they went."""
    weight = random_weight()
    learned = LearnedWeight(rounded(scheme, weight), torch.zeros_like(weight))
    with torch.no_grad():
        learned.u += 3 * random_weight(seed=5)
        learned.gain += 0.01 * torch.randn(learned.gain.shape, generator=torch.Generator().manual_seed(6))
    before, state = learned.quantized(), learned.state()
    assert int(before.codes.max()) <= scheme.max_code
    assert state[0] is not None and state[0].element_size() == (2 if scheme.bits == 8 else 1)
    with torch.no_grad():
        learned.u += 1e3
        learned.gain.zero_()
    assert bool((learned.quantized().codes == scheme.max_code).all())
    learned.set_state(state)
    after = learned.quantized()
    assert torch.equal(after.codes, before.codes) and torch.equal(after.scale, before.scale)


def test_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: torch's own Adam in float64 with the same moments. Portions change nothing, to the bit; a parameter
    without a gradient stays."""
    shapes = [(3,), (4, 5), (2, 2), (7,)]
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(5)]

    def moved() -> list[nn.Parameter]:
        parameters = [nn.Parameter(s.clone()) for s in [*starts, torch.ones(2)]]
        ours = Adam([(parameters[:2], 0.1), (parameters[2:], 0.01)])
        for step, step_grads in enumerate(grads):
            for p, g in zip(parameters, step_grads, strict=False):
                p.grad = g.clone()
            ours.step(1 - step / 10)
            assert all(p.grad is None for p in parameters)
        return parameters

    found = moved()
    wide = [nn.Parameter(s.double()) for s in starts]
    rates = [{"params": wide[:2], "lr": 0.1}, {"params": wide[2:], "lr": 0.01}]
    torchs = torch.optim.Adam(rates, betas=(0.9, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(torchs, lambda i: 1 - i / 10)
    for step_grads in grads:
        for p, g in zip(wide, step_grads, strict=True):
            p.grad = g.double()
        torchs.step()
        schedule.step()
    for p, q in zip(found, wide, strict=False):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[-1].detach(), torch.ones(2))
    monkeypatch.setattr(adam_file, "_ELEMENTS_AT_ONCE", 5)
    assert all(torch.equal(p, q) for p, q in zip(moved(), found, strict=True))


# over a live model


def codes_config(**changes: Any) -> QuantConfig:
    settings = {"scheme": SchemeConfig(bits=2, group_size=16), "learn": LearnConfig(), "tune": CODES}
    return learn_config(**settings | changes)


def engine(
    directory: Path, folder: Path, config: QuantConfig, n: int = 48, batch_size: int = 16
) -> tuple[EngineInputs, EngineResult]:
    """Blocks on 32 sequences of calibration, n more for tuning alone."""
    inputs = replace(
        engine_inputs(directory, config, folder), calibration_ids=token_ids(32, 32, seed=1), batch_size=batch_size,
        verify_ids=token_ids(16, 32, seed=7), tuning_ids=token_ids(n, 32, seed=9),
    )  # fmt: skip
    return inputs, compress_blocks(inputs, nothing)


def trained(
    directory: Path, folder: Path, config: QuantConfig, n: int = 48, batch_size: int = 16
) -> tuple[EngineInputs, TuneNote, Tensor]:
    inputs, result = engine(directory, folder, config, n, batch_size)
    assert result.teacher is not None
    return inputs, *tune_model(inputs, result.teacher, nothing, result.tuning)


@pytest.mark.parametrize("transform", [Transform.none, Transform.hadamard])
def test_tuning_sequences_pass_the_original(transform: Transform, deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracle: the original model's logits on them, whatever was made of the blocks; also where weights are rotated."""
    config = codes_config(transform=transform)
    inputs = engine_inputs(deep_model_dir, config, tmp_path)
    inputs = replace(inputs, batch_size=1, tuning_ids=token_ids(11, 32, seed=9))
    if transform is Transform.hadamard:
        attach_rotation(inputs.loaded, inputs.plan, HadamardConfig(), CPU)
    result = compress_blocks(inputs, nothing)
    assert result.tuning is not None and [len(h) for h in result.tuning.hidden] == [8, 3]
    found = tail_logits(inputs.loaded, result.tuning, torch.float32)
    original = load_dense(load_model(str(deep_model_dir)), CPU, torch.float32)
    with torch.no_grad():
        expected = original(inputs.tuning_ids, use_cache=False).logits
    # the rotated embedding is stored in bfloat16
    assert (found - expected).norm() < (2**-8 if transform is Transform.hadamard else 1e-5) * expected.norm()


def test_training_codes_lowers_the_distance(deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracles: the KL it began with, and that of scales and norms alone; codes in their range, the share of those that
    changed counted; the float32 logits of the finished model nearer to the original's."""
    config = codes_config(tune=replace(CODES, batch_sequences=16))
    alone = codes_config(tune=replace(CODES, batch_sequences=16, code_rate=0.0, patience=100))
    _, without, fixed = trained(deep_model_dir, tmp_path / "scales", alone, 240)
    inputs, note, logits = trained(deep_model_dir, tmp_path / "codes", config, 240)
    assert note.kl_before == pytest.approx(without.kl_before) and note.kl_after < 0.9 * without.kl_after
    assert note.steps == note.steps_planned and without.n_codes == 0 and without.changed == 0
    n_changed = 0
    for index in range(len(inputs.loaded.blocks)):
        before, after = load_block(tmp_path / "codes", index), load_block(tmp_path / "codes" / FOLDER, index)
        assert before is not None and after is not None and before.offsets and not after.offsets
        for name, weight in after.quantized.items():
            assert int(weight.codes.max()) <= 3 and torch.equal(weight.zero, before.quantized[name].zero)
            n_changed += int((weight.codes != before.quantized[name].codes).sum())
    assert note.n_codes == sum(p.n * p.k for p in inputs.plan.linears)
    assert note.changed == n_changed / note.n_codes > 0.01
    original = load_dense(load_model(str(deep_model_dir)), CPU, torch.float32)
    with torch.no_grad():
        reference = original(inputs.verify_ids, use_cache=False).logits
    assert (logits - reference).norm() < (fixed - reference).norm()


def test_codes_never_end_above_their_start(deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracle: the codes and scales it began with, when every step is far too large. Patience does not stop it."""
    wild = replace(CODES, epochs=2, code_rate=50.0, scale_rate=1.0, norm_rate=1.0, patience=1)
    inputs, note, _ = trained(deep_model_dir, tmp_path, codes_config(tune=wild))
    assert note.kl_after == note.kl_before and note.steps == note.steps_planned and note.changed == 0
    for index in range(len(inputs.loaded.blocks)):
        before, after = load_block(tmp_path, index), load_block(tmp_path / FOLDER, index)
        assert before is not None and after is not None and not after.changed
        for name, weight in after.quantized.items():
            assert torch.equal(weight.codes, before.quantized[name].codes)
            assert torch.equal(weight.scale, before.quantized[name].scale)


def test_resuming_gives_the_same_bytes(deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracle: a run that nothing stopped; stopped in the middle of tuning, with one block's file gone."""
    short = codes_config(tune=replace(CODES, epochs=3))
    trained(deep_model_dir, tmp_path / "whole", short)
    inputs, result = engine(deep_model_dir, tmp_path / "stopped", short)
    assert result.teacher is not None

    def stop(done: int, _total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_model(inputs, result.teacher, stop, result.tuning)
    checkpoint_path(tmp_path / "stopped", 2).unlink()
    trained(deep_model_dir, tmp_path / "stopped", short)
    for folder in (Path(), Path(FOLDER)):
        assert tensors_of(tmp_path / "whole" / folder) == tensors_of(tmp_path / "stopped" / folder)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_same_bytes_twice(dtype: torch.dtype, deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracle: the first run; learned rounding comes before. Sequences are long enough for attention to be split."""
    config = codes_config(learn=LearnConfig(enabled=True, epochs=2))
    for name in ("one", "two"):
        inputs = replace(
            engine_inputs(deep_model_dir, config, tmp_path / name), calibration_ids=token_ids(16, 512, seed=1),
            batch_size=4, tuning_ids=token_ids(48, 512, seed=9), device=torch.device("cuda"), dtype=dtype,
        )  # fmt: skip
        result = compress_blocks(inputs, nothing)
        assert result.teacher is not None
        note, _ = tune_model(inputs, result.teacher, nothing, result.tuning)
        assert note.kl_after <= note.kl_before
        assert not torch.are_deterministic_algorithms_enabled()
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "two")
    assert tensors_of(tmp_path / "one" / FOLDER) == tensors_of(tmp_path / "two" / FOLDER)


def test_blocks_made_for_codes_that_stay_are_not_taken(deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracle: the files of a run that was for training codes from the beginning."""
    config = codes_config()
    _, plain = blocks_of(deep_model_dir, replace(config, tune=TUNE), tmp_path / "plain")
    assert not any("cell_offsets" in name for name in tensors_of(tmp_path / "plain")) and plain.n_resumed == 0
    _, again = blocks_of(deep_model_dir, config, tmp_path / "plain")
    blocks_of(deep_model_dir, config, tmp_path / "codes")
    assert again.n_resumed == 0 and tensors_of(tmp_path / "plain") == tensors_of(tmp_path / "codes")


def test_batches_together_are_the_same_step(
    deep_model_dir: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the same sequences one batch at a time: the KL it begins with, and about the KL it ends with."""
    config = codes_config(tune=replace(CODES, epochs=12, batch_sequences=16))
    _, one, _ = trained(deep_model_dir, tmp_path / "one", config, 12, 4)
    seen = []
    real = tune._Tuner._loss
    monkeypatch.setattr(tune, "_batches_at_once", lambda *_: 3)
    monkeypatch.setattr(tune._Tuner, "_loss", lambda self, batches: seen.append(len(batches)) or real(self, batches))
    _, three, _ = trained(deep_model_dir, tmp_path / "three", config, 12, 4)
    assert set(seen) == {3, 1}  # steps of four batches, one held out
    assert three.kl_before == pytest.approx(one.kl_before, rel=1e-5)
    assert three.kl_after == pytest.approx(one.kl_after, rel=0.05) and three.kl_after < 0.95 * three.kl_before


def test_a_loss_that_is_not_finite_stops_tuning(
    deep_model_dir: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: NumericalError, though a finite loss came after it; nothing is written."""
    inputs, result = engine(deep_model_dir, tmp_path, codes_config())
    assert result.teacher is not None
    real, calls = tune._Tuner._loss, [0]

    def loss(self: Any, batches: list[int]) -> Tensor:
        calls[0] += 1
        return real(self, batches) + (float("inf") if calls[0] == 5 else 0.0)

    monkeypatch.setattr(tune._Tuner, "_loss", loss)
    with pytest.raises(NumericalError, match="end-to-end tuning met a KL of inf"):
        tune_model(inputs, result.teacher, nothing, result.tuning)
    assert not (tmp_path / FOLDER).exists()


# settings and the whole run


def test_a_run_with_sequences_for_tuning_alone(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracles: the record, by the settings: blocks saw the calibration alone, tuning more; without tuning nothing is
    sampled for it. The same settings elsewhere give the same artifact."""
    verify_in_process(monkeypatch)
    plain = tiny_config(tiny_model_dir, tmp_path)
    config: RunConfig = replace(
        plain,
        quant=replace(plain.quant, tune=replace(CODES, epochs=6, batch_sequences=4, held_out=0.3)),
        calibration=replace(plain.calibration, generated=3, tune_generated=9, generated_prompt=8),
    )
    record = run_pipeline(replace(config, run_dir=str(tmp_path / "one")))
    made = record["calibration"]["generated"]
    assert (made["n_sequences"], made["n_tuning"], made["n_tokens"], made["batch_size"]) == (3, 9, 12 * 24, 12)
    assert {layer["n_tokens"] for layer in record["layers"]} == {7 * 32}
    # 7 sequences in two batches, of which one only judges; 9 more in batches of 4
    assert record["tuned"]["steps_planned"] == 6 * (1 + 3) and record["rounding"] == "gptq + tuned codes"
    assert record["tuned"]["kl_after"] <= record["tuned"]["kl_before"] and record["verified"]
    from compress.record import generated_text

    assert " and 3 x 32 and for tuning alone 9 x 32 sampled from the original" in generated_text(record["calibration"])
    again = run_pipeline(replace(config, run_dir=str(tmp_path / "two")))
    assert again["tuned"] == record["tuned"]
    names = [Path(r["artifact"]) / "model.safetensors" for r in (record, again)]
    assert names[0].read_bytes() == names[1].read_bytes()

    off = replace(config, quant=replace(plain.quant, tune=TuneConfig()), run_dir=str(tmp_path / "off"))
    assert run_pipeline(off)["calibration"]["generated"]["n_tokens"] == 3 * 24


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_trained_where_asked(
    tied: bool,
    tiny_model_dir: Path,
    tied_model_dir: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracles: the fresh process of the verification, which computes the tuned model's logits from the artifact; the
    tensors there: moved, by no more than the steps allow; tied ones once."""
    verify_in_process(monkeypatch)
    source = tied_model_dir if tied else tiny_model_dir
    plain = tiny_config(source, tmp_path)
    tune = replace(CODES, epochs=6, batch_sequences=4, held_out=0.3, embedding_rate=5e-2)
    config = replace(plain, quant=replace(plain.quant, scheme=SchemeConfig(bits=2, group_size=16), tune=tune))
    record = run_pipeline(replace(config, run_dir=str(tmp_path / "run")))
    before = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    after = load_file(Path(record["artifact"]) / "model.safetensors")
    tables = ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied)
    assert ("lm_head.weight" in after) is not tied and record["verified"]
    assert record["tuned"]["n_embedding"] == sum(before[name].numel() for name in tables)
    assert record["tuned"]["kl_after"] < record["tuned"]["kl_before"]
    for name in tables:
        start = before[name].float()
        moved = (after[name].float() - start).abs()
        most = 5e-2 * start.square().mean().sqrt() * record["tuned"]["steps"] + 2**-8 * start.abs().max()
        assert after[name].dtype is before[name].dtype and 0 < float(moved.max()) < most


def test_forecast_counts_what_tuning_keeps(deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracle: by hand: hidden states of the sequences for tuning; 16 bytes instead of one for a code in training."""
    inputs = engine_inputs(deep_model_dir, codes_config(), tmp_path)
    loaded, plan = inputs.loaded, inputs.plan
    without, more = (forecast(loaded, plan, Load(10**4, 100, n), torch.float32) for n in (0, 10**6))
    assert more.host_bytes - without.host_bytes == 10**6 * 32 * 4
    codes = sum(p.n * p.k for p in plan.linears)
    scales = replace(plan, config=codes_config(tune=TUNE))
    found = [tune.tuning_state_bytes(loaded, p, torch.float32) for p in (plan, scales)]
    assert found[0] - found[1] == 15 * codes and found[1] == codes + 4 * (32 * 2 * 128 + 32)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TuneConfig(code_rate=-1.0), "code_rate=-1.0"),
        (lambda: TuneConfig(pull=1.0), "pull=1.0"),
        (lambda: TuneConfig(pull=-0.1), "pull=-0.1"),
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], Any], words: str) -> None:
    """Oracle: ConfigError that names the field and its value."""
    with pytest.raises(ConfigError, match=words):
        make()
