"""Ground rules and fixtures: no network, no CUDA tests where there is no CUDA, a tiny model made in memory."""

from __future__ import annotations

import os

# Before transformers, datasets, huggingface_hub and torch are imported: they read these once. Processes that tests
# start inherit them. One thread: tensors are small here, and more would wait for each other and for a busy machine.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import ipaddress
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # must be set before the first kernel is decorated: without a GPU, kernels run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take `gpu` tests out of the run where there is no such CUDA device, and gpu("hopper") where its own kernels do
    not run."""

    def runs(item: pytest.Item) -> bool:
        mark = item.get_closest_marker("gpu")
        return mark is None or (torch.cuda.is_available() and (not mark.args or _runs_hopper_kernels()))

    if left_out := [item for item in items if not runs(item)]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if runs(item)]


def _runs_hopper_kernels() -> bool:
    from compress.kernels.choose import hopper_kernels

    return hopper_kernels(torch.device("cuda", torch.cuda.current_device()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out: with pytest-xdist nothing else does."""
    if not torch.cuda.is_available():
        terminalreporter.write_line("tests marked gpu did not run")
    elif not _runs_hopper_kernels():
        terminalreporter.write_line("tests marked gpu of the Hopper kernels did not run")


def _is_local(host: object) -> bool:
    if host is None or host in ("", "localhost", b"localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host)).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Sockets reach this machine alone: a test that wants more fails, it does not wait for a time-out."""
    patch = pytest.MonkeyPatch()

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family != getattr(socket, "AF_UNIX", None) and not _is_local(address[0]):
                raise RuntimeError(f"a test tried to connect to {address!r}; tests must not touch the network")
            return real(self, address)

        return connect

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise RuntimeError(f"a test tried to look up {host!r}; tests must not touch the network")
        return real_getaddrinfo(host, *args, **kwargs)

    real_getaddrinfo = socket.getaddrinfo
    patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    patch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    patch.undo()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[list[str]], Any], list[str]], str]:
    """What a parser says of arguments, which it must refuse with argparse's exit code 2."""

    def said(parse: Callable[[list[str]], Any], arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as ended:
            parse(arguments)
        assert ended.value.code == 2
        return capsys.readouterr().err

    return said


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama (hidden 64, FFN 128, vocabulary 256, 4 heads on 2 KV heads), saved as safetensors in
    float32 with a byte-level tokenizer. Read only: tests that change files copy it first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _byte_tokenizer() -> Any:
    """256 tokens, one a byte: every text is in vocabulary. The NUL byte serves as BOS and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    nul = "\u0100"  # how ByteLevel writes byte 0
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=nul, eos_token=nul)
