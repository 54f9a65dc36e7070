"""Streams of hidden states, the engine, and the files of finished blocks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.blocks import EngineInputs, EngineResult, compress_blocks
from compress.checkpoint import BlockState, checkpoint_path, decode, encode, load_block, save_block, scheme_from_dict
from compress.checkpoint import scheme_to_dict as to_dict
from compress.config_quant import AwqConfig, GptqConfig, ObserverName, QuantConfig, Rounding, SchemeConfig, Transform
from compress.errors import ArtifactError, ConfigError, NumericalError, UnsupportedModel
from compress.methods.gptq import gptq_quantize_shared
from compress.methods.rtn import rtn_quantize
from compress.models import Block, LoadedModel, find_linears, load_model
from compress.plan import make_plan
from compress.quant import Granularity, Observer, QuantizedWeight, QuantScheme
from compress.streams import HiddenStream, open_stream, tail_logits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def deep_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama of 4 blocks in bfloat16: the dtype in which scales and norms are stored, and most models come."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("deep")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(4)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {},
    "rtn-mse": {"scheme": SchemeConfig(bits=3, group_size=16, observer=ObserverName.mse)},
    "awq-asym": {"transform": Transform.awq, "scheme": SchemeConfig(bits=3, group_size=16, symmetric=False)},
    "gptq": {"rounding": Rounding.gptq},
    "gptq-not-sequential": {"rounding": Rounding.gptq, "gptq": GptqConfig(true_sequential=False)},
    "gptaq": {"rounding": Rounding.gptq, "gptq": GptqConfig(gptaq=True)},
    "awq-gptaq": {"transform": Transform.awq, "rounding": Rounding.gptq, "gptq": GptqConfig(gptaq=True)},
    "hqq": {"rounding": Rounding.hqq, "scheme": SchemeConfig(bits=3, group_size=16, symmetric=False)},
    "awq-gptq": {
        "transform": Transform.awq,
        "rounding": Rounding.gptq,
        "scheme": SchemeConfig(bits=3, group_size=16, observer=ObserverName.mse),
        "overrides": {"*.down_proj": {"bits": 8, "granularity": "channel"}},
        "ignore": ["*.o_proj"],
    },
}


def quant_config(recipe: str) -> QuantConfig:
    defaults = {
        "scheme": SchemeConfig(bits=4, group_size=16),
        "awq": AwqConfig(n_grid=2, clip_grid=2, search_tokens=64),
    }
    return QuantConfig(**(defaults | RECIPES[recipe]))


def engine_inputs(directory: Path, config: QuantConfig, checkpoints: Path) -> EngineInputs:
    loaded = load_model(str(directory))
    calibration = token_ids(5, 32, seed=1) if config.needs_calibration else None
    return EngineInputs(
        loaded, make_plan(loaded, config), calibration, token_ids(2, 16, seed=2), 2, CPU, torch.float32, checkpoints
    )


def run(directory: Path, recipe: str, checkpoints: Path) -> EngineResult:
    return compress_blocks(engine_inputs(directory, quant_config(recipe), checkpoints), lambda _done, _total: None)


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Every tensor of every block file, as bytes; reports hold times and are compared by themselves."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(path).items():
            found[f"{path.name}:{name}"] = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def timeless(result: EngineResult) -> list[dict[str, Any]]:
    return [layer.without_time() for layer in result.layers]


# the engine


@pytest.mark.parametrize("recipe", RECIPES)
def test_resuming_gives_the_same_bytes(recipe: str, deep_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: the run that was never interrupted: same block files, same logits, same reports, whichever number of
    blocks was finished before, and when one in the middle is missing."""
    whole = run(deep_model_dir, recipe, tmp_path / "whole")
    expected = tensors_of(tmp_path / "whole")
    assert whole.n_resumed == 0 and len({n.split(":")[0] for n in expected}) == 4
    for done in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3]):
        folder = tmp_path / "again"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for index in done:
            shutil.copy(checkpoint_path(tmp_path / "whole", index), folder)
        again = run(deep_model_dir, recipe, folder)
        assert again.n_resumed == len(done)
        assert tensors_of(folder) == expected
        assert torch.equal(again.verify_logits, whole.verify_logits)
        assert timeless(again) == timeless(whole)


