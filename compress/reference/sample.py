"""Sample the embedded texts from the reference model, once: python -m compress.reference.sample

Ancestral sampling at temperature 1 over the whole vocabulary, no top-k, no top-p: each token is drawn from
exactly the distribution that the float32 model computes, which is what makes the rise in NLL on these texts
an unbiased estimate of KL (see the package docstring). Each sequence starts with <|endoftext|> and has 512
tokens with it. Sampling does not stop there when the model emits <|endoftext|>: id 0 separates documents in
its training text, so what follows is the model's next document, and stopping would bias the sample.

The draw inverts the cumulative distribution in float64 (float32 sums over 8,192 entries lose the tail).
Deterministic for a seed on one machine and torch version; other machines may round a logit differently and
part ways, which is why the token ids are shipped and not the seed alone.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.reference import model_path
from compress.sampling import continue_sequences

log = logging.getLogger(__name__)

N_CALIBRATION = 128
N_HELDOUT = 64
SEQUENCE_LENGTH = 512
SEED = 20240229


def sample_sequences(
    model: nn.Module, n_sequences: int, length: int, generator: torch.Generator, start_id: int = 0
) -> Tensor:
    """Sequences drawn from a causal LM at temperature 1.

    Args:
        model: HF causal LM with a KV cache, on the CPU.
        length: tokens of a sequence, the start token included; at least 1.
        generator: CPU generator; one float64 uniform is taken per token, all sequences' first tokens first.

    Returns:
        int64 [n_sequences, length], column 0 = start_id.
    """
    uniforms = torch.rand(length - 1, n_sequences, dtype=torch.float64, generator=generator).t()
    return continue_sequences(model, torch.full((n_sequences, 1), start_id, dtype=torch.int64), uniforms)


def _batches(model: nn.Module, n_sequences: int, generator: torch.Generator, batch_size: int = 32) -> Iterator[Tensor]:
    for start in range(0, n_sequences, batch_size):
        yield sample_sequences(model, min(batch_size, n_sequences - start), SEQUENCE_LENGTH, generator)
        log.info("sampled %d of %d sequences", min(start + batch_size, n_sequences), n_sequences)


def write_texts(directory: Path, seed: int = SEED) -> dict[str, str]:
    """Write calibration.safetensors and heldout.safetensors (int16 `tokens`); returns the sha256 of each file."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers import __version__ as transformers_version

    weights = model_path() / "model.safetensors"
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.cat(list(_batches(model, N_CALIBRATION + N_HELDOUT, generator)))
    if torch.unique(tokens, dim=0).shape[0] != tokens.shape[0]:
        raise RuntimeError(f"seed {seed} drew the same sequence twice; calibration and held-out would not be disjoint")

    metadata = {
        "seed": str(seed),
        "temperature": "1",
        "model_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers_version,
    }
    directory.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, part in (("calibration", tokens[:N_CALIBRATION]), ("heldout", tokens[N_CALIBRATION:])):
        path = directory / f"{name}.safetensors"
        save_file({"tokens": part.to(torch.int16).contiguous()}, path, metadata=metadata)
        digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        log.info("%s: %s, sha256 %s", path, tuple(part.shape), digests[name])
    return digests


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m compress.reference.sample", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "texts")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_texts(args.output, args.seed)


if __name__ == "__main__":
    main()
