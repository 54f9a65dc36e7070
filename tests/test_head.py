"""A quantized output head: alone where it has a tensor of its own, untied where it has not, refused otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import scheme, tiny_config, verify_in_process
from transformers import AutoModelForCausalLM

import compress
from compress import head as heads
from compress.checkpoint import decode
from compress.config_quant import LearnConfig, QuantConfig, Rounding, SchemeConfig, Transform, TuneConfig
from compress.errors import ConfigError
from compress.models import load_model, untie
from compress.pipeline import run_pipeline
from compress.plan import make_plan
from compress.qlinear import Backend
from compress.quant import Granularity, Observer, QuantScheme

HEAD = SchemeConfig(bits=8, group_size=32)
RTN = QuantConfig(scheme=scheme(), lm_head=True, lm_head_scheme=HEAD)


@pytest.fixture(scope="module")
def tied_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The tiny model with its head tied to the embedding, one tensor on disk."""
    folder = tmp_path_factory.mktemp("tied")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_model_dir / name).read_bytes())
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return folder


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def dense_head(artifact: Path) -> torch.Tensor:
    """float32 [256, 64] of the artifact's packed head, decoded on its own."""
    tensors = load_file(artifact / "model.safetensors")
    own = {n.removeprefix("lm_head."): t for n, t in tensors.items() if n.startswith("lm_head.")}
    return decode(own, QuantScheme(8, Granularity.GROUP, 32)).dequantize()


@pytest.mark.parametrize("tied", [False, True])
def test_independent_reader_computes_the_same_logits(
    tied: bool, tiny_model_dir: Path, tied_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracles: transformers with compressed-tensors on the files alone; the source's own head within half a step of the
    8-bit one; the bytes of the packed tensors against those of a head left alone."""
    verify_in_process(monkeypatch)
    quant = replace(RTN, untie=tied)
    config = tiny_config(tied_model_dir if tied else tiny_model_dir, tmp_path, quant=quant)
    record = run_pipeline(config)
    artifact = Path(record["artifact"])
    ours = logits(compress.load(artifact, device="cpu", dtype=torch.float32, backend=Backend.REFERENCE))
    theirs = logits(AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)

    source = load_file(Path(config.model) / "model.safetensors")
    original = source["model.embed_tokens.weight" if tied else "lm_head.weight"].float()
    groups = original.view(256, 2, 32)
    step = groups.abs().amax(-1, keepdim=True) / 127.5
    assert ((dense_head(artifact).view_as(groups) - groups).abs() <= 0.51 * step).all()
    assert torch.equal(
        load_file(artifact / "model.safetensors")["model.embed_tokens.weight"], source["model.embed_tokens.weight"]
    )

    without = run_pipeline(replace(config, quant=QuantConfig(scheme=scheme()), run_dir=str(tmp_path / "without")))
    packed = 256 * 64 + 256 * 2 * 4 + 16  # a byte a code, a float32 scale a group, the shape
    saved = 0 if tied else 256 * 64 * 4
    assert record["size"]["weight_bytes"] - without["size"]["weight_bytes"] == packed - saved
    assert record["scheme"] == "w4g32 sym, head w8g32 sym"
    (layer,) = [r for r in record["layers"] if r["name"] == "lm_head"]
    assert layer["status"] == "quantized" and 0 < layer["error"] < 1e-3
    assert record["quality"]["kl"] < 1.2 * without["quality"]["kl"]
    config_json = json.loads((artifact / "config.json").read_text())
    assert config_json["tie_word_embeddings"] is False
    assert any("untie" in w for w in record["warnings"]) is tied


def test_head_and_embedding_of_one_tensor_are_refused_with_the_reason(tied_model_dir: Path) -> None:
    """Oracle: the rule in words; with the tie broken the same settings make a plan, and untying twice finds no tie."""
    loaded = load_model(str(tied_model_dir))
    with pytest.raises(
        ConfigError, match=r"lm_head.weight and model.embed_tokens.weight are one tensor.*quant.untie=true"
    ):
        make_plan(loaded, RTN)
    assert untie(loaded) == {"lm_head.weight": "model.embed_tokens.weight"} and untie(loaded) == {}
    plan = make_plan(loaded, RTN)
    assert plan.head is not None and (plan.head.name, plan.head.n, plan.head.k) == ("lm_head", 256, 64)
    assert all(p.name != "lm_head" for p in plan.linears)


def test_settings_that_contradict(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: the rules in words."""
    with pytest.raises(ConfigError, match=r"quant.untie=true only makes the artifact larger"):
        QuantConfig(untie=True)
    with pytest.raises(ConfigError, match=r"baseline run; leave quant.lm_head out"):
        QuantConfig(rounding=Rounding.none, lm_head=True)
    with pytest.raises(ConfigError, match=r"quant.lm_head_scheme on lm_head \[256, 64\]: group_size=128"):
        make_plan(load_model(str(tiny_model_dir)), replace(RTN, lm_head_scheme=SchemeConfig(bits=8)))
    with pytest.raises(ConfigError, match=r"has a tensor of its own; leave quant.untie out"):
        run_pipeline(tiny_config(tiny_model_dir, tmp_path, quant=replace(RTN, untie=True)))


def test_rows_in_chunks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same head in one piece: rows have ranges of their own, a tensor-wide range is never cut."""
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    cpu = torch.device("cpu")
    for granularity in Granularity:
        wide = QuantScheme(4, granularity, 32, observer=Observer.MSE)
        whole = heads.quantize_head(weight, wide, torch.bfloat16, cpu)
        with monkeypatch.context() as patch:
            patch.setattr(heads, "_CHUNK_ELEMENTS", 7 * 64)
            parts = heads.quantize_head(weight, wide, torch.bfloat16, cpu)
        for name in ("codes", "scale", "zero"):
            assert torch.equal(getattr(parts[0], name), getattr(whole[0], name))
        assert parts[1:] == pytest.approx(whole[1:]) and whole[1] < whole[2]


@pytest.mark.parametrize("transform", [Transform.none, Transform.hadamard])
def test_learned_tuned_and_rotated_runs_carry_the_head(
    transform: Transform, tied_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the verification's own: logits of the reloaded artifact equal those of the model in memory, whose head is
    the quantized one; a head of 2 bits would be off by far more than the limit if one of the two were the original."""
    verify_in_process(monkeypatch)
    learning = LearnConfig(enabled=True, epochs=1, batch_sequences=4)
    tuning = TuneConfig(enabled=True, epochs=1, batch_sequences=4)
    quant = QuantConfig(
        transform, Rounding.gptq, scheme(), learn=learning, tune=tuning,
        lm_head=True, lm_head_scheme=SchemeConfig(bits=2, group_size=32), untie=True,
    )  # fmt: skip
    record = run_pipeline(tiny_config(tied_model_dir, tmp_path, quant=quant))
    assert record["verify"]["relative_error"] < 1e-5
    assert record["scheme"] == "w4g32 sym, head w2g32 sym"
    assert record["tuned"]["kl_before"] > 0
