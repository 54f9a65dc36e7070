"""Task scores with EleutherAI's lm-eval, of a model that is already in memory, with errors that pair two models.

The shipped tasks (eval/tasks) need no network; any other lm-eval task, or a user's own from `include_path`, runs
the same way. Two models are compared on the same documents: the error of their difference comes from per-document
differences, not from two separate errors (see compress.eval.uncertainty).

Figures agree with lm-eval's own command line (few-shot seed 1234, zero shots where a task names none). Differs:
log-softmax is in float32 whatever the model's dtype, errors of perplexities come from the delta method (lm-eval
gives none), and the process's random state is handed back as it was. lm-eval is imported on the first call.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compress.errors import ConfigError
from compress.eval.quality import eval_mode
from compress.eval.task_index import LoadedTasks, load_tasks
from compress.eval.uncertainty import paired_stderr, stderr

log = logging.getLogger(__name__)

FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run.

    include_path: directory with the user's own task YAML files; they win over shipped ones of the same name.
    limit: documents of each task, from its start; None for all.
    batch_size: largest number of requests in a batch.
    max_length: longest request in tokens; None for the model's own limit.
    """

    include_path: str | None = None
    limit: int | None = None
    batch_size: int = 64
    max_length: int | None = None


@dataclass(frozen=True)
class EvalResult:
    """One metric of one task, or of a group of tasks (then `n` counts the documents of its tasks).

    stderr: standard error over documents; None where there are fewer than two.
    higher_is_better: None where lm-eval does not say.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None
    is_group: bool = False


@dataclass(frozen=True)
class TaskComparison:
    """A metric of the quantized model beside the original's.

    difference = value - reference; difference_stderr is its paired standard error over documents.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    reference: float
    reference_stderr: float | None
    difference: float
    difference_stderr: float | None
    n: int
    higher_is_better: bool | None
    is_group: bool = False


@dataclass
class _Metric:
    """Per-document values of one task's metric, and how they become one number."""

    result: EvalResult
    values: dict[int, Any]  # document id -> value
    aggregation: Callable[[Any], float]


@dataclass
class _GroupMetric:
    """A group's mean over the tasks, and its weights."""

    result: EvalResult
    weights: dict[str, float]  # task -> weight, summing to 1


@dataclass
class TaskScores:
    """Everything one model scored; `results` lists groups first, then tasks in the order asked for."""

    metrics: dict[tuple[str, str], _Metric] = field(default_factory=dict)
    groups: dict[tuple[str, str], _GroupMetric] = field(default_factory=dict)

    @property
    def results(self) -> list[EvalResult]:
        return [g.result for g in self.groups.values()] + [m.result for m in self.metrics.values()]


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: list[str], options: TaskOptions | None = None
) -> list[EvalResult]:
    """Score one model.

    Args:
        model: HF-like causal LM (`config`, `.logits`), on its device and in its compute dtype; left as it is.
        tokenizer: its fast tokenizer; left as it is.
        tasks: names of lm-eval tasks, groups or tags.

    Raises:
        ConfigError: an unknown task, an include_path that is not there, or a task that cannot be run.
        EnvironmentProblem: a task's data cannot be fetched or cached.
        NumericalError: the model returns NaN or infinite logits.
    """
    options = options or TaskOptions()
    return score_tasks(model, tokenizer, load_tasks(tasks, options.include_path), options).results


def compare_tasks(
    reference: nn.Module, quantized: nn.Module, tokenizer: Any, tasks: list[str], options: TaskOptions | None = None
) -> list[TaskComparison]:
    """Score the original and the quantized model on the same documents. Arguments and errors as in `run_tasks`.

    Where the two do not fit in memory together: `load_tasks`, `score_tasks` for each, `compare_scores`.
    """
    options = options or TaskOptions()
    loaded = load_tasks(tasks, options.include_path)
    scores = score_tasks(reference, tokenizer, loaded, options)
    return compare_scores(scores, score_tasks(quantized, tokenizer, loaded, options))


def compare_scores(reference: TaskScores, quantized: TaskScores) -> list[TaskComparison]:
    """Pair two models' scores document by document.

    Raises:
        ConfigError: the two were scored on different tasks or documents.
    """
    if reference.metrics.keys() != quantized.metrics.keys():
        odd = sorted(reference.metrics.keys() ^ quantized.metrics.keys())
        raise ConfigError(f"scores of different tasks cannot be compared (only in one: {odd}); score both on one list")
    errors: dict[tuple[str, str], float | None] = {}
    for key, metric in quantized.metrics.items():
        other = reference.metrics[key]
        if metric.values.keys() != other.values.keys():
            raise ConfigError(f"task {key[0]}: the two models were scored on different documents; use one limit")
        values = [metric.values[i] for i in metric.values]
        errors[key] = paired_stderr(values, [other.values[i] for i in metric.values], metric.aggregation)
    rows = [
        _comparison(group.result, reference.groups[key].result, _group_stderr(group.weights, key[1], errors))
        for key, group in quantized.groups.items()
    ]
    return rows + [
        _comparison(metric.result, reference.metrics[key].result, errors[key])
        for key, metric in quantized.metrics.items()
    ]


