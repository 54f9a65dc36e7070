"""The decode engine against the transformers model it was made from.

On a CPU the engine runs on the kernels' PyTorch twins (the kernels themselves: test_decode_ops.py), in float32, so only
the order of sums differs from transformers. One test runs the kernels of a whole step in Triton's interpreter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import build, token_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from compress import decode_weights
from compress.decode_weights import Dense, Packed, read_model
from compress.decoder import Decoder
from compress.errors import ConfigError, UnsupportedModel
from compress.kernels import pdl
from compress.kernels.choose import hopper_kernels
from compress.kernels.reference import relative_error
from compress.qlinear import Backend, QuantLinear
from compress.quant import QuantScheme, choose_qparams, quantize

KNOWN = ["llama", "llama-bias-tied", "qwen2", "qwen3"]
PROMPT, STEPS, CAPACITY = 7, 5, 16


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def fresh(name: str, **changes: Any) -> nn.Module:
    """A model that a test may change; `changes` of the config keep the weights."""
    model = copy.deepcopy(build(name))
    if not changes:
        return model
    config = type(model.config).from_dict(model.config.to_dict() | changes)
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def check_steps(model: nn.Module, decoder: Decoder, bound: float, vocabulary: int = 128) -> None:
    """Prefill and steps of the engine against one pass of the model over all tokens, position by position."""
    device = decoder.positions.device
    ids = token_ids(decoder.batch, PROMPT + STEPS).to(device) % vocabulary
    whole = model(ids).logits
    first = decoder.prefill(model, ids[:, :PROMPT])
    assert relative_error(first, whole[:, PROMPT - 1]) < bound
    for t in range(PROMPT, PROMPT + STEPS):
        logits = decoder.step(ids[:, t])
        assert logits.shape == whole[:, t].shape and logits.dtype is whole.dtype
        assert relative_error(logits, whole[:, t]) < bound, t
        assert decoder.length == t + 1 and decoder.positions.tolist() == [t + 1] * decoder.batch


@pytest.mark.parametrize("name", KNOWN)
def test_logits_equal_those_of_transformers(name: str) -> None:
    """Oracle: one pass of the transformers model over the whole text, made before the engine touched its weights."""
    model = fresh(name)
    check_steps(build(name), Decoder(read_model(model), 2, CAPACITY), 1e-5)


def test_scaled_rotary_embeddings() -> None:
    """Oracle: transformers, with tables that Llama 3.1 and YaRN scale (YaRN's also change the norm of q and k)."""
    for rope in (
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    ):  # fmt: skip
        model = fresh("llama", rope_parameters=rope)
        plain = build("llama")(token_ids(1, 12)).logits
        assert relative_error(model(token_ids(1, 12)).logits, plain) > 1e-3  # the change is one
        check_steps(copy.deepcopy(model), Decoder(read_model(model), 2, CAPACITY), 1e-5)


def test_window_limits_the_capacity() -> None:
    """Oracle: Mistral's window of 8 tokens: up to 8 the engine equals transformers, beyond it refuses."""
    weights = read_model(fresh("mistral"))
    with pytest.raises(ConfigError, match="window of 8"):
        Decoder(weights, 1, 9)
    model, ids = build("mistral"), token_ids(1, 8)
    decoder = Decoder(weights, 1, 8)
    decoder.prefill(model, ids[:, :5])
    for t in range(5, 8):
        logits = decoder.step(ids[:, t])
    assert relative_error(logits, model(ids).logits[:, -1]) < 1e-5
    with pytest.raises(ConfigError, match="is full"):
        decoder.step(ids[:, 0])


def test_fused_weights_are_the_models_own() -> None:
    """Oracle: storages: one for q, k, v, shared with the model, which still computes what it did; and a second
    engine fuses nothing anew."""
    model = fresh("qwen2")
    first = read_model(model)
    part = first.layers[0].qkv.parts[0]
    assert isinstance(part, Dense) and len(first.layers[0].qkv.parts) == 1
    attention: Any = model.model.layers[0].self_attn  # type: ignore[union-attr, index]
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert linear.weight.untyped_storage().data_ptr() == part.weight.untyped_storage().data_ptr()
    ids = token_ids(2, 9)
    assert torch.equal(model(ids).logits, build("qwen2")(ids).logits)
    again = read_model(model).layers[0].qkv.parts[0]
    assert isinstance(again, Dense) and again.weight.data_ptr() == part.weight.data_ptr()
    assert torch.equal(again.weight, part.weight) and torch.equal(again.weight[:64], attention.q_proj.weight)


def quantize_linears(model: nn.Module, backend: Backend, dtype: torch.dtype, bits: dict[str, int]) -> nn.Module:
    """Every linear of the blocks as a QuantLinear of group 32; `bits` by name of the projection, otherwise 4."""
    for block in model.model.layers:  # type: ignore[union-attr]
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    scheme = QuantScheme(bits=bits.get(name, 4), group_size=32)
                    weight = linear.weight.detach().float().cpu()
                    q = quantize(weight, *choose_qparams(weight, scheme), scheme)
                    coded = QuantLinear.from_quantized(q, linear.bias, backend, dtype)
                    setattr(parent, name, coded.to(linear.weight.device))
    return model


def test_quantized_layers_without_a_kernel_stay_apart() -> None:
    """Oracle: the transformers model around the same QuantLinear layers, in float32, 4 and 8 bits mixed."""
    model = quantize_linears(fresh("qwen2"), Backend.AUTO, torch.float32, {"k_proj": 8})
    weights = read_model(model)
    assert len(weights.layers[0].qkv.parts) == 3
    check_steps(model, Decoder(weights, 2, CAPACITY), 1e-5)


def test_a_step_of_kernels() -> None:
    """Oracle: transformers around the same layers in float16, so the bound is that of half precision. On a CPU the
    whole step runs in Triton's interpreter: norms, attention, SiLU, and W4A16 matmuls of fused packed weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fresh("qwen2").half().to(device)
    quantize_linears(model, Backend.TRITON, torch.float16, {})
    weights = read_model(model)
    kinds = [type(p) for w in (weights.layers[0].qkv, weights.layers[0].gate_up, weights.head) for p in w.parts]
    assert kinds == [Packed, Packed, Dense]
    check_steps(model, Decoder(weights, 3, CAPACITY, use_kernels=True), 1e-2)


@pytest.mark.parametrize("bits", [8, 3, 2])
def test_other_widths_are_fused_and_multiplied_by_their_own_kernel(bits: int) -> None:
    """Oracle: transformers around the same layers, which compute each by itself; beside them a k of other bits that no
    neighbour joins. On a CPU the products run in Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fresh("qwen2").half().to(device)
    widths = dict.fromkeys(("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), bits)
    quantize_linears(model, Backend.TRITON, torch.float16, widths | {"k_proj": 4 if bits == 8 else 8})
    weights = read_model(model)
    layer = weights.layers[0]
    assert [type(p.weight).__name__ for p in layer.qkv.parts if isinstance(p, Packed)] == (
        ["PackedWeight", "KernelWeight", "PackedWeight"] if bits == 8 else ["PackedWeight"] * 3
    )
    assert len(layer.gate_up.parts) == 1 and layer.gate_up.interleaved
    decoder = Decoder(weights, 2, CAPACITY, use_kernels=False)
    check_steps(model, decoder, 1e-2)
    assert not Decoder(weights, 2, CAPACITY, use_kernels=True).fused


def test_products_that_do_their_neighbours_work() -> None:
    """Oracle: transformers around the same layers in float16, and the launches apart from each other, on the twins."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fresh("qwen2").half().to(device)
    quantize_linears(model, Backend.TRITON, torch.float16, {})
    weights = read_model(model)
    assert weights.layers[0].gate_up.interleaved
    decoder = Decoder(weights, 3, CAPACITY, use_kernels=False)
    check_steps(model, decoder, 1e-2)
    decoder.fused = True
    check_steps(model, decoder, 1e-2)


@pytest.mark.parametrize("use_pdl", [False, True], ids=["plain", "pdl"])
def test_dependent_launch_of_the_products_is_that_of_the_engine(monkeypatch: pytest.MonkeyPatch, use_pdl: bool) -> None:
    """Oracle: what the engine was told, at every launch of W4A16 that a step of 9 sequences makes."""
    from compress.kernels import w4a16

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = quantize_linears(fresh("qwen2").half().to(device), Backend.TRITON, torch.float16, {})
    decoder = Decoder(read_model(model), 9, CAPACITY, use_kernels=False)  # twins around the products
    decoder.pdl, told = use_pdl, []

    def launch(x: torch.Tensor, weight: Any, bias: Any, config: Any = None, pdl: bool = True) -> torch.Tensor:
        told.append(pdl)
        return x.new_zeros(x.shape[0], weight.n)

    monkeypatch.setattr(w4a16, "launch", launch)
    decoder.step(torch.zeros(9, dtype=torch.int64, device=device))
    assert told == [use_pdl] * 8  # qkv, out, gate/up and down of two blocks


def test_caches_of_transformers_are_taken_over() -> None:
    """Oracle: steps after a static cache, and after the first tokens of a longer dynamic one, equal the model's."""
    model, ids = build("qwen3"), token_ids(2, PROMPT + 3)
    expected = model(ids[:, : PROMPT + 1]).logits[:, -1]
    static, dynamic = StaticCache(model.config, 20), DynamicCache(config=model.config)
    model(ids[:, :PROMPT], past_key_values=static, use_cache=True)
    model(ids, past_key_values=dynamic, use_cache=True)
    decoder = Decoder(read_model(fresh("qwen3")), 2, CAPACITY)
    for cache, length in ((static, None), (dynamic, PROMPT)):
        decoder.load_cache(cache, length)
        assert relative_error(decoder.step(ids[:, PROMPT]), expected) < 1e-5
    with pytest.raises(ConfigError, match="10 tokens of a cache of 10"):
        Decoder(decoder.model, 2, 9).load_cache(dynamic)
    with pytest.raises(ConfigError, match=r"layer 0 of the cache is \(2,"):
        Decoder(decoder.model, 3, 16).load_cache(dynamic)


def test_generate_equals_transformers_generate() -> None:
    """Oracle: greedy `generate` of transformers, token by token."""
    model, ids = build("llama"), token_ids(2, PROMPT)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, PROMPT:]
    decoder = Decoder(read_model(fresh("llama")), 2, CAPACITY)
    first = decoder.prefill(model, ids).argmax(dim=-1)
    assert torch.equal(torch.cat([first[:, None], decoder.generate(first, 5)], dim=1), expected)


def test_bytes_of_a_step() -> None:
    """Oracle: parameters of the tiny Llama, each once, without the embedding but for its rows; 2 x 2 x 16 values of a
    token in each of 2 layers, read 10 times and written once."""
    model = fresh("llama")
    embedding = model.model.embed_tokens.weight  # type: ignore[union-attr]
    parameters = sum(p.numel() for p in model.parameters()) - embedding.numel()
    expected = 4 * (parameters + 3 * 64 + 3 * 11 * 2 * (2 * 2 * 16))
    assert read_model(model).step_bytes(3, 10) == expected


@pytest.mark.parametrize("name", ["granite", "gemma", "smollm3", "olmo2", "phi3", "gpt2", "stablelm"])
def test_other_families_are_refused(name: str) -> None:
    """Oracle: an UnsupportedModel that names the block, for look-alikes that compute something else too."""
    with pytest.raises(UnsupportedModel, match="the decode engine knows LlamaDecoderLayer"):
        read_model(build(name))


def test_variants_are_refused() -> None:
    """Oracle: each change of a known model that the engine does not compute raises, and says what it is."""
    with pytest.raises(UnsupportedModel, match="hidden_act=gelu"):
        read_model(fresh("llama", hidden_act="gelu"))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match="rope type dynamic"):
        read_model(fresh("llama", rope_parameters=dynamic))
    hooked = fresh("llama")
    hooked.model.layers[1].mlp.register_forward_hook(lambda *args: None)  # type: ignore[union-attr, index]
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp has hooks"):
        read_model(hooked)
    with pytest.raises(UnsupportedModel, match="meta"):
        read_model(fresh("llama").to("meta"))
    strange = fresh("llama")
    strange.lm_head = nn.Identity()
    with pytest.raises(UnsupportedModel, match="Identity"):
        read_model(strange)


def test_unfit_requests_are_refused() -> None:
    """Oracle: a ConfigError that names the value and the rule."""
    weights = read_model(fresh("llama"))
    with pytest.raises(ConfigError, match="batch=0"):
        Decoder(weights, 0, 4)
    with pytest.raises(ConfigError, match=r"torch\.float32"):
        Decoder(weights, 1, 4, use_kernels=True)
    decoder = Decoder(weights, 2, 4)
    with pytest.raises(ConfigError, match="one for each of 2"):
        decoder.step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="length=5"):
        decoder.seek(5)
    if decoder.positions.device.type == "cpu":
        with pytest.raises(ConfigError, match="needs a CUDA device"):
            decoder.capture()


