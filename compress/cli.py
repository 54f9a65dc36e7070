"""`python -m compress`: the command line. The only place that reads Hydra's config and sets up logging.

    python -m compress recipe=awq4                           the embedded model, no network
    python -m compress recipe=gptq4 model=Qwen/Qwen3-8B      a hub id or a local directory
    python -m compress -m recipe=bf16,rtn4,gptq4,awq4        a sweep
    python -m compress recipe=awq4 --cfg job                 show the settings and stop

Progress and logs go to stderr. stdout carries the summary and, as its last line, one JSON object. In a sweep each
job that succeeds prints its own; a job that fails says why, the others still run, and the exit code is not 0.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from importlib.resources import files
from typing import Any, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compress.config import RunConfig
from compress.errors import CompressError, ConfigError, EnvironmentProblem, GateFailure

log = logging.getLogger("compress")

# Every key is declared, but for the patterns of quant.overrides, which are the user's.
_SCHEMA = OmegaConf.structured(RunConfig)
OmegaConf.set_struct(_SCHEMA.quant.overrides, False)
ConfigStore.instance().store(name="schema", node=_SCHEMA)


def _gpu_or_cpu(on_gpu: Any, on_cpu: Any, *, _root_: DictConfig) -> Any:
    """`${gpu_or_cpu:a,b}` in a recipe: a where the run is on a GPU, by its setting `device`, else b."""
    device = str(_root_.device)
    if device == "auto":
        import torch  # late: only a recipe that asks pays for it

        return on_gpu if torch.cuda.is_available() else on_cpu
    return on_gpu if device.startswith("cuda") else on_cpu


OmegaConf.register_new_resolver("gpu_or_cpu", _gpu_or_cpu, replace=True)


@dataclass
class _Failure:
    """One job that ended in an error the user can act on, and the settings that tell it from its siblings."""

    overrides: list[str]
    error: CompressError


def main() -> None:
    """Entry point; exits 0, 1 (a bug), 2 (bad input), 3 (gate) or 130 (interrupted)."""
    verbose = any(a in ("-v", "--verbose") for a in sys.argv[1:])
    # argparse takes settings on one side of an option only: `recipe=a,b -m model=c` would be refused
    sweep = [a for a in sys.argv[1:] if a in ("-m", "--multirun")]
    sys.argv[1:] = sweep + [a for a in sys.argv[1:] if a not in ("-v", "--verbose", "-m", "--multirun")]
    log.handlers = [logging.StreamHandler(sys.stderr)]  # ours alone: libraries that log have handlers of their own
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of Hydra's own exit
    failures: list[_Failure] = []
    try:
        _application(failures)()
    except (HydraException, OmegaConfBaseException) as error:
        failures.append(_Failure([], as_config_error(error)))
        _tell(failures[-1].error)
    except OSError as error:  # Hydra's own: it makes the directory of a sweep
        failures.append(_Failure([], _as_disk_error(error)))
        _tell(failures[-1].error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    for failure in failures:
        if failure.overrides:
            print(f"failed: {' '.join(failure.overrides)}", file=sys.stderr)
    if failures:
        sys.exit(min(f.error.exit_code for f in failures))  # bad input before a gate: that job was not judged at all


def _application(failures: list[_Failure]) -> Callable[[], None]:
    """Hydra's main function over one job; what went wrong is appended to `failures`."""

    @hydra.main(version_base="1.3", config_path="pkg://compress.recipes", config_name="config")
    def job(composed: DictConfig) -> None:
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        overrides = list(HydraConfig.get().overrides.task)
        own = [o for o in overrides if o not in sys.argv]  # what the jobs of a sweep do not share
        if sweep:
            log.info("job %d: %s", HydraConfig.get().job.num + 1, " ".join(own))
        try:
            summary = _run(composed, overrides)
        except CompressError as error:  # here, because Hydra would stop the sweep and print a heading of its own
            failures.append(_Failure(own if sweep else [], error))
            _tell(error)
        else:
            print(json.dumps(summary, allow_nan=False), flush=True)

    return job  # type: ignore[no-any-return]


