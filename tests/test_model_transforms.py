"""What users wrap around a network: compilers, exporters, transforms, checkpoints, threads, DDP."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from networks import AXES, assert_same, image
from networks import one_thread as one_thread
from pairs import SHAPE, assert_same_step, named_pair, pair, step
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import resunet_fast as rf

NAMES = rf.list_models()
POST_AND_PRE = ("resunet", "deep_resunet")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def compiled_step(model: nn.Module, x: Tensor, backend: str) -> dict[str, Tensor | None]:
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    return {key.replace("_orig_mod.", ""): value for key, value in step(compiled, x).items()}


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("name", POST_AND_PRE)
def test_compiles_as_one_graph(name: str, recompute: bool) -> None:
    fast, plain = named_pair(name, width_factors=(1, 2))
    fast.set_recompute(recompute)
    assert_same(compiled_step(fast, image(*SHAPE), "aot_eager"), step(plain, image(*SHAPE)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_every_network_compiles_as_one_graph(name: str, mode: bool) -> None:
    fast, plain = (model.train(mode) for model in named_pair(name))
    x = image(*SHAPE)
    assert_same(compiled_step(fast, x, "aot_eager"), step(plain, x))
    with torch.no_grad():
        assert_same(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), plain(x))


def graphs(model: nn.Module, sizes: list[tuple[int, int]]) -> int:
    """Compile for one size after another; how many graphs it took."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for height, width in sizes:
            x = image(2, 3, height, width)
            assert_same(compiled(x), model(x))
    return counter.frame_count


@pytest.mark.parametrize("downsample", AXES["downsample"])
def test_sizes_become_dynamic_instead_of_recompiling(downsample: str) -> None:
    fast, plain = (model.eval() for model in pair(downsample=downsample, width_factors=(1, 2)))
    sizes = [(12, 16), (20, 24), (28, 32), (16, 40), (24, 12)]
    assert graphs(fast, sizes) <= graphs(plain, sizes) < len(sizes)


