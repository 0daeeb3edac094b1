"""What the fast networks keep for backward, as autograd saves it, and that nothing leaks.

T is one activation of a level. Eager keeps 15.75 T: four per block, the concatenation (3 T), the
pool's indices (0.5 T in float32) and the pooled result (0.25 T). The fast network keeps neither
concatenation nor indices: 12.25 T; recomputing one activation per block, 9.25 T.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from networks import AXES, VARIANTS, image, variant_id
from networks import one_thread as one_thread
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resunet_fast as rf
from resunet_fast import reference
from resunet_fast.testing.memory import kept_bytes

PRECISIONS = {"float32": nullcontext, "bf16": lambda: torch.autocast("cpu", torch.bfloat16)}


def kept(model: nn.Module, x: Tensor, precision: str = "float32") -> int:
    def forward() -> Tensor:
        with PRECISIONS[precision]():
            return model(x)

    return kept_bytes(forward, model)


def assert_saves(size: int, width: int, precision: str) -> None:
    """The listing against eager: at most 0.78 of what it keeps, with recomputation 0.6."""
    x = image(2, 3, size, size, dtype=torch.float32)
    eager = kept(reference.ResUNet(3, 2, base_width=width), x, precision)
    fast = rf.ResUNet(3, 2, base_width=width)
    # Both keep the image itself, a constant that is not theirs to save.
    assert kept(fast, x, precision) - x.nbytes <= 0.78 * (eager - x.nbytes)
    fast.set_recompute(True)
    assert kept(fast, x, precision) <= 0.6 * eager


@pytest.mark.parametrize("precision", PRECISIONS)
def test_keeps_less_than_eager(precision: str) -> None:
    assert_saves(size=64, width=32, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_listing_keeps_less_than_eager(precision: str) -> None:
    assert_saves(size=128, width=64, precision=precision)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_keeps_what_the_design_says_and_no_more(recompute: bool) -> None:
    size, width = 64, 16
    x = image(2, 3, size, size, dtype=torch.float32)
    fast = rf.ResUNet(3, 2, base_width=width, recompute=recompute)
    level = 2 * width * size * size * 4
    # Per level, halved with each: two blocks on the way up and one on the way down, of four tensors
    # each, or three, and the pooled result; the bottleneck's block without it.
    per_block = 3 if recompute else 4
    images = sum(level / 2**i * (3 * per_block + 0.25) for i in range(4)) + level / 16 * per_block
    # Statistics and the like are vectors.
    expected = images + x.nbytes
    assert expected <= kept(fast, x) <= expected * 1.01


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", VARIANTS, ids=variant_id)
def test_no_combination_keeps_more_than_eager(options: dict[str, object], precision: str) -> None:
    options = {"base_width": 16, "width_factors": (1, 2), **options}
    x = image(2, 3, 16, 16, dtype=torch.float32)
    eager = kept(reference.ResUNet(3, 2, **options), x, precision)
    fast = kept(rf.ResUNet(3, 2, **options), x, precision)
    recomputed = kept(rf.ResUNet(3, 2, recompute=True, **options), x, precision)
    assert recomputed < fast <= eager


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("order", AXES["order"])
def test_nothing_is_kept_without_gradients(
    order: str, training: bool, guard: Callable[[], AbstractContextManager[None]]
) -> None:
    model = rf.ResUNet(3, 2, base_width=4, width_factors=(1, 2), order=order, recompute=True)
    model.train(training)

    def forward() -> Tensor:
        with guard():
            return model(image(2, 3, 16, 16, dtype=torch.float32))

    assert kept_bytes(forward, model) == 0
    assert forward().grad_fn is None


@pytest.mark.parametrize("order", AXES["order"])
def test_a_frozen_network_keeps_nothing(order: str) -> None:
    model = rf.ResUNet(3, 2, base_width=4, width_factors=(1, 2), order=order).requires_grad_(False)
    assert kept(model, image(2, 3, 16, 16, dtype=torch.float32)) == 0


def test_a_frozen_encoder_keeps_only_what_the_decoder_reads() -> None:
    x = image(2, 3, 32, 32, dtype=torch.float32)
    sizes = []
    for network in (rf.ResUNet, reference.ResUNet):
        model = network(3, 2, base_width=8, width_factors=(1, 2))
        model.encoder_layers.requires_grad_(False)
        model.bottleneck.requires_grad_(False)
        sizes.append(kept(model, x))
    level = 2 * 8 * 32 * 32 * 4
    # The two sources, then four tensors for each of the two blocks on the way up.
    expected = level * (0.5 + 1 + 8)
    assert expected <= sizes[0] <= expected * 1.02
    assert sizes[0] < sizes[1]


def test_the_graph_is_freed_by_backward() -> None:
    model = rf.ResUNet(3, 2, base_width=4, width_factors=(1, 2))
    y = model(image(2, 3, 16, 16, dtype=torch.float32))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


class Results(TorchDispatchMode):
    """Remembers the storage of whatever an operator returned, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.storages.append(StorageWeakRef(leaf.untyped_storage()))
        return result


def train(model: nn.Module, optim: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).square().mean().backward()
    optim.step()
    optim.zero_grad(set_to_none=True)
    with torch.no_grad():
        model(x)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Leave freeing to reference counts: a cycle would hold an iteration's activations."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("name", rf.list_models())
def test_everything_is_freed_at_once(name: str, recompute: bool) -> None:
    options = {"base_width": 4, "width_factors": (1, 2), "recompute": recompute}
    model = rf.create_model(name, **options)
    optim = torch.optim.SGD(model.parameters(), lr=0.01)
    x = image(2, 3, 16, 16, dtype=torch.float32)
    with Results() as results:
        train(model, optim, x)
    # What an in-place update returns is the parameter itself.
    own = {StorageWeakRef(t.untyped_storage()).cdata for t in model.state_dict().values()}
    made = [storage for storage in results.storages if storage.cdata not in own]
    assert len(made) > 50
    assert all(storage.expired() for storage in made)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("order", AXES["order"])
def test_nothing_grows_over_fifty_iterations(order: str, recompute: bool) -> None:
    options = {"base_width": 4, "width_factors": (1, 2), "order": order, "recompute": recompute}
    model = rf.ResUNet(3, 2, **options)
    optim = torch.optim.SGD(model.parameters(), lr=0.01)
    x = image(2, 3, 16, 16, dtype=torch.float32)
    counts = []
    for times in (10, 50):
        for _ in range(times):
            train(model, optim, x)
        gc.collect()
        alive = gc.get_objects()
        counts.append((sum(issubclass(type(each), Tensor) for each in alive), len(alive)))
    (tensors, objects), (tensors_later, objects_later) = counts
    assert tensors_later <= tensors
    assert objects_later - objects < 50, "an object is left over by every iteration"
