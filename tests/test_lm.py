"""Task scores with lm-eval: the shipped tasks, users' own, and the errors of differences."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.errors import ConfigError, EnvironmentProblem, NumericalError
from compress.eval import lm, uncertainty
from compress.eval.lm import EvalResult, TaskOptions, compare_scores, compare_tasks, run_tasks, score_tasks
from compress.eval.task_index import TASKS_DIR, load_tasks
from compress.eval.tasks import generate, loader
from compress.eval.uncertainty import paired_stderr, stderr
from compress.reference import heldout_tokens, model_path

GROUP, HELDOUT = "compress_minimal_pairs", "compress_heldout"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def noisy(model: Any) -> Any:
    noisy, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in noisy.named_parameters():
            if "proj" in name:
                parameter += 0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return noisy


@pytest.fixture(scope="module")
def results(model: Any, tokenizer: Any) -> dict[tuple[str, str], EvalResult]:
    options = TaskOptions(limit=12)
    return {(r.task, r.metric): r for r in run_tasks(model, tokenizer, [GROUP, "compress_mp_wh_gap"], options)}


@pytest.fixture
def own_index_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves lm-eval's own 14,000 tasks out, which take seconds to index."""
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path, **_: whole(include_path=include_path, include_defaults=False)
    )


def log_likelihood(model: Any, tokenizer: Any, text: str) -> float:
    ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.inference_mode():
        log_p = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None]).sum().item()


# ---- shipped tasks


def test_minimal_pairs_are_what_the_grammars_write(tmp_path: Path) -> None:
    """Oracle: generate.py writes the shipped files again, byte for byte, and nothing else is shipped beside them."""
    generate.write_tasks(tmp_path)
    written = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    shipped = {p.name: p.read_bytes() for p in (TASKS_DIR / "minimal_pairs").iterdir() if p.name != "_template_yaml"}
    assert written == shipped


@pytest.mark.parametrize("name", generate.CANDIDATES)
def test_minimal_pairs_are_distinct_and_minimal(name: str) -> None:
    """Oracle: 150 distinct pairs; one contiguous stretch of at most two words differs; no sentence is right in one
    pair and wrong in another; the right one comes first in half of the rows."""
    pairs = generate.make_pairs(name)
    assert len(set(pairs)) == 150
    assert not {good for good, _ in pairs} & {bad for _, bad in pairs}
    for good, bad in pairs:
        a, b = good.rstrip(".").split(), bad.rstrip(".").split()
        while a and b and a[0] == b[0]:
            a, b = a[1:], b[1:]
        while a and b and a[-1] == b[-1]:
            a, b = a[:-1], b[:-1]
        assert 1 <= max(len(a), len(b)) <= 2, (good, bad)
    rows = generate.task_rows(name)
    assert sum(row["gold"] == 0 for row in rows) == 75
    assert [tuple(r["choices"]) if r["gold"] == 0 else tuple(r["choices"])[::-1] for r in rows] == pairs  # type: ignore[arg-type]


def test_readme_has_the_accuracies_of_the_shipped_tasks(results: dict[tuple[str, str], EvalResult]) -> None:
    """Oracle: the binomial test on the table's own figures; every shipped phenomenon is in it and beats chance."""
    rows = [line.split("|")[1:5] for line in (TASKS_DIR / "README.md").read_text().splitlines() if "| yes |" in line]
    table = {name.strip(): float(accuracy) for name, accuracy, *_ in rows}
    assert set(table) == set(generate.SHIPPED) and len(table) >= 6
    for name, accuracy in table.items():
        assert generate.binomial_p(round(accuracy * 150), 150) < 1e-3
        # the first 12 pairs cannot be further from the figure of all 150 than chance allows
        got = results[(f"compress_mp_{name}", "acc")].value
        assert abs(got - accuracy) < 4 * math.sqrt(accuracy * (1 - accuracy) / 12)


