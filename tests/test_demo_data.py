"""The demo's data: composited pictures from photographs and digits that no split shares."""

from __future__ import annotations

import math
import socket

import numpy as np
import pytest
import torch
from networks import one_thread as one_thread

from resunet_fast.demo import dataset
from resunet_fast.demo.dataset import Batch, Split


@pytest.fixture(scope="module")
def splits() -> tuple[Split, Split]:
    return dataset.load_splits()


def test_data_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the data set opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    training_split, _ = dataset.load_splits()
    assert len(training_split.regions) == len(dataset.PHOTOGRAPHS)


def test_splits_share_no_digit(splits: tuple[Split, Split]) -> None:
    first, second = ({digit.tobytes() for digit in split.digits} for split in splits)
    assert len(first) + len(second) == 1797
    assert not first & second


def test_splits_divide_every_photograph(splits: tuple[Split, Split]) -> None:
    for name, first, second in zip(
        dataset.PHOTOGRAPHS, splits[0].regions, splits[1].regions, strict=True
    ):
        whole = dataset._photograph(name)
        axis = 1 if whole.shape[1] >= whole.shape[0] else 0
        np.testing.assert_array_equal(np.concatenate((first, second), axis=axis), whole)
        assert 0.25 < second.size / whole.size < 0.35
        assert min(second.shape[:2]) >= dataset.CROP


def test_photographs_are_real_and_different(splits: tuple[Split, Split]) -> None:
    for region in splits[0].regions:
        assert region.dtype == np.float32
        assert region.min() >= 0
        assert region.max() <= 1
        assert region.std() > 0.02
    assert len({region.tobytes() for region in splits[0].regions}) == len(dataset.PHOTOGRAPHS)


def test_masks_are_exactly_what_was_painted(
    splits: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With strokes marked by an impossible colour and no noise, image and mask must coincide."""

    def mark(image: np.ndarray, stroke: np.ndarray, rng: np.random.Generator) -> None:
        image[stroke] = (1.0, 0.0, 1.0)

    def keep(image: np.ndarray, rng: np.random.Generator) -> None:
        pass

    monkeypatch.setattr(dataset, "paint", mark)
    monkeypatch.setattr(dataset, "add_noise", keep)
    for scene in dataset.scenes(splits[0], np.random.default_rng(0), 28):
        marked = (scene.image == (255, 0, 255)).all(axis=2)
        np.testing.assert_array_equal(marked, scene.mask)
        assert 0.005 < scene.mask.mean() < 0.6


def test_paint_touches_the_stroke_only_and_uses_both_polarities() -> None:
    rng = np.random.default_rng(0)
    stroke = rng.random((20, 20)) < 0.3
    changes = []
    for _ in range(40):
        image = np.full((20, 20, 3), 0.5, dtype=np.float32)
        dataset.paint(image, stroke, rng)
        assert (image[~stroke] == 0.5).all()
        changes.append(float(image[stroke].mean()) - 0.5)
    assert min(map(abs, changes)) > 0.1
    assert min(changes) < 0 < max(changes)


def test_every_digit_renders_upright_and_rotates(splits: tuple[Split, Split]) -> None:
    for digit in splits[0].digits[:200]:
        block = np.kron(digit > 0.5, np.ones((8, 8), dtype=bool))
        upright = dataset.render_digit(digit, 64, 0.0)
        assert (upright & block).sum() > 0.7 * block.sum()
        turned = dataset.render_digit(digit, 64, math.pi / 2)
        assert (
            np.array_equal(np.rot90(upright), turned) or (np.rot90(upright) == turned).mean() > 0.99
        )


def test_pictures_depend_on_the_seed_and_on_nothing_else(splits: tuple[Split, Split]) -> None:
    def draw(seed: int) -> Batch:
        return dataset.to_batch(dataset.scenes(splits[1], np.random.default_rng(seed), 5))

    assert torch.equal(draw(1).images, draw(1).images)
    assert torch.equal(draw(1).masks, draw(1).masks)
    assert not torch.equal(draw(1).masks, draw(2).masks)


def test_batches_have_the_promised_layout(splits: tuple[Split, Split]) -> None:
    pictures = dataset.scenes(splits[0], np.random.default_rng(0), 3)
    batch = dataset.to_batch(pictures)
    assert batch.images.shape == (3, 3, dataset.CROP, dataset.CROP)
    assert batch.masks.shape == (3, 1, dataset.CROP, dataset.CROP)
    assert batch.images.dtype == batch.masks.dtype == torch.float32
    assert set(batch.masks.flatten().tolist()) == {0.0, 1.0}
    expected = torch.from_numpy(pictures[1].image).permute(2, 0, 1) / 255
    assert torch.equal(batch.images[1], expected)


def test_each_photograph_comes_up_equally_often(splits: tuple[Split, Split]) -> None:
    count = 2 * len(dataset.PHOTOGRAPHS)
    names = [s.photograph for s in dataset.scenes(splits[0], np.random.default_rng(0), count)]
    assert sorted(names) == sorted(dataset.PHOTOGRAPHS * 2)
