"""Hadamard rotations: the matrices are orthonormal, folding them leaves the model's function alone, and what cannot be
rotated is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, save, token_ids
from safetensors.torch import load_file, save_file
from tiny_runs import hashes, scheme, tiny_config, verify_in_process
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import compress
from compress.artifact import read_manifest
from compress.config import EvalConfig
from compress.config_quant import GptqConfig, HadamardConfig, QuantConfig, Rounding, Transform
from compress.errors import ConfigError, UnsupportedModel
from compress.methods.hadamard import apply_hadamard, hadamard_matrix, hadamard_order, random_turn
from compress.models import LoadedModel, load_dense, load_model
from compress.pipeline import run_pipeline
from compress.plan import make_plan
from compress.qlinear import Backend
from compress.rotation import attach_rotation

CPU = torch.device("cpu")
HADAMARD = QuantConfig(Transform.hadamard, Rounding.rtn, scheme())


@pytest.fixture(scope="module", autouse=True)
def quick_verify() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        verify_in_process(patch)
        yield


def rotated(path: Path, config: HadamardConfig, quant: QuantConfig = HADAMARD) -> tuple[LoadedModel, list[str]]:
    loaded = load_model(str(path))
    notes = attach_rotation(loaded, make_plan(loaded, quant), config, CPU)
    assert loaded.rotation is not None
    loaded.rotation.rounded = set()
    return loaded, notes


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.double()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 60, 64, 80, 96, 112, 128, 576, 768, 896, 1536, 2304])
def test_matrices_are_hadamard(n: int) -> None:
    """Oracle: the definition. Entries of one size, rows orthonormal."""
    matrix = hadamard_matrix(n)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [3, 6, 52, 92, 100])
def test_matrices_of_other_sizes_are_block_diagonal(n: int) -> None:
    """Oracle: orthonormal; zero outside blocks whose size is the largest power of two that divides n."""
    matrix, size = hadamard_matrix(n), n & -n
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    block = torch.arange(n) // size
    assert hadamard_order(n) == size
    assert torch.equal(matrix != 0, block[:, None] == block[None, :])


@pytest.mark.parametrize("n", [2048, 3072, 3584, 4096, 5120, 7168, 8192])
def test_sizes_of_real_models_mix_all_channels(n: int) -> None:
    """Oracle: a basis vector becomes entries of one size, and the length of a random vector stays."""
    assert hadamard_order(n) == n
    unit = torch.zeros(n, dtype=torch.float64)
    unit[n // 3] = 1
    torch.testing.assert_close(apply_hadamard(unit).abs(), torch.full((n,), n**-0.5, dtype=torch.float64))
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(apply_hadamard(x).norm(), x.norm())


@pytest.mark.parametrize(("n", "size"), [(24, None), (64, 16), (36, 12)])
def test_turns(n: int, size: int | None) -> None:
    """Oracle: the dense product diag(signs) (I x H); another seed gives other signs, the global generator is not
    touched."""
    state = torch.get_rng_state()
    turn, other = random_turn(n, 1, size), random_turn(n, 2, size)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(turn.signs, other.signs)
    dense = turn.signs[:, None] * torch.kron(torch.eye(n // (size or n)).double(), hadamard_matrix(size or n))
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn.apply(x), x.double() @ dense)


KINDS = ["llama", "llama-bias-tied", "mistral", "qwen2", "qwen3", "granite", "smollm3", "gemma"]


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True)], ids=["both", "residual", "value"])
@pytest.mark.parametrize("kind", KINDS)
def test_function_is_unchanged(kind: str, parts: tuple[bool, bool], tmp_path: Path) -> None:
    """Oracle: the transformers model itself, on other tokens than the search ran on; 1e-5 is float32 rounding. The
    weights differ, or nothing would have been tested. Grouped-query attention has 4 heads on 2 here."""
    state = torch.get_rng_state()
    loaded, _ = rotated(save(kind, tmp_path), HadamardConfig(*parts, seed=3))
    model, reference, ids = load_dense(loaded, CPU, torch.float32), build(kind), token_ids(2, 40, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert distance(logits(model, ids), logits(reference, ids)) < 1e-5
    moved = {
        name.split(".")[-2]
        for name, value in model.named_parameters()
        if name.endswith("proj.weight") and distance(value, reference.get_parameter(name)) > 0.5
    }
    attention = {"v_proj", "o_proj"} if parts[1] else set()
    everything = {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")} if parts[0] else set()
    assert moved == attention | everything


@pytest.mark.parametrize(("width", "heads"), [(96, 4), (52, 2)])
def test_widths_that_are_no_power_of_two(width: int, heads: int, tmp_path: Path) -> None:
    """Oracle: the transformers model. 96 channels in heads of 24 mix whole; 52 in heads of 26 mix in blocks of 4 and
    of 2."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads // 2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference = LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    loaded, _ = rotated(tmp_path, HadamardConfig(), replace(HADAMARD, scheme=scheme(4, "channel")))
    assert loaded.rotation is not None
    change = loaded.rotation.changes["model.layers.0.self_attn.v_proj.weight"]
    assert change.columns is not None and change.rows is not None
    assert (change.columns.size, change.rows.size) == ((96, 24) if width == 96 else (4, 2))
    ids = token_ids(2, 40, seed=5)
    assert distance(logits(load_dense(loaded, CPU, torch.float32), ids), logits(reference, ids)) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_gains_become_one(kind: str, tmp_path: Path) -> None:
    """Oracle: what an RMSNorm without a gain stores: 1, or 0 where the architecture adds 1 to it."""
    loaded, _ = rotated(save(kind, tmp_path), HadamardConfig())
    plain = 0.0 if kind == "gemma" else 1.0
    norms = [n for n, p in loaded.model.named_parameters() if p.ndim == 1 and "norm" in n]
    assert len(norms) == 5
    for name in norms:
        assert bool((loaded.tensor(name) == plain).all()), name


