"""`python -m compress`: the command line. The only place that reads Hydra's config and sets up logging.

    python -m compress recipe=awq4                           the embedded model, no network
    python -m compress recipe=gptq4 model=Qwen/Qwen3-8B      a hub id or a local directory
    python -m compress -m recipe=bf16,rtn4,gptq4,awq4        a sweep
    python -m compress recipe=awq4 --cfg job                 show the settings and stop

Progress and logs go to stderr. stdout carries the summary and, as its last line, one JSON object.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compress.config import EMBEDDED_MODEL, RunConfig
from compress.errors import CompressError, ConfigError, GateFailure

log = logging.getLogger("compress")

ConfigStore.instance().store(name="schema", node=RunConfig)


@hydra.main(version_base="1.3", config_path="pkg://compress.recipes", config_name="config")
def _job(composed: DictConfig) -> None:
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    _stay_offline(config)
    from compress.finish import finish_run
    from compress.pipeline import run_pipeline

    try:
        summary = finish_run(run_pipeline(config), config)
    except CompressError as error:  # here, because Hydra would print a heading of its own above it
        _fail(error, str(error), error.exit_code)
    print(json.dumps(summary, allow_nan=False), flush=True)


def main() -> None:
    """Entry point; exits 0, 1 (a bug), 2 (bad input), 3 (gate) or 130 (interrupted)."""
    verbose = any(a in ("-v", "--verbose") for a in sys.argv[1:])
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in ("-v", "--verbose")]
    logging.basicConfig(stream=sys.stderr, format="%(message)s", force=True)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    _quiet_libraries(verbose)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of Hydra's own exit
    try:
        _job()
    except CompressError as error:
        _fail(error, str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, CompressError) else error
        _fail(error, _explain(cause), 2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _fail(error: BaseException, message: str, code: int) -> NoReturn:
    verbose = log.isEnabledFor(logging.DEBUG)
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    label = "gate" if isinstance(error, GateFailure) else "error"
    print(f"{label}: {message}", file=sys.stderr)
    if not verbose and code == 2:
        print("(-v shows where it came from)", file=sys.stderr)
    sys.exit(code)


def _explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's complaints in one line, with the nearest thing that exists."""
    if isinstance(error, CompressError):
        return str(error)
    text = str(error).strip()
    key = re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is )?not in|in struct.*key[: ]+'?([\w.]+)", text)
    if match := re.search(r"Could not find '([\w./-]+)'", text):
        group, _, name = match[1].rpartition("/")
        if group == "recipe":
            return f"there is no recipe {name!r}; {_nearest(name, recipes())}"
        return f"there is no config group or key {match[1]!r}; {_nearest(match[1], list(config_keys(RunConfig)))}"
    if key:
        name = next(g for g in key.groups() if g)
        full = re.search(r"full_key: ([\w.]+)", text)
        name = full[1] if full else name
        return f"there is no setting {name!r}; {_nearest(name, [*config_keys(RunConfig), 'recipe'])}"
    first = text.splitlines()[0] if text else type(error).__name__
    where = re.search(r"full_key: ([\w.]+)", text)
    return f"{where[1]}: {first}" if where else first


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if not near:
        leaves = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaves), n=1, cutoff=0.4)]
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    from importlib.resources import files

    return sorted(p.name.removesuffix(".yaml") for p in files("compress.recipes").joinpath("recipe").iterdir())


def config_keys(cls: Any, prefix: str = "") -> Iterable[str]:
    """Dotted names of every setting of a config dataclass."""
    from typing import get_type_hints

    hints = get_type_hints(cls)
    for item in fields(cls):
        kind = hints[item.name]
        if is_dataclass(kind):
            yield from config_keys(kind, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def _stay_offline(config: RunConfig) -> None:
    """Nothing named on the hub: libraries must not ask it anything."""
    local_model = config.model == EMBEDDED_MODEL or Path(config.model).expanduser().is_dir()
    tasks_local = config.eval.tasks is None or config.eval.include_path is not None
    if local_model and not config.calibration.dataset and not config.eval.dataset and tasks_local:
        if config.model == EMBEDDED_MODEL or (config.calibration.path and config.eval.path):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


def _quiet_libraries(verbose: bool) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


__all__ = ["ConfigError", "config_keys", "main", "recipes"]
