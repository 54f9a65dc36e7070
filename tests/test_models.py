"""Source checkpoints that are damaged, incomplete or unusual, and models taken apart."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, save, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.config import EMBEDDED_MODEL
from compress.errors import ConfigError, EnvironmentProblem, ModelFileError, UnsupportedModel
from compress.models import choose_device, find_blocks, iter_meta, load_dense, load_model
from compress.source import SourceCheckpoint, resolve, sha256_file

Tensors = dict[str, Tensor]
WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A tiny Llama whose files a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def rewrite(directory: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """Load the weights, let `change` edit or replace them, save them again."""
    tensors = {n: t.clone() for n, t in load_file(directory / WEIGHTS).items()}
    save_file(change(tensors) or tensors, directory / WEIGHTS, metadata={"format": "pt"})


def reconfigure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(directory: Path) -> None:
    """Split the weights over two files with an index, as large models come."""
    tensors = load_file(directory / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: tensors[n].clone() for n in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / WEIGHTS).unlink()


def logits(directory: Path) -> Tensor:
    """Logits of the model as this project loads it."""
    model = load_dense(load_model(str(directory)), torch.device("cpu"), torch.float32)
    assert not list(iter_meta(model))
    with torch.no_grad():
        return model(token_ids(2, 16), use_cache=False).logits


def transformers_logits(directory: Path) -> Tensor:
    """The oracle of every checkpoint that can be read."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory).eval()(token_ids(2, 16), use_cache=False).logits


# files


def test_shards_and_single_file_are_the_same_model(copy: Path) -> None:
    """Oracle: transformers' logits of the single file; every tensor is accounted for."""
    expected = transformers_logits(copy)
    assert torch.equal(logits(copy), expected)
    shard(copy)
    assert torch.equal(logits(copy), expected)
    loaded = load_model(str(copy))
    assert set(loaded.source_names.values()) == set(loaded.source.names())
    assert loaded.unused == {} and loaded.tied == {}