@pytest.mark.gpu
@pytest.mark.parametrize("use_pdl", [False, True], ids=["plain", "pdl"])
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_captured_steps_equal_transformers(name: str, packed: bool, use_pdl: bool) -> None:
    """Oracle: transformers on the GPU in float16, after the step was recorded before any prompt was read."""
    model = fresh(name).half().cuda()
    if packed:
        quantize_linears(model, Backend.AUTO, torch.float16, {})
    device = torch.device("cuda")
    decoder = Decoder(read_model(model), 3, 64, pdl=use_pdl and pdl.supported(device))
    decoder.capture()
    for _ in range(2):  # a second prompt through the same graph
        check_steps(model, decoder, 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("use_pdl", [False, True], ids=["plain", "pdl"])
def test_captured_fused_steps_equal_transformers(use_pdl: bool) -> None:
    """Oracle: transformers on the GPU; widths that the Hopper kernels take, so products do their neighbours' work."""
    config = AutoConfig.for_model(
        "qwen2", hidden_size=256, intermediate_size=640, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=512,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).half().cuda().eval()
    quantize_linears(model, Backend.AUTO, torch.float16, {})
    for batch in (1, 5, 8):
        decoder = Decoder(read_model(model), batch, 64, pdl=use_pdl)
        assert decoder.fused == hopper_kernels(torch.device("cuda", torch.cuda.current_device()))
        decoder.capture()
        for _ in range(2):
            check_steps(model, decoder, 1e-2)


@pytest.mark.gpu
def test_a_long_captured_generation() -> None:
    """Oracle: the engine without a graph, over 300 positions and several blocks and splits: the same bits."""
    config = AutoConfig.for_model(
        "qwen3", hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, head_dim=128,
        num_key_value_heads=2, vocab_size=512,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).bfloat16().cuda().eval()
    weights = read_model(model)
    first = torch.tensor([5, 9], device="cuda")
    results = []
    for captured in (False, True):
        decoder = Decoder(weights, 2, 320)
        if captured:
            decoder.capture()
        results.append(decoder.generate(first, 300))
    assert torch.equal(*results)


def test_blocks_known_are_those_of_transformers() -> None:
    """Oracle: each name is a class that transformers has."""
    import transformers

    for name in decode_weights.BLOCKS:
        family = name.removesuffix("DecoderLayer").lower()
        module = getattr(transformers.models, family)
        assert hasattr(getattr(module, f"modeling_{family}"), name)
