"""Another quantizer on our calibration windows, in an interpreter of its own: `python peer_worker.py JOB.json`.

Nothing of this package is imported: the packages here pin versions that conflict with its own and with each other, so
this file may run under any environment that has torch, transformers, safetensors and the one package it is to run.

The job names a model directory, a safetensors file of `input_ids` int64 [S, T], the scheme and where to write. What is
written is the model's parameters as that package left them, dequantized, in the dtype it computed in: one safetensors
file of dense weights by parameter name. The last line on stdout is a JSON object of what was done.

    python peer_worker.py --version hqq        {"version": "0.2.8"}, or {"version": null} where it is not installed
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTIONS = {"llmcompressor": "llmcompressor", "auto-round": "auto-round", "hqq": "hqq"}


def installed_version(peer: str) -> str | None:
    try:
        return metadata.version(DISTRIBUTIONS[peer])
    except metadata.PackageNotFoundError:
        return None


def block_linears(model: Any) -> dict[str, Any]:
    """Linears by full name, the output head left out."""
    import torch

    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


# Each runner gets the model on the CPU and gives the dense weight of every linear it quantized, by full name. The
# packages move blocks to the device themselves.


def run_hqq(model: Any, job: dict[str, Any], input_ids: Any) -> dict[str, Any]:
    """HQQ's own quantizer on every linear, zero points and scales unquantized; it reads no calibration text."""
    from hqq.core.quantize import Quantizer

    options = {"nbits": job["bits"], "group_size": job["group_size"], "axis": 1, "optimize": True}
    found = {}
    for name, linear in block_linears(model).items():
        weight = linear.weight.detach().to(job["device"])
        codes, meta = Quantizer.quantize(weight, device=job["device"], compute_dtype=weight.dtype, **options)
        found[name] = Quantizer.dequantize(codes, meta).reshape(weight.shape)
    return found


def run_llmcompressor(model: Any, job: dict[str, Any], input_ids: Any) -> dict[str, Any]:
    """llm-compressor's GPTQ with its own defaults but for the scheme: W{bits}A16, one range a group."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = {
        "num_bits": job["bits"], "type": "int", "symmetric": job["symmetric"], "strategy": "group",
        "group_size": job["group_size"],
    }  # fmt: skip
    linears = list(block_linears(model))
    recipe = GPTQModifier(config_groups={"group_0": {"targets": linears, "weights": weights}}, ignore=[])
    rows = {"input_ids": input_ids.tolist(), "attention_mask": [[1] * input_ids.shape[1]] * len(input_ids)}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=input_ids.shape[1],
        num_calibration_samples=len(input_ids),
    )
    found = {}
    for name, linear in block_linears(model).items():
        scheme = getattr(linear, "quantization_scheme", None)
        if scheme is None:
            continue  # the caller sees that this one did not change
        if hasattr(linear, "weight_g_idx"):
            raise RuntimeError(f"{name} has groups of scattered columns, which no engine serves; use static ones")
        zero = getattr(linear, "weight_zero_point", None)
        # the identity on weights that are on their grid already
        found[name] = fake_quantize(linear.weight.detach(), linear.weight_scale, zero, scheme.weights)
    return found


def run_auto_round(model: Any, job: dict[str, Any], input_ids: Any) -> dict[str, Any]:
    """AutoRound with its own defaults but for the scheme and the number of iterations. It leaves dense weights in
    bfloat16, whose rounding is a thousandth of that to 4 bits."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in input_ids]
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"], trust_remote_code=job["trust_remote_code"]),
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["symmetric"],
        iters=job["iterations"],
        dataset=torch.utils.data.DataLoader(rows, batch_size=8),  # type: ignore[arg-type]
        seqlen=input_ids.shape[1],
        nsamples=len(input_ids),
        device_map=job["device"],
    )
    rounder.quantize()
    return {name: linear.weight.detach() for name, linear in block_linears(model).items()}


RUNNERS = {"llmcompressor": run_llmcompressor, "auto-round": run_auto_round, "hqq": run_hqq}


def run(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    dtype = getattr(torch, job["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=dtype, trust_remote_code=job["trust_remote_code"]
    ).eval()
    before = {name: linear.weight.detach().clone() for name, linear in block_linears(model).items()}
    gains = [name for name, p in model.named_parameters() if p.ndim == 1]  # some methods fold scales into norms
    input_ids = load_file(job["tokens"])["input_ids"]
    started = time.perf_counter()
    found = RUNNERS[job["peer"]](model, job, input_ids)
    seconds = time.perf_counter() - started
    after = {f"{name}.weight": weight for name, weight in found.items()}
    after |= {name: model.get_parameter(name).detach() for name in gains}
    after = {name: value.to("cpu", dtype).contiguous() for name, value in after.items()}
    changed = [name for name in found if not torch.equal(after[f"{name}.weight"], before[name])]
    save_file(after, job["out"])
    return {
        "version": installed_version(job["peer"]),
        "seconds": seconds,
        "changed": sorted(changed),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    if sys.argv[1] == "--version":
        print(json.dumps({"version": installed_version(sys.argv[2])}))
        return
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), flush=True)


if __name__ == "__main__":
    main()
