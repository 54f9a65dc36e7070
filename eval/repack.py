"""python -m compress.eval.repack: how long a model's linears take from their on-disk form to the kernels' layout.

Metric: seconds, the device synchronized before and after, of what `compress.load` and the first forward do to every
linear of the blocks once its tensors are on the device: int32 words of compressed-tensors `pack-quantized` -> codes ->
planar rows -> the layout that the Triton kernels read. The first pass, which also grows the allocator's pools, is what
a user waits for; the median of the others is what the device takes. GB/s: tensors read and layout written, once each,
over that median. Every layer gets the same random codes of its shape; a tensor leaves the L2 between two uses.

The layout of each shape is unpacked again and must hold the very codes that were packed, or the run fails.

    python -m compress.eval.repack --shape llama-3-8b --schemes w4g128,w4g128-asym,w8g128,w3g128,w2g128 --out DIR

Prints a table in Markdown and one JSON line; --out keeps both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.arguments import run_command
from compress.atomic import write_atomically, write_json
from compress.checkpoint import decode, encode
from compress.environment import describe
from compress.eval.random_models import SHAPES, Shape
from compress.eval.roofline import synchronize
from compress.kernels.problem import Scheme, schemes
from compress.models import choose_device
from compress.qlinear import Backend, QuantLinear
from compress.quant import Granularity, QuantizedWeight, QuantScheme


@dataclass(frozen=True)
class Row:
    """One scheme: all linears of all blocks. wrong: shapes whose layout does not hold the codes."""

    scheme: str
    linears: int
    weights: int
    bytes_moved: int
    first_s: float
    median_s: float
    GB_per_s: float
    wrong: list[str]


def linear_shapes(shape: Shape) -> list[tuple[int, int]]:
    """[N, K] of the seven linears of a block, in the order in which they are loaded."""
    c = shape.config
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    head_dim = c.get("head_dim") or hidden // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    return [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner)]


def quant_scheme(scheme: Scheme) -> QuantScheme:
    if scheme.group is None:
        return QuantScheme(scheme.bits, Granularity.CHANNEL, symmetric=scheme.symmetric)
    return QuantScheme(scheme.bits, Granularity.GROUP, scheme.group, scheme.symmetric)


def random_weight(n: int, k: int, scheme: QuantScheme, device: torch.device, seed: int) -> QuantizedWeight:
    generator = torch.Generator(device).manual_seed(seed)
    groups = scheme.n_groups(k)
    codes = torch.randint(0, 2**scheme.bits, (n, k), dtype=torch.uint8, device=device, generator=generator)
    scale = torch.rand((n, groups), device=device, generator=generator).to(torch.bfloat16)
    zero = torch.full((n, groups), scheme.mid_code, dtype=torch.uint8, device=device)
    if not scheme.symmetric:
        zero.random_(0, 2**scheme.bits, generator=generator)
    return QuantizedWeight(codes, scale, zero, scheme)


def repack(tensors: dict[str, Tensor], scheme: QuantScheme) -> QuantLinear:
    """On-disk tensors of one linear, on the device -> a layer that holds the kernels' layout."""
    layer = QuantLinear.from_quantized(decode(tensors, scheme), backend=Backend.TRITON, dtype=torch.bfloat16)
    layer.prepare()
    return layer


def holds(layer: QuantLinear, codes: Tensor) -> bool:
    """Whether the layout unpacks to these codes."""
    from compress.kernels import w4a16, wna16_layout

    weight = layer.kernel_weight()
    unpack: Any = w4a16.unpack_kernel_layout if layer.scheme.bits == 4 else wna16_layout.unpack
    return torch.equal(unpack(weight), codes)


def measure(shape: Shape, label: str, device: torch.device, repeats: int) -> Row:
    """All linears of `shape`, repacked `repeats` + 1 times."""
    scheme, n_layers = quant_scheme(Scheme.parse(label)), shape.config["num_hidden_layers"]
    shapes = linear_shapes(shape)
    stored, wrong, moved = [], [], 0
    for seed, (n, k) in enumerate(shapes):
        q = random_weight(n, k, scheme, device, seed)
        tensors = {name: t if name == "weight_shape" else t.to(device) for name, t in encode(q).items()}
        moved += sum(t.nbytes for t in tensors.values())
        stored.append(tensors)
    times = [_seconds(stored * n_layers, scheme, device) for _ in range(repeats + 1)]
    for seed, ((n, k), tensors) in enumerate(zip(shapes, stored, strict=True)):
        layer = repack(tensors, scheme)
        moved += layer.weight_bytes
        if not holds(layer, random_weight(n, k, scheme, device, seed).codes):
            wrong.append(f"{n}x{k}")
    median = statistics.median(times[1:])
    weights, moved = n_layers * sum(n * k for n, k in shapes), n_layers * moved
    return Row(label, n_layers * len(shapes), weights, moved, times[0], median, moved / median / 1e9, wrong)


def _seconds(stored: list[dict[str, Tensor]], scheme: QuantScheme, device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for tensors in stored:
        repack(tensors, scheme)
    synchronize(device)
    return time.perf_counter() - began


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['environment']['device_name']}, {result['shape']}: stored words to kernel layout, seconds.",
        "",
        "| scheme | linears | weights | first pass | median of the others | GB/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        verdict = f"wrong at {', '.join(row['wrong'])}" if row["wrong"] else f"{row['GB_per_s']:.0f}"
        lines.append(
            f"| {row['scheme']} | {row['linears']} | {row['weights'] / 1e9:.2f} G | {row['first_s']:.3f} | "
            f"{row['median_s']:.3f} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-3-8b")
    parser.add_argument(
        "--schemes", type=schemes, default="w4g128", help="comma list, e.g. w4g128,w4g32-asym,w8-channel,w3g128"
    )
    parser.add_argument("--repeats", type=int, default=3, help="passes after the first")
    parser.add_argument("--device", default="auto", help="on a CPU Triton's interpreter must be on: TRITON_INTERPRET=1")
    parser.add_argument("--out", type=Path, help="directory for repack_<device>.json, .md")
    args = parser.parse_args(argv)
    if any(scheme.int8 for scheme in args.schemes):
        parser.error(
            "--schemes w8a8: stored as w8-channel, and no layer takes its layout unless it is named; leave it out"
        )
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: needs one or more")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = choose_device(args.device)
    rows = [measure(SHAPES[args.shape], scheme.label, device, args.repeats) for scheme in args.schemes]
    result = {
        "metric": "seconds to repack all linears of a model",
        "environment": describe(device, torch.bfloat16),
        "shape": args.shape,
        "repeats": args.repeats,
        "rows": [asdict(row) for row in rows],
    }
    table = markdown(result)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / f"repack_{device.type}.json", result)
        path = args.out / f"repack_{device.type}.md"
        write_atomically(path, lambda temporary: temporary.write_text(table, encoding="utf-8"))
    print(table)
    print(json.dumps(result))
    if any(row.wrong for row in rows):
        sys.exit("a layout above does not hold the codes that were packed")


if __name__ == "__main__":
    run_command(main)
