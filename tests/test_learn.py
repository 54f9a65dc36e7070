"""Learned rounding and end-to-end tuning: the learned weight, the losses, the passes over a live model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import token_ids
from test_blocks import deep_model_dir, engine_inputs, tensors_of  # noqa: F401 (a fixture)
from tiny_runs import tiny_config
from torch import Tensor
from torch.nn import functional as F

from compress.blocks import EngineInputs, EngineResult, compress_blocks
from compress.checkpoint import load_block, load_tuned
from compress.config_quant import (
    GranularityName,
    LearnConfig,
    QuantConfig,
    Rounding,
    SchemeConfig,
    Transform,
    TuneConfig,
)
from compress.errors import ConfigError, NumericalError
from compress.learn_pass import split_batches
from compress.loading import load
from compress.methods.distill import TunedLinear, kl_to_teacher
from compress.methods.rtn import rtn_quantize
from compress.methods.signround import LearnedWeight, cell_offsets
from compress.pipeline import run_pipeline
from compress.quant import Granularity, QuantizedWeight, QuantScheme
from compress.tune import FOLDER, TuneNote, tune_model

LEARN = LearnConfig(enabled=True, epochs=2, batch_sequences=4, held_out=0.125)
LONG = replace(LEARN, epochs=30)
TUNE = TuneConfig(enabled=True, epochs=2, batch_sequences=4, held_out=0.125, scale_rate=5e-3, norm_rate=5e-3)
SCHEMES = [
    QuantScheme(bits=4, group_size=16),
    QuantScheme(bits=2, group_size=32, symmetric=False),
    QuantScheme(bits=3, granularity=Granularity.CHANNEL),
    QuantScheme(bits=8, granularity=Granularity.TENSOR),
]


def random_weight(n: int = 24, k: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def rounded(scheme: QuantScheme, weight: Tensor) -> QuantizedWeight:
    return rtn_quantize(weight, scheme, scale_dtype=torch.bfloat16)


def nothing(_done: int, _total: int) -> None:
    pass


# the learned weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.label)
@pytest.mark.parametrize("pull", [0.0, 0.8])
def test_a_learned_weight_begins_where_it_was_told(scheme: QuantScheme, pull: float) -> None:
    """Oracle: the given codes and scales, through the dense weight and back, bit for bit."""
    weight = random_weight()
    start = rounded(scheme, weight)
    learned = LearnedWeight(start, pull * cell_offsets(start, weight))
    result = learned.quantized()
    assert torch.equal(result.codes, start.codes) and torch.equal(result.scale, start.scale)
    assert result.scale.dtype == torch.bfloat16 and torch.equal(result.zero, start.zero)
    assert torch.equal(learned().detach(), start.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.label)
def test_gradients_pass_the_rounding(scheme: QuantScheme) -> None:
    """Oracle: autograd through (steps + u - u.detach()) * scale * gain, written out."""
    weight = random_weight()
    start = rounded(scheme, weight)
    learned = LearnedWeight(start, 0.5 * cell_offsets(start, weight))
    direction = random_weight(seed=1)
    (learned() * direction).sum().backward()

    u = learned.u.detach().clone().requires_grad_()
    gain = torch.ones_like(start.scale.float()).requires_grad_()
    grouped = u.reshape(learned.shape)
    steps = (start.codes.float().reshape(learned.shape) - start.zero.float().unsqueeze(-1)) + grouped - grouped.detach()
    dense = (steps * (start.scale.float() * gain).unsqueeze(-1)).reshape(weight.shape)
    (dense * direction).sum().backward()
    assert u.grad is not None and gain.grad is not None
    assert learned.u.grad is not None and learned.gain.grad is not None
    torch.testing.assert_close(learned.u.grad, u.grad)
    # by the gain, `learned` is relative to the stored scale
    torch.testing.assert_close(learned.gain.grad, gain.grad)


def test_codes_stay_in_range() -> None:
    """Oracle: 0 .. 2^bits - 1, however far the steps go."""
    weight = random_weight()
    learned = LearnedWeight(rounded(QuantScheme(bits=2, group_size=16), weight), torch.zeros_like(weight))
    for _ in range(5):
        learned.u.grad = torch.randn_like(learned.u)
        learned.step(10.0, 0.0)
    codes = learned.quantized().codes
    assert int(codes.max()) == 3 and int(codes.min()) == 0


def test_steps_follow_the_sign_of_the_gradient() -> None:
    """Oracle: u - rate * sign(gradient), and no gradient left; a rate of 0 leaves the gain alone."""
    weight = random_weight()
    start = rounded(SCHEMES[0], weight)
    learned = LearnedWeight(start, 0.5 * cell_offsets(start, weight))
    before, direction = learned.u.detach().clone(), random_weight(seed=3)
    learned.u.grad, learned.gain.grad = direction.clone(), torch.ones_like(learned.gain)
    learned.step(0.25, 0.0)
    torch.testing.assert_close(learned.u.detach(), before - 0.25 * direction.sign())
    assert learned.u.grad is None and learned.gain.grad is None and torch.equal(learned.gain, torch.ones(24, 4))


# the loss


def test_kl_and_its_gradient() -> None:
    """Oracle: torch's kl_div in float64 and autograd through it; 0 with gradient 0 for equal logits."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 7, 50, generator=generator)
    logits = (teacher + torch.randn(3, 7, 50, generator=generator)).requires_grad_()
    kl_to_teacher(logits, teacher).backward()
    wide = logits.detach().double().requires_grad_()
    expected = F.kl_div(
        wide.log_softmax(-1).reshape(-1, 50), teacher.double().log_softmax(-1).reshape(-1, 50),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    expected.backward()
    assert wide.grad is not None and logits.grad is not None
    assert kl_to_teacher(logits, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-4, atol=1e-8)
    same = teacher.clone().requires_grad_()
    kl = kl_to_teacher(same, teacher)
    kl.backward()
    assert same.grad is not None and abs(kl.item()) < 1e-6 and float(same.grad.abs().max()) == 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.label)
