"""FLOPs against torch's counter, bytes against counting them one by one."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench import ceilings, predictions
from bench.layers import MODES, layers, network_share, network_work, predict, total, traffic
from bench.roofline import BACKWARD, FORWARD, Ceilings, Work, floor, operator_work, share
from resunet_fast import reference
from resunet_fast.registry import OPERATORS
from resunet_fast.testing import CASES, Case, make_inputs
from resunet_fast.testing.checks import differentiable


def counted(function: Any, *args: Any) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        result = function(*args)
    return counter.get_total_flops(), result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_operations_of_every_case_are_those_that_torch_counts(case: Case) -> None:
    grad = differentiable(case)
    inputs = make_inputs(case, requires_grad=grad)
    compute = OPERATORS[case.operator].implementations["reference"].compute
    forward, result = counted(compute, *inputs)
    assert operator_work(case.operator, inputs, "forward").flops == forward
    if not grad:
        return
    outputs = result if isinstance(result, tuple) else (result,)
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    start = outputs[0]
    backward, _ = counted(
        lambda: torch.autograd.grad(start, wanted, torch.ones_like(start), allow_unused=True)
    )
    # A weight gradient in groups counts for torch as if it were dense.
    surplus = (case.options.get("groups", 1) - 1) * forward
    assert operator_work(case.operator, inputs, "backward").flops == backward - surplus


class Memory:
    """Counts elements one by one, as a two-pass implementation touches them."""

    def __init__(self, element: int) -> None:
        self.element, self.bytes = element, 0

    def touch(self, tensor: Tensor, times: int = 1) -> None:
        for _ in range(times):
            for value in tensor.flatten():
                self.bytes += value.element_size()


@pytest.mark.parametrize(
    ("frozen", "residual", "pool"),
    list(product([False, True], [None, "tensor", "norm"], [False, True])),
)
def test_bytes_of_batch_norm_are_those_of_two_passes(
    frozen: bool, residual: str | None, pool: bool
) -> None:
    options = {"frozen": frozen, "residual": residual, "pool": pool}
    case = Case("bn_act", "brute", (2, 3, 4, 6), options)
    inputs = make_inputs(case, torch.bfloat16, requires_grad=True)
    x, r = inputs[0], inputs[6]
    vectors = [v for v in inputs if isinstance(v, Tensor) and v.dim() == 1]
    mean = torch.zeros(3)
    memory = Memory(2)
    if not frozen:  # statistics first
        memory.touch(x)
        for _ in range(2):
            memory.touch(mean)
        if residual == "norm":
            memory.touch(r)
            for _ in range(2):
                memory.touch(mean)
    memory.touch(x, 2)  # read, and z written
    for vector in vectors:
        memory.touch(vector)
    if residual:
        memory.touch(r)
    if pool:
        memory.touch(x[:, :, ::2, ::2])
    assert operator_work("bn_act", inputs, "forward").nbytes == memory.bytes


def test_bytes_of_batch_norm_backward_are_those_of_two_passes() -> None:
    case = Case("bn_act", "brute", (2, 3, 4, 6), {"residual": "tensor", "pool": True})
    inputs = make_inputs(case, torch.bfloat16, requires_grad=True)
    x, vector = inputs[0], torch.zeros(3)
    memory = Memory(2)
    for _ in range(2):  # sums, then gradients: dz, the pool's gradient, x, and z for the mask
        memory.touch(x, 3)
        memory.touch(x[:, :, ::2, ::2])
    memory.touch(x, 2)  # dx and dr written
    memory.touch(vector, 3 + 1 + 2)  # mean, var, weight, bias read; dweight, dbias written
    assert operator_work("bn_act", inputs, "backward").nbytes == memory.bytes


@pytest.mark.parametrize("stats", [True, False], ids=["batch", "frozen"])
def test_bytes_of_a_convolution_and_its_batch_norm(stats: bool) -> None:
    case = Case("conv_bn_act", "brute", (2, 3, 4, 6), {"out": 5, "frozen": not stats})
    inputs = make_inputs(case, torch.bfloat16)
    inputs[-1] = False  # keep nothing for backward
    x, weight, z, vector = inputs[0], inputs[2], torch.zeros(2, 5, 4, 6).bfloat16(), torch.zeros(5)
    memory = Memory(2)
    for tensor in (x, weight, z):
        memory.touch(tensor)
    memory.touch(inputs[3])  # the convolution's bias
    memory.touch(vector, 4)  # weight, bias, and the statistics, returned or given
    if stats:
        memory.touch(z, 2)  # the convolution's result, written and read once more
    assert operator_work("conv_bn_act", inputs, "forward").nbytes == memory.bytes


def test_bytes_of_the_backward_of_a_pre_activation_unit() -> None:
    case = Case("bn_act_conv", "brute", (2, 3, 4, 6), {"out": 5})
    inputs = make_inputs(case, torch.bfloat16, requires_grad=True)
    x, weight, bias = inputs[0], inputs[7], inputs[8]
    memory = Memory(2)
    memory.touch(torch.zeros(2, 5, 4, 6).bfloat16())  # the result's gradient
    memory.touch(x, 2)  # z's gradient, written and summed at once, and read
    memory.touch(x, 2)  # x, for the sums and for its gradient
    memory.touch(x, 2)  # z for the weight's gradient; x's gradient written
    memory.touch(weight, 2)
    memory.touch(bias)
    memory.touch(torch.zeros(3), 4 + 2)  # mean, var, weight, bias read; two gradients written
    assert operator_work("bn_act_conv", inputs, "backward").nbytes == memory.bytes


def test_bytes_of_upsampling_and_of_a_convolution_are_operands_and_result() -> None:
    case = Case("upsample", "brute", (2, 3, 4, 5), {"size": [8, 9], "mode": "nearest"})
    inputs = make_inputs(case, torch.float32, requires_grad=True)
    small, large = 2 * 3 * 4 * 5 * 4, 2 * 3 * 8 * 9 * 4
    for direction in ("forward", "backward"):
        assert operator_work("upsample", inputs, direction).nbytes == small + large
    case = Case("conv2d", "brute", (2, 3, 4, 5), {"out": 7, "bias": False})
    inputs = make_inputs(case, torch.float32, requires_grad=True)
    x, y, w = 2 * 3 * 4 * 5 * 4, 2 * 7 * 4 * 5 * 4, 7 * 3 * 9 * 4
    assert operator_work("conv2d", inputs, "forward").nbytes == x + y + w
    assert operator_work("conv2d", inputs, "backward").nbytes == 2 * x + y + 2 * w


def test_bytes_of_what_writes_into_its_arguments() -> None:
    x, skip = torch.zeros(2, 3, 4, 5), torch.zeros(2, 7, 8, 10)
    inputs = [x, skip, torch.zeros(2, 10, 8, 10), "bilinear"]
    moved = 4 * 2 * (3 * 20 + 7 * 80 + 10 * 80)
    assert operator_work("upsample_concat", inputs, "forward") == Work(0, moved)
    stats = [torch.zeros(3) for _ in range(5)]
    inputs = [*stats[:2], torch.tensor(0), *stats[2:], 40, 0.1]
    moved = 4 * 3 * 5 + 8 + 4 * 3 * 2 + 8  # all read, two statistics and the counter written
    assert operator_work("update_running_stats", inputs, "forward") == Work(0, moved)


def test_every_operator_has_its_formulas() -> None:
    backward = {name.removesuffix("_backward") for name in OPERATORS if name.endswith("_backward")}
    assert set(FORWARD) == {name for name in OPERATORS if not name.endswith("_backward")}
    assert backward <= set(BACKWARD) < set(FORWARD)


class Tally(TorchDispatchMode):
    """Bytes that eager's operators read and write, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            touched = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            count = sum(t.numel() * t.element_size() for t in touched)
            self.bytes[func.name()] = self.bytes.get(func.name(), 0) + count
        return result


