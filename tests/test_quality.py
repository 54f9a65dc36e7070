"""KL, perplexity and top-1 agreement between two models."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compress.eval.quality as quality
from compress.errors import ConfigError, NumericalError
from compress.eval.quality import KlQuality, kl_quality
from compress.reference import heldout_tokens, model_path
from compress.reference.sample import sample_sequences


class Bigram(nn.Module):
    """A causal LM with logits [V, V] by the last token; its cache remembers nothing, because nothing else counts."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)
        self.batch_sizes: list[int] = []

    def forward(self, input_ids: Tensor, use_cache: bool, past_key_values: Any = None) -> Any:
        self.batch_sizes.append(len(input_ids))
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=())


def bigrams(v: int = 11, noise: float = 0.3, seed: int = 0) -> tuple[Bigram, Bigram]:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(v, v, generator=g)
    return Bigram(logits), Bigram(logits + noise * torch.randn(v, v, generator=g))


def random_tokens(s: int, t: int, v: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(v, (s, t), generator=torch.Generator().manual_seed(seed))


def test_against_torch_distributions() -> None:
    """Oracle: torch.distributions.kl_divergence over all S*T positions, torch's cross entropy over S*(T-1) tokens."""
    p, q = bigrams()
    tokens = random_tokens(7, 13)
    got = kl_quality(p, q, tokens, batch_size=3)

    p_logits, q_logits = p.table[tokens].double(), q.table[tokens].double()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p_logits), torch.distributions.Categorical(logits=q_logits)
    )
    assert got.kl == pytest.approx(kl.mean().item(), rel=1e-12)
    assert got.top1 == pytest.approx((p_logits.argmax(-1) == q_logits.argmax(-1)).double().mean().item(), rel=1e-12)

    def nll(logits: Tensor) -> float:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()

    assert got.ppl == pytest.approx(math.exp(nll(q_logits)), rel=1e-12)
    assert got.ppl_reference == pytest.approx(math.exp(nll(p_logits)), rel=1e-12)
    assert got.nll_rise == pytest.approx(nll(q_logits) - nll(p_logits), rel=1e-9)
    assert (got.n_tokens, got.n_sequences) == (91, 7)


def test_standard_errors_are_clustered_by_sequence() -> None:
    """Oracle: sd / sqrt(S) over figures of each sequence measured alone; perplexities by the delta method."""
    p, q = bigrams()
    tokens = random_tokens(9, 10)
    whole = kl_quality(p, q, tokens)
    alone = [kl_quality(p, q, row[None]) for row in tokens]

    def error(values: list[float]) -> float:
        return float(np.std(values, ddof=1) / math.sqrt(len(values)))

    assert whole.kl_stderr == pytest.approx(error([a.kl for a in alone]))
    assert whole.top1_stderr == pytest.approx(error([a.top1 for a in alone]))
    assert whole.nll_rise_stderr == pytest.approx(error([a.nll_rise for a in alone]))
    assert whole.ppl_stderr == pytest.approx(whole.ppl * error([math.log(a.ppl) for a in alone]))
    assert whole.ppl_reference_stderr == pytest.approx(
        whole.ppl_reference * error([math.log(a.ppl_reference) for a in alone])
    )
    assert alone[0].kl_stderr is None and alone[0].ppl_stderr is None


def test_repeating_a_token_sequence_does_not_shrink_the_error_of_its_cluster() -> None:
    """Oracle: two identical halves inside each sequence carry no new information, so the error must not fall by
    sqrt(2), as it would if tokens were taken as independent."""
    p, q = bigrams()
    tokens = random_tokens(40, 16)
    once, twice = kl_quality(p, q, tokens), kl_quality(p, q, torch.cat((tokens, tokens), dim=1))
    assert twice.kl_stderr == pytest.approx(once.kl_stderr, rel=1e-9)


def test_a_model_is_at_distance_zero_from_itself() -> None:
    """Oracle: KL(p || p) = 0 exactly, whatever the rounding, and everything that follows from it."""
    p, _ = bigrams(v=50)
    same = Bigram(p.table.detach().clone())
    got = kl_quality(p, same, random_tokens(4, 9, v=50))
    assert (got.kl, got.nll_rise, got.top1) == (0.0, 0.0, 1.0)
    assert (got.kl_stderr, got.nll_rise_stderr, got.top1_stderr) == (0.0, 0.0, 0.0)
    assert got.ppl == got.ppl_reference


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(1e-3, 30.0), v=st.integers(2, 20))
def test_kl_is_not_negative(seed: int, noise: float, v: int) -> None:
    """Oracle: Gibbs' inequality."""
    p, q = bigrams(v, noise, seed)
    assert kl_quality(p, q, random_tokens(2, 5, v, seed)).kl >= 0