def test_missing_shard(copy: Path) -> None:
    """Oracle: the documented error names the file that is not there, and a tensor that its shard lacks."""
    shard(copy)
    second = copy / "model-00002-of-00002.safetensors"
    second.rename(copy / "elsewhere")
    with pytest.raises(ModelFileError, match=r"shard model-00002-of-00002.safetensors .* is missing"):
        load_model(str(copy))
    (copy / "elsewhere").rename(second)
    index = copy / f"{WEIGHTS}.index.json"
    weight_map = json.loads(index.read_text())
    weight_map["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    tensors = load_file(copy / "model-00001-of-00002.safetensors")
    tensors.pop("model.norm.weight", None)
    save_file(tensors, copy / "model-00001-of-00002.safetensors")
    index.write_text(json.dumps(weight_map))
    with pytest.raises(ModelFileError, match=r"model-00001-of-00002.safetensors lacks tensor model.norm.weight"):
        load_model(str(copy))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(copy: Path, keep: int) -> None:
    """Oracle: the documented error, wherever the file was cut: nothing left, in the header, in the last tensor."""
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(ModelFileError, match=r"model.safetensors is truncated or not a safetensors file"):
        load_model(str(copy))


def test_garbage_and_pickles_are_not_opened(copy: Path) -> None:
    """Oracle: the documented errors; a pickle that would write a file when opened must not have written it."""
    (copy / WEIGHTS).write_bytes(bytes(range(256)) * 40)
    with pytest.raises(ModelFileError, match="truncated or not a safetensors file"):
        load_model(str(copy))
    marker = copy / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    (copy / WEIGHTS).write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(ModelFileError, match="is a pickle under another name"):
        load_model(str(copy))
    torch.save({"a": torch.ones(2)}, copy / WEIGHTS)
    with pytest.raises(ModelFileError, match="is a pickle under another name"):
        load_model(str(copy))
    (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"only pickled weights \(pytorch_model.bin\), which are never opened"):
        load_model(str(copy))
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(ModelFileError, match="holds no weights"):
        load_model(str(copy))
    assert not marker.exists()


def test_broken_config(copy: Path) -> None:
    """Oracle: the documented errors for a config that is not JSON, no object, unknown, or not there."""
    for text, error in (("{", ModelFileError), ("[]", ModelFileError), ('{"model_type": "no_such"}', UnsupportedModel)):
        (copy / "config.json").write_text(text)
        with pytest.raises(error, match=r"config\.json"):
            load_model(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"config\.json is missing"):
        load_model(str(copy))


def test_second_copy_of_the_weights(copy: Path) -> None:
    """Oracle: transformers reads model.safetensors and leaves consolidated.safetensors alone; two files of other names
    that hold one tensor are ambiguous and refused."""
    expected = logits(copy)
    save_file({"layers.0.wq.weight": torch.ones(2, 2)}, copy / "consolidated.safetensors")
    assert torch.equal(logits(copy), expected)
    (copy / WEIGHTS).rename(copy / "a.safetensors")
    shutil.copy(copy / "a.safetensors", copy / "consolidated.safetensors")
    with pytest.raises(ModelFileError, match=r"is in both a.safetensors and consolidated.safetensors"):
        load_model(str(copy))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(copy: Path, bad: float) -> None:
    """Oracle: the documented error names the tensor, counts the values, and comes when the tensor is read."""

    def damage(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5:7] = bad

    rewrite(copy, damage)
    loaded = load_model(str(copy))
    assert loaded.tensor("model.layers.0.mlp.up_proj.weight").shape == (128, 64)
    for _ in range(2):  # a second read must not pass
        with pytest.raises(ModelFileError, match=r"layers.1.mlp.up_proj.weight .* has 2 NaN or Inf values of 8192"):
            loaded.tensor("model.layers.1.mlp.up_proj.weight")


def test_a_flipped_bit_is_found_by_a_recorded_hash(copy: Path) -> None:
    """Oracle: sha256sum's own file format. One bit of one weight leaves a valid file with finite values; the recorded
    hash tells. Other files of the list count too, and a line that cannot be read is no silent pass."""
    sums = copy / "SHA256SUMS"
    names = (WEIGHTS, "config.json", "tokenizer.json")
    sums.write_text("".join(f"{sha256_file(copy / n)}  {n}\n" for n in names))
    whole = SourceCheckpoint.open(copy).sha256()
    sums.write_text("".join(f"{sha256_file(copy / n).upper()} *./{n}\n" for n in names))
    assert SourceCheckpoint.open(copy).sha256() == whole
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[-100] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    load_model(str(copy))  # nothing else can see it
    with pytest.raises(ModelFileError, match=r"model.safetensors has sha256 .* the file changed on disk"):
        SourceCheckpoint.open(copy).sha256()
    data[-100] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    assert SourceCheckpoint.open(copy).sha256() == whole
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"tokenizer.json has sha256"):
        SourceCheckpoint.open(copy).sha256()
    sums.write_text("not a hash  model.safetensors\n")
    with pytest.raises(ModelFileError, match="cannot read the line 'not a hash"):
        SourceCheckpoint.open(copy).sha256()


def test_a_hub_blob_is_checked_against_its_name(copy: Path) -> None:
    """Oracle: the hub cache links model.safetensors to a blob named by its sha256."""
    digest = sha256_file(copy / WEIGHTS)
    (copy / WEIGHTS).rename(copy / digest)
    (copy / WEIGHTS).symlink_to(copy / digest)
    SourceCheckpoint.open(copy).sha256()
    rewrite(copy, lambda tensors: {n: t + 1 for n, t in tensors.items()})
    if not (copy / WEIGHTS).is_symlink():  # save_file replaced the link
        (copy / WEIGHTS).replace(copy / digest)
        (copy / WEIGHTS).symlink_to(copy / digest)
    with pytest.raises(ModelFileError, match="the file changed on disk"):
        SourceCheckpoint.open(copy).sha256()


def test_hash_covers_config_and_weights(copy: Path) -> None:
    """Oracle: two models differ if and only if a weight or a setting does; the tokenizer is not part of it."""
    first = SourceCheckpoint.open(copy).sha256()
    (copy / "tokenizer.json").write_text("{}")
    assert SourceCheckpoint.open(copy).sha256() == first
    reconfigure(copy, rms_norm_eps=1e-5)
    second = SourceCheckpoint.open(copy).sha256()
    rewrite(copy, lambda tensors: {n: t * 2 for n, t in tensors.items()})
    assert len({first, second, SourceCheckpoint.open(copy).sha256()}) == 3