def test_a_tuned_linear_is_the_dequantized_one(scheme: QuantScheme) -> None:
    """Oracle: torch's linear on the dequantized weight, and autograd through it for x and the scales."""
    weight, x = random_weight(), torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    start = rounded(scheme, weight)
    bias = torch.nn.Parameter(torch.arange(24.0), requires_grad=False)
    linear, x1, x2 = TunedLinear(start, bias), x.clone().requires_grad_(), x.clone().requires_grad_()
    y = linear(x1)
    gain = torch.ones_like(start.scale.float()).requires_grad_()
    steps = start.codes.float() - start.zero.float().repeat_interleave(64 // start.zero.shape[1], 1)
    scale = (start.scale.float() * gain).repeat_interleave(64 // start.zero.shape[1], 1)
    expected = F.linear(x2, steps * scale, bias)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert (
        linear.learned.gain.grad is not None and gain.grad is not None and x1.grad is not None and x2.grad is not None
    )
    torch.testing.assert_close(linear.learned.gain.grad, gain.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-4, atol=1e-3)
    assert torch.equal(linear.learned.quantized().dequantize(), start.dequantize())


# over a live model


def learn_config(**changes: object) -> QuantConfig:
    base = QuantConfig(rounding=Rounding.gptq, scheme=SchemeConfig(bits=3, group_size=16), learn=LEARN)
    return replace(base, **changes)  # type: ignore[arg-type]


def blocks_of(directory: Path, config: QuantConfig, folder: Path) -> tuple[EngineInputs, EngineResult]:
    inputs = replace(
        engine_inputs(directory, config, folder), calibration_ids=token_ids(32, 32, seed=1), batch_size=4,
        verify_ids=token_ids(16, 32, seed=7),
    )  # fmt: skip
    return inputs, compress_blocks(inputs, nothing)


@pytest.mark.parametrize(
    "config",
    [
        learn_config(learn=LONG),
        learn_config(learn=LONG, rounding=Rounding.rtn, scheme=SchemeConfig(bits=2, group_size=16, symmetric=False)),
        learn_config(learn=LONG, transform=Transform.awq, rounding=Rounding.rtn, ignore=["*.o_proj"]),
        learn_config(learn=LONG, rounding=Rounding.rtn, scheme=SchemeConfig(granularity=GranularityName.channel)),
    ],
    ids=["gptq", "rtn-2bit-asym", "awq-kept", "channel"],
)
def test_learning_lowers_the_error_it_reports(config: QuantConfig, deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracle: the held-out error before, block by block, and the finished logits' distance to the original's."""
    from compress.models import load_dense, load_model

    _, plain = blocks_of(deep_model_dir, replace(config, learn=LearnConfig()), tmp_path / "plain")
    inputs, learned = blocks_of(deep_model_dir, config, tmp_path / "learned")
    notes = {id(r.learned): r.learned for r in learned.layers if r.learned is not None}
    assert all(r.learned is not None for r in learned.layers if r.status == "quantized")
    for note in notes.values():
        if note["kept"]:
            assert note["error_after"] < note["error_before"]
        assert note["steps"] == 210 and 0 <= note["changed"] < 1
    assert any(note["kept"] and note["changed"] > 0 for note in notes.values())
    original = load_dense(load_model(str(deep_model_dir)), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        reference = original(inputs.verify_ids, use_cache=False).logits
    assert (learned.verify_logits - reference).norm() < (plain.verify_logits - reference).norm()


def test_what_does_not_help_is_not_kept(deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracle: the codes of the run without learning. Steps this large make noise of any rounding."""
    _, _ = blocks_of(deep_model_dir, learn_config(learn=LearnConfig()), tmp_path / "plain")
    wild = replace(LEARN, rate=500.0, gain_rate=10.0)
    _, result = blocks_of(deep_model_dir, learn_config(learn=wild), tmp_path / "wild")
    assert not any(r.learned["kept"] for r in result.layers if r.learned)
    assert tensors_of(tmp_path / "wild") == tensors_of(tmp_path / "plain")


def test_learning_twice_gives_the_same_bytes(deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracle: the first run; and the state of torch's global generator, which is the user's."""
    before = torch.random.get_rng_state()
    for name in ("one", "two"):
        inputs, result = blocks_of(deep_model_dir, learn_config(tune=TUNE), tmp_path / name)
        assert result.teacher is not None
        tune_model(inputs, result.teacher, nothing)
        torch.rand(3)  # another state the second time
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "two")
    assert tensors_of(tmp_path / "one" / FOLDER) == tensors_of(tmp_path / "two" / FOLDER)
    torch.random.set_rng_state(before)


def test_learning_leaves_the_global_generator_alone(deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracle: the generator's state from before."""
    before = torch.random.get_rng_state()
    inputs, result = blocks_of(deep_model_dir, learn_config(tune=TUNE), tmp_path)
    assert result.teacher is not None
    tune_model(inputs, result.teacher, nothing)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_loss_that_is_not_finite_stops(deep_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Oracle: NumericalError naming the block; nothing is written."""
    from compress import learn_pass

    monkeypatch.setattr(learn_pass, "_batch_error", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(NumericalError, match=r"model\.layers\.0: learned rounding met a loss of nan"):
        blocks_of(deep_model_dir, learn_config(), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def tuned(directory: Path, folder: Path, config: QuantConfig) -> tuple[EngineInputs, TuneNote, Tensor]:
    inputs, result = blocks_of(directory, config, folder)
    assert result.teacher is not None
    return inputs, *tune_model(inputs, result.teacher, nothing)


def test_tuning_changes_scales_and_norms_alone(deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracles: codes and zeros of the blocks it began with; the KL it began with."""
    inputs, note, _ = tuned(deep_model_dir, tmp_path, learn_config(learn=LearnConfig(), tune=TUNE))
    assert note.kl_after < note.kl_before and 0 < note.steps <= note.steps_planned
    for index, block in enumerate(inputs.loaded.blocks):
        before, after = load_block(tmp_path, index), load_block(tmp_path / FOLDER, index)
        assert before is not None and after is not None
        for name in block.linears:
            assert torch.equal(before.quantized[name].codes, after.quantized[name].codes)
            assert torch.equal(before.quantized[name].zero, after.quantized[name].zero)
            assert not torch.equal(before.quantized[name].scale, after.quantized[name].scale)
            assert after.quantized[name].scale.dtype == before.quantized[name].scale.dtype
        assert set(after.changed) <= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    outside = load_tuned(tmp_path / FOLDER)
    assert outside is not None and set(outside[0]) <= {"model.norm.weight"}


def test_tuning_never_ends_above_its_start(deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracle: the scales it began with, when every step is far too large."""
    wild = replace(TUNE, scale_rate=50.0, norm_rate=50.0, patience=1)
    inputs, note, _ = tuned(deep_model_dir, tmp_path, learn_config(learn=LearnConfig(), tune=wild))
    assert note.kl_after == note.kl_before and note.steps < note.steps_planned
    for index in range(len(inputs.loaded.blocks)):
        before, after = load_block(tmp_path, index), load_block(tmp_path / FOLDER, index)
        assert before is not None and after is not None and not after.changed
        assert all(torch.equal(before.quantized[n].scale, q.scale) for n, q in after.quantized.items())


def test_a_tuned_model_is_found_again(deep_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Oracles: the note and logits of the first call; a second one makes no step."""
    config = learn_config(learn=LearnConfig(), tune=TUNE)
    _, note, logits = tuned(deep_model_dir, tmp_path, config)
    inputs, result = blocks_of(deep_model_dir, config, tmp_path)
    assert result.n_resumed == 4 and result.teacher is not None

    def no_step(_done: int, _total: int) -> None:
        raise AssertionError("tuned again")

    again, again_logits = tune_model(inputs, result.teacher, no_step)
    assert again == note and torch.equal(again_logits, logits)


def test_recomputed_activations_change_nothing(
    deep_model_dir: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: tuning with all activations kept; to the bit, since the same products are taken twice."""
    from compress import tune

    config = learn_config(learn=LearnConfig(), tune=TUNE)
    tuned(deep_model_dir, tmp_path / "kept", config)
    monkeypatch.setattr(tune, "free_bytes", lambda _device: 1)
    tuned(deep_model_dir, tmp_path / "recomputed", config)
    assert tensors_of(tmp_path / "kept" / FOLDER) == tensors_of(tmp_path / "recomputed" / FOLDER)


def test_the_whole_pipeline_learns_and_tunes(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Oracles: verify's fresh process, and the artifact as loaded against the logits that tuning left; AWQ's folded
    norms are tuned with the others."""
    quant = QuantConfig(
        Transform.awq, Rounding.gptq, SchemeConfig(bits=3, group_size=32), learn=LEARN, tune=replace(TUNE, held_out=0.3)
    )
    record = run_pipeline(tiny_config(tiny_model_dir, tmp_path, quant=quant))
    assert record["verified"] and record["verify"]["relative_error"] < 1e-5
    assert record["tuned"]["kl_after"] <= record["tuned"]["kl_before"]
    statuses = record["verify"]["source_tensors"]
    assert statuses["quantized"] == 14 and statuses.get("tuned", 0) + statuses["kept"] == 7
    assert load(record["artifact"]).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).shape[1] > 3


def test_split_batches() -> None:
    """Oracle: counted by hand; a single batch has to serve for both."""
    assert split_batches(16, 0.0625) == (list(range(15)), [15])
    assert split_batches(32, 0.0625) == (list(range(30)), [30, 31])
    assert split_batches(5, 0.0) == ([0, 1, 2, 3], [4])
    assert split_batches(3, 0.9) == ([0], [1, 2])
    assert split_batches(1, 0.5) == ([0], [0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LearnConfig(epochs=0), "epochs=0"),
        (lambda: LearnConfig(pull=1.0), "pull=1.0"),
        (lambda: TuneConfig(held_out=0.0), "held_out=0.0"),
        (lambda: TuneConfig(scale_rate=-1.0), "scale_rate=-1.0"),
    ],
)
def test_settings_that_make_no_sense(make: object, words: str) -> None:
    """Oracle: ConfigError that names the field and its value."""
    with pytest.raises(ConfigError, match=words):
        make()  # type: ignore[operator]
