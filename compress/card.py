"""README.md of a published artifact: the Hugging Face model card, written from the run's own measurements."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from compress.record import Record, generated_text, reproduce_command
from compress.units import format_bytes, format_count, format_ms, format_stderr


def model_card(record: Record) -> str:
    """README.md of the artifact: YAML front matter and what this run measured, and nothing it did not."""
    parts = [
        _front_matter(record),
        f"# {_plain(_title(record))}\n",
        f"`{_code(record['model'])}` compressed with the recipe `{_code(record['name'])}`: "
        f"{_plain(record['scheme'])}, transform {_plain(record['transform'])}, "
        f"rounding {_plain(record['rounding'])}.\n",
        _size_text(record),
        _quality_text(record),
        _speed_text(record),
        _load_text(record),
        _provenance_text(record),
    ]
    return "\n".join(part for part in parts if part)


def _title(record: Record) -> str:
    return f"{Path(record['model']).name}-{record['name']}"


def _is_quantized(record: Record) -> bool:
    return bool(record["rounding"] != "none")


def _hub_id(record: Record) -> str | None:
    """The model when it is a hub id; a local directory or the embedded model has none."""
    model = record["model"]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith(".") or Path(model).exists():
        return None
    return str(model)


def _front_matter(record: Record) -> str:
    """JSON strings are YAML strings, so names need no other quoting."""
    tags = ["compress"] + (["compressed-tensors", record["name"]] if _is_quantized(record) else [])
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    hub_id = _hub_id(record)
    if hub_id is not None:
        lines.append(f"base_model: {json.dumps(hub_id)}")
        if _is_quantized(record):
            lines.append("base_model_relation: quantized")
    lines += ["tags:", *(f"  - {json.dumps(tag)}" for tag in tags), "---\n"]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A string of the record as Markdown text: nothing in it is markup, a table stays a table."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A string of the record inside a code span."""
    return " ".join(text.replace("`", "'").split())


def _markdown_table(head: list[str], rows: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, align, *rows]) + "\n"


def _size_text(record: Record) -> str:
    size = record["size"]
    return (
        f"Weights: {format_bytes(size['weight_bytes'])} instead of {format_bytes(size['reference_weight_bytes'])} "
        f"({size['ratio']:.2f}x smaller), {size['bits_per_weight']:.2f} bits a weight over the whole model.\n"
    )


def _quality_text(record: Record) -> str:
    quality = record["quality"]
    if quality is None:
        return "## Quality\n\nNot measured.\n"
    rows = [
        ["KL to the original (nats a token)", "0", format_stderr(quality["kl"], quality["kl_stderr"])],
        [
            "perplexity",
            format_stderr(quality["ppl_reference"], quality["ppl_reference_stderr"]),
            format_stderr(quality["ppl"], quality["ppl_stderr"]),
        ],
        [
            "NLL rise, paired (nats a token)",
            "0",
            format_stderr(quality["nll_rise"], quality["nll_rise_stderr"], plus=True),
        ],
        ["top-1 agreement", "1", format_stderr(quality["top1"], quality["top1_stderr"])],
    ]
    for task in quality["tasks"]:
        name = f"{_plain(task['task'])} {_plain(task['metric'])} (n = {task['n']:,})"
        reference = format_stderr(task["reference"], task["reference_stderr"])
        rows.append([name, reference, format_stderr(task["value"], task["stderr"])])
    measured = f"{quality['n_tokens']:,} tokens of {_plain(quality['dataset'])} (sha256 `{quality['dataset_sha256']}`)"
    return (
        f"## Quality\n\nOn {measured}, on these files reloaded from disk, value ± standard error:\n\n"
        + _markdown_table(["", "original", "this model"], rows)
    )


def _speed_text(record: Record) -> str:
    speed, environment = record["speed"], record["environment"]
    if speed is None:
        return "## Speed\n\nNot measured.\n"
    rows = [
        [
            f"{_plain(row['phase'])}, batch {row['batch']}",
            f"{row['prompt_tokens']} + {row['decode_tokens']}",
            format_ms(row["reference_p50_ms"]),
            format_ms(row["p50_ms"]),
            format_ms(row["p95_ms"]),
            format_count(row["tokens_per_s"]),
            f"{row['speedup']:.2f}x",
        ]
        for row in speed["rows"]
    ]
    where = _plain(environment["device_name"])
    if environment["device"].startswith("cpu") and environment.get("threads"):
        where += f", {environment['threads']} threads"
    return (
        f"## Speed\n\nOn {where}, in this project's own runtime, alternating with the original in one process:\n\n"
        + _markdown_table(["", "tokens", "original p50", "p50", "p95", "tokens/s", "speedup"], rows)
    )


def _load_text(record: Record) -> str:
    """Snippets for the engines that read this scheme."""
    # transformers reads packed zero points only when it may dequantize them at load
    asymmetric = " asym" in record["scheme"]
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", CompressedTensorsConfig" if asymmetric else "")
    option = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if asymmetric else ""
    blocks = [
        "## Load\n",
        "```python\n"
        f"from transformers import {imports}\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("<this directory or repository>"{option})\n'
        'tokenizer = AutoTokenizer.from_pretrained("<this directory or repository>")\n'
        "```\n",
    ]
    if _is_quantized(record):
        blocks.insert(1, "With transformers (`pip install transformers compressed-tensors`):\n")
        blocks.append(
            "With this project's kernels:\n\n"
            '```python\nimport compress\n\nmodel = compress.load("<this directory>")\n```\n'
        )
    # vLLM's integer kernels for this format take 4 and 8 bits, and its loader no quantized head; a plain checkpoint
    # needs neither
    if not _is_quantized(record) or (re.match(r"w[48](\D|$)", record["scheme"]) and "head" not in record["scheme"]):
        blocks.append("With vLLM:\n\n```bash\nvllm serve <this directory or repository>\n```\n")
    return "\n".join(blocks)


def _provenance_text(record: Record) -> str:
    lines = [
        "## Reproduce\n",
        f"```bash\n{shlex.join(reproduce_command(record)).replace('```', '')}\n```\n",
        f"- source weights sha256 `{record['source_sha256']}`",
        f"- fingerprint `{_code(record['fingerprint'])}`, compress {_plain(record['compress_version'])}",
    ]
    calibration = record["calibration"]
    if calibration is not None:
        lines.append(
            f"- calibration: {calibration['n_sequences']} x {calibration['sequence_length']} tokens of "
            f"{_plain(calibration['source'])}{_plain(generated_text(calibration))}, sha256 "
            f"`{_code(calibration['sha256'])}`"
        )
    versions = [f"{k} {record['environment'][k]}" for k in ("torch", "transformers") if record["environment"].get(k)]
    if versions:
        lines.append(f"- {_plain(', '.join(versions))}")
    changed = [
        f"`{_code(layer['name'])}`: {_plain(layer['fallback'])}" for layer in record["layers"] if layer["fallback"]
    ]
    if changed:
        lines.append("\nLayers not treated as the recipe asks:\n")
        lines += [f"- {line}" for line in changed]
    return "\n".join(lines) + "\n"