@pytest.mark.parametrize("kind", ["phi", "gptj", "opt", "gemma2", "gemma3", "olmo2", "cohere", "starcoder2"])
def test_values_turn_where_the_stream_cannot(kind: str, tmp_path: Path) -> None:
    """Oracle: the transformers model. OPT's fc1 feeds fc2 through a ReLU, which passes positive factors and no turn."""
    loaded, _ = rotated(save(kind, tmp_path), HadamardConfig(residual=False))
    ids = token_ids(2, 40, seed=5)
    assert distance(logits(load_dense(loaded, CPU, torch.float32), ids), logits(build(kind), ids)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("gpt2", "LayerNorm.*subtracts the mean"),
        ("opt", "LayerNorm.*subtracts the mean"),
        ("stablelm", "subtracts the mean"),
        ("cohere", "subtracts the mean"),
        ("gemma2", "post_attention_layernorm normalizes the output of self_attn.o_proj"),
        ("gemma3", "post_attention_layernorm normalizes the output of self_attn.o_proj"),
        ("olmo2", "no linear of model.layers.0 reads the output of a norm"),
    ],
)
def test_models_whose_stream_does_not_turn_are_refused(kind: str, why: str, tmp_path: Path) -> None:
    """Oracle: the architectures' papers: a mean that is subtracted, or a gain after attention. The message names the
    module and the setting."""
    with pytest.raises(UnsupportedModel, match=f"(?s){why}.*quant.hadamard.residual=false"):
        rotated(save(kind, tmp_path), HadamardConfig(value=False))


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "gpt-neox"])
def test_fused_values_are_refused(kind: str, tmp_path: Path) -> None:
    """Oracle: the rows of q, k and v lie in one weight there."""
    with pytest.raises(UnsupportedModel, match=r"fused q/k/v.*quant.hadamard.value=false"):
        rotated(save(kind, tmp_path), HadamardConfig(residual=False))


def test_what_the_search_overlooks_the_check_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a writer left out on purpose changes the function, and the block is named."""
    from compress import rotation

    real = rotation._moves_stream
    monkeypatch.setattr(
        rotation, "_moves_stream", lambda block, run, name, *rest: "down" not in name and real(block, run, name, *rest)
    )
    with pytest.raises(UnsupportedModel, match=r"the output of model.layers.0 of LlamaForCausalLM changes by"):
        rotated(save("llama", tmp_path), HadamardConfig())


def test_outliers_are_spread(tmp_path: Path) -> None:
    """Oracle: the paper's claim on a made-up case: one input channel of q is 100 times as large as the others, and the
    kurtosis of its rows falls to that of a normal distribution, 3, or near."""
    path = save("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][:, 5] *= 100
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    loaded, _ = rotated(path, HadamardConfig(value=False))

    def kurtosis(w: Tensor) -> float:
        w = w.double()
        return float((w.pow(4).mean(1) / w.square().mean(1).square()).mean())

    assert kurtosis(loaded.original(name)) > 50
    assert kurtosis(loaded.tensor(name)) < 4


def run(model: Path, folder: Path, quant: QuantConfig) -> Path:
    folder.mkdir(exist_ok=True)
    return Path(run_pipeline(tiny_config(model, folder, quant=quant, eval=EvalConfig(enabled=False)))["artifact"])


@pytest.fixture(scope="module")
def tied_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one tensor for embedding and head. Read only."""
    path = tmp_path_factory.mktemp("tied")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(path)
    for companion in tiny_model_dir.glob("tokenizer*"):
        (path / companion.name).write_bytes(companion.read_bytes())
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    return path


