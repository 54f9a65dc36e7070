"""The embedded model and its texts, and the sampler that made them."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress import reference
from compress.errors import EnvironmentProblem
from compress.reference.sample import sample_sequences


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(reference.model_path(), dtype=torch.float32).eval()


def test_texts_have_the_documented_form() -> None:
    """Oracle: the shapes, dtype and start token of the package docstring; ids within the vocabulary of 8,192."""
    calibration, heldout = reference.calibration_tokens(), reference.heldout_tokens()
    assert calibration.shape == (128, 512) and heldout.shape == (64, 512)
    for tokens in (calibration, heldout):
        assert tokens.dtype == torch.int64
        assert (tokens[:, 0] == 0).all()
        assert tokens.min() >= 0 and tokens.max() < 8192


def test_calibration_and_heldout_are_disjoint() -> None:
    """Oracle: no run of 16 ids occurs in both, so not even a copied passage is shared."""

    def runs(tokens: Tensor) -> set[tuple[int, ...]]:
        return {tuple(row[i : i + 16]) for row in tokens.tolist() for i in range(len(row) - 15)}

    assert not runs(reference.calibration_tokens()) & runs(reference.heldout_tokens())


def test_texts_name_the_model_they_were_drawn_from() -> None:
    """Oracle: sha256 of the shipped weights against the files' metadata."""
    digest = hashlib.sha256((reference.model_path() / "model.safetensors").read_bytes()).hexdigest()
    for name in ("calibration", "heldout"):
        with safe_open(reference.texts_path(name), framework="pt") as file:
            assert file.metadata()["model_sha256"] == digest
            assert file.metadata()["temperature"] == "1"


def test_texts_are_samples_of_the_model(model: Any) -> None:
    """Oracle: for x drawn from p, -log p(x_t | x_<t) minus the entropy of p has mean 0 at every position. Cutting
    the tail (top-k, top-p), another temperature or ids shifted by one would move it by many standard errors."""
    tokens = torch.cat([reference.calibration_tokens()[:6], reference.heldout_tokens()[:6]])
    excess = []
    with torch.inference_mode():
        for row in tokens.split(2):
            log_p = model(input_ids=row).logits[:, :-1].log_softmax(-1)
            nll = -log_p.gather(-1, row[:, 1:, None]).squeeze(-1)
            excess.append((nll + (log_p.exp() * log_p).sum(-1)).flatten())
    # a martingale difference sequence: tokens are uncorrelated, so the plain standard error is right
    values = torch.cat(excess)
    z = values.mean() / (values.std() / math.sqrt(len(values)))
    assert abs(z) < 4, f"mean excess surprise {values.mean():.4f} nats is {z:.1f} standard errors from 0"


def test_model_is_the_documented_one(model: Any) -> None:
    """Oracle: the parameter count of the model card, and the tokenizer's special ids."""
    assert sum(p.numel() for p in model.parameters()) == 8_392_960
    assert "8,392,960" in (reference.model_path() / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(reference.model_path())
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.decode([0]) == "<|endoftext|>"


class _Markov(nn.Module):
    """A causal LM whose next token depends on the last one through a table of probabilities [V, V]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.log_table = nn.Parameter(table.log())

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.log_table[input_ids], past_key_values=past_key_values or ())


def test_sampler_draws_the_model_distribution() -> None:
    """Oracle: transition frequencies of 30,000 draws against the table, chi-square below its 1e-5 quantile; an id
    of probability 0 never comes, and the start id does not end a sequence."""
    table = torch.tensor([[0.1, 0.6, 0.3, 0.0], [0.5, 0.2, 0.25, 0.05], [0.01, 0.01, 0.98, 0.0], [0.25] * 4])
    tokens = sample_sequences(_Markov(table), 300, 101, torch.Generator().manual_seed(3))
    counts = torch.zeros(4, 4).index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.tensor(1.0), True)
    assert counts[0, 3] == 0 and counts[2, 3] == 0
    expected = table * counts.sum(1, keepdim=True)
    possible = table > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    assert chi_square < 45, chi_square  # 10 degrees of freedom
    assert (tokens[:, 1:] == 0).any()


def test_sampler_with_cache_agrees_with_a_full_forward(tiny_model_dir: Path) -> None:
    """Oracle: the same uniforms inverted with logits of one uncached forward over the finished sequences."""
    tiny = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    tokens = sample_sequences(tiny, 3, 24, torch.Generator().manual_seed(5))
    assert torch.equal(tokens, sample_sequences(tiny, 3, 24, torch.Generator().manual_seed(5)))
    assert not torch.equal(tokens, sample_sequences(tiny, 3, 24, torch.Generator().manual_seed(6)))
    with torch.inference_mode():
        cdf = tiny(input_ids=tokens).logits.double().softmax(-1).cumsum(-1)
    generator = torch.Generator().manual_seed(5)
    for t in range(1, 24):
        u = torch.rand(3, 1, dtype=torch.float64, generator=generator)
        assert torch.equal((cdf[:, t - 1] <= u).sum(-1), tokens[:, t])


def test_missing_package_data_names_the_file_and_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: an installation without weights and texts raises EnvironmentProblem that says which and what to do."""
    monkeypatch.setattr(reference, "_HERE", tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"model\.safetensors is missing.*reinstall"):
        reference.model_path()
    with pytest.raises(EnvironmentProblem, match=r"heldout\.safetensors is missing"):
        reference.heldout_tokens()


def test_import_is_light() -> None:
    """Oracle: a fresh interpreter that asks for the model's path has loaded neither torch nor transformers."""
    code = "import sys, compress.reference as r; r.model_path(); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
