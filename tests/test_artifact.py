"""The artifact on disk: an independent reader computes the same logits, and damage never loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import hashes, scheme, tiny_config, verify_in_process
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import compress
from compress import artifact as artifacts
from compress.artifact import check_manifest, read_manifest
from compress.config import EvalConfig, RunConfig
from compress.config_quant import QuantConfig, Rounding, Transform
from compress.errors import ArtifactError, VerifyError
from compress.pipeline import run_pipeline
from compress.qlinear import Backend
from compress.source import SourceCheckpoint
from compress.verify import check_kept

RTN = QuantConfig(Transform.none, Rounding.rtn)


@pytest.fixture(scope="module")
def monkeymodule() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", autouse=True)
def quick_verify(monkeymodule: pytest.MonkeyPatch) -> None:
    verify_in_process(monkeymodule)


def save(model: Path, folder: Path, quant: QuantConfig) -> Path:
    """An artifact by the pipeline, verified, not measured."""
    config: RunConfig = tiny_config(model, folder, quant=quant, eval=EvalConfig(enabled=False))
    return Path(run_pipeline(config)["artifact"])


@pytest.fixture(scope="module")
def shipped(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AWQ + GPTQ 4-bit artifact. Read only."""
    quant = QuantConfig(Transform.awq, Rounding.gptq, scheme())
    return save(tiny_model_dir, tmp_path_factory.mktemp("shipped"), quant)


@pytest.fixture
def copy(shipped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped, tmp_path / "copy"))


def logits(model: Any) -> torch.Tensor:
    """[2, 24, 256] in float32 for fixed random tokens."""
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def ours(artifact: Path) -> torch.Tensor:
    return logits(compress.load(artifact, device="cpu", dtype=torch.float32, backend=Backend.REFERENCE))


