"""Time and peak memory of quantizing, by model size: `python -m compress.eval.scale`.

Quantizes a Llama-shaped model of random weights (speed and memory do not depend on the values) block by block and
prints, as a table and one JSON line: the bytes of the model and of its largest block, the peak memory, the forecast
made beforehand, and seconds a block. The claim to check is that the peak follows the largest block and the
activations, not the model: run it with 6, 12 and 24 blocks and compare.

Peak memory is torch's own peak on CUDA. On a CPU it is the peak of the process's anonymous memory over that before
loading, sampled every 10 ms: pages of the mapped checkpoint are not counted, the system takes them back at will.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compress.arguments import names, numbers, run_command
from compress.atomic import write_json
from compress.blocks import EngineInputs, compress_blocks
from compress.config_quant import ObserverName, QuantConfig, Rounding, SchemeConfig, Transform
from compress.environment import describe
from compress.forecast import Load, forecast
from compress.models import choose_device, load_model
from compress.plan import make_plan

SHAPES = {
    # hidden, ffn, heads, kv heads, vocabulary
    "small": (512, 1408, 8, 4, 16000),
    "llama-3-8b": (4096, 14336, 32, 8, 128256),
    "qwen3-1.7b": (2048, 6144, 16, 8, 151936),
}
METHODS = {
    "rtn4": QuantConfig(),
    "gptq4": QuantConfig(rounding=Rounding.gptq, scheme=SchemeConfig(observer=ObserverName.mse)),
    "awq4": QuantConfig(transform=Transform.awq),
}


@dataclass
class Job:
    shape: str
    blocks: int
    method: str
    sequences: int
    length: int
    batch: int


def write_random_model(folder: Path, shape: str, n_blocks: int) -> None:
    """A bfloat16 Llama checkpoint of random weights, one shard a block, never in memory as a whole."""
    hidden, ffn, heads, kv_heads, vocabulary = SHAPES[shape]
    kv = hidden // heads * kv_heads
    generator = torch.Generator().manual_seed(0)

    def random(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, generator=generator) * k**-0.5).bfloat16()

    weight_map: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    outside = {"model.embed_tokens.weight": random(vocabulary, hidden), "lm_head.weight": random(vocabulary, hidden)}
    write("outside.safetensors", outside | {"model.norm.weight": torch.ones(hidden).bfloat16()})
    for i in range(n_blocks):
        parts = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }  # fmt: skip
        tensors = {f"model.layers.{i}.{name}.weight": random(*dims) for name, dims in parts.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        write(f"block-{i:03d}.safetensors", tensors)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": n_blocks,
        "vocab_size": vocabulary, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "dtype": "bfloat16",
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    }  # fmt: skip
    write_json(folder / "config.json", config)


def measure(job: Job, device: torch.device, work: Path) -> dict[str, Any]:
    """Quantize one random model; JSON-ready figures."""
    source = work / f"{job.shape}-{job.blocks}"
    if not source.is_dir():
        source.mkdir(parents=True)
        write_random_model(source, job.shape, job.blocks)
    load_model(str(source))  # what importing and building architectures allocates is no part of the figure
    with _peak_memory(device) as peak:
        loaded = load_model(str(source))
        dtype = torch.float32 if device.type == "cpu" else loaded.dtype
        plan = make_plan(loaded, METHODS[job.method])
        vocabulary = SHAPES[job.shape][4]
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, vocabulary, (job.sequences, job.length), generator=generator)
        needs = METHODS[job.method].needs_calibration
        expected = forecast(loaded, plan, Load(ids.numel() if needs else 0, job.batch * job.length), dtype)
        marks = [time.perf_counter()]
        with tempfile.TemporaryDirectory(dir=work) as checkpoints:
            inputs = EngineInputs(
                loaded, plan, ids if needs else None, ids[:1, :64], job.batch, device, dtype, Path(checkpoints)
            )
            compress_blocks(inputs, lambda _done, _total: marks.append(time.perf_counter()))
    seconds = [b - a for a, b in pairwise(marks)]
    block_bytes = sum(p.numel() for p in loaded.blocks[0].module.parameters()) * loaded.dtype.itemsize
    model_bytes = sum(p.numel() for p in loaded.model.parameters()) * loaded.dtype.itemsize
    return {
        **job.__dict__,
        "model_bytes": model_bytes,
        "block_bytes": block_bytes,
        "activation_bytes": expected.host_bytes,
        "forecast_bytes": expected.device_bytes + (expected.host_bytes if device.type == "cpu" else 0),
        "peak_bytes": peak(),
        "seconds_per_block": sorted(seconds)[len(seconds) // 2],
        "seconds": marks[-1] - marks[0],
    }


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    stop = threading.Event()
    base = highest = _anonymous_bytes()

    def sample() -> None:
        nonlocal highest
        while not stop.wait(0.01):
            highest = max(highest, _anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: highest - base
    finally:
        stop.set()
        thread.join()


def _anonymous_bytes() -> int:
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--blocks", type=numbers, default="6,12,24", help="numbers of blocks")
    parser.add_argument("--methods", type=names(METHODS), default="gptq4", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", default=None, help="directory for the random models; default: a temporary one")
    parser.add_argument("--out", default=None, help="JSON file to write")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    device = choose_device(options.device)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(options.work or temporary)
        for method in options.methods:
            for blocks in options.blocks:
                job = Job(options.shape, blocks, method, options.sequences, options.length, options.batch)
                # a process each: memory that an allocator keeps from one run must not hide the next one's
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    rows.append(pool.submit(measure, job, device, work).result())
    print(f"{'method':8} {'blocks':>6} {'model':>9} {'block':>9} {'peak':>9} {'forecast':>9} {'s/block':>8}   (MB)")
    for r in rows:
        sizes = (r[k] / 1e6 for k in ("model_bytes", "block_bytes", "peak_bytes", "forecast_bytes"))
        cells = " ".join(f"{v:9.0f}" for v in sizes)
        print(f"{r['method']:8} {r['blocks']:6} {cells} {r['seconds_per_block']:8.2f}")
    result = {"environment": describe(device, torch.float32 if device.type == "cpu" else torch.bfloat16), "rows": rows}
    if options.out:
        write_json(Path(options.out), result)
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
