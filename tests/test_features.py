"Shifted grids and feature spaces: what must hold by arithmetic."

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aoi_ssl import features
from aoi_ssl.core import AoiError
from aoi_ssl.encoder import PixelEncoder, ViTEncoder, mirror
from aoi_ssl.features import (
    Balance,
    FeatureSpace,
    Place,
    Unplace,
    Whiten,
    between_grids,
    cosine_basis,
    embed,
    fit_space,
    grid_windows,
    in_bfloat16,
    layer_count,
    restore_space,
    shift_offsets,
    window_layout,
    with_layers,
)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def samples():
    "Correlated samples with a mean, and places that have nothing to do with them."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 8, generator=g) @ torch.randn(8, 8, generator=g) + torch.arange(8.0)
    return x, torch.rand(3000, 2, generator=g)


# --- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [8, 16])
def test_offsets_are_nested_and_as_far_apart_as_they_can_be(patch_size):
    whole = shift_offsets(patch_size**2, patch_size)
    assert len(set(whole)) == patch_size**2
    for power, least in ((1, patch_size / 2**0.5), (2, patch_size / 2), (3, patch_size / 8**0.5), (4, patch_size / 4)):
        points = np.array(shift_offsets(2**power, patch_size))
        assert [tuple(p) for p in points] == whole[: 2**power]
        apart = np.abs(points[:, None] - points[None])
        apart = np.hypot(*np.moveaxis(np.minimum(apart, patch_size - apart), -1, 0))  # the next patch is a neighbour too
        assert apart[~np.eye(len(points), dtype=bool)].min() == pytest.approx(least)


@pytest.mark.parametrize(("count", "patch_size"), [(0, 16), (3, 16), (6, 16), (512, 16), (8, 14), (2, 7)])
def test_impossible_offsets_are_refused(count, patch_size):
    with pytest.raises(AoiError, match=f"{count} shifts of a patch of {patch_size} pixels"):
        shift_offsets(count, patch_size)


@pytest.mark.parametrize("shift", [(0, 4), (8, 0), (4, 12), (15, 1)])
@pytest.mark.parametrize("size", [64, 512])
def test_moving_the_image_moves_the_grid(shift, size):
    "The grid that starts at (dy, dx) is the plain grid of the image without its first dy rows and dx columns."
    encoder, image = PixelEncoder(channels=2, patch_size=16), noise(1, 2, 90, 130)
    moved = embed(encoder, image, shift=shift, size=size)
    plain = embed(encoder, image[..., shift[0] :, shift[1] :], size=size)
    rows, columns = (int(n > 0) for n in shift)
    assert torch.allclose(moved[:, rows:, columns:], plain, atol=1e-6)


def test_beyond_the_border_the_image_is_mirrored():
    encoder, image = PixelEncoder(channels=1, patch_size=4, mean=[0], std=[1]), noise(1, 1, 8, 8)
    first = embed(encoder, image, shift=(3, 2))[0, 0, 0].view(4, 4)
    assert torch.allclose(first[1:, 2:], image[0, 0, :3, :2]) and torch.allclose(first[0, 2:], image[0, 0, 0, :2])
    assert torch.allclose(first[1:, :2], image[0, 0, :3, :2].flip(1))
    assert mirror(image) is image and mirror(image, top=20).shape == (1, 1, 28, 8)


