"""Data of the shipped lm-eval tasks, for `custom_dataset: !function` in their YAML files.

Loaded in memory from files that lie beside this module: it works from any directory and from an installed wheel,
needs no network and writes no `datasets` cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

TASKS_DIR = Path(__file__).resolve().parent
SEPARATOR = "<|endoftext|>"
# Sequences of the held-out texts that the task reads: a part, so that two models are scored in seconds on a CPU.
# KL and perplexity on token ids (compress.eval.quality) use all 64.
HELDOUT_SEQUENCES = 12


def minimal_pairs(phenomenon: str, **_metadata: Any) -> dict[str, Dataset]:
    """Split `test` with columns `choices` (two sentences) and `gold` (index of the right one).

    lm-eval passes the YAML's metadata as further keywords.
    """
    from datasets import Dataset

    lines = (TASKS_DIR / "minimal_pairs" / f"{phenomenon}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def heldout_documents(**_metadata: Any) -> dict[str, Dataset]:
    """Split `test` with the column `text`: documents of the reference model's held-out texts."""
    from datasets import Dataset

    return {"test": Dataset.from_list([{"text": text} for text in heldout_texts(HELDOUT_SEQUENCES)])}


def heldout_texts(n_sequences: int) -> list[str]:
    """The first sequences decoded and cut at document separators; empty documents dropped.

    The last document of a sequence may end inside a character (byte-level BPE); the fragment is dropped.
    """
    from tokenizers import Tokenizer

    from compress.reference import heldout_tokens, model_path

    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    texts: list[str] = []
    for ids in heldout_tokens()[:n_sequences].tolist():
        documents = tokenizer.decode(ids, skip_special_tokens=False).split(SEPARATOR)
        documents[-1] = documents[-1].rstrip("\N{REPLACEMENT CHARACTER}")
        texts += [document for document in documents if document.strip()]
    return texts
