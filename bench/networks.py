"""The table of network variants: every way to run the model that is timed, ours and the peers'.

A new way to run it is one builder and one line of :data:`VARIANTS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import resunet_fast as rf

from . import peers

NCHW, NHWC = torch.contiguous_format, torch.channels_last
TRAINING, INFERENCE = "training", "inference"


@dataclass(frozen=True)
class Setting:
    """What is run: one phase in one precision on one size.

    Args:
        phase: "training" (forward and backward, no optimiser) or "inference".
        precision: "fp32" or "bf16".
        batch, size, width: images, their side, the network's base width.
        device: "cpu" or "cuda".
    """

    phase: str
    precision: str
    batch: int
    size: int
    width: int
    device: str = "cpu"

    @property
    def autocast(self) -> bool:
        """Bfloat16 is autocast's, but in inference on a GPU, where the weights are cast once."""
        return self.precision == "bf16" and not self.cast

    @property
    def cast(self) -> bool:
        return self.precision == "bf16" and self.phase == INFERENCE and self.device == "cuda"

    @property
    def element(self) -> int:
        return 2 if self.precision == "bf16" else 4

    def __str__(self) -> str:
        size = f"{self.batch}x3x{self.size}x{self.size}"
        return f"{self.phase} {self.precision}, {size}, width {self.width}, {self.device}"


@dataclass(frozen=True)
class Network:
    """What a variant runs.

    Args:
        call: image to logits.
        module: the owner of the parameters; None where they are not to be seen or trained, as in
            another runtime, which then has its own precision too: autocast is left off.
        note: what to say of it, such as the precision that a runtime really uses.
    """

    call: Callable[[Tensor], Tensor]
    module: nn.Module | None = None
    note: str = ""


@dataclass(frozen=True)
class Variant:
    """A line of the table.

    Args:
        name: as the tables show it.
        build: makes the network for a setting.
        layout: of the image.
        ours: whether it is this project's, not a peer.
        phases, precisions, devices: where it takes part.
        requires: packages without which it is announced as missing.
        compiled: it goes through torch.compile, which `--no-compile` leaves out.
        graph: on a GPU, its calls are recorded once and replayed as a CUDA graph.
    """

    name: str
    build: Callable[[Setting], Network]
    layout: torch.memory_format = NHWC
    ours: bool = False
    phases: tuple[str, ...] = (TRAINING, INFERENCE)
    precisions: tuple[str, ...] = ("fp32", "bf16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    requires: tuple[str, ...] = ()
    compiled: bool = False
    graph: bool = False

    def joins(self, setting: Setting) -> bool:
        return (
            setting.phase in self.phases
            and setting.precision in self.precisions
            and setting.device in self.devices
        )

    def missing(self) -> str:
        """Which package is not installed, as a sentence; empty: none."""
        absent = [name for name in self.requires if find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else ""


@cache
def weights(width: int) -> dict[str, Tensor]:
    """One state dict for every variant; its running statistics have seen random images."""
    torch.manual_seed(0)
    model = rf.reference.ResUNet(3, 2, base_width=width)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 3, 32, 32, generator=generator))
    return model.state_dict()


def prepared(model: nn.Module, setting: Setting, layout: torch.memory_format) -> nn.Module:
    """Bring a model to its weights, device, mode and layout."""
    model.load_state_dict(weights(setting.width))
    model.to(setting.device)
    if setting.cast:
        model.to(torch.bfloat16)
    if layout == NHWC:
        model.to(memory_format=NHWC)  # type: ignore[call-overload]
    return model.train(setting.phase == TRAINING)


def plain(layout: torch.memory_format) -> Callable[[Setting], Network]:
    def build(setting: Setting) -> Network:
        model = rf.reference.ResUNet(3, 2, base_width=setting.width)
        prepared(model, setting, layout)
        return Network(model, model)

    return build


def compiled(**options: Any) -> Callable[[Setting], Network]:
    """The plain model through torch.compile, in channels_last."""

    def build(setting: Setting) -> Network:
        module = plain(NHWC)(setting).module
        assert module is not None
        return Network(torch.compile(module, fullgraph=True, **options), module)

    return build