# names and shapes


def test_tensors_that_do_not_fit_the_architecture(copy: Path) -> None:
    """Oracle: the documented errors: another shape, one too few, one too many."""
    reconfigure(copy, intermediate_size=96)
    with pytest.raises(ModelFileError, match=r"shape \[128, 64\], but config.json makes it \[96, 64\]"):
        load_model(str(copy))
    reconfigure(copy, intermediate_size=128)
    rewrite(copy, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.up" not in n})
    with pytest.raises(ModelFileError, match=r"no tensor for model.layers.1.mlp.up_proj.weight \(1 missing in all\)"):
        load_model(str(copy))
    reconfigure(copy, num_hidden_layers=1)
    with pytest.raises(
        UnsupportedModel, match=r"model.layers.1.input_layernorm.weight has no place in LlamaForCausalLM"
    ):
        load_model(str(copy))


def test_constants_of_old_checkpoints_are_left_out_with_a_reason(copy: Path) -> None:
    """Oracle: transformers before 4.30 saved rotary frequencies; they are computed, and must be listed as unused."""
    expected = logits(copy)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(copy, lambda tensors: tensors | {name: torch.ones(8)})
    assert load_model(str(copy)).unused == {name: "a constant the architecture computes itself"}
    assert torch.equal(logits(copy), expected)


def test_already_quantized_models_are_refused(copy: Path) -> None:
    """Oracle: the documented errors, with a quantization_config and without one (integer or 8-bit float weights)."""
    original = load_file(copy / WEIGHTS)
    for dtype, stored in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        quantized = {n: t.to(dtype) if "down_proj" in n else t.clone() for n, t in original.items()}
        rewrite(copy, lambda _, quantized=quantized: quantized)
        with pytest.raises(
            UnsupportedModel, match=rf"down_proj.weight is stored as {stored}.* looks quantized already"
        ):
            load_model(str(copy))
    reconfigure(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModel, match=r"already quantized \(gptq\); start from the original weights"):
        load_model(str(copy))


def test_tied_embeddings_with_and_without_the_duplicate(tmp_path: Path) -> None:
    """Oracle: transformers' logits. A head stored beside its embedding, or under the head's name alone, is the same
    model; a head with other values contradicts the config and must not be dropped."""
    directory = save("llama-bias-tied", tmp_path)
    expected = transformers_logits(directory)
    single = load_model(str(directory))
    assert single.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in single.source_names
    assert torch.equal(logits(directory), expected)

    embedding = load_file(directory / WEIGHTS)["model.embed_tokens.weight"]
    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": embedding.clone()})
    both = load_model(str(directory))
    assert both.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert both.source_names["lm_head.weight"] == "lm_head.weight"
    assert torch.equal(logits(directory), expected)

    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(ModelFileError, match=r"ties lm_head.weight .* two different tensors.* tie_word_embeddings"):
        load_model(str(directory))
    reconfigure(directory, tie_word_embeddings=False)
    assert torch.equal(logits(directory), transformers_logits(directory))
    assert not torch.equal(logits(directory), expected)

    reconfigure(directory, tie_word_embeddings=True)
    rewrite(directory, lambda tensors: {n: t for n, t in tensors.items() if n != "model.embed_tokens.weight"})
    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": embedding.clone()})
    assert torch.equal(logits(directory), expected)


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon"])
def test_checkpoint_without_the_base_model_prefix(name: str, tmp_path: Path) -> None:
    """Oracle: transformers' logits of the usual names. GPT-2 on the hub has `h.0...` for `transformer.h.0...`, and
    attention masks beside the weights."""
    directory = save(name, tmp_path)
    expected = transformers_logits(directory)
    prefix = build(name).base_model_prefix + "."  # type: ignore[operator]
    rewrite(directory, lambda tensors: {n.removeprefix(str(prefix)): t for n, t in tensors.items()})
    if name == "gpt2":
        rewrite(directory, lambda tensors: tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)})
        assert set(load_model(str(directory)).unused) == {"h.0.attn.bias"}
    loaded = load_model(str(directory))
    assert any(not n.startswith(str(prefix)) for n in loaded.source_names.values())
    assert torch.equal(logits(directory), expected)