def test_compiled_again_when_the_backend_changes() -> None:
    fast, plain = (model.eval() for model in pair(width_factors=(1, 2)))
    x = image(*SHAPE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = plain(x)
        for _ in range(2):
            assert_same(compiled(x), expected)
            with rf.use_backend("reference"):
                assert_same(compiled(x), expected)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", POST_AND_PRE)
def test_inductor(name: str) -> None:
    fast, plain = named_pair(name)
    assert_same(compiled_step(fast, image(*SHAPE), "inductor"), step(plain, image(*SHAPE)))


def test_compiled_under_autocast() -> None:
    model = rf.ResUNet(3, 2, base_width=4, width_factors=(1, 2))
    x = image(2, 3, 8, 10, dtype=torch.float32)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(x), twin(x)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_exports_with_a_fixed_size(name: str) -> None:
    fast, plain = named_pair(name)
    x = image(*SHAPE)
    program = torch.export.export(fast.eval(), (x,))
    assert_same(program.module()(x), plain.eval()(x))


@pytest.mark.parametrize("downsample", AXES["downsample"])
@pytest.mark.parametrize("order", AXES["order"])
def test_exports_with_any_size(order: str, downsample: str) -> None:
    fast, plain = (model.eval() for model in pair(order=order, downsample=downsample))
    dims = {0: Dim("n"), 2: Dim("h", min=8), 3: Dim("w", min=8)}
    x = image(2, 3, 11, 14)
    program = torch.export.export(fast, (x,), dynamic_shapes=(dims,)).module()
    for given in (x, image(1, 3, 8, 9), image(3, 3, 16, 13)):
        assert_same(program(given), plain(given))


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("name", POST_AND_PRE)
def test_an_exported_program_runs_with_and_without_gradients(name: str, recompute: bool) -> None:
    fast, plain = (model.eval() for model in named_pair(name))
    fast.set_recompute(recompute)
    x = image(*SHAPE)
    expected = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    for grad_enabled in (True, False):
        with torch.set_grad_enabled(grad_enabled):
            program = torch.export.export(fast, (x,)).module()
        assert_same(program(x), plain(x))
        actual = torch.autograd.grad(program(x).square().sum(), list(program.parameters()))
        assert_same(actual, expected)
        with torch.no_grad():
            assert_same(program(x), plain(x))


@pytest.mark.parametrize("name", POST_AND_PRE)
def test_traces_for_inference(name: str) -> None:
    fast, plain = (model.eval() for model in named_pair(name))
    with torch.no_grad():
        traced = torch.jit.trace(fast, (image(*SHAPE),))
        for given in (image(*SHAPE), image(1, 3, 12, 11)):
            assert_same(traced(given), plain(given))
    assert_same(traced(image(*SHAPE)), plain(image(*SHAPE)))


def test_shapes_can_be_had_without_data() -> None:
    with torch.device("meta"):
        model = rf.create_model("resunet")
        x = torch.empty(2, 3, 40, 33)
        y = model(x)
        assert y.shape == (2, 1, 40, 33)
        y.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    with torch._subclasses.FakeTensorMode():
        assert rf.create_model("deep_resunet")(torch.empty(2, 3, 32, 33)).shape == (2, 1, 32, 33)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", POST_AND_PRE)
def test_inference_mode(name: str, mode: bool) -> None:
    fast, plain = (model.train(mode) for model in named_pair(name))
    with torch.inference_mode():
        y = fast(image(*SHAPE))
        assert_same(y.clone(), plain(image(*SHAPE)).clone())
    assert y.is_inference()
    assert_same(dict(fast.named_buffers()), dict(plain.named_buffers()))
    assert_same_step(fast, plain, image(*SHAPE))


class Checkpointed(nn.Module):
    """A block whose insides are run again in backward."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block = block
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def checkpointed_pair(name: str, recompute: bool, reentrant: bool) -> tuple[nn.Module, nn.Module]:
    fast, plain = named_pair(name)
    fast.set_recompute(recompute)
    for model in (fast, plain):
        for layers in (model.encoder_layers, model.decoder_layers):
            for i, block in enumerate(layers):
                layers[i] = Checkpointed(block, reentrant)
        model.bottleneck = Checkpointed(model.bottleneck, reentrant)
    return fast, plain


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("name", POST_AND_PRE)
def test_checkpoints_around_blocks(name: str, reentrant: bool, recompute: bool) -> None:
    fast, plain = checkpointed_pair(name, recompute, reentrant)
    with set_checkpoint_early_stop(False):
        assert_same_step(fast, plain, image(*SHAPE))
    counters = {k: int(v) for k, v in fast.named_buffers() if k.endswith("num_batches_tracked")}
    assert {v for k, v in counters.items() if ".block." in k} == {2}


@pytest.mark.parametrize("name", POST_AND_PRE)
def test_a_checkpoint_that_stops_early_gives_the_same_gradients(name: str) -> None:
    fast, plain = checkpointed_pair(name, recompute=False, reentrant=False)
    actual, expected = step(fast, image(*SHAPE)), step(plain, image(*SHAPE))
    # The second run stops when everything is kept again: before a block's last batch norm tells its
    # running statistics, which eager does first.
    ours = [key for key in expected if key.startswith(("output", "grad"))]
    assert_same({key: actual[key] for key in ours}, {key: expected[key] for key in ours})


def test_a_checkpoint_around_the_network() -> None:
    fast, plain = pair(encoder="residual")
    assert_same_step(Checkpointed(fast, False), Checkpointed(plain, False), image(*SHAPE))


def test_saved_tensors_may_be_moved() -> None:
    fast, plain = pair()
    expected = step(plain, image(*SHAPE))
    with torch.autograd.graph.save_on_cpu():
        assert_same(step(fast, image(*SHAPE)), expected)


def parts(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return parameters, dict(model.named_buffers())


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_grad_and_vmap(name: str) -> None:
    results = []
    for model in named_pair(name):
        parameters, buffers = parts(model.eval())

        def loss(p: dict[str, Tensor], x: Tensor, m=model, b=buffers) -> Tensor:
            return functional_call(m, (p, b), (x[None],)).square().mean()

        x = image(3, 3, 9, 14)
        per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        results.append(
            (grad(loss)(parameters, x[0]), per_sample, vmap(loss, (None, 0))(parameters, x))
        )
    assert_same(*results)


def ensemble(models: list[nn.Module], x: Tensor) -> Tensor:
    stacked = torch.func.stack_module_state(models)
    return vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(*stacked)


def test_an_ensemble_by_vmap() -> None:
    fast, plain = (model.eval() for model in pair())
    results = []
    for model in (fast, plain):
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.data *= 1.5
        results.append(ensemble([model, other], image(*SHAPE)))
    assert_same(*results)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", POST_AND_PRE)
def test_jvp(name: str, mode: bool) -> None:
    results = []
    for model in named_pair(name):
        if mode:
            # As torch asks: transforms cannot update running statistics.
            torch.func.replace_all_batch_norm_modules_(model)
        parameters, buffers = parts(model.train(mode))

        def network(p: dict[str, Tensor], x: Tensor, m=model, b=buffers) -> Tensor:
            return functional_call(m, (p, b), (x,))

        x = image(*SHAPE)
        tangents = {key: value.cos() for key, value in parameters.items()}
        results.append(jvp(network, (parameters, x), (tangents, x.sin())))
    assert_same(*results)


def test_running_statistics_inside_a_transform_are_refused_alike() -> None:
    for model in pair():
        with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
            grad(lambda x, m=model: m(x).sum())(image(*SHAPE))


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("of", ["image", "every parameter", "one batch norm"])
@pytest.mark.parametrize("order", AXES["order"])
def test_forward_mode(order: str, of: str, trainable: bool) -> None:
    results = []
    for model in pair(order=order):
        parameters, _ = parts(model.eval().requires_grad_(trainable))
        norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        chosen = {
            "image": (),
            "every parameter": parameters,
            "one batch norm": [f"{norms[2]}.bias"],
        }
        x = image(*SHAPE)
        with forward_ad.dual_level():
            x = forward_ad.make_dual(x, x.sin()) if of == "image" else x
            given = {
                key: forward_ad.make_dual(parameters[key], parameters[key].cos())
                for key in chosen[of]
            }
            tangent = forward_ad.unpack_dual(functional_call(model, given, (x,))).tangent
            assert tangent is not None
            results.append(tangent.detach())
    assert results[1].abs().max() > 1e-3
    assert_same(*results)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("name", POST_AND_PRE)
def test_a_gradient_penalty(name: str, recompute: bool) -> None:
    results = []
    fast, plain = named_pair(name)
    fast.set_recompute(recompute)
    for model in (fast, plain):
        x = image(*SHAPE).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().mean().backward()
        # A bias that a batch norm cancels may lack a gradient instead of having a zero one.
        grads = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in model.named_parameters()
        }
        results.append((slope.detach(), x.grad, grads))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def run_in_threads(work: list[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_two_threads_at_once() -> None:
    pairs = [pair(recompute=recompute) for recompute in (False, True)]
    shared = pair(order="pre")[0].eval()
    images = [image(*SHAPE) + offset for offset in (0, 1)]
    expected = [shared(x).detach() for x in images]

    def work(number: int) -> None:
        for _ in range(10):
            assert_same_step(*pairs[number], images[number])
            y = shared(images[number])
            assert_same(y.detach(), expected[number])
            torch.autograd.grad(y.sum(), list(shared.parameters()))

    run_in_threads([lambda: work(0), lambda: work(1)])


def test_distributed_data_parallel(tmp_path: Path) -> None:
    fast, plain = pair()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(fast)
        for _ in range(2):
            assert_same_step(wrapped.module, plain, image(*SHAPE))
            actual = step(wrapped, image(*SHAPE))
            expected = step(plain, image(*SHAPE))
            assert_same({key.replace("module.", ""): v for key, v in actual.items()}, expected)
    finally:
        torch.distributed.destroy_process_group()
