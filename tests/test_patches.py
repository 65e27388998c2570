"Masks as patches: cutting, laying, regression and the guided filter against plain formulas."

import numpy as np
import pytest
import torch

from aoi_ssl.core import AoiError
from aoi_ssl.patches import (
    box_mean,
    guided_filter,
    lay,
    moments,
    patchify_mask,
    rim_weights,
    shows_any,
    solve_ridge,
    unpatchify_mask,
    with_one,
)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("corner", [(0, 0), (-5, 0), (-1, -7)])
@pytest.mark.parametrize("halo", [0, 3])
def test_a_patch_is_the_slice_of_the_mask(corner, halo):
    mask = noise(2, 21, 30) > 0.5
    patches = patchify_mask(mask, 8, corner=corner, halo=halo)
    rows, columns = (-(-(n - c) // 8) for n, c in zip((21, 30), corner, strict=True))
    assert patches.shape == (rows, columns, 2, 8 + 2 * halo, 8 + 2 * halo)
    few = noise(21, 30, seed=1) > 0.99
    shown = patchify_mask(few[None], 8, corner=corner, halo=halo).flatten(2).any(-1)
    assert shows_any(few, 8, corner=corner, halo=halo).equal(shown) and 0 < shown.sum() < shown.numel()
    whole = np.pad(mask.numpy(), ((0, 0), (40, 40), (40, 40)))
    for r in range(rows):
        for c in range(columns):
            y, x = corner[0] + 8 * r - halo + 40, corner[1] + 8 * c - halo + 40
            assert np.array_equal(patches[r, c], whole[:, y : y + 8 + 2 * halo, x : x + 8 + 2 * halo])
    assert unpatchify_mask(patchify_mask(mask, 8, corner=corner), 21, 30, corner=corner).equal(mask)


@pytest.mark.parametrize("halo", [0, 1, 4, 8])
def test_the_weights_of_all_patches_sum_to_one(halo):
    weight = rim_weights(16, halo)
    assert weight.shape == (16 + 2 * halo,) * 2 and (weight > 0).all() and weight.argmax() // (16 + 2 * halo) <= 8 + halo
    total = lay(torch.ones(1, 7, 7, 1, *weight.shape), 112, 112, halo=halo)
    assert torch.allclose(total[..., 16:-16, 16:-16], torch.ones(()), atol=1e-6)


def test_overlapping_patches_are_summed_by_weight():
    "Two patches of 4 with a halo of 1, side by side: at the pixels 3 and 4 both have a say."
    patches = torch.stack([torch.full((1, 6, 6), 1.0), torch.full((1, 6, 6), 10.0)])[None, None]
    ramp = torch.tensor([1.0, 2, 3, 3, 2, 1]) / 3
    row = lay(patches, 4, 8, halo=1)[0, 0, 1] / rim_weights(4, 1)[2].max()
    left, right = torch.zeros(8), torch.zeros(8)
    left[:5], right[3:] = ramp[1:], ramp[:5]
    assert torch.allclose(row, left + 10 * right, atol=1e-5)


def test_ridge_is_the_closed_form():
    x, y = noise(40, 5), (noise(40, 6, seed=1) > 0.5).float()
    a = with_one(x).double().numpy()
    penalty = 0.3 * (a[:, :5] ** 2).sum(0).mean() * np.diag([1.0] * 5 + [0])
    expected = np.linalg.solve(a.T @ a + penalty, a.T @ y.double().numpy())
    assert np.allclose(solve_ridge(moments(x, y), 0.3), expected, atol=1e-4)
    exact = with_one(x) @ noise(6, 2, seed=2)
    assert torch.allclose(with_one(x) @ solve_ridge(moments(x, exact), 1e-9), exact, atol=1e-3)


def test_taking_patches_away_is_never_having_had_them():
    x, y = noise(30, 4), noise(30, 3, seed=1)
    left = moments(x, y).plus(moments(x[:11], y[:11]), -1)
    assert left.count == 19 and torch.allclose(left.cross, moments(x[11:], y[11:]).cross, atol=1e-5)
    with pytest.raises(AoiError, match="0 fully labelled patches"):
        solve_ridge(left.plus(left, -1), 0.1)


def test_a_box_mean_is_the_mean_of_the_box():
    maps = noise(2, 9, 7)
    means = box_mean(maps, 2)
    for y, x in ((0, 0), (4, 3), (8, 6), (1, 5)):
        box = maps[:, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        assert torch.allclose(means[:, y, x], box.mean((1, 2)), atol=1e-6)


def test_the_guided_filter_keeps_constants_and_follows_the_guide():
    guide = noise(1, 2, 30, 20)
    for value in (0.0, 0.4, 1.0):
        assert torch.allclose(guided_filter(torch.full((1, 3, 30, 20), value), guide), torch.tensor(value), atol=1e-4)
    linear = 0.2 + 0.5 * guide[:, :1] - 0.1 * guide[:, 1:]  # a linear function of the lights passes where they vary
    assert torch.allclose(guided_filter(linear, guide, smooth=1e-7), linear, atol=1e-3)
    flat = guided_filter(noise(1, 1, 30, 20, seed=1), torch.zeros(1, 2, 30, 20), radius=2)
    assert torch.allclose(flat[0], box_mean(box_mean(noise(1, 1, 30, 20, seed=1)[0], 2), 2), atol=1e-5)