@pytest.mark.parametrize("rounding", [Rounding.rtn, Rounding.gptq])
@pytest.mark.parametrize("source", ["tiny_model_dir", "tied_model_dir"])
def test_artifact_round_trip(rounding: Rounding, source: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Oracle: transformers with compressed-tensors on the files alone gives our logits, and at 8 bits those of the
    original model; the manifest says of every source tensor what became of it."""
    model: Path = request.getfixturevalue(source)
    artifact = run(model, tmp_path / "run", replace(HADAMARD, rounding=rounding, scheme=scheme(8)))
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    ours = logits(compress.load(artifact, device="cpu", dtype=torch.float32, backend=Backend.REFERENCE), ids)
    theirs = logits(AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32), ids)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert distance(ours, logits(AutoModelForCausalLM.from_pretrained(model), ids)) < 0.02
    assert AutoConfig.from_pretrained(artifact).tie_word_embeddings is False
    accounted = read_manifest(artifact)["source_tensors"]
    assert accounted["model.norm.weight"]["status"] == "folded"
    assert accounted["model.embed_tokens.weight"]["status"] == "rotated"
    stored = load_file(artifact / "model.safetensors")
    assert {n for e in accounted.values() for n in e["as"]} == set(stored)
    assert "lm_head.weight" in stored


def test_ties_stay_without_the_residual_rotation(tied_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: config.json of the source; an artifact without a tensor for the head."""
    artifact = run(tied_model_dir, tmp_path, replace(HADAMARD, hadamard=HadamardConfig(residual=False)))
    assert AutoConfig.from_pretrained(artifact).tie_word_embeddings is True
    assert "lm_head.weight" not in load_file(artifact / "model.safetensors")
    assert read_manifest(artifact)["source_tensors"]["model.embed_tokens.weight"]["status"] == "kept"


def test_kept_linears_are_rotated_in_their_own_dtype(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: transformers on the files, where one linear of a group is not quantized."""
    quant = replace(HADAMARD, ignore=["*layers.1.self_attn.v_proj", "*layers.0.mlp.down_proj"], scheme=scheme(8))
    quant = replace(quant, allow_split_fused=True)
    artifact = run(tiny_model_dir, tmp_path, quant)
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    ours = logits(compress.load(artifact, device="cpu", dtype=torch.float32, backend=Backend.REFERENCE), ids)
    theirs = logits(AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32), ids)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert distance(ours, logits(AutoModelForCausalLM.from_pretrained(tiny_model_dir), ids)) < 0.02
    assert read_manifest(artifact)["source_tensors"]["model.layers.0.mlp.down_proj.weight"]["status"] == "rotated"


def test_runs_repeat_and_the_seed_counts(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: sha256 of every file of the artifact; equal for equal settings, different for another seed."""
    quant = replace(HADAMARD, rounding=Rounding.gptq, gptq=GptqConfig(act_order=False))
    first, second = (hashes(run(tiny_model_dir, tmp_path / name, quant)) for name in "ab")
    first, second = ({n: h for n, h in files.items() if n.endswith(".safetensors")} for files in (first, second))
    other = hashes(run(tiny_model_dir, tmp_path / "c", replace(quant, hadamard=HadamardConfig(seed=1))))
    assert first and first == second
    assert first["model.safetensors"] != other["model.safetensors"]


def test_a_resumed_run_gives_the_same_bytes(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an undisturbed run. The other one stops after its first block and is run again in the same directory."""
    from compress import blocks

    class Stop(Exception):
        pass

    def stopping(*args: Any) -> None:
        real(*args)
        raise Stop

    real = blocks.save_block
    monkeypatch.setattr(blocks, "save_block", stopping)
    with pytest.raises(Stop):
        run(tiny_model_dir, tmp_path / "a", HADAMARD)
    monkeypatch.setattr(blocks, "save_block", real)
    resumed, whole = (run(tiny_model_dir, tmp_path / name, HADAMARD) for name in "ab")
    assert hashes(resumed)["model.safetensors"] == hashes(whole)["model.safetensors"]


def test_record_says_that_a_tie_was_broken(tied_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: 256 x 64 more weights of 4 bytes, in the sizes too; a run that finds its quantization done says so
    again, and calibrates on nothing."""
    config = tiny_config(tied_model_dir, tmp_path, quant=HADAMARD, eval=EvalConfig(enabled=False))
    for _ in range(2):
        record = run_pipeline(config)
        assert any("unties lm_head.weight" in w and "16,384 more weights" in w for w in record["warnings"])
        assert record["transform"] == "hadamard" and record["calibration"] is None
    plain = run_pipeline(replace(config, quant=replace(HADAMARD, transform=Transform.none)))
    assert record["size"]["weight_bytes"] - plain["size"]["weight_bytes"] == 256 * 64 * 4
    assert record["size"]["reference_weight_bytes"] == plain["size"]["reference_weight_bytes"]


def test_settings() -> None:
    """Oracle: the rules of `HadamardConfig`."""
    with pytest.raises(ConfigError, match=r"rotates nothing"):
        HadamardConfig(residual=False, value=False)
    with pytest.raises(ConfigError, match=r"quant.hadamard.seed=-1"):
        HadamardConfig(seed=-1)
    assert not HADAMARD.needs_calibration
