"""python -m compress.eval.decode_tiles: a decode step under different tiles of its kernels, in turns in one process.

What is fastest behind itself, which `compress.kernels.tune` measures, is not so between others: there programs of the
next kernel want room before those of the last one leave. So a step's tiles are compared within the step.

    python -m compress.eval.decode_tiles --shape llama-3-8b --batch 1 --try head=8,1024,8 \\
        --try 4096x14336=8,32,8,2,1,168 --try "attention=64,16,4,6 4096x4096=8,16,8,2" --out DIR

Each --try is a step of its own; the first of all takes the rules. Tiles are given by fields in order, later ones have
defaults: attention `AttentionConfig`, head `DenseConfig`, N x K of a product `DecodeConfig`. Rounds of --steps steps
are taken in alternating order.

Metric: milliseconds of a step, the median of its rounds, each the median of its steps, timed as `compress.eval.decode`
does. Keys and values are random. Every step must give the logits of the rules' step; one that does not has no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.arguments import in_order, run_command
from compress.atomic import write_json
from compress.decode_weights import DecodeModel, Packed, read_model
from compress.decoder import Decoder, StepTiles
from compress.environment import describe
from compress.errors import ConfigError
from compress.eval import decode
from compress.eval.random_models import SHAPES, random_pair
from compress.kernels import common
from compress.kernels.decode_attention import AttentionConfig
from compress.kernels.dense_decode import DenseConfig
from compress.kernels.reference import relative_error
from compress.kernels.w4a16_decode import DecodeConfig
from compress.models import choose_device


@dataclass
class Row:
    """One step. p50_ms is None where it failed."""

    tiles: str
    rounds_ms: list[float] = field(default_factory=list)
    p50_ms: float | None = None
    tokens_per_s: float | None = None
    roofline_fraction: float | None = None
    difference: float | None = None  # relative, of logits from those of the rules
    failure: str | None = None


def parse_tiles(text: str) -> StepTiles:
    """attention=64,16,4,6 head=8,1024,8 4096x14336=8,32,8,2,1,168 -> what is named.

    Raises:
        ConfigError: another name, or fields that are not its.
    """
    found: dict[str, Any] = {"products": {}}
    for part in text.split():
        name, _, values = part.partition("=")
        kinds: dict[str, type] = {"attention": AttentionConfig, "head": DenseConfig}
        kind = kinds.get(name, DecodeConfig)
        try:
            config = in_order(kind, values)
            if name in kinds:
                found[name] = config
            else:
                n, k = (int(size) for size in name.split("x"))
                found["products"][n, k] = config
        except (TypeError, ValueError) as problem:
            fields = ", ".join(kind.__annotations__)
            raise ConfigError(
                f"{part!r}: {problem}; name attention, head or the N x K of a product, and numbers for {fields}"
            ) from problem
    return StepTiles(**found)


def check_used(decoder: Decoder, tiles: StepTiles) -> None:
    """Tiles that no kernel of the step would take must not look as if they had been measured.

    Raises:
        ConfigError: there are some.
    """
    layer = decoder.model.layers[0]
    shapes = {
        (p.weight.n, p.weight.k)
        for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)
        for p in linear.parts
        if decoder.fused and isinstance(p, Packed)
    }
    for n, k in set(tiles.products) - shapes:
        known = ", ".join(f"{n}x{k}" for n, k in sorted(shapes))
        raise ConfigError(f"no product of this step takes tiles for {n}x{k}; those that do: {known or 'none'}")
    if tiles.head and not decoder.has_own_head():
        raise ConfigError("the head of this step is no kernel of its own; that is for one sequence, on Hopper")


def make_steps(
    model: DecodeModel, tiles: list[StepTiles], args: argparse.Namespace, rows: list[Row]
) -> dict[int, Decoder]:
    """A decoder for each of `tiles` by its place, recorded on CUDA, all over one cache. Their logits go into `rows`,
    and why one cannot be."""
    token = torch.full((args.batch,), 17, dtype=torch.int64, device=model.device)
    decoders: dict[int, Decoder] = {}
    expected: Tensor | None = None
    for i, (which, row) in enumerate(zip(tiles, rows, strict=True)):
        try:
            decoder = Decoder(model, args.batch, args.cache, use_kernels=True, tiles=which)
            check_used(decoder, which)
            if decoders:
                decoder.keys, decoder.values = decoders[0].keys, decoders[0].values
            else:
                decoder.keys.normal_()
                decoder.values.normal_()
            decoder.seek(args.start)
            if model.device.type == "cuda":
                decoder.capture()
                decoder.seek(args.start)
            logits = decoder.step(token).float().clone()
            expected = logits if expected is None else expected
            difference = relative_error(logits, expected.double())
            if not difference < decode.MAX_ERROR[torch.bfloat16]:
                raise ValueError(f"logits differ by {difference:.3g}")
            row.difference = difference
            decoders[i] = decoder
        except Exception as problem:
            if i == 0:  # nothing to compare with
                raise
            row.failure = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
    return decoders


def take_turns(
    decoders: dict[int, Decoder], rows: list[Row], args: argparse.Namespace, options: decode.Options
) -> None:
    """Fills the rounds of `rows`."""
    token = torch.full((args.batch,), 17, dtype=torch.int64, device=options.device)
    for at in range(args.rounds):
        for i in list(decoders) if at % 2 else list(reversed(decoders)):
            decoder = decoders[i]
            decoder.seek(args.start)
            rows[i].rounds_ms.append(statistics.median(decode.time_steps(partial(decoder.step, token), options)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--cache", type=int, default=1024, help="tokens of each that the KV cache holds")
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="TILES", help="may be repeated")
    parser.add_argument("--steps", type=int, default=50, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="directory for decode_tiles_<shape>_<batch>.json")
    args = parser.parse_args(argv)
    args.start = args.cache - args.steps - decode.WARM_STEPS
    if min(args.steps, args.rounds, args.batch) < 1 or args.start < 1:
        parser.error(
            f"--cache {args.cache} with --steps {args.steps}: needs a cache of {args.steps + decode.WARM_STEPS + 1} or "
            "more, and a step, a round and a sequence at least"
        )
    try:
        args.tiles = [parse_tiles(text) for text in args.tries]
    except ConfigError as problem:
        parser.error(f"--try: {problem}")
    args.device = choose_device(args.device)
    if args.device.type != "cuda" and not common.INTERPRETED:
        parser.error(f"the kernels of a step run on a CUDA GPU, not on {args.device}")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float16
    options = decode.Options(args.device, dtype, args.cache, args.steps, False, False, None)
    bandwidth = decode.copy_bandwidth(options)
    dense, quantized = random_pair(SHAPES[args.shape], args.device, dtype)
    del dense
    model = read_model(quantized)
    rows = [Row("rules"), *(Row(text) for text in args.tries)]
    decoders = make_steps(model, [StepTiles(), *args.tiles], args, rows)
    take_turns(decoders, rows, args, options)
    moved = model.step_bytes(args.batch, options.mean_cached_tokens)
    print(f"{'ms':>9} {'tokens/s':>10} {'roofline':>8} {'logits':>8}  tiles")
    for row in rows:
        if row.failure is None:
            row.p50_ms = statistics.median(row.rounds_ms)
            row.tokens_per_s = args.batch / row.p50_ms * 1e3
            row.roofline_fraction = moved / bandwidth / row.p50_ms * 1e3
            print(
                f"{row.p50_ms:9.4f} {row.tokens_per_s:10,.1f} {row.roofline_fraction:8.2%} {row.difference:8.1e}  "
                f"{row.tiles}"
            )
        else:
            print(f"{'FAILED':>9}  {row.tiles}: {row.failure}")
    result = {
        "metric": "milliseconds of a decode step, tiles in turns in one process",
        "environment": describe(args.device, dtype),
        "bandwidth_bytes_per_s": bandwidth,
        "bytes_moved": moved,
        "shape": args.shape,
        "batch": args.batch,
        "cache_tokens": args.cache,
        "timed_steps": args.steps,
        "rows": [asdict(row) for row in rows],
    }
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / f"decode_tiles_{args.shape}_{args.batch}.json", result)
    print(json.dumps(result))
    if any(row.failure for row in rows):
        sys.exit("a step above failed")


if __name__ == "__main__":
    run_command(main)