def fast(layout: torch.memory_format, **options: bool) -> Callable[[Setting], Network]:
    def build(setting: Setting) -> Network:
        model = rf.ResUNet(3, 2, base_width=setting.width, **options)
        prepared(model, setting, layout)
        return Network(model, model)

    return build


def frozen(setting: Setting) -> Network:
    """The immutable copy for inference, alone in memory: its model is gone."""
    model = prepared(rf.ResUNet(3, 2, base_width=setting.width), setting, NHWC)
    start = time.perf_counter()
    copy = rf.freeze(model, torch.bfloat16 if setting.precision == "bf16" else None)
    return Network(copy, None, f"rf.freeze took {time.perf_counter() - start:.2f} s")


def foreign(runtime: Callable[..., peers.Foreign]) -> Callable[[Setting], Network]:
    """The plain model exported to another runtime."""

    def build(setting: Setting) -> Network:
        module = plain(NCHW)(setting).module
        assert module is not None
        example = torch.randn(setting.batch, 3, setting.size, setting.size)
        made = runtime(module, example, setting.precision, torch.get_num_threads())
        return Network(made.call, None, made.note)

    return build


def _compile_line(name: str, options: dict[str, Any], **where: Any) -> Variant:
    return Variant(f"torch.compile {name}", compiled(**options), compiled=True, **where)


_GPU: dict[str, Any] = {"devices": ("cuda",)}
_CPU_INFERENCE: dict[str, Any] = {"devices": ("cpu",), "phases": (INFERENCE,), "layout": NCHW}
_MAX_FROZEN = {"max_autotune": True, "triton.cudagraphs": True, "freezing": True}

VARIANTS = (
    Variant("eager NCHW", plain(NCHW), NCHW),
    Variant("eager channels_last", plain(NHWC)),
    Variant("eager channels_last, CUDA graph", plain(NHWC), graph=True, **_GPU),
    _compile_line("default", {}, phases=(TRAINING,)),  # in inference freezing is stronger
    _compile_line("freezing", {"options": {"freezing": True}}, phases=(INFERENCE,)),
    _compile_line("reduce-overhead", {"mode": "reduce-overhead"}, **_GPU),
    _compile_line("max-autotune", {"mode": "max-autotune"}, **_GPU),
    _compile_line("max-autotune, freezing", {"options": _MAX_FROZEN}, phases=(INFERENCE,), **_GPU),
    Variant(
        "ONNX Runtime",
        foreign(peers.onnx_runtime),
        precisions=("fp32",),
        requires=("onnxruntime", "onnx", "onnxscript"),
        **_CPU_INFERENCE,
    ),
    Variant("OpenVINO", foreign(peers.openvino), requires=("openvino",), **_CPU_INFERENCE),
    Variant("fast NCHW", fast(NCHW), NCHW, ours=True),
    Variant("fast channels_last", fast(NHWC), ours=True),
    Variant(
        "fast channels_last, recompute", fast(NHWC, recompute=True), ours=True, phases=(TRAINING,)
    ),
    Variant("fast channels_last, CUDA graph", fast(NHWC), ours=True, graph=True, **_GPU),
    # On a GPU it replays a graph of its own, between copies of image and logits.
    Variant("freeze", frozen, ours=True, phases=(INFERENCE,)),
    Variant("freeze, CUDA graph", frozen, ours=True, phases=(INFERENCE,), graph=True, **_GPU),
)


@dataclass
class Choice:
    """The variants that take part in a setting, and why others do not."""

    variants: list[Variant] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def choose(
    setting: Setting, *, compile: bool = True, variants: tuple[Variant, ...] = VARIANTS
) -> Choice:
    """Which variants take part, and by name those that would if they were installed."""
    choice = Choice()
    for variant in variants:
        if not variant.joins(setting):
            continue
        reason = variant.missing() or ("left out" if variant.compiled and not compile else "")
        if reason:
            choice.missing[variant.name] = reason
        else:
            choice.variants.append(variant)
    return choice
