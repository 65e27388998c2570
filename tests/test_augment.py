"Image and mask move together, exactly; light stays in [0, 1]; the same seed gives the same batch."

import pytest
import torch

from aoi_ssl.augment import Augment, stretch_contrast, turn_and_flip
from aoi_ssl.core import AoiError

GEOMETRY = Augment(blur=0, contrast=0, noise=0)


@pytest.fixture
def batch():
    return torch.rand(24, 2, 48, 48, generator=torch.Generator().manual_seed(0))


def test_mask_and_ignore_follow_the_image(batch):
    mask, ignore = batch > 0.5, batch < 0.1
    image, moved, skipped = GEOMETRY(batch, mask, ignore, seed=3)
    assert moved.dtype == skipped.dtype == torch.bool
    assert torch.equal(moved, image > 0.5) and torch.equal(skipped, image < 0.1)
    assert not torch.equal(image, batch)


def test_geometry_invents_no_pixel_and_uses_all_eight_positions(batch):
    one = batch[:1].expand(400, -1, -1, -1)
    image, _, _ = GEOMETRY(one, seed=0)
    eight = {x.numpy().tobytes() for x in image}
    orbit = [torch.rot90(y, k, (-2, -1)) for y in (one[0], one[0].flip(-1)) for k in range(4)]
    assert eight == {x.contiguous().numpy().tobytes() for x in orbit} and len(eight) == 8


def test_codes_by_hand():
    square = torch.tensor([[[[1, 2], [3, 4]]]])
    expected = {0: [[1, 2], [3, 4]], 1: [[2, 1], [4, 3]], 2: [[3, 4], [1, 2]], 4: [[2, 4], [1, 3]], 8: [[4, 3], [2, 1]]}
    for code, result in expected.items():
        assert turn_and_flip(square, torch.tensor([code]))[0, 0].tolist() == result


@pytest.mark.parametrize("name", ["blur", "contrast", "noise"])
def test_light_changes_the_image_and_never_the_mask(batch, name):
    off = {"flips": False, "turns": False, "blur": 0, "contrast": 0, "noise": 0}
    change = Augment(**(off | {name: {"blur": 1.5, "contrast": 0.5, "noise": 0.1}[name]}))
    image, mask, _ = change(batch, batch > 0.5, seed=1)
    assert torch.equal(mask, batch > 0.5) and not torch.equal(image, batch)
    changed = (image != batch).flatten(1).any(1)
    assert changed.all() if name == "contrast" else 2 < changed.sum() < 22  # blur and noise: about half of the images


def test_everything_off_changes_nothing_and_input_is_never_touched(batch):
    before = batch.clone()
    image, mask, ignore = Augment(flips=False, turns=False, blur=0, contrast=0, noise=0)(batch, seed=0)
    assert torch.equal(image, batch) and mask is None and ignore is None
    Augment(contrast=0)(batch, seed=5)
    assert torch.equal(batch, before)


def test_values_stay_in_the_unit_interval():
    black_and_white = (torch.rand(16, 2, 32, 32, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    image, _, _ = Augment(blur=2, contrast=1, noise=0.5)(black_and_white, seed=0)
    assert image.min() >= 0 and image.max() <= 1 and image.dtype == torch.float32


def test_contrast_is_drawn_for_each_light():
    ramp = torch.linspace(0.3, 0.7, 32 * 32).view(1, 1, 32, 32).expand(1, 2, 32, 32)
    image, _, _ = Augment(flips=False, turns=False, blur=0, noise=0, contrast=0.3)(ramp, seed=0)
    spread = image.std(dim=(-2, -1))[0] / ramp.std(dim=(-2, -1))[0]
    assert abs(spread[0] - spread[1]) > 0.01 and ((spread > 0.69) & (spread < 1.31)).all()
    assert torch.allclose(image.mean((-2, -1)), ramp.mean((-2, -1)), atol=1e-4)
    assert torch.allclose(stretch_contrast(ramp, torch.ones(1, 2)), ramp)


def test_one_seed_one_result_and_no_global_random_state(batch):
    torch.manual_seed(1)
    first = Augment()(batch, seed=7)[0]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, Augment()(batch, seed=7)[0])
    assert not torch.equal(first, Augment()(batch, seed=8)[0])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_is_said():
    with pytest.raises(AoiError, match="turns=False"):
        Augment()(torch.rand(1, 2, 32, 48), seed=0)
    with pytest.raises(AoiError, match="out of range"):
        Augment(contrast=-0.1)
    assert Augment(turns=False)(torch.rand(1, 2, 32, 48), seed=0)[0].shape == (1, 2, 32, 48)
    assert Augment(blur=20)(torch.rand(4, 2, 16, 16), seed=0)[0].shape == (4, 2, 16, 16)  # kernel wider than the crop