def eager(size: int, batch: int, width: int) -> tuple[torch.nn.Module, Tensor]:
    with torch.device("meta"):
        return reference.ResUNet(3, 2, base_width=width), torch.empty(batch, 3, size, size)


def test_operations_of_the_network_are_those_that_torch_counts_at_full_size() -> None:
    model, x = eager(512, 16, 64)
    some = layers(16, 512, 512)
    flops, y = counted(model, x)
    assert network_work(some, "forward", 2).flops == flops
    parameters = list(model.parameters())
    backward, _ = counted(lambda: torch.autograd.grad(y, parameters, torch.empty_like(y)))
    assert network_work(some, "backward", 2).flops == backward
    assert network_work(some, "training", 2).flops == flops + backward


def test_bytes_of_the_eager_network_are_those_that_its_operators_touch() -> None:
    model, x = eager(64, 2, 16)
    some = layers(2, 64, 64, base_width=16)
    with torch.no_grad(), Tally() as tally:
        model.eval()(x)
    expected = sum(tally.bytes.values())
    # Biases and batch norm's vectors are not counted.
    assert network_work(some, "inference", 4, "eager").nbytes == pytest.approx(expected, rel=2e-3)

    with Tally() as tally:
        y = model.train()(x)
    normalised = sum(4 * layer.positions * layer.out for layer in some if layer.kernel == 3)
    expected = sum(tally.bytes.values()) + normalised  # batch norm reads its source twice
    assert network_work(some, "forward", 4, "eager").nbytes == pytest.approx(expected, rel=2e-3)

    with Tally() as tally:
        torch.autograd.grad(y, list(model.parameters()), torch.empty_like(y))
    twice = sum(4 * layer.positions * layer.out for layer in some if not layer.first)
    # Batch norm's backward makes two passes over two tensors; a convolution's reads its gradient
    # once for each of its two products.
    expected = sum(tally.bytes.values()) + 2 * normalised + twice
    assert network_work(some, "backward", 4, "eager").nbytes == pytest.approx(expected, rel=3e-3)


