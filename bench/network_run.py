"""Check and time the variants of one setting, in turn, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import resunet_fast as rf
from resunet_fast.testing.compare import one_line
from resunet_fast.testing.memory import kept_bytes

from .layers import layers, network_share
from .networks import INFERENCE, NCHW, TRAINING, Network, Setting, Variant, choose, weights
from .roofline import Ceilings
from .timing import Clock, Timing, captured, fitting_rounds, interleaved, ratio

# A variant is timed only if its logits and gradients are at most this many times further from the
# judge than the worst eager variant in the same precision.
ALLOWED = 2.0
# Errors below these are not held against a variant. Batch statistics of few positions magnify
# float32's rounding by hundreds, more in one order of sums than in another; a ReLU mask that flips
# near zero moves the gradient of a network with random weights by a hundredth, and whether eager's
# has one is luck. tests/ holds each operator, with the mask imposed, to far tighter bounds.
NEGLIGIBLE = {"logits": 1e-4, "gradient": 5e-2}
ROUNDS = (3, 25)


class Session:
    """One variant's network, its image and its call."""

    def __init__(self, variant: Variant, setting: Setting) -> None:
        start = time.perf_counter()
        self.setting, self.variant = setting, variant
        self.network: Network = variant.build(setting)
        self.build_seconds = time.perf_counter() - start
        image = random(1, setting, 3)
        dtype = torch.bfloat16 if setting.cast else torch.float32
        self.image = image.to(dtype).contiguous(memory_format=variant.layout)
        self.target = random(2, setting, 2)
        start = time.perf_counter()
        self.results = self._results()
        self.first_call_seconds = time.perf_counter() - start
        self.call: Callable[[], object] = self.once
        if variant.graph:
            self.call = captured(self.once, setting.device)

    def logits(self) -> Tensor:
        if self.variant.compiled:
            # Results of the call before may be overwritten: nobody holds them.
            torch.compiler.cudagraph_mark_step_begin()
        # A network without a module has a precision of its own. Without autocast's cache of cast
        # weights, which a recorded graph would not refresh.
        device, wanted = self.setting.device, self.setting.autocast and self.network.module
        with torch.autocast(device, torch.bfloat16, bool(wanted), cache_enabled=False):
            return self.network.call(self.image)

    def loss(self) -> Tensor:
        return (self.logits() * self.target).mean()

    def once(self) -> object:
        """The call that is timed."""
        if self.setting.phase == INFERENCE:
            with torch.no_grad():
                return self.logits()
        assert self.network.module is not None
        self.network.module.zero_grad(set_to_none=True)
        self.loss().backward()
        return None

    def _results(self) -> dict[str, Tensor]:
        """Logits, and in training all gradients, of the first call, on the CPU in float64."""
        if self.setting.phase == INFERENCE:
            with torch.no_grad():
                return {"logits": self.logits().detach().cpu().double()}
        module = self.network.module
        assert module is not None
        module.zero_grad(set_to_none=True)
        logits = self.logits()
        (logits * self.target).mean().backward()
        grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        # A training pass moves the running statistics; every later one starts from the same.
        module.load_state_dict(weights(self.setting.width))
        return {
            "logits": logits.detach().cpu().double(),
            "gradient": torch.cat(grads).cpu().double(),
        }


def random(seed: int, setting: Setting, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.batch, channels, setting.size, setting.size)
    return torch.randn(shape, generator=generator).to(setting.device)


@lru_cache(maxsize=1)
def judge(setting: Setting) -> dict[str, Tensor]:
    """The plain network's results in float64; on a GPU, whose memory it would not fit, float32.

    Args:
        setting: in "fp32": one judge serves every precision.
    """
    precise = torch.float64 if setting.device == "cpu" else torch.float32

    def build(_: Setting) -> Network:
        model = rf.reference.ResUNet(3, 2, base_width=setting.width)
        model.load_state_dict(weights(setting.width))
        model.to(setting.device, precise).train(setting.phase == TRAINING)
        return Network(lambda image: model(image.to(precise)), model)

    with _without_tf32():
        return Session(Variant("judge", build, NCHW), setting).results


def _without_tf32() -> AbstractContextManager[Any]:
    if not torch.cuda.is_available():
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {kind: float((results[kind] - e).norm() / e.norm()) for kind, e in exact.items()}