def test_minimal_pair_scores_are_likelihood_comparisons(
    model: Any, tokenizer: Any, results: dict[tuple[str, str], EvalResult]
) -> None:
    """Oracle: summed log-likelihoods computed here, one sentence at a time, without lm-eval."""
    for name in ("wh_gap", "agreement_across_pp"):
        pairs = generate.make_pairs(name)[:12]
        right = [log_likelihood(model, tokenizer, g) > log_likelihood(model, tokenizer, b) for g, b in pairs]
        got = results[(f"compress_mp_{name}", "acc")]
        assert got.value == pytest.approx(np.mean(right)) and got.n == 12 and got.higher_is_better


def test_group_is_the_mean_of_its_tasks(results: dict[tuple[str, str], EvalResult]) -> None:
    """Oracle: mean of accuracies; the error of a mean of independent means; tasks named twice appear once."""
    members = [r for (task, _), r in results.items() if task.startswith("compress_mp_")]
    assert {r.task for r in members} == {f"compress_mp_{name}" for name in generate.SHIPPED}
    group = results[(GROUP, "acc")]
    assert group.is_group and group.n == 12 * len(members)
    assert group.value == pytest.approx(np.mean([m.value for m in members]))
    squares = sum(m.stderr**2 for m in members if m.stderr is not None)
    assert group.stderr == pytest.approx(math.sqrt(squares) / len(members))


def test_heldout_perplexity(model: Any, tokenizer: Any) -> None:
    """Oracle: log-likelihoods computed here, over the words, bytes and bits of the same documents."""
    texts = loader.heldout_texts(4)[:3]
    total = sum(log_likelihood(model, tokenizer, text) for text in texts)
    n_bytes, n_words = sum(len(t.encode()) for t in texts), sum(len(re.split(r"\s+", t)) for t in texts)
    got = {r.metric: r for r in run_tasks(model, tokenizer, [HELDOUT], TaskOptions(limit=3))}
    assert got["byte_perplexity"].value == pytest.approx(math.exp(-total / n_bytes), rel=1e-5)
    assert got["bits_per_byte"].value == pytest.approx(-total / n_bytes / math.log(2), rel=1e-5)
    # a word is what lies between white space, as lm-eval counts
    assert got["word_perplexity"].value == pytest.approx(math.exp(-total / n_words), rel=1e-5)
    assert all(r.stderr is not None and r.n == 3 and r.higher_is_better is False for r in got.values())


def test_heldout_documents_are_the_heldout_texts(tokenizer: Any) -> None:
    """Oracle: joined again and tokenized, they are as long as the sampled ids, but for ids the tokenizer would not
    choose and empty documents."""
    texts = loader.heldout_texts(64)
    assert not any(loader.SEPARATOR in t or not t.strip() for t in texts)
    n_ids = sum(len(tokenizer(t).input_ids) for t in texts)
    assert n_ids == pytest.approx((heldout_tokens() != 0).sum().item(), rel=0.01)


# ---- agreement with lm-eval, and what is left as it was


