"""Steps replayed from a CUDA graph: when a call is plain, captured or replayed; on a GPU, that it changes no byte."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import token_ids
from test_blocks import deep_model_dir, engine_inputs, tensors_of  # noqa: F401 (a fixture)
from test_learn import learn_config, nothing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress import replay as replay_file
from compress import tune
from compress.blocks import compress_blocks
from compress.config_quant import LearnConfig, SchemeConfig, TuneConfig
from compress.errors import EnvironmentProblem
from compress.models import load_dense, load_model
from compress.replay import Replay
from compress.streams import captured_as_called
from compress.tune import FOLDER, TuneNote, tune_model

CPU = torch.device("cpu")


class FakeStream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been asked of a GPU, in order: torch's calls replaced by a note of them."""
    seen: list[str] = []

    class FakeGraph:
        def replay(self) -> None:
            seen.append("replay")

        def reset(self) -> None:
            seen.append("reset")

    def graph(_graph: FakeGraph, stream: FakeStream) -> Any:
        seen.append("capture")
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: FakeStream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("empty"))
    monkeypatch.setattr(replay_file, "_capture_stream", lambda _: FakeStream())
    return seen


class Recorded:
    """A step on a parameter that notes what it is called with."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.parameter, self.inputs = events, nn.Parameter(torch.ones(2)), [torch.empty(0)]

    def __call__(self, x: Tensor, name: str = "") -> None:
        self.events.append(f"step {x.numel()}{name}")
        self.inputs.append(x)
        (self.parameter.sum() * x.sum()).backward()


def test_calls_are_plain_then_captured_then_replayed(events: list[str]) -> None:
    """Oracle: the order by hand: three plain calls of a kind, its capture, replays; other kinds plain for ever. Replays
    read the inputs of their call and leave the gradients that the capture made, whatever became of them; in the end
    nothing is left."""
    step = Recorded(events)
    with Replay(step, [step.parameter, nn.Parameter(torch.ones(1))], CPU, True, "switch") as replay:
        for x in (torch.ones(3), torch.ones(4), torch.ones(3), torch.ones(3)):
            replay(x)
            assert step.inputs[-1] is x and step.parameter.grad is not None
            step.parameter.grad = None
        assert events == ["step 3", "step 4", "step 3", "step 3"]
        del events[:]
        replay(torch.full((3,), 5.0))
        assert events == ["capture", "step 3", "replay"]
        place, gradient = step.inputs[-1], step.parameter.grad
        assert torch.equal(place, torch.full((3,), 5.0)) and gradient is not None
        del events[:]
        step.parameter.grad = None
        replay(torch.full((3,), 7.0))
        assert torch.equal(place, torch.full((3,), 7.0)) and step.parameter.grad is gradient
        for other in (torch.ones(4), torch.ones(3, dtype=torch.float64)):
            step.parameter.grad = None
            replay(other)
        step.parameter.grad = None
        replay(torch.ones(3), name="b")
        assert events == ["replay", "step 4", "step 3", "step 3b"]
        assert replay.parameters[1].grad is None
        del events[:]
    assert events == ["reset", "empty"] and step.parameter.grad is None and replay.graph is None


def test_keywords_tell_kinds_apart(events: list[str]) -> None:
    """Oracle: the kind that comes a fourth time first is the captured one."""
    step = Recorded(events)
    with Replay(step, [step.parameter], CPU, True, "switch") as replay:
        for name in "abababb":
            step.parameter.grad = None
            replay(torch.ones(1), name=name)
    assert events == [*(f"step 1{n}" for n in "ababab"), "capture", "step 1b", "replay", "reset", "empty"]


def test_without_capture_calls_are_plain(events: list[str]) -> None:
    """Oracle: the step itself, on the same tensors, and its gradients stay."""
    step = Recorded(events)
    with Replay(step, [step.parameter], CPU, False, "switch") as replay:
        for i in range(6):
            x = torch.full((3,), float(i))
            replay(x)
            assert step.inputs[-1] is x
    assert events == ["step 3"] * 6 and step.parameter.grad is not None


def test_a_step_that_cannot_be_captured(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: EnvironmentProblem with what torch said first, not what it said of the end, and the setting to change."""

    class Ends:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("capture invalidated")

    def step(x: Tensor) -> None:
        events.append("step")
        if len(events) > 3:
            raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    monkeypatch.setattr(torch.cuda, "graph", lambda _graph, stream: Ends())
    with Replay(step, [], CPU, True, "quant.tune.graphs") as replay:
        for _ in range(3):
            replay(torch.ones(1))
        with pytest.raises(
            EnvironmentProblem, match=r"\(operation not permitted .* capturing\).*quant.tune.graphs=fals"
        ):
            replay(torch.ones(1))


