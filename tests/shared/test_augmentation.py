"""Augmentation changes each image by itself, with its mask and its condition, and lets gradients through."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fedsynth.models.augmentation import Changes, augmented, draw_changes
from fedsynth.models.condition import TumourMap, condition, condition_dim

SIZE, ROWS, FEATURES = 32, 4, 4
MAP = TumourMap(size=SIZE, places=(3, 4, 5), volume=2, volume_ml=(1.0, 250.0), pixel_mm=6.0, stack_mm=105.0)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images() -> Tensor:
    return torch.rand(ROWS, 3, SIZE, SIZE, generator=draws(1)) * 2 - 1


def code() -> Tensor:
    scores = 0.3 + 0.4 * torch.rand(ROWS, FEATURES, generator=draws(2))
    return condition(torch.arange(ROWS) % 2, scores, torch.zeros(ROWS), 2)


def still(count: int = ROWS) -> Changes:
    zeros = torch.zeros(count, dtype=torch.int64)
    return Changes(zeros, zeros, torch.zeros(count), torch.ones(count), zeros > 0, torch.zeros(count))


def moved(right: int, down: int) -> Changes:
    return replace(still(), right=torch.full((ROWS,), right), down=torch.full((ROWS,), down))


def test_nothing_named_changes_nothing_and_draws_nothing() -> None:
    generator = draws()
    before = generator.get_state()
    changes = draw_changes([], ROWS, SIZE, generator)
    assert torch.equal(generator.get_state(), before)
    for each in (changes, still()):
        shown, stated = augmented(images(), code(), each, MAP)
        assert torch.equal(shown, images())
        assert torch.equal(stated, code())


def test_a_shift_moves_image_mask_and_stated_place_together() -> None:
    x, right, down = images(), 2, -1
    shown, stated = augmented(x, code(), moved(right, down), MAP)
    assert torch.equal(shown[:, :, :-1, 2:], x[:, :, 1:, :-2])
    assert float(shown[:, :, -1].max()) == -1
    assert float(shown[:, :, :, :2].max()) == -1
    before, after = MAP(code()), MAP(stated)
    torch.testing.assert_close(after[:, :, :-1, 2:], before[:, :, 1:, :-2], rtol=1e-4, atol=1e-5)
    assert float((after - before).abs().max()) > 0.1
    kept = [i for i in range(condition_dim(2, FEATURES)) if i not in (3, 4)]
    assert torch.equal(stated[:, kept], code()[:, kept])


def test_without_a_stated_place_only_the_image_moves() -> None:
    nowhere = TumourMap(size=SIZE, places=None, volume=None, volume_ml=(1.0, 2.0), pixel_mm=6.0, stack_mm=105.0)
    shown, stated = augmented(images(), code(), moved(1, 1), nowhere)
    assert torch.equal(stated, code())
    assert torch.equal(shown[:, :, 1:, 1:], images()[:, :, :-1, :-1])


def test_intensities_change_and_the_mask_does_not() -> None:
    brightness, contrast = torch.tensor([0.1, -0.2, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.2, 0.8])
    x = images()
    shown, stated = augmented(x, code(), replace(still(), brightness=brightness, contrast=contrast), MAP)
    assert torch.equal(shown[:, -1], x[:, -1])
    assert torch.equal(stated, code())
    torch.testing.assert_close(shown[:2, :-1], x[:2, :-1] + brightness[:2, None, None, None])
    mean = x[2:, :-1].mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(shown[2:, :-1], mean + contrast[2:, None, None, None] * (x[2:, :-1] - mean))


def test_mirrored_images_state_the_other_side() -> None:
    which = torch.tensor([True, False, True, False])
    shown, stated = augmented(images(), code(), replace(still(), mirrored=which), MAP)
    assert torch.equal(shown[which], images()[which].flip(-1))
    assert torch.equal(shown[~which], images()[~which])
    torch.testing.assert_close(MAP(stated)[which], MAP(code())[which].flip(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(stated[~which], code()[~which])


def test_turned_images_state_the_turned_place() -> None:
    quarter = torch.full((ROWS,), math.pi / 2)
    x = images()
    shown, stated = augmented(x, code(), replace(still(), turned=quarter), MAP)
    torch.testing.assert_close(shown, x.rot90(-1, (2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(MAP(stated), MAP(code()).rot90(-1, (2, 3)), rtol=1e-3, atol=1e-4)
    slightly, _ = augmented(x, code(), replace(still(), turned=torch.full((ROWS,), 0.15)), MAP)
    assert float(slightly[:, :, 0, 0].max()) < float(x[:, :, 0, 0].max())  # background turns in at the corner


def test_draws_stay_within_their_bounds_and_vary() -> None:
    changes = draw_changes(["translation", "intensity"], 500, SIZE, draws())
    for pixels in (changes.right, changes.down):
        assert set(pixels.tolist()) == {-2, -1, 0, 1, 2}
    assert 0.15 < float(changes.brightness.abs().max()) <= 0.2
    assert 0.15 < float((changes.contrast - 1).abs().max()) <= 0.2 + 1e-6
    turns = draw_changes(["flip", "rotation"], 500, SIZE, draws())
    assert 0.15 < float(turns.turned.abs().max()) <= math.radians(10) + 1e-6
    assert 0.4 < float(turns.mirrored.float().mean()) < 0.6
    assert not bool(turns.right.any())
    only = draw_changes(["intensity"], 500, SIZE, draws())
    assert not bool(only.right.any() or only.down.any())
    only = draw_changes(["translation"], 500, 64, draws())
    assert int(only.right.max()) == 4
    assert torch.equal(only.contrast, torch.ones(500))


def test_no_image_sees_another() -> None:
    changes = draw_changes(["translation", "intensity", "flip", "rotation"], ROWS, SIZE, draws())
    x, c = images(), code()
    together = augmented(x, c, changes, MAP)
    x[0], c[0] = 1.0, 0.5
    changed = augmented(x, c, changes, MAP)
    for a, b in zip(together, changed, strict=True):
        assert not torch.equal(a[0], b[0])
        assert torch.equal(a[1:], b[1:])
    for row in range(ROWS):
        rows = torch.tensor([row])
        alone = augmented(x[rows], c[rows], changes[rows], MAP)
        for a, b in zip(changed, alone, strict=True):
            torch.testing.assert_close(a[rows], b, rtol=1e-6, atol=1e-6)


def test_gradients_pass_to_the_pixels_that_are_shown() -> None:
    x = images().requires_grad_()
    shown, _ = augmented(x, code(), moved(2, 0), MAP)
    (gradient,) = torch.autograd.grad(shown.sum(), x)
    assert torch.equal(gradient[..., :-2], torch.ones(ROWS, 3, SIZE, SIZE - 2))
    assert float(gradient[..., -2:].abs().max()) == 0
