"""Which tokens a run calibrates and evaluates on, and which lm-eval tasks it runs, when the user names none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compress.calibration import CalibrationSet, TextSource, token_windows
from compress.config import CalibrationConfig, EvalConfig
from compress.models import LoadedModel
from compress.source import sha256_file

# What the field calibrates and reports on when nothing else is said.
_DEFAULT_DATASET, _DEFAULT_SUBSET = "Salesforce/wikitext", "wikitext-2-raw-v1"


def has_embedded_tokenizer(loaded: LoadedModel) -> bool:
    """Whether the shipped token ids mean the same text to this model: its tokenizer is the embedded one."""
    from compress.reference import model_path

    own = loaded.source.path / "tokenizer.json"
    return own.is_file() and sha256_file(own) == sha256_file(model_path() / "tokenizer.json")


def calibration_set(config: CalibrationConfig, loaded: LoadedModel, tokenizer: Any) -> CalibrationSet:
    """Tokens to gather activations on. Raises as `token_windows`."""
    from compress.reference import calibration_tokens

    return _windows("calibration", config, loaded, tokenizer, calibration_tokens)


def evaluation_set(config: EvalConfig, loaded: LoadedModel, tokenizer: Any) -> CalibrationSet:
    """Tokens to measure KL and perplexity on, disjoint from the calibration default. Raises as `token_windows`."""
    from compress.reference import heldout_tokens

    return _windows("eval", config, loaded, tokenizer, heldout_tokens)


def default_tasks(config: EvalConfig, loaded: LoadedModel) -> list[str]:
    """The tasks named, or the shipped ones; held-out texts are samples of the embedded model and suit no other."""
    if config.tasks is not None:
        return list(config.tasks)
    return ["compress_minimal_pairs", *(["compress_heldout"] if has_embedded_tokenizer(loaded) else [])]


def _windows(
    what: str, config: CalibrationConfig | EvalConfig, loaded: LoadedModel, tokenizer: Any, embedded: Any
) -> CalibrationSet:
    source = TextSource(
        what, config.path, config.dataset, config.dataset_config, config.split, config.text_column,
        config.n_sequences, config.sequence_length,
    )  # fmt: skip
    own = has_embedded_tokenizer(loaded)
    if not source.path and not source.dataset and not own:
        source = replace(source, dataset=_DEFAULT_DATASET, dataset_config=_DEFAULT_SUBSET)
    return token_windows(source, tokenizer, embedded() if own else None)