def test_small_divergences_are_resolved() -> None:
    """Oracle: KL = variance of the perturbation under p, over 2, to leading order; at 1e-9 nats float32 sums of
    log-softmax would be all rounding error."""
    logits = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta = 4.5e-5 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = kl_quality(Bigram(logits), Bigram(logits + delta), torch.zeros(1, 2, dtype=torch.int64))
    prob = logits.softmax(-1)
    variance = (prob * delta**2).sum() - (prob * delta).sum() ** 2
    assert got.kl == pytest.approx(variance.item() / 2, rel=1e-3)


def test_batches_and_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same figures whatever the split, and no batch above what was asked for or what memory allows."""
    p, q = bigrams()
    tokens = random_tokens(9, 12)
    expected = kl_quality(p, q, tokens, batch_size=100)
    monkeypatch.setattr(quality, "CHUNK_ELEMENTS", 8 * 5 * 11)  # 5 rows of V = 11 on a CPU: chunks of 5, 5 and 2
    monkeypatch.setattr(quality, "BATCH_ELEMENTS", 3 * 12 * 11)  # 3 sequences
    p.batch_sizes.clear()
    got = kl_quality(p, q, tokens, batch_size=100)
    assert p.batch_sizes == [1, 3, 3, 2]
    for name, value in vars(expected).items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-12), name


def test_rise_of_nll_estimates_kl_on_text_drawn_from_the_model() -> None:
    """Oracle: the identity of the reference package's docstring, on 400 x 50 tokens sampled from a bigram model;
    the difference has the error of a martingale, estimated over sequences."""
    p, q = bigrams(v=20, noise=0.5)
    tokens = sample_sequences(p, 400, 50, torch.Generator().manual_seed(0))
    differences = [r.nll_rise - r.kl for r in (kl_quality(p, q, row[None]) for row in tokens)]
    # KL counts one position more than NLL; its share of a mean over 50 is far below the error
    z = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(len(differences)))
    assert abs(z) < 4
    assert kl_quality(p, q, tokens).kl > 0.05


@pytest.fixture(scope="module")
def noisy_reference_quality() -> KlQuality:
    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)

    noisy, generator = load(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in noisy.named_parameters():
            if "proj" in name:
                parameter += 0.15 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return kl_quality(load(), noisy, heldout_tokens()[:8], batch_size=4)


def test_rise_of_nll_estimates_kl_on_the_heldout_texts(noisy_reference_quality: KlQuality) -> None:
    """Oracle: the same identity for the shipped model and texts, with noise of 15 % on every projection."""
    got = noisy_reference_quality
    assert got.kl > 0.02 and got.kl_stderr is not None and got.nll_rise_stderr is not None
    assert abs(got.nll_rise - got.kl) < 4 * math.hypot(got.kl_stderr, got.nll_rise_stderr)
    assert 10 < got.ppl_reference < 40


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("broken", ["reference", "quantized"])
def test_non_finite_logits_name_the_model(broken: str, value: float) -> None:
    """Oracle: NumericalError that names the one model whose logits are not finite."""
    p, q = bigrams()
    with torch.no_grad():
        (p if broken == "reference" else q).table[3, 4] = value
    tokens = torch.full((2, 4), 3)
    other = "quantized" if broken == "reference" else "reference"
    with pytest.raises(NumericalError, match=f"the {broken} model") as caught:
        kl_quality(p, q, tokens)
    assert other not in str(caught.value)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(3, 1, dtype=torch.int64), torch.zeros(8, dtype=torch.int64), torch.zeros(2, 8)]
)
def test_unusable_tokens_are_refused(tokens: Tensor) -> None:
    """Oracle: a length without a prediction, a missing dimension or a float dtype raises ConfigError."""
    p, q = bigrams()
    with pytest.raises(ConfigError, match=r"int64 \[S, T\]"):
        kl_quality(p, q, tokens)


def test_models_of_different_vocabularies_are_refused() -> None:
    """Oracle: ConfigError with both shapes."""
    with pytest.raises(ConfigError, match=r"12\).*13\)"):
        kl_quality(bigrams(12)[0], bigrams(13)[0], random_tokens(2, 5))


def test_modes_and_random_state_are_left_alone_and_progress_is_told() -> None:
    """Oracle: training flags and the generator's state before and after; progress ends at (S, S)."""
    p, q = bigrams()
    p.train()
    q.eval()
    state = torch.get_rng_state()
    calls: list[tuple[int, int]] = []
    kl_quality(p, q, random_tokens(5, 6), batch_size=2, progress=lambda done, total: calls.append((done, total)))
    assert p.training and not q.training
    assert torch.equal(state, torch.get_rng_state())
    assert calls == [(1, 5), (3, 5), (5, 5)]


@pytest.mark.gpu
def test_gpu_agrees_with_cpu() -> None:
    """Oracle: the same figures on the CPU, with the two models on different devices too."""
    tokens = random_tokens(5, 16)
    expected = kl_quality(*bigrams(), tokens)
    for devices in (("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")):
        p, q = (m.to(d) for m, d in zip(bigrams(), devices, strict=True))
        got = kl_quality(p, q, tokens)
        for name, value in vars(expected).items():
            assert getattr(got, name) == pytest.approx(value, rel=1e-9), (devices, name)