@pytest.mark.parametrize("count", [4, 16])
def test_half_way_between_two_grids_a_linear_image_is_exact(count):
    encoder = PixelEncoder(channels=1, patch_size=16, mean=[0], std=[1])
    y, x = torch.meshgrid(torch.arange(80.0), torch.arange(64.0), indexing="ij")
    image = ((2 * y + x) / 300)[None, None]
    between = between_grids([(s, embed(encoder, image, shift=s)[0]) for s in shift_offsets(count, 16)], 16)
    assert [s for s, _ in between] == shift_offsets(4 * count, 16)[count:]
    for shift, grid in between:
        exact = embed(encoder, image, shift=shift)[0]
        rows, columns = (slice(1, n // 16 - 1) for n in (80, 64))  # at the border it is mirrored, and not linear
        assert torch.allclose(grid[rows, columns], exact[rows, columns], atol=1e-5)
        there = grid[: exact.shape[0], : exact.shape[1]].isfinite().all(-1)
        assert there[rows, columns].all()
    with pytest.raises(AoiError, match="none half-way"):
        between_grids([(s, embed(encoder, image, shift=s)[0]) for s in shift_offsets(8, 16)], 16)


def test_a_shifted_grid_takes_no_more_windows():
    for height, width in ((512, 512), (1024, 700), (100, 2000)):
        plain = grid_windows(height, width, 16)
        for shift in ((0, 8), (8, 8)):
            boxes = grid_windows(height, width, 16, shift=shift)
            assert len(boxes) == len(plain)
            rows, columns = (max(b[i] + b[i + 2] for b in boxes) for i in (0, 1))
            assert rows == -(-(height + (16 - shift[0]) % 16) // 16) and columns == -(-(width + 16 - shift[1]) // 16)


def test_places_are_those_of_the_window():
    places = window_layout(96, 64, 16, size=64).places
    assert places.shape == (6, 4, 2)
    assert places[:, 0, 0].tolist() == [0.125, 0.375, 0.125, 0.375, 0.625, 0.875]  # the last window is moved back inside
    assert places[0, :, 1].tolist() == [0.125, 0.375, 0.625, 0.875]


def test_layers_share_the_weights():
    vit = ViTEncoder("nano", image_size=32)
    both = with_layers(vit, [1, 2])
    image = noise(1, 2, 32, 32)
    assert both.vit is vit.vit and layer_count(both) == 2 and both.dim == 96
    assert torch.allclose(both.encode(image)[..., 48:], vit.encode(image)) and with_layers(vit, 1) is vit
    with pytest.raises(AoiError, match="layers is 3"):
        with_layers(vit, 3)
    for blocks in ([1], 1, 2, 99, 2.0, 0.0, -0.5):
        with pytest.raises(AoiError, match="PixelEncoder has no blocks"):
            with_layers(PixelEncoder(), blocks)
    pixels = PixelEncoder()
    assert with_layers(pixels, None) is pixels and with_layers(pixels, 1 / 3) is pixels, "as the default recipe asks for"


# --- steps ----------------------------------------------------------------------------------------------------------


def test_whitening_makes_the_covariance_the_identity(samples):
    white = Whiten.fit(*samples, dims=8)(*samples)
    assert white.mean(0).abs().max() < 1e-3
    assert torch.allclose(torch.cov(white.T, correction=0), torch.eye(8), atol=1e-3)


def test_shrinking_divides_by_the_variance_and_a_share_of_the_mean(samples):
    x, places = samples
    variance = torch.linalg.eigvalsh(torch.cov(x.double().T, correction=0)).flip(0)
    kept = Whiten.fit(x, places, dims=3, shrink=0.5)(x, places)
    expected = variance[:3] / (variance[:3] + 0.5 * variance.mean())
    assert torch.allclose(torch.cov(kept.double().T, correction=0), torch.diag(expected), atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_whitening_works_with_hardly_any_sample(count):
    x, places = noise(count, 20), noise(count, 2)
    keys = fit_space(x, places, whiten=16, shrink=0.1)(noise(7, 20, seed=1), noise(7, 2))
    assert keys.isfinite().all() and keys.shape == (7, max(1, count - 1))


def test_balanced_parts_have_length_one():
    parts = Balance({}, parts=3)(noise(5, 12) * torch.tensor([1.0] * 4 + [100.0] * 4 + [0.01] * 4), noise(5, 2))
    assert torch.allclose(parts.unflatten(1, (3, 4)).norm(dim=-1), torch.ones(5, 3))


def test_the_place_is_taken_away_and_the_mean_stays(samples):
    x, places = samples
    told = x + 20 * cosine_basis(places, 3) @ noise(9, 8, seed=3)
    left = Unplace.fit(told, places)(told, places)
    basis = cosine_basis(places, 4)[:, 1:]
    slope = torch.linalg.lstsq(basis, left - left.mean(0)).solution
    assert (basis @ slope).std() < 0.02 * (told - x).std()
    assert torch.allclose(left.mean(0), told.mean(0), atol=1e-2)


def test_a_key_with_its_place_prefers_what_is_near():
    x = F.normalize(noise(1, 6), dim=-1).expand(3, 6)
    places = torch.tensor([[0.1, 0.1], [0.1, 0.2], [0.1, 0.9]])
    keys = F.normalize(Place({}, weight=0.5)(x, places), dim=-1)
    same, near, far = (keys[0] @ key for key in keys)
    assert same > near > far and torch.isclose(same, torch.tensor(1.0))


def test_a_space_survives_saving(samples):
    space = fit_space(*samples, parts=2, position="remove", whiten=4)
    again = restore_space(space.settings(), dict(space.state_dict()))
    assert again(*samples).equal(space(*samples)) and again.fingerprint() == space.fingerprint()
    assert [s["kind"] for s in space.settings()] == ["balance", "unplace", "whiten"]
    other = fit_space(samples[0][:-1], samples[1][:-1], parts=2, position="remove", whiten=4)
    assert other.fingerprint() != space.fingerprint()
    with pytest.raises(AoiError, match="a step 'magic'"):
        restore_space([{"kind": "magic"}], {})


def test_without_steps_a_key_is_the_embedding_of_length_one(samples):
    assert FeatureSpace()(*samples).equal(F.normalize(samples[0], dim=-1))
    centred = fit_space(*samples, centre=True)(*samples)
    assert torch.allclose(centred, F.normalize(samples[0] - samples[0].mean(0), dim=-1))


def test_bfloat16_is_for_processors_that_are_quick_at_it(monkeypatch):
    "The same weights and nearly the same embeddings; elsewhere, and for raw pixels, the very encoder."
    vit, image = ViTEncoder("nano", image_size=32), noise(1, 2, 32, 48)
    monkeypatch.setattr(features, "has_fast_bfloat16", lambda: False)
    assert in_bfloat16(vit) is vit
    monkeypatch.setattr(features, "has_fast_bfloat16", lambda: True)
    quick, plain = in_bfloat16(vit), vit.encode(image)
    found = quick.encode(image)
    assert found.dtype == torch.float32 and not found.equal(plain)
    assert torch.nn.functional.cosine_similarity(found, plain, dim=-1).min() > 0.999
    assert in_bfloat16(quick).encode(image).equal(found) and with_layers(quick, vit.layers).encode(image).equal(found)
    assert quick.fingerprint() == vit.fingerprint() and vit.encode(image).equal(plain)
    pixels = PixelEncoder()
    assert in_bfloat16(pixels) is pixels