def test_a_run_that_dies_between_blocks_goes_on(deep_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: the uninterrupted run. The process dies after its second block; the same call then finishes."""
    whole = run(deep_model_dir, "awq-gptq", tmp_path / "whole")

    def die(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    inputs = engine_inputs(deep_model_dir, quant_config("awq-gptq"), tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        compress_blocks(inputs, die)
    again = run(deep_model_dir, "awq-gptq", tmp_path / "killed")
    assert again.n_resumed == 2
    assert tensors_of(tmp_path / "killed") == tensors_of(tmp_path / "whole")
    assert torch.equal(again.verify_logits, whole.verify_logits)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "bit flip", "no metadata"])
def test_damaged_checkpoints_are_redone(damage: str, deep_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: the undamaged run. A flipped bit in the codes leaves a readable file; its recorded hash tells."""
    whole = run(deep_model_dir, "gptq", tmp_path)
    expected = tensors_of(tmp_path)
    path = checkpoint_path(tmp_path, 1)
    data = bytearray(path.read_bytes())
    if damage == "no metadata":
        save_file(load_file(path), path)
    else:
        data[-5] ^= 4
        path.write_bytes({"truncated": data[:-7], "empty": b"", "garbage": b"x" * 999, "bit flip": bytes(data)}[damage])
    again = run(deep_model_dir, "gptq", tmp_path)
    assert again.n_resumed == 3
    assert tensors_of(tmp_path) == expected
    assert torch.equal(again.verify_logits, whole.verify_logits)


def test_better_methods_report_smaller_errors(deep_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: error_rtn, measured on the same inputs by the same formula. RTN reports equal figures; GPTQ lowers
    the error of the first linears, which see the same inputs, and so does MSE for the weights."""
    plain = run(deep_model_dir, "rtn", tmp_path / "rtn").layers
    assert all(r.error == pytest.approx(r.error_rtn) and r.error_of == "weights" for r in plain)
    gptq = run(deep_model_dir, "gptq", tmp_path / "gptq").layers
    assert all(r.error_of == "outputs" and r.n_tokens == 160 and r.damping == 0.01 and r.n_dead == 0 for r in gptq)
    assert all(r.error < 0.9 * r.error_rtn for r in gptq if r.name.startswith("model.layers.0.self_attn.q"))  # type: ignore[operator]
    assert [r.name for r in gptq] == [r.name for r in plain]


def linear_inputs(directory: Path, names: list[str], changed: dict[str, Tensor]) -> dict[str, Tensor]:
    """float64 [tokens, K] of what the named linears of block 1 read in transformers' own model on the calibration
    tokens, with some weights of the whole model replaced."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, value in changed.items():
            model.get_parameter(f"{name}.weight").copy_(value)
        for name in names:
            linear = model.model.layers[1].get_submodule(name)
            linear.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].flatten(0, 1)}))
        model(token_ids(5, 32, seed=1))
    return {name: x.double() for name, x in found.items()}


