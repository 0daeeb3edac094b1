"""cuDNN's graph interface (nvidia-cudnn-frontend): convolution, bias, addition, ReLU in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .job import UnavailableError
from .measure import Results

if TYPE_CHECKING:
    from .convolutions import Operands


def conv_bias_relu(o: Operands, operation: str) -> Callable[[], Results]:
    """Build and compile the graph for these operands.

    Args:
        o: operands, bfloat16, channels_last.
        operation: "relu" or "add_relu".

    Raises:
        UnavailableError: cuDNN does not support the graph on this machine.
    """
    import cudnn

    graph = cudnn.pygraph(
        io_data_type=cudnn.data_type.BFLOAT16,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )
    bias = o.b.view(1, -1, 1, 1)
    result = torch.empty_like(o.g)
    x, w, b, z = (graph.tensor_like(t) for t in (o.x, o.w, bias, o.z))
    y = graph.conv_fprop(image=x, weight=w, padding=[1, 1], stride=[1, 1], dilation=[1, 1])
    y = graph.bias(input=y, bias=b)
    operands = {x: o.x, w: o.w, b: bias}
    if operation == "add_relu":
        y = graph.add(a=y, b=z)
        operands[z] = o.z
    y = graph.relu(input=y)
    y.set_output(True).set_data_type(cudnn.data_type.BFLOAT16)
    y.set_dim(list(result.shape)).set_stride(list(result.stride()))
    try:
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    except cudnn.cudnnGraphNotSupportedError as error:
        raise UnavailableError(f"cuDNN does not support the graph: {error}"[:200]) from error
    workspace = torch.empty(graph.get_workspace_size(), device=o.x.device, dtype=torch.uint8)
    handle = cudnn.create_handle()

    def call() -> Results:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute({**operands, y: result}, workspace, handle=handle)
        return [result]

    return call
