"""Write the minimal-pair tasks, or score every candidate phenomenon on the reference model.

    python -m compress.eval.tasks.generate            # rewrite minimal_pairs/ beside this file, byte for byte
    python -m compress.eval.tasks.generate --score    # accuracy of all candidates, the table of README.md

The output is a function of the grammars and SEED alone (Python's `random`, seeded by a string).
"""

from __future__ import annotations

import argparse
import json
from math import comb
from pathlib import Path
from random import Random

from compress.eval.tasks.grammar import CANDIDATES

SEED = 1
N_PAIRS = 150
GROUP = "compress_minimal_pairs"

# Above chance on the reference model (binomial p < 1e-3) and below 0.985: a task at its ceiling cannot show a
# small loss and costs as much time as one that can. README.md has the accuracies of all candidates.
SHIPPED = (
    "agreement_across_pp",
    "determiner_noun",
    "existential_number",
    "pronoun_case",
    "reflexive_number",
    "relative_pronoun",
    "subject_verb",
    "wh_gap",
)

_TASK_YAML = """\
# Written by generate.py
include: _template_yaml
task: compress_mp_{name}
dataset_kwargs:
  phenomenon: {name}
"""

_GROUP_YAML = """\
# Written by generate.py
group: {group}
task:
{tasks}
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: true
metadata:
  version: 1.0
"""


def make_pairs(name: str, n_pairs: int = N_PAIRS, seed: int = SEED) -> list[tuple[str, str]]:
    """Distinct (good, bad) sentences of one phenomenon.

    Raises:
        ValueError: the grammar has fewer distinct pairs than asked for.
    """
    rng = Random(f"{seed}:{name}")
    pairs: dict[tuple[str, str], None] = {}  # a set that keeps the order
    for _ in range(100 * n_pairs):
        pairs[CANDIDATES[name](rng)] = None
        if len(pairs) == n_pairs:
            return list(pairs)
    raise ValueError(f"phenomenon {name} yields {len(pairs)} distinct pairs, {n_pairs} are needed; widen its lexicon")


def task_rows(name: str) -> list[dict[str, object]]:
    """Rows of a task's JSONL: the right sentence comes first in exactly half of them, in random order.

    With the right one always first, a model that returns equal scores (or NaN) would score 1.0 in lm-eval.
    """
    pairs = make_pairs(name)
    gold = [i % 2 for i in range(len(pairs))]
    Random(f"{SEED}:{name}:order").shuffle(gold)
    return [
        {"choices": [good, bad] if g == 0 else [bad, good], "gold": g}
        for (good, bad), g in zip(pairs, gold, strict=True)
    ]


def write_tasks(directory: Path) -> None:
    """Write the JSONL and YAML of each shipped phenomenon and the YAML of their group."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        lines = "".join(json.dumps(row) + "\n" for row in task_rows(name))
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (directory / f"{name}.yaml").write_text(_TASK_YAML.format(name=name), encoding="utf-8")
    tasks = "\n".join(f"  - compress_mp_{name}" for name in SHIPPED)
    (directory / "_group.yaml").write_text(_GROUP_YAML.format(group=GROUP, tasks=tasks), encoding="utf-8")


def binomial_p(n_right: int, n: int) -> float:
    """One-sided p value of at least n_right of n by tossing a coin."""
    return sum(comb(n, k) for k in range(n_right, n + 1)) / 2**n


def score_candidates(names: tuple[str, ...] = tuple(CANDIDATES)) -> dict[str, int]:
    """Pairs of each phenomenon that the reference model (float32, CPU) gets right, without lm-eval."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress.reference import model_path

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path())

    def log_likelihood(sentence: str) -> float:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(sentence, add_special_tokens=False).input_ids]])
        with torch.inference_mode():
            log_p = model(ids[:, :-1]).logits.log_softmax(-1)
        return log_p.gather(-1, ids[:, 1:, None]).sum().item()

    return {name: sum(log_likelihood(good) > log_likelihood(bad) for good, bad in make_pairs(name)) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m compress.eval.tasks.generate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "minimal_pairs")
    parser.add_argument("--score", action="store_true", help="print a table of all candidates, write nothing")
    args = parser.parse_args()
    if not args.score:
        write_tasks(args.output)
        return
    print("| phenomenon | accuracy | p (chance) | shipped |\n|---|---|---|---|")
    for name, n_right in score_candidates().items():
        shipped = "yes" if name in SHIPPED else "no"
        print(f"| {name} | {n_right / N_PAIRS:.3f} | {binomial_p(n_right, N_PAIRS):.1e} | {shipped} |")


if __name__ == "__main__":
    main()
