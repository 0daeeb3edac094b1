"""CUDA graphs of a frozen network: one per input shape, a bounded number of them.

Not yet run on a GPU: capture is a parameter, and the tests pass one that records on the CPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import ClassVar

import torch
from torch import Tensor

from ..registry import forced_backend

Run = Callable[[Tensor], Tensor]
Capture = Callable[[Run, Tensor], Run]

_WARMUP = 3  # calls before capture, in which libraries choose their algorithms and allocate


class GraphCache:
    """Replays `run` where it has been captured for a shape, captures it where it has not.

    A graph owns its buffers, so the least recently used one is dropped beyond the limit. The result
    is a copy that later calls do not touch.

    Args:
        capture: turns `run` and an example into a function of inputs like the example.
        limit: number of graphs kept.
    """

    LIMIT: ClassVar[int] = 4

    def __init__(self, capture: Capture, limit: int = LIMIT) -> None:
        self._capture = capture
        self._limit = limit
        self._graphs: OrderedDict[tuple[object, ...], Run] = OrderedDict()
        # Two threads must not interleave filling, replaying and copying one graph's buffers.
        self._lock = Lock()

    def __call__(self, run: Run, x: Tensor) -> Tensor:
        """Return run(x)."""
        key = _key(x)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._graphs[key] = self._capture(run, x)
            self._graphs.move_to_end(key)
            if len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)
            return graph(x)

    def __len__(self) -> int:
        return len(self._graphs)


def _key(x: Tensor) -> tuple[object, ...]:
    # Buffers are shared by the replays of one graph: each stream has its own. A captured graph
    # keeps the kernels that these switches chose.
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    cudnn = torch.backends.cudnn
    precision = cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    switches = (forced_backend(), precision, cudnn.enabled, cudnn.deterministic)
    return (tuple(x.shape), x.stride(), x.dtype, x.device, stream, *switches)


def cuda_capture(run: Run, example: Tensor) -> Run:
    """Capture `run` into a CUDA graph with buffers of its own.

    Args:
        run: launches kernels only; its result depends on its argument alone.
        example: a CUDA tensor; its values are not used later.
    """
    with torch.inference_mode(False):  # later calls may be made outside it
        static = torch.empty_like(example)
    static.copy_(example)
    stream = torch.cuda.Stream(example.device)
    stream.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            run(static)
    torch.cuda.current_stream(example.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: what other threads do on the device does not break this capture. Without a
    # stream torch captures one of whichever device came first, and a graph of another is empty.
    with (
        torch.cuda.device(example.device),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        result = run(static)

    def replay(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return result.clone()

    return replay