def _comparison(result: EvalResult, reference: EvalResult, error: float | None) -> TaskComparison:
    return TaskComparison(
        task=result.task,
        metric=result.metric,
        value=result.value,
        stderr=result.stderr,
        reference=reference.value,
        reference_stderr=reference.stderr,
        difference=result.value - reference.value,
        difference_stderr=error,
        n=result.n,
        higher_is_better=result.higher_is_better,
        is_group=result.is_group,
    )


def _group_stderr(weights: dict[str, float], metric: str, errors: dict[tuple[str, str], float | None]) -> float | None:
    """Standard error of a weighted mean of tasks, whose documents are independent between tasks."""
    squares = []
    for task, weight in weights.items():
        error = errors[(task, metric)]
        if error is None:
            return None
        squares.append((weight * error) ** 2)
    return math.sqrt(sum(squares))


def score_tasks(model: nn.Module, tokenizer: Any, loaded: LoadedTasks, options: TaskOptions) -> TaskScores:
    """Score one model on loaded tasks. Arguments and errors as in `run_tasks`."""
    from lm_eval.evaluator import evaluate

    from compress.eval.harness import InMemoryLM, own_random_state, quiet

    with quiet(), own_random_state(), eval_mode(model):
        for task in loaded.tasks.values():
            # again before each model, so that both see the same few-shot examples
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        lm = InMemoryLM(model, tokenizer, options.batch_size, options.max_length)
        raw = evaluate(
            lm=lm,
            task_dict={"tasks": loaded.tasks, "groups": loaded.groups, "group_map": loaded.group_map},
            limit=options.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
        return _collect(raw, loaded)  # inside: lm-eval draws a random name to read a task's


def _collect(raw: Any, loaded: LoadedTasks) -> TaskScores:
    scores = TaskScores()
    for name, task in loaded.tasks.items():
        found = dict(_metric_values(raw["results"][name]))
        _check_metrics(name, set(task.aggregation()), {key.partition(",")[0] for key in found})
        for key, value in found.items():
            metric = _task_metric(task, key, value, raw["samples"][name])
            scores.metrics[(name, metric.result.metric)] = metric
    for name, group in loaded.groups.items():
        for key, value in _metric_values(raw["results"].get(name, {})):
            label = key.removesuffix(",none")
            scores.groups[(name, label)] = _group_metric(name, label, value, group, scores.metrics)
    return scores


def _check_metrics(task: str, declared: set[str], computed: set[str]) -> None:
    """lm-eval drops a metric it does not know, or that does not fit the task, without an error."""
    missing = ", ".join(sorted(declared - computed))
    if not computed:
        raise ConfigError(f"task {task} computed none of its metrics ({missing}); check metric_list in its YAML")
    if missing:
        log.warning("task %s did not compute %s; check metric_list in its YAML", task, missing)


def _task_metric(task: Any, key: str, value: float, samples: list[dict[str, Any]]) -> _Metric:
    """key: lm-eval's `metric,filter`; samples: what it logged for each document and filter."""
    name, _, filter_name = key.partition(",")
    values = {s["doc_id"]: s[name] for s in samples if s["filter"] == filter_name and name in s}
    aggregation = task.aggregation()[name]
    result = EvalResult(
        task=task.task_name,
        metric=key.removesuffix(",none"),
        value=value,
        stderr=stderr(list(values.values()), aggregation),
        n=len(values),
        higher_is_better=task.higher_is_better().get(name),
    )
    return _Metric(result, values, aggregation)


def _metric_values(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(`metric,filter`, value) of one row of lm-eval's results."""
    for key, value in row.items():
        if "," in key and "_stderr," not in key:
            yield key, float(value)


def _group_metric(
    name: str, label: str, value: float, group: Any, metrics: dict[tuple[str, str], _Metric]
) -> _GroupMetric:
    names = [task.task_name for task in group.get_all_tasks()]
    members = {task: metrics[(task, label)].result for task in names if (task, label) in metrics}
    by_size = next(a.weight_by_size for a in group.aggregate_metric_list if a.metric == label.partition(",")[0])
    total = sum(r.n for r in members.values())
    weights = {task: r.n / total if by_size else 1 / len(members) for task, r in members.items()}
    error = _group_stderr(weights, label, {(task, label): r.stderr for task, r in members.items()})
    better = {r.higher_is_better for r in members.values()}
    result = EvalResult(name, label, value, error, total, better.pop() if len(better) == 1 else None, is_group=True)
    return _GroupMetric(result, weights)