def describe(session: Session, exact: dict[str, Tensor]) -> dict[str, Any]:
    """A variant's row before it is timed."""
    variant, network = session.variant, session.network
    row: dict[str, Any] = {
        "ours": variant.ours,
        "note": network.note,
        "error": errors(session.results, exact),
        "build_seconds": session.build_seconds,
        "first_call_seconds": session.first_call_seconds,
        "kept_for_backward_bytes": None,
        "wrong": False,
    }
    if session.setting.phase == TRAINING and network.module is not None and not variant.compiled:
        row["kept_for_backward_bytes"] = kept_bytes(session.loss, network.module)
    if session.setting.device == "cuda":
        row["peak"] = peak_memory(session.once)
    return row


def peak_memory(call: Callable[[], object]) -> dict[str, int]:
    """The most bytes that one call had allocated, and reserved, on the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


def mark_wrong(rows: dict[str, dict[str, Any]]) -> None:
    """Mark the rows that are too far from the judge, measured by eager; NaN never passes."""
    for name, row in rows.items():
        for kind, error in row["error"].items():
            eager = [r["error"][kind] for n, r in rows.items() if n.startswith("eager")]
            allowed = ALLOWED * max([*eager, NEGLIGIBLE[kind]])
            if not (name.startswith("eager") or error <= allowed):
                row["wrong"] = True


def measure(
    setting: Setting,
    ceilings: Ceilings,
    *,
    budget: float,
    compile: bool = True,
    variants: Sequence[Variant] | None = None,
    rounds: int | None = None,
) -> dict[str, Any]:
    """Check, then time every variant that takes part in a setting.

    Args:
        setting: phase, precision, size, device.
        ceilings: of this machine in this precision.
        budget: seconds for the timed rounds (at least three are timed).
        compile: include torch.compile's variants.
        variants: instead of the table's.
        rounds: instead of as many as the budget allows.
    """
    table = {} if variants is None else {"variants": tuple(variants)}
    choice = choose(setting, compile=compile, **table)
    # Every setting compiles the same model anew; none may count as another's recompile.
    torch._dynamo.reset()
    exact = judge(replace(setting, precision="fp32"))
    rows: dict[str, dict[str, Any]] = {}
    sessions: dict[str, Session] = {}
    for variant in tqdm(choice.variants, desc=f"{setting}: check", unit="variant"):
        try:
            sessions[variant.name] = Session(variant, setting)
        except Exception as error:
            # Whatever another runtime raises where it cannot export or compile the network is named
            # in the table, and its row is missing; ours must not fail.
            if variant.ours:
                raise
            choice.missing[variant.name] = f"failed: {one_line(error)}"
            continue
        rows[variant.name] = describe(sessions[variant.name], exact)
    mark_wrong(rows)
    calls = {name: s.call for name, s in sessions.items() if not rows[name]["wrong"]}
    samples = _timed(setting, calls, budget, rounds)
    some = layers(setting.batch, setting.size, setting.size, base_width=setting.width)
    for name, times in samples.items():
        timing = Timing.of(times)
        phase = "training" if setting.phase == TRAINING else "inference"
        rows[name]["ms"] = timing.json()
        rows[name].update(network_share(some, phase, setting.element, ceilings, timing.median))
    return {
        "setting": asdict(setting),
        "variants": rows,
        "ratios": _ratios(rows, samples),
        "missing": choice.missing,
    }


def _timed(
    setting: Setting, calls: dict[str, Callable[[], object]], budget: float, rounds: int | None
) -> dict[str, list[float]]:
    clock = Clock(setting.device)
    start = time.perf_counter()
    interleaved(calls, 0, warmup=1, clock=clock)
    seconds = time.perf_counter() - start
    count = rounds or fitting_rounds(seconds, budget - seconds, *ROUNDS)
    with tqdm(total=count * len(calls), desc=f"{setting}: time", unit="call") as bar:
        return interleaved(calls, count, warmup=0, progress=bar.update, clock=clock)


def _ratios(
    rows: dict[str, dict[str, Any]], samples: dict[str, list[float]]
) -> dict[str, dict[str, Any]]:
    """Every variant of ours against every peer, round by round."""
    ours = [name for name in samples if rows[name]["ours"]]
    peers = [name for name in samples if not rows[name]["ours"]]
    return {
        name: {peer: ratio(samples[peer], samples[name]).json() for peer in peers} for name in ours
    }
