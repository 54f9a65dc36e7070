"""`run.json`, the record of one finished run: reading it and checking it.

The pipeline writes the record; the report, the frontier, the gate and the publisher only read it. A record
written by a newer version may hold keys unknown here, which are kept and ignored. A required key that is
missing, has another type, or is not finite makes the record unusable: a NaN compares false with everything
and would otherwise sit on the frontier, undominated.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError

SCHEMA = 1
RECORD_NAME = "run.json"

Record = dict[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "number": (int, float),
    "bool": (bool,),
    "dict": (dict,),
    "list": (list,),
}


def _fields(kind: str, names: str) -> dict[str, str]:
    """Space-separated key names -> {name: kind}; a kind that ends in `?` may be null."""
    return dict.fromkeys(names.split(), kind)


_TOP = (
    _fields("str", "name model source_sha256 fingerprint run_dir finished compress_version")
    | _fields("str", "scheme transform rounding")
    | _fields("str?", "artifact")
    | _fields("bool?", "verified")
    | _fields("dict", "environment size timings")
    | _fields("dict?", "calibration quality speed")
    | _fields("list", "layers warnings")
    | _fields("int", "schema")
)
_OPTIONAL = _fields("list?", "command") | _fields("dict?", "allocation tuned")
_ENVIRONMENT = _fields("str", "device device_name")
_CALIBRATION = _fields("str", "source sha256") | _fields("int", "n_sequences sequence_length")
_QUALITY = (
    _fields("number", "kl kl_stderr ppl ppl_stderr ppl_reference ppl_reference_stderr")
    | _fields("number", "nll_rise nll_rise_stderr top1 top1_stderr")
    | _fields("int", "n_tokens n_sequences")
    | _fields("str", "dataset dataset_sha256")
    | _fields("list", "tasks")
)
_TASK = (
    _fields("str", "task metric")
    | _fields("number", "value reference difference")
    | _fields("number?", "stderr reference_stderr difference_stderr")
    | _fields("int", "n")
    | _fields("bool", "higher_is_better")
)
_SIZE = _fields("number", "weight_bytes reference_weight_bytes ratio bits_per_weight") | _fields(
    "number?", "quantized_bits_per_weight artifact_bytes"
)
_SPEED = _fields("list", "rows") | _fields("number?", "bandwidth_bytes_per_s flops_per_s")
_ROW = (
    _fields("str", "phase")
    | _fields("int", "batch prompt_tokens decode_tokens")
    | _fields("number", "p50_ms p95_ms p99_ms tokens_per_s")
    | _fields("number", "reference_p50_ms reference_p95_ms reference_p99_ms reference_tokens_per_s speedup")
    | _fields("number?", "bytes_moved flops intensity roofline_fraction reference_roofline_fraction")
    | _fields("number?", "peak_memory_bytes reference_peak_memory_bytes")
)
_LAYER = _fields("str", "name status") | _fields("str?", "fallback") | _fields("number?", "error_rtn error")


def _check_fields(data: Any, schema: dict[str, str], where: str) -> None:
    """Each key of `schema` is in `data` with its type, and numbers are finite."""
    if not isinstance(data, dict):
        raise ArtifactError(f"{where or 'record'} must be an object, not {type(data).__name__}")
    for key, kind in schema.items():
        name = f"{where}.{key}" if where else key
        if key not in data:
            raise ArtifactError(f"{name} is missing")
        value = data[key]
        if value is None and kind.endswith("?"):
            continue
        kind = kind.rstrip("?")
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise ArtifactError(f"{name}={value!r} must be of type {kind}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ArtifactError(f"{name}={value!r} is not finite")


def check_record(data: Any) -> Record:
    """The record itself, once every section has the keys that its readers use.

    Raises:
        ArtifactError: names the first key that is missing, of the wrong type or not finite.
    """
    _check_fields(data, _TOP, "")
    _check_fields(data, {key: kind for key, kind in _OPTIONAL.items() if key in data}, "")
    if data["schema"] != SCHEMA:
        raise ArtifactError(f"schema={data['schema']} but this version reads schema {SCHEMA}")
    _check_fields(data["environment"], _ENVIRONMENT, "environment")
    _check_fields(data["size"], _SIZE, "size")
    _check_fields(data["timings"], dict.fromkeys(data["timings"], "number"), "timings")
    for i, layer in enumerate(data["layers"]):
        _check_fields(layer, _LAYER, f"layers[{i}]")
    for i, warning in enumerate(data["warnings"]):
        _check_fields({"text": warning}, {"text": "str"}, f"warnings[{i}]")
    if data["calibration"] is not None:
        _check_fields(data["calibration"], _CALIBRATION, "calibration")
    if data["quality"] is not None:
        _check_fields(data["quality"], _QUALITY, "quality")
        for i, task in enumerate(data["quality"]["tasks"]):
            _check_fields(task, _TASK, f"quality.tasks[{i}]")
    if data["speed"] is not None:
        _check_fields(data["speed"], _SPEED, "speed")
        for i, row in enumerate(data["speed"]["rows"]):
            _check_fields(row, _ROW, f"speed.rows[{i}]")
    return data  # type: ignore[no-any-return]


def read_json(path: Path) -> Any:
    """Parsed JSON of a file.

    Raises:
        ArtifactError: the file cannot be read, or is not UTF-8 JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}") from error


def read_record(path: Path) -> Record:
    """The checked record at `path`.

    Raises:
        ArtifactError: unreadable, not JSON, or a required key is missing, mistyped or not finite.
    """
    data = read_json(path)
    try:
        return check_record(data)
    except ArtifactError as error:
        raise ArtifactError(f"{path} is not a usable run record: {error}") from error


def reproduce_command(record: Record) -> list[str]:
    """Arguments that make the run again: those recorded under `command`, or else recipe and model alone."""
    recorded = record.get("command")
    if recorded:
        return [str(argument) for argument in recorded]
    return ["python", "-m", "compress", f"recipe={record['name']}", f"model={record['model']}"]


def generated_text(calibration: dict[str, Any]) -> str:
    """What a record's calibration section says of sequences sampled from the original model, as the end of a phrase;
    empty where there were none."""
    made = calibration.get("generated")
    if not made:
        return ""
    begun = f"{made['prompt_tokens']} tokens of the text" if made["prompt_tokens"] else "the first token"
    length, n, n_tuning = calibration["sequence_length"], made["n_sequences"], made.get("n_tuning", 0)
    parts = [f"{n} x {length}"] if n else []
    parts += [f"for tuning alone {n_tuning} x {length}"] if n_tuning else []
    return (
        f" and {' and '.join(parts)} sampled from the original model "
        f"({made['n_tokens']:,} tokens drawn after {begun}, temperature {made['temperature']:g}, seed {made['seed']})"
    )