def test_figures_are_those_of_lm_eval(model: Any, tokenizer: Any, results: dict[tuple[str, str], EvalResult]) -> None:
    """Oracle: lm_eval.evaluate with its own HFLM and TaskManager, and its own error of accuracies."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
    plain = HFLM(pretrained=copy.deepcopy(model), tokenizer=copy.deepcopy(tokenizer), batch_size=64)
    expected = evaluate(plain, manager.load([GROUP]), limit=12, bootstrap_iters=10)["results"]
    for (task, metric), result in results.items():
        assert result.value == pytest.approx(expected[task][f"{metric},none"])
        assert result.stderr == pytest.approx(expected[task][f"{metric}_stderr,none"], rel=1e-6)


def test_nothing_of_the_caller_changes(model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Oracle: random states, weights, tying, modes, tokenizer, loggers and stdout before and after."""
    untied = copy.deepcopy(model)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.train()
    before = {n: p.data_ptr() for n, p in untied.named_parameters()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    logger, pad = logging.getLogger("lm_eval"), tokenizer.pad_token
    logging_state = logger.propagate, logger.handlers[:], logger.level

    run_tasks(untied, tokenizer, ["compress_mp_wh_gap"], TaskOptions(limit=2))

    assert {n: p.data_ptr() for n, p in untied.named_parameters()} == before
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert all(m.training for m in untied.modules())
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert tokenizer.pad_token == pad is None
    assert (logger.propagate, logger.handlers, logger.level) == logging_state
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "it/s" not in printed.err and "%|" not in printed.err


def test_warnings_of_lm_eval_come_out_once(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: a warning that differs only in its numbers is logged once with its count; known chatter is not."""
    from compress.eval.harness import quiet

    source = logging.getLogger("lm_eval.models.huggingface")
    with caplog.at_level(logging.WARNING), quiet():
        for length in (3000, 4000, 5000):
            source.warning("Truncating %d tokens from the left", length)
        source.warning("Passed an already-initialized model through `pretrained`, assuming ...")
    assert [r.getMessage() for r in caplog.records] == [
        "lm-eval: Truncating 3000 tokens from the left (3 such warnings)"
    ]


def test_long_requests_shrink_the_batch(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: with room for 64 tokens of logits no batch is larger, unless it is one request, and scores stay."""
    from compress.eval import harness

    names, options = ["compress_mp_wh_gap", HELDOUT], TaskOptions(limit=3)
    expected = run_tasks(model, tokenizer, names, options)
    shapes: list[torch.Size] = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(harness, "MAX_LOGITS", 64 * len(tokenizer))
    got = run_tasks(model, tokenizer, names, options)
    hook.remove()
    assert all(batch == 1 or batch * length <= 64 for batch, length in shapes)
    assert any(batch > 1 for batch, _ in shapes)
    for a, b in zip(got, expected, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-5)


def test_nan_logits_raise(model: Any, tokenizer: Any) -> None:
    """Oracle: NumericalError, where lm-eval alone would count the first answer."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(NumericalError, match="NaN or infinite logits"):
        run_tasks(broken, tokenizer, ["compress_mp_wh_gap"], TaskOptions(limit=2))


# ---- two models


def test_a_model_does_not_differ_from_itself(model: Any, tokenizer: Any) -> None:
    """Oracle: differences and their paired errors are exactly 0."""
    rows = compare_tasks(model, model, tokenizer, ["compress_mp_wh_gap", HELDOUT], TaskOptions(limit=4))
    assert len(rows) == 4
    for row in rows:
        assert (row.difference, row.difference_stderr) == (0.0, 0.0)
        assert row.value == row.reference


def test_errors_of_differences_are_paired(model: Any, noisy: Any, tokenizer: Any) -> None:
    """Oracle: sd of per-document differences over sqrt(n), from lm-eval's per-document accuracies; a jackknife over
    documents for the perplexity. Pairing must beat adding the two errors for perplexity."""
    loaded = load_tasks([GROUP, HELDOUT])
    options = TaskOptions(limit=16)
    reference, quantized = (score_tasks(m, tokenizer, loaded, options) for m in (model, noisy))
    rows = {(r.task, r.metric): r for r in compare_scores(reference, quantized)}

    errors = []
    for name in generate.SHIPPED:
        key = (f"compress_mp_{name}", "acc")
        documents = reference.metrics[key].values
        d = np.array([quantized.metrics[key].values[i] - documents[i] for i in documents])
        assert rows[key].difference == pytest.approx(d.mean())
        assert rows[key].difference_stderr == pytest.approx(d.std(ddof=1) / math.sqrt(len(d)))
        errors.append(d.std(ddof=1) / math.sqrt(len(d)))
    assert rows[(GROUP, "acc")].difference_stderr == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / len(errors))
    assert any(row.difference != 0 for row in rows.values())

    key = (HELDOUT, "byte_perplexity")
    p, q = (list(s.metrics[key].values.values()) for s in (reference, quantized))
    aggregation = reference.metrics[key].aggregation
    left_out = [aggregation(q[:i] + q[i + 1 :]) - aggregation(p[:i] + p[i + 1 :]) for i in range(len(p))]
    jackknife = math.sqrt((len(p) - 1) * np.var(left_out))
    row = rows[key]
    assert row.difference_stderr == pytest.approx(jackknife, rel=0.2)
    separate = [s.metrics[key].result.stderr or 0.0 for s in (reference, quantized)]
    assert row.difference_stderr < 0.7 * math.hypot(*separate)
    assert row.difference > 0


def test_scores_on_other_documents_are_not_compared(model: Any, tokenizer: Any) -> None:
    """Oracle: ConfigError for another limit and for other tasks."""
    loaded, other = load_tasks(["compress_mp_wh_gap"]), load_tasks(["compress_mp_pronoun_case"])
    scores = score_tasks(model, tokenizer, loaded, TaskOptions(limit=2))
    with pytest.raises(ConfigError, match="different documents"):
        compare_scores(scores, score_tasks(model, tokenizer, loaded, TaskOptions(limit=3)))
    with pytest.raises(ConfigError, match="different tasks"):
        compare_scores(scores, score_tasks(model, tokenizer, other, TaskOptions(limit=2)))


@pytest.mark.parametrize("name", [a.value for a in uncertainty.Aggregate])
def test_delta_method_errors(name: str) -> None:
    """Oracle: a jackknife of lm-eval's own aggregation function, alone and for a difference of two models."""
    import lm_eval.api.metrics as metrics

    rng = np.random.default_rng(0)
    weights = rng.integers(20, 60, size=400)
    first = -3.0 * weights + 8 * rng.standard_normal(400)
    second = first - 0.2 * weights + rng.standard_normal(400)
    weighted = name in ("weighted_perplexity", "bits_per_byte")

    def values(x: Any) -> list[Any]:
        return list(zip(x.tolist(), weights.tolist(), strict=True)) if weighted else (x / 40).tolist()

    aggregation = getattr(metrics, name)
    p, q = values(first), values(second)
    alone = [aggregation(q[:i] + q[i + 1 :]) for i in range(400)]
    both = [a - aggregation(p[:i] + p[i + 1 :]) for i, a in enumerate(alone)]
    assert stderr(q, aggregation) == pytest.approx(math.sqrt(399 * np.var(alone)), rel=0.02)
    assert paired_stderr(q, p, aggregation) == pytest.approx(math.sqrt(399 * np.var(both)), rel=0.02)


def test_other_aggregations_are_bootstrapped() -> None:
    """Oracle: the error of a mean under a name that has no formula; equal models differ by exactly 0."""

    def mean(values: Any) -> float:
        return 2 * sum(values) / len(values)

    values = np.random.default_rng(1).standard_normal(300).tolist()
    assert stderr(values, mean) == pytest.approx(2 * np.std(values, ddof=1) / math.sqrt(300), rel=0.25)
    assert paired_stderr(values, values, mean) == 0.0
    assert stderr(values[:1], mean) is None


# ---- finding tasks


@pytest.fixture
def user_tasks(tmp_path: Path) -> Path:
    """A directory with one multiple-choice task over a local file, in the form lm-eval documents."""
    directory = tmp_path / "tasks"
    directory.mkdir()
    rows = [
        {"q": "The sky is", "c": [" blue.", " very of."], "a": 0},
        {"q": "The grass", "c": [" of is.", " is"], "a": 1},
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (directory / "colours.yaml").write_text(f"""
task: my_colours
dataset_path: json
dataset_kwargs:
  data_files: {directory}/rows.jsonl
  cache_dir: {tmp_path}/cache
output_type: multiple_choice
test_split: train
doc_to_text: q
doc_to_choice: c
doc_to_target: a
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""")
    (directory / "group.yaml").write_text("""
group: my_group
task: [my_colours, compress_mp_wh_gap]
aggregate_metric_list:
  - metric: acc
    weight_by_size: false
""")
    return directory


def test_users_own_tasks_run_from_any_directory(
    model: Any, tokenizer: Any, user_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: log-likelihoods of the choices computed here; a group over a user's and a shipped task averages both."""
    monkeypatch.chdir(tmp_path)
    options = TaskOptions(include_path=str(user_tasks), limit=2)
    got = {r.task: r for r in run_tasks(model, tokenizer, ["my_group"], options)}

    def score(context: str, choice: str) -> float:
        return log_likelihood(model, tokenizer, context + choice) - log_likelihood(model, tokenizer, context)

    right = [
        score("The sky is", " blue.") > score("The sky is", " very of."),
        score("The grass", " is") > score("The grass", " of is."),
    ]
    assert got["my_colours"].value == np.mean(right)
    assert got["my_group"].value == pytest.approx((got["my_colours"].value + got["compress_mp_wh_gap"].value) / 2)


def test_unknown_task_names_its_neighbours_and_unreadable_files(user_tasks: Path, own_index_only: None) -> None:
    """Oracle: ConfigError with the nearest names, and the YAML file that lm-eval skips without a word."""
    with pytest.raises(ConfigError, match=r"'compress_helout' is not an lm-eval task; close: compress_heldout"):
        load_tasks(["compress_helout"])
    (user_tasks / "broken.yaml").write_text("task: my_task\n  dataset_path: json\n")
    with pytest.raises(ConfigError, match=r"'my_task'.*broken\.yaml cannot be read"):
        load_tasks(["my_task"], str(user_tasks))


def test_bad_include_path_and_empty_list() -> None:
    """Oracle: ConfigError that names the setting."""
    with pytest.raises(ConfigError, match=r"eval\.include_path=/nowhere/tasks is not a directory"):
        load_tasks([HELDOUT], "/nowhere/tasks")
    with pytest.raises(ConfigError, match="no task is named"):
        load_tasks([])


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("dataset_path: json", "dataset_path: nobody/no-such-set", EnvironmentProblem, "hub cannot be reached"),
        ("rows.jsonl", "no_rows.jsonl", ConfigError, "cannot be loaded.*no_rows"),
        ("doc_to_text: q", "doc_to_text: !function nowhere.text", ConfigError, "cannot be loaded.*nowhere"),
        ("output_type: mul", "unsafe_code: true\noutput_type: mul", ConfigError, "runs code that the model writes"),
    ],
)
def test_tasks_that_cannot_run_say_why(
    user_tasks: Path, old: str, new: str, error: type[Exception], message: str
) -> None:
    """Oracle: the class and the cause of each error. The first needs the hub, which tests cannot reach."""
    file = user_tasks / "colours.yaml"
    text = file.read_text().replace(old, new)
    if "nobody" in new:
        text = text.replace(f"  data_files: {user_tasks}/rows.jsonl\n", "")
    file.write_text(text)
    with pytest.raises(error, match=rf"(?s)my_colours.*{message}|task my_colours {message}"):
        load_tasks(["my_colours"], str(user_tasks))


def test_metrics_that_are_not_computed_are_reported(
    model: Any, tokenizer: Any, user_tasks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: lm-eval drops a metric it does not know; a task left without any is an error, one with others warns."""
    options = TaskOptions(include_path=str(user_tasks))
    file = user_tasks / "colours.yaml"
    whole = file.read_text()
    unknown = "  - metric: no_such_metric\n    aggregation: mean\n    higher_is_better: true\n"
    file.write_text(whole + unknown)
    assert [r.metric for r in run_tasks(model, tokenizer, ["my_colours"], options)] == ["acc"]
    assert any("my_colours" in m and "no_such_metric" in m for m in caplog.messages)
    file.write_text(whole.replace("metric: acc", "metric: no_such_metric"))
    with pytest.raises(ConfigError, match=r"task my_colours computed none of its metrics \(no_such_metric\)"):
        run_tasks(model, tokenizer, ["my_colours"], options)


def test_lm_eval_is_imported_on_use() -> None:
    """Oracle: the module holds none of lm-eval's names before a task is run; only functions import it."""
    assert not {name for name, value in vars(lm).items() if getattr(value, "__module__", "").startswith("lm_eval")}