def test_bytes_of_the_ideal_decoder_layer_are_its_sources_weight_and_result() -> None:
    layer = next(each for each in layers(2, 64, 64, base_width=16) if each.skip)
    low = 2 * 256 * 4 * 4  # the level below
    skip = y = 2 * 128 * 8 * 8
    weight = 9 * (256 + 128) * 128
    assert traffic(layer, "ideal", "inference", 2).total == 2 * (low + skip + y + weight)


@pytest.mark.parametrize("phase", ["inference", "forward", "backward"])
def test_every_way_to_run_moves_less_than_the_one_before(phase: str) -> None:
    some = layers(2, 64, 64, base_width=16)
    moved = [network_work(some, phase, 2, mode).nbytes for mode in MODES]
    assert moved == sorted(moved, reverse=True)
    assert len(set(moved)) == len(moved)


def test_the_larger_of_the_two_times_binds() -> None:
    known = Ceilings(1e9, 1e12, "float32")
    memory, arithmetic = floor(Work(1e6, 1e6), known), floor(Work(1e10, 1e6), known)
    assert (memory.ms, memory.binds) == (1.0, "memory")
    assert (arithmetic.ms, arithmetic.binds) == (10.0, "arithmetic")
    assert share(Work(1e10, 1e6), known, 40.0)["roofline_percent"] == 25.0
    some = layers(2, 64, 64, base_width=16)
    least = total(predict(some, "inference", "ideal", known, element=4))
    row = network_share(some, "inference", 4, known, 2 * least)
    assert row["roofline_percent"] == pytest.approx(50.0)
    assert row["binds"] == "memory"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ceilings_are_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ceilings.measure("cpu", dtype, small=True)
    assert found.source == "measured"
    assert found.dtype == str(dtype).removeprefix("torch.")
    # The faster of the two ways to compute the product counts.
    times = iter([0.75, 0.5] * ceilings.RUNS + [0.25] * ceilings.RUNS)
    monkeypatch.setattr(ceilings, "Clock", lambda _: lambda call: next(times))
    known = ceilings.measure.__wrapped__("cpu", dtype, small=True)
    assert known.flops_per_second == pytest.approx(2 * 64**3 / 0.5e-3)
    assert known.bytes_per_second == pytest.approx(2 * 4 * 4096 / 0.25e-3)


def test_predictions_name_their_assumptions_and_no_measurement() -> None:
    text = predictions.text()
    assert "Assumed, not measured: 790 TFLOP/s and 4.3 TB/s" in text
    assert "not yet run on a GPU" in text
    some = layers(16, 512, 512)
    compiled = total(predict(some, "inference", "compiled", predictions.ASSUMED))
    ideal = total(predict(some, "inference", "ideal", predictions.ASSUMED))
    assert 1.2 < compiled / ideal < 1.5