def test_renamed_head_of_gpt_neox(tmp_path: Path) -> None:
    """Oracle: transformers' logits. Pythia checkpoints call the head `embed_out`; whatever name transformers gives it
    now, both must load."""
    directory = save("gpt-neox", tmp_path)
    expected = transformers_logits(directory)
    (head,) = [n for n in load_file(directory / WEIGHTS) if not n.startswith("gpt_neox.")]
    rewrite(directory, lambda tensors: {n.replace(head, "embed_out.weight"): t for n, t in tensors.items()})
    assert torch.equal(logits(directory), expected)


# architectures


def moe_config(kind: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_local_experts=4,
        num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_mixtures_of_experts_are_refused(kind: str, tmp_path: Path) -> None:
    """Oracle: experts are 3-D parameters that a walk over linears would leave at 16 bits without a word."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(moe_config(kind)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"experts.*3-D weight.*not supported yet"):
        load_model(str(tmp_path))


def test_what_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    """Oracle: the documented error for an architecture without a causal head."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="cannot build a causal LM"):
        load_model(str(tmp_path))


def test_blocks_are_the_largest_list_of_modules_with_linears(copy: Path) -> None:
    """Oracle: by hand, for a model that has a small list beside the blocks and a list inside them; an override picks
    another, and one that matches nothing is an error."""

    class Part(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(4096)])
            self.small = nn.ModuleList([Part(4), Part(4), Part(4)])
            self.blocks = nn.ModuleList([Part(16), Part(16)])

    assert [b.name for b in find_blocks(Toy())] == ["blocks.0", "blocks.1"]
    assert list(find_blocks(Toy())[0].linears) == ["inner.0", "inner.1"]
    assert [b.name for b in find_blocks(Toy(), "sm*")] == ["small.0", "small.1", "small.2"]
    with pytest.raises(ConfigError, match=r"quant.blocks=layers matches no ModuleList of Toy"):
        find_blocks(Toy(), "layers")
    with pytest.raises(UnsupportedModel, match="no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(UnsupportedModel, match="no list of decoder blocks"):
        find_blocks(Toy(), "norms")


def test_nothing_is_loaded_before_it_is_asked_for(copy: Path) -> None:
    """Oracle: parameters are on meta; materialize fills one block with the file's values and release empties it."""
    loaded = load_model(str(copy))
    assert all(p.device.type == "meta" for p in loaded.model.parameters())
    loaded.materialize("model.layers.1", torch.device("cpu"), torch.float64)
    weight = loaded.blocks[1].linears["mlp.up_proj"].weight
    assert isinstance(weight, Tensor) and weight.dtype is torch.float64
    assert torch.equal(weight.float(), load_file(copy / WEIGHTS)["model.layers.1.mlp.up_proj.weight"])
    assert all(p.device.type == "meta" for p in loaded.blocks[0].module.parameters())
    loaded.release("model.layers.1")
    assert all(p.device.type == "meta" for p in loaded.model.parameters())


# where models come from


def test_resolve(copy: Path) -> None:
    """Oracle: the documented errors and values. Tests cannot reach the hub, so a hub id ends in EnvironmentProblem
    with the way out, not in a traceback."""
    assert resolve(str(copy)) == copy.resolve()
    assert (resolve(EMBEDDED_MODEL) / "config.json").is_file()
    with pytest.raises(ConfigError, match="is a file; give the directory"):
        resolve(str(copy / "config.json"))
    for name in ("/no/such/place", "./nowhere", "a/b/c", "bad name/x", "~nobody-here"):
        with pytest.raises(ConfigError, match="not the form of a hub id"):
            resolve(name)
    with pytest.raises(EnvironmentProblem, match="leave `model` out for the embedded model"):
        resolve("no-such-org/no-such-model")


def test_choose_device() -> None:
    """Oracle: the documented errors."""
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="is not a device"):
        choose_device("gpu")
    with pytest.raises(ConfigError, match="is not supported"):
        choose_device("meta")
    with pytest.raises(EnvironmentProblem, match=r"CUDA device"):
        choose_device("cuda:99")
