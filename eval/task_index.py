"""Finding lm-eval tasks by name and loading their data, with errors that name the remedy.

Tasks come from three places: those shipped in eval/tasks, a user's directory, and lm-eval's own collection. lm-eval
is imported on the first call.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError, ConfigError, EnvironmentProblem

TASKS_DIR = Path(__file__).resolve().parent / "tasks"


@dataclass
class LoadedTasks:
    """lm-eval's task and group objects, with their data; load once, score any number of models."""

    tasks: dict[str, Any]
    groups: dict[str, Any]
    group_map: dict[str, list[str]]


def load_tasks(names: list[str], include_path: str | None = None) -> LoadedTasks:
    """Find tasks by name and load their data.

    Raises:
        ConfigError: an unknown task, an include_path that is not there, or a task that cannot be run.
        EnvironmentProblem: a task's data cannot be fetched or cached.
    """
    from compress.eval.harness import own_random_state, quiet

    if not names:
        raise ConfigError("no task is named; give eval.tasks at least one, or switch evaluation off")
    with quiet(), own_random_state():
        manager = _find(names, include_path)
        loaded = LoadedTasks({}, {}, {})
        for name in dict.fromkeys(names):
            part = _load_one(manager, name)
            loaded.tasks.update(part["tasks"])
            loaded.groups.update(part.get("groups", {}))
            loaded.group_map.update(part.get("group_map", {}))
    for name, task in loaded.tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            why = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "needs images or audio"
            raise ConfigError(f"task {name} {why}, which is not supported here; choose a text-only task")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _find(names: list[str], include_path: str | None) -> Any:
    """A TaskManager that knows every name."""
    from lm_eval.tasks import TaskManager

    roots = [str(TASKS_DIR)]
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ConfigError(
                f"eval.include_path={include_path} is not a directory; give the folder with task YAML files"
            )
        roots.append(include_path)
    # lm-eval's own index is 14,000 YAML files, seconds to read: only for what the two directories cannot settle
    manager = TaskManager(include_path=roots, include_defaults=False)
    if not all(_is_settled(name, manager.task_index) for name in names):
        manager = TaskManager(include_path=roots)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise ConfigError(_unknown_message(unknown, manager.all_tasks, include_path))
    return manager


def _is_settled(name: str, index: dict[str, Any]) -> bool:
    """The index knows `name` and, if it is a group, all its members."""
    entry = index.get(name)
    if entry is None:
        return False
    members = entry.cfg["task"] if entry.kind.name == "GROUP" else []
    return all(isinstance(member, str) and _is_settled(member, index) for member in members)


def _unknown_message(unknown: list[str], known: list[str], include_path: str | None) -> str:
    from lm_eval.tasks._yaml_loader import load_yaml

    parts = []
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
        parts.append(f"eval.tasks: {name!r} is not an lm-eval task" + (f"; close: {', '.join(close)}" if close else ""))
    # lm-eval skips files it cannot read without a word
    for path in sorted(Path(include_path).glob("**/*.yaml")) if include_path else []:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # whatever the YAML reader raises is reported, in an error
            parts.append(f"{path} cannot be read: {error}")
    return "; ".join(parts)


def _load_one(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except CompressError:
        raise
    except Exception as error:
        chain = list(_causes(error))
        detail = f"{type(error).__name__}: {error}"
        if any(_is_network_error(e) for e in chain):
            raise EnvironmentProblem(
                f"task {name} needs data that is not in the local cache and the hub cannot be reached ({detail});"
                " run once with network access (and HF_HUB_OFFLINE, HF_DATASETS_OFFLINE unset) to fill the cache,"
                " or use tasks with local data: the shipped ones, or your own with eval.include_path"
            ) from error
        if any(isinstance(e, PermissionError) for e in chain):
            raise EnvironmentProblem(
                f"task {name}: {detail}; set HF_HOME or HF_DATASETS_CACHE to a directory that can be written"
            ) from error
        raise ConfigError(
            f"task {name} cannot be loaded ({detail}); check its YAML: relative data_files are looked up from the"
            " current directory, so absolute paths are safer"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_network_error(error: BaseException) -> bool:
    """Connection failures of the standard library, httpx, requests, huggingface_hub and datasets."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or bool(
        names & {"TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "MaxRetryError"}
    )