def test_gptaq_pairs_inputs_with_those_of_the_original_model(
    deep_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: transformers' forward of the whole original model and of the model with everything before each group
    quantized: E[(x_original - x) x^T] over the same tokens, which is 0 for the first group of the model only."""
    seen: list[Tensor] = []

    def spy(weights: list[Tensor], hessian: Tensor, *args: Any) -> Any:
        seen.append(args[-1])
        return gptq_quantize_shared(weights, hessian, *args)

    monkeypatch.setattr("compress.blocks.gptq_quantize_shared", spy)
    result = run(deep_model_dir, "gptaq", tmp_path)
    assert len(seen) == 16 and torch.count_nonzero(seen[0]) == 0
    groups = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
              ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip
    firsts = [members[0] for members in groups]
    states = [load_block(tmp_path, index) for index in range(2)]
    assert states[0] is not None and states[1] is not None
    done = {f"model.layers.0.{n}": q.dequantize() for n, q in states[0].quantized.items()}
    original = linear_inputs(deep_model_dir, firsts, {})
    for number, members in enumerate(groups):
        x = linear_inputs(deep_model_dir, firsts, done)[members[0]]
        expected = (original[members[0]] - x).t() @ x / len(x)
        found = seen[4 + number].double()
        assert float((found - expected).norm()) < 1e-3 * float(expected.norm())
        done |= {f"model.layers.1.{n}": states[1].quantized[n].dequantize() for n in members}
    assert all(layer.fallback is None and layer.moved is not None for layer in result.layers)


def test_gptaq_says_where_inputs_cannot_be_paired(
    deep_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: plain GPTQ. A teacher whose tokens the linears do not read one by one pairs with nothing; every linear
    then has the codes of a run without GPTAQ and says so."""
    monkeypatch.setattr("compress.blocks._BlockQuantizer._original_inputs", lambda self, groups, teacher: {})
    result = run(deep_model_dir, "gptaq", tmp_path / "a")
    run(deep_model_dir, "gptq", tmp_path / "b")
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b")
    assert all(layer.fallback is not None and "plain GPTQ" in layer.fallback for layer in result.layers)


def test_kept_linears_stay_as_they_are(deep_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: the plan: an ignored linear has a report that says kept and nothing in the block files, and AWQ does not
    touch its group or fold into it."""
    result = run(deep_model_dir, "awq-gptq", tmp_path)
    kept = [r.name for r in result.layers if r.status == "kept"]
    assert kept == [f"model.layers.{i}.self_attn.o_proj" for i in range(4)]
    for index in range(4):
        state = load_block(tmp_path, index)
        assert state is not None and "self_attn.o_proj" not in state.quantized
        assert set(state.changed) <= {"input_layernorm.weight", "post_attention_layernorm.weight"}
        assert all(v.dtype is torch.bfloat16 for v in state.changed.values())
        assert state.quantized["mlp.down_proj"].scheme.bits == 8


def test_device_memory_holds_one_block(deep_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: the parameters themselves: while block i is reported, no parameter of any block has storage."""
    inputs = engine_inputs(deep_model_dir, quant_config("gptq"), tmp_path)
    seen = []

    def look(done: int, total: int) -> None:
        seen.append((done, total))
        assert all(p.device.type == "meta" for p in inputs.loaded.model.parameters())

    compress_blocks(inputs, look)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_split_fused_groups_stop_at_the_first_block(deep_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: the documented error, before block 0 is done although the override is about block 3."""
    config = replace(quant_config("gptq"), overrides={"*.3.*.v_proj": {"bits": 8}})
    with pytest.raises(ConfigError, match=r"model.layers.3.self_attn.q_proj and its siblings read one tensor"):
        compress_blocks(engine_inputs(deep_model_dir, config, tmp_path), lambda _done, _total: None)
    assert not list(tmp_path.glob("*.safetensors"))


def test_activations_that_overflow_are_an_error(deep_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: float16 cannot hold what a norm gain of 60000 makes; the run must stop and name the block."""
    shutil.copytree(deep_model_dir, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] *= 60000
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    inputs = replace(engine_inputs(tmp_path / "model", quant_config("gptq"), tmp_path / "c"), dtype=torch.float16)
    with pytest.raises(NumericalError, match=r"model.layers.1.*NaN or Inf.*compute_dtype=float32"):
        compress_blocks(inputs, lambda _done, _total: None)


def test_numerical_errors_name_the_linear(deep_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: a scale that does not fit the checkpoint's float16 is refused with the names of block and linears."""
    inputs = engine_inputs(deep_model_dir, quant_config("rtn"), tmp_path)
    inputs.loaded.dtype = torch.float16
    source_tensor = inputs.loaded.tensor

    def huge(name: str) -> Tensor:
        value = source_tensor(name)
        return value.float() * 1e7 if name == "model.layers.2.mlp.up_proj.weight" else value

    inputs.loaded.tensor = huge  # type: ignore[method-assign]
    with pytest.raises(NumericalError, match=r"model.layers.2: .*mlp.up_proj: a scale of .* does not fit"):
        compress_blocks(inputs, lambda _done, _total: None)


# streams


class Inner(nn.Module):
    """A block that adds a linear of its input; subclasses of Toy decide how the model calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(
        self, hidden_states: Tensor, extra: Tensor | None = None, state: dict[str, Tensor] | None = None
    ) -> Any:
        if extra is not None:
            hidden_states = hidden_states + extra
        if state is not None:
            hidden_states = hidden_states + state.get("sum", 0)
            state["sum"] = hidden_states.mean(1, keepdim=True)
        hidden_states += self.linear(hidden_states)  # in place, as some blocks do
        return hidden_states


class Toy(nn.Module):
    """embed -> 3 blocks -> head, with the parts of a transformers model that streams use. mode: what is unusual."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Inner() for _ in range(3)])
        self.head = nn.Linear(8, 16, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor, use_cache: bool = False) -> Any:
        x = self.embed(ids)
        state: dict[str, Tensor] = {}
        per_token = self.embed(ids.flip(1))
        order = {"repeats": (0, 1, 1, 2), "skips": (0, 2), "reverses": (0, 2, 1)}.get(self.mode, (0, 1, 2))
        for i in order:
            if self.mode == "tokens":
                x = self.blocks[i](x, extra=per_token)
            elif self.mode == "state":
                x = self.blocks[i](x, state=state)
            elif self.mode == "keyword":
                x = self.blocks[i](hidden_states=x)
            elif self.mode == "unpacks":
                x, _ = self.blocks[i](x), self.blocks[i].missing
            else:
                x = self.blocks[i](x)
            if self.mode == "scales":
                x = x / 2
        return type("Output", (), {"logits": self.head(x)})


def toy_model(mode: str) -> tuple[LoadedModel, nn.Module]:
    """A Toy on meta with a source that holds its tensors, and the Toy itself."""
    torch.manual_seed(0)
    toy, empty = Toy(mode), Toy(mode)
    values = {n: p.detach().clone() for n, p in toy.named_parameters()}
    for name in values:
        parent, _, leaf = name.rpartition(".")
        setattr(empty.get_submodule(parent), leaf, nn.Parameter(torch.empty_like(values[name], device="meta")))

    class Source:
        def tensor(self, name: str) -> Tensor:
            return values[name]

    blocks = [Block(f"blocks.{i}", b, find_linears(b)) for i, b in enumerate(empty.blocks)]
    names = {n: n for n in values}
    return LoadedModel(empty, Source(), blocks, names, {}, {}, torch.float32), toy  # type: ignore[arg-type]


def streamed(loaded: LoadedModel, ids: Tensor, repeats: int) -> tuple[Tensor, HiddenStream]:
    """Logits after passing all blocks; every block is run `repeats` times more, as gathering statistics does."""
    stream = open_stream(loaded, ids, 2, CPU, CPU, torch.float32)
    with torch.no_grad():
        for index, block in enumerate(loaded.blocks):
            loaded.materialize(block.name, CPU, torch.float32)
            for _ in range(repeats):
                for batch in range(len(stream.hidden)):
                    stream.forward(block.module, index, batch)
            stream.advance(block, index)
            loaded.release(block.name)
        return tail_logits(loaded, stream, torch.float32), stream


@pytest.mark.parametrize("mode", ["plain", "keyword", "tokens", "state"])
def test_streams_follow_unusual_calls(mode: str) -> None:
    """Oracle: the whole model. Blocks may work in place, take tensors made from the tokens (Gemma 3n), or hand values
    to later blocks through a dict (shared keys and values), and a block may run several times before the stream
    goes on."""
    loaded, toy = toy_model(mode)
    ids = torch.randint(0, 16, (5, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = torch.cat([toy(batch).logits for batch in ids.split(2)])
    logits, stream = streamed(loaded, ids, repeats=2)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert stream.n_tokens == 30
    shared = len({id(calls) for calls in stream.calls})
    assert shared == (1 if mode in ("plain", "keyword") else 3)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("scales", "does more than pass the output of block 0 to block 1"),
        ("repeats", "does more than pass the output of block 1 to block 2"),
        ("reverses", "does more than pass the output of block 0 to block 1"),
        ("skips", "does more than pass the output of block 0 to block 1"),
        ("unpacks", "cannot be run block by block: AttributeError"),
    ],
)
def test_models_that_are_no_chain_of_blocks_are_refused(mode: str, message: str) -> None:
    """Oracle: a stream would compute something else than the model for each of these, so it must not start."""
    loaded, _ = toy_model(mode)
    with pytest.raises(UnsupportedModel, match=message):
        open_stream(loaded, torch.zeros(2, 4, dtype=torch.int64), 2, CPU, CPU, torch.float32)
    assert all("forward" not in vars(b.module) for b in loaded.blocks)


# block files


def quantized_weight(scheme: QuantScheme, n: int, k: int, seed: int, dtype: torch.dtype) -> QuantizedWeight:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return rtn_quantize(weight, scheme, scale_dtype=dtype)


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    pairs = [(a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero)]
    return a.scheme == b.scheme and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


schemes = st.builds(
    QuantScheme,
    bits=st.sampled_from([2, 3, 4, 8]),
    granularity=st.sampled_from(list(Granularity)),
    group_size=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    observer=st.sampled_from(list(Observer)),
)


@settings(max_examples=60, deadline=None)
@given(schemes, st.integers(1, 20), st.sampled_from([8, 24, 40]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_decode_inverts_encode(scheme: QuantScheme, n: int, k: int, dtype: torch.dtype) -> None:
    """Oracle: the identity, tensors and dtypes; the scheme survives its dict."""
    q = quantized_weight(scheme, n, k, n * k, dtype)
    assert same(decode(encode(q), scheme), q)
    assert scheme_from_dict(json.loads(json.dumps(to_dict(scheme)))) == scheme


def test_decode_refuses_shapes_that_do_not_fit() -> None:
    """Oracle: the documented error."""
    scheme = QuantScheme(4, group_size=8)
    tensors = encode(quantized_weight(scheme, 4, 16, 0, torch.float32))
    tensors["weight_shape"] = torch.tensor([4, 32])
    with pytest.raises(ArtifactError, match="need int32 with 4"):
        decode(tensors, scheme)


def test_block_files_hold_what_was_saved(tmp_path: Path) -> None:
    """Oracle: the identity for a block of mixed schemes, one name a prefix of another, and a block of nothing."""
    state = BlockState(
        {
            "a": quantized_weight(QuantScheme(3, group_size=8, symmetric=False), 8, 16, 0, torch.bfloat16),
            "a.b": quantized_weight(QuantScheme(8, Granularity.TENSOR, symmetric=False), 8, 16, 1, torch.float16),
        },
        {"norm.weight": torch.randn(16).bfloat16(), "a.bias": torch.randn(8)},
        [{"name": "a", "error": 0.25, "damping": None}],
    )
    save_block(tmp_path, 7, state)
    again = load_block(tmp_path, 7)
    assert again is not None and again.reports == state.reports
    assert all(same(again.quantized[n], q) for n, q in state.quantized.items())
    assert all(torch.equal(again.changed[n], v) and again.changed[n].dtype == v.dtype for n, v in state.changed.items())
    assert load_block(tmp_path, 8) is None
    save_block(tmp_path, 0, BlockState({}, {}, []))
    assert load_block(tmp_path, 0) == BlockState({}, {}, [])
    with safe_open(checkpoint_path(tmp_path, 7), framework="pt") as f:
        assert f.get_tensor("a.weight_packed").dtype is torch.int32
