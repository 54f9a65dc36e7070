"""Tokens drawn from a model: the right distribution; the static way, step by step, on tape and on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from test_replay import events, tapes  # noqa: F401 (fixtures)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress import sampling
from compress.errors import NumericalError, UnsupportedModel
from compress.reference import model_path
from compress.sampling import SWITCH, continue_sequences, continue_static, draw, has_static_step


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    return model


def start(n: int, prompt: int, new: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Beginnings [n, prompt] and uniforms [n, new]."""
    generator = torch.Generator().manual_seed(4)
    begin = torch.randint(3, vocabulary, (n, prompt), generator=generator)
    return begin, torch.rand(n, new, dtype=torch.float64, generator=generator)


def quiet(_drawn: int) -> None:
    pass


def test_draws_follow_the_tempered_distribution() -> None:
    """Oracle: softmax(logits / temperature) at evenly spread uniforms: each id comes as often as its probability says,
    to one draw, and an id of probability 0 never."""
    logits = torch.tensor([[2.0, 0.0, -1.0, -torch.inf, 1.0]])
    uniform = ((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000).unsqueeze(1)
    for temperature in (0.5, 1.0, 2.0):
        ids = draw(logits.expand(len(uniform), -1), uniform, temperature)
        expected = 10_000 * torch.softmax(logits[0].double() / temperature, -1)
        assert (torch.bincount(ids.flatten(), minlength=5) - expected).abs().max() <= 1
    with pytest.raises(NumericalError, match="NaN or infinite logits"):
        draw(torch.tensor([[float("nan"), 0.0]]), uniform[:1])


def test_sequences_are_the_inverted_distribution_of_a_full_forward(tiny_model_dir: Path) -> None:
    """Oracle: the same uniforms inverted with the logits of one forward without cache over the finished sequences."""
    tiny = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    begin = torch.tensor([[5, 9, 33], [200, 1, 7]])
    uniforms = torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens = continue_sequences(tiny, begin, uniforms, 1.3)
    assert torch.equal(tokens[:, :3], begin)
    with torch.inference_mode():
        cdf = (tiny(input_ids=tokens).logits.double() / 1.3).softmax(-1).cumsum(-1)
    for t in range(9):
        assert torch.equal((cdf[:, 2 + t] <= uniforms[:, t : t + 1]).sum(-1), tokens[:, 3 + t])


def test_a_model_without_a_cache_is_refused(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a model that forgets: continuing from its last token alone would be another distribution."""
    tiny = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    real = tiny.forward
    monkeypatch.setattr(tiny, "forward", lambda **kw: real(**kw | {"use_cache": False}))
    with pytest.raises(UnsupportedModel, match="no KV cache"):
        continue_sequences(tiny, torch.tensor([[1, 2]]), torch.rand(1, 3, dtype=torch.float64))


def test_a_static_cache_gives_the_same_tokens(reference: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the dynamic way; the prompt ends inside a stage, and the last stage is shorter than the others."""
    monkeypatch.setattr(sampling, "_STAGE_TOKENS", 8)
    begin, uniforms = start(3, 5, 16, 8192)
    counts: list[int] = []
    tokens = continue_static(reference, begin, uniforms, 0.9, counts.append, captured=False)
    assert torch.equal(tokens, continue_sequences(reference, begin, uniforms, 0.9))
    assert counts == list(range(1, 17))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_one_token_is_that_of_sdpa(dtype: torch.dtype) -> None:
    """Oracle: torch's sdpa with keys and values repeated for each head, in float64; a mask that hides a tail, and the
    part of a cache that a stage shows."""
    generator = torch.Generator().manual_seed(5)
    cache = [torch.randn(3, 2, 20, 16, generator=generator).to(dtype) for _ in range(2)]
    key, value = (c[:, :, :12] for c in cache)
    query = torch.randn(3, 6, 1, 16, generator=generator).to(dtype)
    mask = (torch.arange(12) < torch.tensor([5, 12, 1])[:, None])[:, None, None]
    wide = [t.double().repeat_interleave(3, dim=1) for t in (key, value)]
    for scale, hidden in ((None, mask), (0.3, None)):
        found, _ = sampling._attend(nn.Identity(), query, key, value, hidden, scaling=scale)
        expected = nn.functional.scaled_dot_product_attention(query.double(), *wide, attn_mask=hidden, scale=scale)
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.double(), expected.transpose(1, 2), rtol=0, atol=tolerance)


def test_own_attention_is_for_static_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracles: calls counted by hand: 2 layers, 4 steps, the prompt not; sdpa after them, also after an error. A model
    that was made with another implementation keeps it."""
    model, (begin, uniforms) = build("llama"), start(2, 3, 5, 128)
    calls: list[int] = []
    real = sampling._attend
    monkeypatch.setattr(sampling, "_attend", lambda *a, **kw: calls.append(a[1].shape[2]) or real(*a, **kw))
    continue_static(model, begin, uniforms, 1.0, quiet, captured=False)
    assert calls == [1] * (4 * model.config.num_hidden_layers) and model.config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError):
        continue_static(model, begin, uniforms, 1.0, lambda n: 1 // (2 - n), captured=False)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    calls.clear()
    continue_static(model, begin, uniforms, 1.0, quiet, captured=False)
    assert calls == [] and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("prompt", [1, 5, 8, 17, 19])
def test_every_stage_is_as_long_as_it_must_be(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the dynamic way; the length that the model is shown with each token fed, by hand: stages of 8, the last
    ends with the 20 tokens of a sequence."""
    monkeypatch.setattr(sampling, "_STAGE_TOKENS", 8)
    model, (begin, uniforms) = build("llama"), start(2, prompt, 20 - prompt, 128)
    lengths: list[int] = []
    real = sampling._StaticStep.__call__

    def call(self: Any) -> None:
        lengths.append(self.cache.layers[0].keys.shape[2])
        real(self)

    monkeypatch.setattr(sampling._StaticStep, "__call__", call)
    tokens = continue_static(model, begin, uniforms, 1.0, quiet, captured=False)
    assert torch.equal(tokens, continue_sequences(model, begin, uniforms))
    assert lengths == [8 if fed < 8 else 16 if fed < 16 else 20 for fed in range(prompt, 19)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "phi3", "falcon"])
