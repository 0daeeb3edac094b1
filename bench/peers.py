"""Other runtimes for the network, each optional; and what is known and not measured."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# Announced in every table.
NOT_MEASURED = {
    "apex": "fuses batch norm, ReLU and addition, but is built from source for each torch, and was"
    " not built here",
    "TensorRT": "inference only, needs its own packages and a conversion per GPU, which were not"
    " installed here",
}


@dataclass(frozen=True)
class Foreign:
    """A network in another runtime: image to logits on the CPU, and what to say of it."""

    call: Callable[[Tensor], Tensor]
    note: str = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print about themselves."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def onnx_runtime(model: nn.Module, example: Tensor, precision: str, threads: int) -> Foreign:
    """The exported model in ONNX Runtime's CPU provider, every graph optimisation on."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "model.onnx")
        with _quiet():
            torch.onnx.export(model, (example,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: image.numpy()})[0])

    return Foreign(call, f"version {onnxruntime.__version__}, float32")


def openvino(model: nn.Module, example: Tensor, precision: str, threads: int) -> Foreign:
    """The traced model in OpenVINO's CPU plugin, in the precision that it is asked for.

    Left to itself the plugin computes in bfloat16 where the processor has it: the precision that it
    really uses is read back and reported.
    """
    import openvino as ov

    with _quiet():
        converted = ov.convert_model(model, example_input=example, input=list(example.shape))
    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    wish = {"fp32": "f32", "bf16": "bf16"}[precision]
    compiled = core.compile_model(converted, "CPU", {**settings, "INFERENCE_PRECISION_HINT": wish})
    used = _precision(compiled.get_property("INFERENCE_PRECISION_HINT"))
    left_alone = _precision(core.get_property("CPU", "INFERENCE_PRECISION_HINT"))

    def call(image: Tensor) -> Tensor:
        # A copy: the runtime writes the next result into the same memory.
        return torch.from_numpy(compiled(image.numpy())[0].copy())

    return Foreign(call, f"computes in {used}; left to itself it would in {left_alone}")


def _precision(hint: object) -> str:
    name = getattr(hint, "get_type_name", lambda: str(hint))()
    return str(name).replace("dynamic", "a precision of its choice")
