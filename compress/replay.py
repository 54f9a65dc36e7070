"""A step of training or sampling, recorded once on a GPU and replayed: a CUDA graph instead of thousands of launches.

A small model's forward and backward pass are kernels of a few microseconds each, and Python takes several times as long
to launch them as the GPU to run them. A graph is one launch.

What a step must keep to, so that the graph computes the same bytes as the function that it was made from:
  * It begins without gradients and leaves one in each parameter that it reaches. In the graph these are made as they
    are outside of it: the first backward pass makes them and later ones of the same step add to them. They lie in the
    graph's own memory, every replay writes them anew, and so whoever uses them may write to them and set `grad` to
    None: there is nothing to set to zero.
  * All else that it reads or adds to has its place before the first call and keeps it: a graph knows addresses alone.
    Parameters are changed in place.
  * It never waits for the GPU (`item`, a comparison in an `if`) and copies nothing from the CPU.
  * It draws no random numbers.
Of training the optimizer stays outside, because its rates change with every step: it works on many tensors at a time,
in some tens of launches, which are made while the graph runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import EnvironmentProblem

# Before a capture kernels must have been loaded and libraries set up, which the first calls do.
_PLAIN_CALLS = 3


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace of megabytes for each stream that it has ever worked on."""
    return torch.cuda.Stream(device)


class Replay:
    """A step, to be called as it is, which a graph takes the place of. A context that gives the memory back.

    The first calls are steps like all others, made plainly: nothing has to be undone. The first kind of call that comes
    more often than _PLAIN_CALLS is captured; calls of another kind (a smaller last batch) stay plain. Kinds are told
    apart by the inputs' shapes and dtypes and by the values of keyword arguments.

    Args:
        step: called with tensors, and keywords that are not tensors.
        parameters: all those that it may leave gradients in; none of a step of sampling.
        device: where the graph's inputs lie; its call may get them from the CPU too.
        captured: False: every call is plain, as it must be where `can_capture` says no. Also where memory may be short:
            from the capture on, what the step has at its peak is not to be had for anything else.
        switch: the setting that turns capturing off, for the error.
    """

    def __init__(
        self, step: Callable[..., None], parameters: Sequence[nn.Parameter], device: torch.device, captured: bool,
        switch: str,
    ) -> None:  # fmt: skip
        self.step, self.parameters, self.device, self.switch = step, parameters, device, switch
        self.stream = _capture_stream(device) if captured else None
        self.seen: Counter[Hashable] = Counter()
        self.kind: Hashable = None  # of the calls that the graph stands for
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.gradients: list[Tensor | None] = []

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        """Give back the graph and its memory: gradients lie there and are gone too."""
        if self.graph is None:
            return
        torch.cuda.synchronize(self.device)  # it may be running
        for p in self.parameters:
            p.grad = None
        self.gradients, self.inputs = [], []
        self.graph.reset()
        self.graph = None
        torch.cuda.empty_cache()  # the memory of a graph is of no use to others before

    def __call__(self, *inputs: Tensor, **static: Hashable) -> None:
        """Make one step.

        Raises:
            EnvironmentProblem: it cannot be captured.
        """
        if self.stream is None:
            self.step(*inputs, **static)
            return
        kind = tuple((x.shape, x.dtype) for x in inputs), tuple(static.items())
        self.seen[kind] += 1
        if self.graph is None and self.seen[kind] > _PLAIN_CALLS:
            self._capture(self.stream, inputs, static)
            self.kind = kind
        if self.graph is None or kind != self.kind:
            self._plain(self.stream, inputs, static)
        else:
            self._replay(self.graph, inputs)

    def _plain(self, stream: torch.cuda.Stream, inputs: Sequence[Tensor], static: dict[str, Any]) -> None:
        """On the stream of the capture, so that its workspaces are there when that begins."""
        outside = torch.cuda.current_stream(self.device)
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            self.step(*inputs, **static)
        # Gradients are used outside from here. What is freed there is not written over too early: the stream is only
        # used here and waits first.
        outside.wait_stream(stream)

    def _capture(self, stream: torch.cuda.Stream, inputs: Sequence[Tensor], static: dict[str, Any]) -> None:
        """Launches nothing; the gradients that it leaves are places without values as yet."""
        assert all(p.grad is None for p in self.parameters), "a step begins without gradients"
        self.inputs = [x.to(self.device, copy=True) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            # `graph` alone would leave its stream in place after an error; it frees what plain calls left behind
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
                self.step(*self.inputs, **static)
        except RuntimeError as error:
            cause = error.__context__ or error  # ending the capture fails too, with fewer words
            reason = str(cause).partition("\n")[0]
            raise EnvironmentProblem(
                f"a step cannot be captured in a CUDA graph ({reason}): it may do nothing that waits for the "
                f"GPU, as routed experts and dynamic rotary tables do; with {self.switch}=false the run goes on where "
                "this stopped"
            ) from error
        self.gradients = [p.grad for p in self.parameters]
        self.graph = graph

    def _replay(self, graph: torch.cuda.CUDAGraph, inputs: Sequence[Tensor]) -> None:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