def test_a_recorded_step_serves_every_position(
    name: str,
    tapes: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the dynamic way, where no tape replays. Of each stage three steps are plain: of 3, 8, 8 and 5 steps."""
    monkeypatch.setattr(sampling, "_STAGE_TOKENS", 8)
    model, (begin, uniforms) = build(name), start(3, 5, 25, 128)
    expected = continue_sequences(model, begin, uniforms, 1.1, graphs=False)
    assert tapes == []
    assert torch.equal(continue_sequences(model, begin, uniforms, 1.1), expected)
    assert tapes == [SWITCH] * (0 + 5 + 5 + 2)


def test_models_without_a_static_step_are_sampled_dynamically(
    tapes: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracles: what is known of the architectures: the windows of Mistral, and of some layers of Gemma 3, roll their
    caches; a class that promises nothing, as remote code; a module that is no transformers model."""
    assert has_static_step(build("llama"))
    assert not has_static_step(build("gemma3")) and not has_static_step(nn.Linear(2, 2))
    begin, uniforms = start(2, 3, 20, 128)
    continue_sequences(build("mistral"), begin, uniforms)
    monkeypatch.setattr(type(build("llama")), "_can_compile_fullgraph", False)
    continue_sequences(build("llama"), begin, uniforms)
    assert tapes == []


@pytest.mark.parametrize(("bad", "found"), [(3, 32), (40, 40)])
def test_a_static_step_finds_bad_logits_later(bad: int, found: int) -> None:
    """Oracle: by hand: logits of the third token are not finite, which the check after 32 tokens finds, or those of
    the last, which the end finds."""
    model, (begin, uniforms) = build("llama"), start(2, 4, 40, 128)
    calls: list[int] = []

    def spoil(_module: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
        calls.append(0)
        return logits * float("nan") if len(calls) == bad else logits

    handle = model.get_output_embeddings().register_forward_hook(spoil)  # type: ignore[operator]
    counts: list[int] = []
    with pytest.raises(NumericalError, match="NaN or infinite logits"):
        continue_static(model, begin, uniforms, 1.0, counts.append, captured=False)
    handle.remove()
    assert counts == list(range(1, found + 1))


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_draw_the_same_tokens(dtype: torch.dtype) -> None:
    """Oracles: the same steps launched one by one (in bfloat16 their products may round otherwise), and the same call
    again; the beginnings stay, and the sequences differ. The memory of graphs and cache comes back."""
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype).eval().cuda()
    begin, uniforms = start(64, 20, 200, 8192)
    begin, uniforms = begin.cuda(), uniforms.cuda()
    plain = continue_static(model, begin, uniforms, 1.0, quiet, captured=False)
    first = continue_sequences(model, begin, uniforms)
    used = 0
    for _ in range(3):  # what libraries keep is there after the first
        assert torch.equal(continue_sequences(model, begin, uniforms), first)
        before, used = used, torch.cuda.memory_allocated()
    assert used == before
    assert torch.equal(first, plain) or dtype == torch.bfloat16
    assert torch.equal(first[:, :20], begin) and len(first.unique(dim=0)) == 64


@pytest.mark.gpu
def test_graphs_give_the_tokens_of_the_dynamic_way() -> None:
    """Oracle: the dynamic way in float32: sequences part where rounding decides a draw, which is rare."""
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval().cuda()
    begin, uniforms = start(64, 20, 200, 8192)
    pair = [continue_sequences(model, begin.cuda(), uniforms, graphs=graphs) for graphs in (False, True)]
    assert (pair[0] == pair[1]).all(dim=1).float().mean() > 0.8


@pytest.mark.gpu
def test_bad_logits_are_found_behind_graphs() -> None:
    """Oracle: a weight of the head that becomes NaN while steps are replayed."""
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval().cuda()
    begin, uniforms = start(8, 20, 60, 8192)
    counts: list[int] = []

    def spoil(drawn: int) -> None:
        counts.append(drawn)
        if drawn == 40:
            model.get_output_embeddings().weight[5, 5] = float("nan")

    with pytest.raises(NumericalError, match="NaN or infinite logits"):
        continue_sequences(model, begin.cuda(), uniforms, 1.0, spoil)
    assert counts == list(range(1, 61))