def theirs(artifact: Path, **options: Any) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, **options))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_independent_reader_computes_our_logits(
    bits: int, granularity: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Oracle: transformers with the compressed-tensors package, on the files alone; equal to float32 rounding."""
    path = save(tiny_model_dir, tmp_path, replace(RTN, scheme=scheme(bits, granularity)))
    torch.testing.assert_close(theirs(path), ours(path), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_independent_reader_with_zero_points(bits: int, granularity: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: as above, with dequantize=True: up to compressed-tensors 0.20 the reader's other path makes room for
    zero points that are not packed, and so refuses every asymmetric checkpoint by channel or group."""
    path = save(tiny_model_dir, tmp_path, replace(RTN, scheme=scheme(bits, granularity, symmetric=False)))
    found = theirs(path, quantization_config=CompressedTensorsConfig(dequantize=True))
    torch.testing.assert_close(found, ours(path), rtol=1e-5, atol=1e-6)


def test_independent_reader_of_mixed_precision(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: transformers with compressed-tensors. Three schemes in one artifact, and linears left alone."""
    overrides = {"*.down_proj": {"bits": 8}, "*.o_proj": {"bits": 3, "granularity": "channel"}}
    quant = replace(RTN, scheme=scheme(), overrides=overrides, ignore=["*layers.1.mlp.gate_proj", "*layers.1.mlp.up*"])
    path = save(tiny_model_dir, tmp_path, quant)
    torch.testing.assert_close(theirs(path), ours(path), rtol=1e-5, atol=1e-6)
    described = read_manifest(path)["tensors"]
    assert described["model.layers.0.mlp.down_proj.weight_packed"]["shape"] == [64, 128 * 8 // 32]
    assert described["model.layers.1.mlp.gate_proj.weight"]["dtype"] == "float32"


def test_independent_reader_of_awq_and_gptq(shipped: Path) -> None:
    """Oracle: transformers with compressed-tensors: folded scales and GPTQ codes mean the same to it."""
    torch.testing.assert_close(theirs(shipped), ours(shipped), rtol=1e-5, atol=1e-6)


def test_load_gives_a_model_that_generates(shipped: Path) -> None:
    """Oracle: greedy decoding without a cache, one full forward pass a token."""
    model = compress.load(shipped, device="cpu", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 4]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None)
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


def test_manifest_describes_every_tensor_and_file(shipped: Path, tiny_model_dir: Path) -> None:
    """Oracle: the files themselves, and the source checkpoint's list of tensors."""
    manifest = check_manifest(shipped)
    stored = load_file(shipped / "model.safetensors")
    assert set(manifest["tensors"]) == set(stored)
    for name, value in stored.items():
        assert manifest["tensors"][name]["shape"] == list(value.shape)
    assert set(manifest["source_tensors"]) == set(load_file(tiny_model_dir / "model.safetensors"))
    assert {n for e in manifest["source_tensors"].values() for n in e["as"]} == set(stored)
    others = {p.name for p in shipped.iterdir() if p.suffix != ".safetensors"} - {"manifest.json", "README.md"}
    assert set(manifest["files"]) == others
    assert manifest["calibration"]["n_sequences"] == 4 and len(manifest["layers"]) == 14


def test_companions_are_copied_byte_for_byte(shipped: Path, tiny_model_dir: Path) -> None:
    """Oracle: the source files' hashes; and transformers reads the tokenizer."""
    source, copied = hashes(tiny_model_dir), hashes(shipped)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert copied[name] == source[name]
    assert AutoTokenizer.from_pretrained(shipped).decode([72, 105]) == AutoTokenizer.from_pretrained(
        tiny_model_dir
    ).decode([72, 105])


def test_equal_runs_give_equal_bytes(shipped: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: sha256 of every file of a second run in another directory."""
    again = save(tiny_model_dir, tmp_path, QuantConfig(Transform.awq, Rounding.gptq, scheme()))
    assert hashes(again) == hashes(shipped)


def test_shards_and_index_mean_the_same(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same recipe in one file, and transformers reading the shards."""
    whole = save(tiny_model_dir, tmp_path, replace(RTN, scheme=scheme()))
    monkeypatch.setattr(artifacts, "MAX_SHARD_BYTES", 60_000)
    (tmp_path / "sharded").mkdir()
    path = save(tiny_model_dir, tmp_path / "sharded", replace(RTN, scheme=scheme()))
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(ours(path), ours(whole))
    torch.testing.assert_close(theirs(path), ours(path), rtol=1e-5, atol=1e-6)

    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ArtifactError, match=shard.name):
        compress.load(path, device="cpu")


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def _rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _reinterpret(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight_packed"
    tensors[name] = tensors[name].view(torch.float32)


DAMAGE = {
    "bit flipped in a tensor": (lambda p: _flip(p / "model.safetensors", -100), "sha256"),
    "bit flipped in the header": (lambda p: _flip(p / "model.safetensors", 3), "not a safetensors file"),
    "truncated": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-64]),
        "truncated",
    ),
    "weights gone": (lambda p: (p / "model.safetensors").unlink(), "safetensors"),
    "tensor gone": (
        lambda p: _rewrite(p / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale")),
        "lacks tensor model.layers.1.mlp.up_proj.weight_scale",
    ),
    "tensor added": (
        lambda p: _rewrite(p / "model.safetensors", lambda t: t.update(extra=torch.zeros(3))),
        "extra, which the manifest does not know",
    ),
    "same bytes, other dtype": (lambda p: _rewrite(p / "model.safetensors", _reinterpret), "up_proj.weight_packed"),
    "config edited": (lambda p: _edit(p / "config.json", '"silu"', '"gelu"'), "config.json differs"),
    "config gone": (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "config not JSON": (lambda p: (p / "config.json").write_text("{"), "config.json is not valid JSON"),
    "tokenizer edited": (lambda p: _edit(p / "tokenizer.json", '"version"', '"Version"'), "tokenizer.json differs"),
    "tokenizer gone": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is in the manifest but missing"),
    "manifest not JSON": (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
    "manifest not text": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is not valid JSON"),
    "manifest empty": (lambda p: (p / "manifest.json").write_text("{}"), "no usable 'tensors' section"),
    "manifest of another kind": (
        lambda p: (p / "manifest.json").write_text(
            json.dumps({"tensors": {"a": 1}, "source_tensors": {}, "files": {}})
        ),
        "no usable 'tensors' section",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_artifact_does_not_load(kind: str, copy: Path) -> None:
    """Oracle: the damage itself; the error names the file or tensor."""
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(ArtifactError, match=message):
        compress.load(copy, device="cpu")


@pytest.mark.parametrize("path", ["/no/such/artifact", "/dev/null"])
def test_load_of_something_that_is_no_directory(path: str) -> None:
    """Oracle: the path in the message."""
    with pytest.raises(ArtifactError, match=path):
        compress.load(path)


def test_load_of_an_unquantized_model(tiny_model_dir: Path) -> None:
    """Oracle: the source model has no quantization_config."""
    with pytest.raises(ArtifactError, match="describes no"):
        compress.load(tiny_model_dir, device="cpu")


def test_kept_tensor_that_changed_is_found(shipped: Path, tiny_model_dir: Path) -> None:
    """Oracle: a manifest whose hash of the embedding is another tensor's; and one without the tensor."""
    source, manifest = SourceCheckpoint.open(tiny_model_dir), read_manifest(shipped)
    assert check_kept(source, manifest) == 3
    embedding = "model.embed_tokens.weight"
    wrong = manifest["tensors"] | {embedding: manifest["tensors"]["lm_head.weight"]}
    with pytest.raises(VerifyError, match="embed_tokens"):
        check_kept(source, manifest | {"tensors": wrong})
    fewer = {k: v for k, v in manifest["source_tensors"].items() if k != embedding}
    with pytest.raises(VerifyError, match="not accounted for"):
        check_kept(source, manifest | {"source_tensors": fewer})