def test_blocks_are_captured_as_they_were_called(deep_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Oracles: the logits of the plain call, to the bit, with arguments that the model made anew as if captured; that
    transformers does give blocks a mask there (or all this were not needed), which the block does not get."""
    loaded = load_model(str(deep_model_dir))
    model, tokens = load_dense(loaded, CPU, torch.float32), token_ids(2, 16, seed=1)
    masks: list[Any] = []
    block = loaded.blocks[0].module
    block.register_forward_pre_hook(lambda *a: masks.append(a[2].get("attention_mask")), with_kwargs=True)
    attention = dict(block.named_modules())["self_attn"]
    inner: list[Any] = []
    attention.register_forward_pre_hook(lambda *a: inner.append(a[2].get("attention_mask")), with_kwargs=True)
    with torch.no_grad(), captured_as_called(loaded):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        plain = model(tokens, use_cache=False).logits
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        captured = model(tokens, use_cache=False).logits
    assert torch.equal(plain, captured)
    assert masks[0] is None and isinstance(masks[1], Tensor) and inner == [None, None]


# the loops on a tape: what a GPU would replay, on a CPU


class Tape(TorchDispatchMode):
    """A CUDA graph's double: the operators of a capture, which `replay` makes again on the same tensors, so that only
    what lies at its place counts, and no Python. The capture leaves no trace; what would wait for a GPU is an error."""

    capturing = False
    waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.own: set[int] = set()
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in self.waits:
            raise RuntimeError(f"{func} would wait for the GPU")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and self._place(value) not in self.own:
                self.before.append((value, value.clone()))
        out = func(*args, **kwargs)
        given = {self._place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.own |= {self._place(x) for x in made} - given
        self.calls.append((func, args, kwargs, out))
        return out

    @staticmethod
    def _place(x: Tensor) -> int:
        return x.untyped_storage().data_ptr()

    def __enter__(self) -> Tape:
        Tape.capturing = True
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        Tape.capturing = False
        super().__exit__(*error)
        with torch.no_grad():
            for value, before in reversed(self.before):
                value.detach().copy_(before)
            for x in tree_leaves([out for *_, out in self.calls]):
                if isinstance(x, Tensor) and self._place(x) in self.own and x.is_floating_point():
                    x.detach().fill_(float("nan"))

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and self._place(old) != self._place(new):
                    old.detach().copy_(new)

    def reset(self) -> None:
        self.calls = []


@pytest.fixture
def tapes(events: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """GPU graphs as tapes, allowed on a CPU; which loop replayed, as often as it did."""
    replays: list[str] = []
    real = Replay._replay
    monkeypatch.setattr(Replay, "_replay", lambda self, *a: replays.append(self.switch) or real(self, *a))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, stream: tape)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Tape.capturing)
    monkeypatch.setattr(replay_file, "can_capture", lambda _: True)
    return replays


def graphs_against_none(
    device: torch.device, dtype: torch.dtype, at_once: int, n_tokens: int, directory: Path, folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Blocks after learned rounding, the tuned ones, and what is said of tuning, with graphs and without. Steps of
    tuning take three batches, so many at once; one batch is smaller than others."""
    monkeypatch.setattr(tune, "_batches_at_once", lambda *_: at_once)
    notes: list[TuneNote] = []
    for graphs in (False, True):
        config = learn_config(
            scheme=SchemeConfig(bits=2, group_size=16),
            learn=LearnConfig(enabled=True, epochs=8, graphs=graphs),
            tune=TuneConfig(
                enabled=True, epochs=5, batch_sequences=12, code_rate=1e-2, scale_rate=5e-3, norm_rate=5e-3,
                graphs=graphs,
            ),
        )  # fmt: skip
        inputs = replace(
            engine_inputs(directory, config, folder / str(graphs)), calibration_ids=token_ids(20, n_tokens, seed=1),
            batch_size=4, tuning_ids=token_ids(50, n_tokens, seed=9), device=device, dtype=dtype,
        )  # fmt: skip
        result = compress_blocks(inputs, nothing)
        assert result.teacher is not None
        notes.append(tune_model(inputs, result.teacher, nothing, result.tuning)[0])
    assert notes[0] == notes[1] and notes[0].kl_after < notes[0].kl_before
    for part in (Path(), Path(FOLDER)):
        assert tensors_of(folder / "False" / part) == tensors_of(folder / "True" / part)


@pytest.mark.parametrize("at_once", [2, 3])
def test_replayed_loops_change_no_byte(
    at_once: int,
    tapes: list[str],
    deep_model_dir: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the same run without graphs."""
    graphs_against_none(CPU, torch.float32, at_once, 32, deep_model_dir, tmp_path, monkeypatch)
    assert set(tapes) == {"quant.learn.graphs", "quant.tune.graphs"} and len(tapes) > 60


# on a GPU


@pytest.mark.gpu
def test_a_graph_gives_the_same_gradients() -> None:
    """Oracle: the step itself, bit for bit: two backward passes, an input from the CPU, an optimizer that spoils the
    gradients. The memory of the graph comes back."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(64, 256, device=device, generator=generator) for _ in range(12)]
    start = torch.randn(256, 256, device=device, generator=generator) / 16

    def trained(captured: bool) -> tuple[Tensor, Tensor]:
        weight, total = nn.Parameter(start.clone()), torch.zeros((), device=device)

        def step(x: Tensor, y: Tensor) -> None:
            for part in (x, y):
                loss = F.gelu(F.linear(part.to(device), weight)).square().mean()
                loss.backward()  # type: ignore[no-untyped-call]
                total.add_(loss.detach())

        with Replay(step, [weight], device, captured, "switch") as replay:
            for i in range(20):
                replay(inputs[i % 12], inputs[(i + 5) % 12].cpu())
                assert weight.grad is not None
                with torch.no_grad():
                    weight -= 0.1 * weight.grad.sign_()
                weight.grad = None
            assert (replay.graph is not None) is captured
        return weight.detach(), total

    plain, total = trained(False)
    used = 0
    for _ in range(3):  # what libraries keep is there after the first
        captured, captured_total = trained(True)
        assert torch.equal(plain, captured) and torch.equal(total, captured_total)
        del captured, captured_total
        before, used = used, torch.cuda.memory_allocated()
    assert used == before


WAITS = """
import torch
from compress.errors import EnvironmentProblem
from compress.replay import Replay

outside = torch.cuda.current_stream()
with Replay(lambda x: print(x.sum().item()), [], torch.device("cuda"), True, "the.switch") as replay:
    for _ in range(3):
        replay(torch.ones(2))
    try:
        replay(torch.ones(2))
    except EnvironmentProblem as error:
        assert "the.switch=false" in str(error), error
        assert torch.cuda.current_stream() == outside
        print("refused")
"""


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_is_refused() -> None:
    """Oracle: EnvironmentProblem on the first call that is captured, the stream as before. In a process of its own:
    what torch's allocator is like after a capture that failed is not defined."""
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True)
    assert done.stdout.split() == ["2.0", "2.0", "2.0", "refused"], done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_graphs_change_no_byte(
    at_once: int,
    dtype: torch.dtype,
    deep_model_dir: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the same run without graphs; both loops do replay."""
    replays: list[str] = []
    real = Replay._replay
    monkeypatch.setattr(Replay, "_replay", lambda self, *a: replays.append(self.switch) or real(self, *a))
    graphs_against_none(torch.device("cuda"), dtype, at_once, 512, deep_model_dir, tmp_path, monkeypatch)
    assert set(replays) == {"quant.learn.graphs", "quant.tune.graphs"} and len(replays) > 60