def _run(composed: DictConfig, overrides: list[str]) -> dict[str, Any]:
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise as_config_error(error) from error
    assert isinstance(config, RunConfig)
    for key in _undeclared(composed, RunConfig):
        raise ConfigError(_no_setting(key))
    from compress.finish import check_requests, finish_run

    check_requests(config)
    from compress.pipeline import run_pipeline  # imports torch: only after what can be told without it

    return finish_run(run_pipeline(config, ["python", "-m", "compress", *overrides]), config)


def _tell(error: CompressError) -> None:
    verbose = log.isEnabledFor(logging.DEBUG)
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    sys.stdout.flush()
    if isinstance(error, GateFailure):
        print(error, file=sys.stderr)
        return
    print(f"error: {error}", file=sys.stderr)
    if not verbose:
        print("(-v shows where it came from)", file=sys.stderr)


def _as_disk_error(error: OSError) -> EnvironmentProblem:
    problem = EnvironmentProblem(
        f"cannot use {error.filename or 'a file'}: {error.strerror or error}; check the path, space and rights, "
        "or set output_dir=<a writable directory>"
    )
    problem.__cause__ = error
    return problem


def as_config_error(error: Exception) -> CompressError:
    """Hydra's and OmegaConf's complaints as one line that names the value, with the nearest thing that exists."""
    if isinstance(error.__cause__, CompressError):
        return error.__cause__
    text, cause = str(error).strip(), str(error.__cause__ or "").strip()
    problem = ConfigError(_explain(text, cause, getattr(error, "override", None)))
    problem.__cause__ = error
    return problem


def _explain(text: str, cause: str, override: str | None) -> str:
    if override is not None:  # Hydra's grammar could not read it
        reason = next((line for line in text.splitlines() if not line.startswith("Error parsing")), "")
        return (
            f"cannot read {override!r} ({reason}); write key=value, lists as 'key=[a,b]', dicts with bare keys as "
            "'key={a:1,b:2}'"
        )
    if match := re.search(r"Could not find '([\w./-]+)'", text):
        group, _, name = match[1].rpartition("/")
        if group == "recipe":
            return f"there is no recipe {name!r}; {_nearest(name, recipes())}"
        return _no_setting(match[1])
    if match := re.search(r"Could not override '([^']+)'", text):
        return _no_setting(match[1])
    if match := re.match(r"Error merging override (.*)", text):
        return f"{match[1]}: {_first_line(cause)}"
    where = re.search(r"full_key: ([\w.]+)", text)
    return f"{where[1]}: {_first_line(text)}" if where else _first_line(text) or "the settings cannot be composed"


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""


_MOST_SUGGESTIONS = 3


def _no_setting(key: str) -> str:
    return f"there is no setting {key!r}; {_nearest(key, [*config_keys(RunConfig), 'recipe'])}"


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # a setting named without its section
        leaves: dict[str, list[str]] = {}
        for key in known:
            leaves.setdefault(key.rsplit(".", 1)[-1], []).append(key)
        found = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaves), n=1, cutoff=0.6)
        near = leaves[found[0]] if found else []
    if near:
        return f"did you mean {' or '.join(map(repr, near[:_MOST_SUGGESTIONS]))}?"
    return f"known are {', '.join(sorted(known))}" if len(known) < 20 else "--help lists the main ones, --cfg job all"


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    names = (p.name for p in files("compress.recipes").joinpath("recipe").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def config_keys(cls: Any, prefix: str = "") -> Iterable[str]:
    """Dotted names of every setting of a config dataclass."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        kind = hints[item.name]
        if is_dataclass(kind):
            yield from config_keys(kind, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def _undeclared(node: DictConfig, cls: Any, prefix: str = "") -> Iterable[str]:
    """Keys that `+key=value` added beside the declared ones: nothing would ever read them."""
    hints = get_type_hints(cls)
    for key in node:
        if key not in hints:
            yield f"{prefix}{key}"
        elif is_dataclass(hints[key]):
            yield from _undeclared(node[key], hints[key], f"{prefix}{key}.")


__all__ = ["as_config_error", "config_keys", "main", "recipes"]
