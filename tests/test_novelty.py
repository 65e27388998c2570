"What is new to a bank: distances by hand, limits that hold, and files that know their bank."

import json
import math

import numpy as np
import pytest
import torch

from aoi_ssl.core import AoiError
from aoi_ssl.encoder import PixelEncoder
from aoi_ssl.novelty import (
    calibrate_novelty,
    held_out_novelty,
    image_scores,
    load_novelty,
    nearer_with_all,
    novelty_map,
    prediction_limit,
)
from aoi_ssl.remember import METHODS, make_recipe, remember_image
from aoi_ssl.retrieval import MemoryBank, append_rows

P = 4
HALVES = torch.zeros(3, P, P)  # left bright, right bright, all bright
HALVES[0, :, :2], HALVES[1, :, 2:], HALVES[2] = 1, 1, 1


def scene(kinds):
    "An image (1, H, W) of patches by number."
    rows = [torch.cat([HALVES[kind] for kind in row], 1) for row in kinds]
    return torch.cat(rows)[None]


def bank_of(images, *, recipe=METHODS["paper"], ignore=None, mask=None):
    "A bank of images that are labelled all over; `ignore` is one mask for all, or one for each."
    encoder, parts, records = PixelEncoder(channels=1, patch_size=P, mean=[0.0], std=[1.0]), [], []
    for number, image in enumerate(images):
        here = torch.zeros_like(image, dtype=torch.bool) if mask is None else mask
        each = ignore[number] if isinstance(ignore, list) else ignore
        parts.append(remember_image({"image": image, "mask": here, "ignore": each}, encoder, recipe=recipe, number=number))
        size = dict(zip(("height", "width"), image.shape[-2:], strict=True))
        records.append({"stem": f"i{number}", "device": "d", "classes": [], **size})
    return MemoryBank(encoder, ["wire"], {name: torch.cat([p[name] for p in parts]) for name in parts[0]}, records, recipe=recipe)


def textures(count, seed=0, size=24):
    "Images of noise."
    return list(torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed)))


def test_distance_by_hand():
    bank = bank_of([scene([[0, 1], [1, 0]])])
    found = novelty_map(bank, scene([[0, 1, 2], [2, 0, 0]]))
    far = 1 - 8 / (math.sqrt(8) * 4)
    expected = torch.tensor([[0, 0, far], [far, 0, 0]]).repeat_interleave(P, 0).repeat_interleave(P, 1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"bank_shifts": 4, "query_shifts": 4}, {"bank_shifts": 4, "query_shifts": 2, "halo": 2}])
def test_held_out_is_what_a_bank_without_the_image_says(options):
    recipe, images = make_recipe("paper", **options), textures(3)
    bank = bank_of(images, recipe=recipe)
    for n, (stem, found) in enumerate(held_out_novelty(bank).items()):
        rest = bank.subset(stem=[f"i{m}" for m in range(3) if m != n], calibrate=False)
        torch.testing.assert_close(found, novelty_map(rest, images[n]), atol=1e-5, rtol=0)
        assert stem == f"i{n}" and novelty_map(bank, images[n]).max() < 1e-5


def test_what_is_ignored_is_not_judged():
    ignore = torch.zeros(1, 24, 24, dtype=torch.bool)
    ignore[:, :8] = True
    bank = bank_of(textures(2), ignore=ignore)
    found = held_out_novelty(bank)["i0"]
    assert found[:8].isnan().all() and not found[8:].isnan().any()
    assert np.isfinite(calibrate_novelty(bank).limits["whole"])


RECORD = {"device": "d", "classes": [], "height": 24, "width": 24}
NOTHING = torch.ones(1, 24, 24, dtype=torch.bool)


def test_an_image_that_is_ignored_all_over_changes_no_limit():
    images = textures(4)
    plain, bank = bank_of(images[:3]), bank_of(images, ignore=[None, None, None, NOTHING])
    wanted, found = calibrate_novelty(plain), calibrate_novelty(bank)
    assert found.limits == wanted.limits and [score["stem"] for score in found.scores] == ["i0", "i1", "i2"]
    assert nearer_with_all(bank) == nearer_with_all(plain) and "from 3 good" in repr(found)
    first = bank_of([images[3], *images[:3]], ignore=[NOTHING, None, None, None])
    assert calibrate_novelty(first).limits == wanted.limits


def test_where_too_few_images_are_labelled_there_is_no_limit():
    for ignore in ([None, NOTHING], [NOTHING, None]):
        bank = bank_of(textures(2), ignore=ignore)
        with pytest.raises(AoiError, match=r"2 image\(s\), and labels that count in 1; two at least"):
            calibrate_novelty(bank)
        assert not hasattr(bank, "novelty")
    with pytest.raises(AoiError, match="None of the 16 pixels"):
        image_scores(torch.full((4, 4), torch.nan))


def test_a_limit_that_is_no_number_trusts_nothing(tmp_path):
    bank = bank_of(textures(3))
    novelty, path = calibrate_novelty(bank), tmp_path / "novelty.json"
    novelty.save(path)
    kept = json.loads(path.read_text())
    kept["limits"]["spot"] = math.nan
    path.write_text(json.dumps(kept))
    with pytest.raises(AoiError, match="limits .*nan.* number above 0"):
        load_novelty(path, bank)
    novelty.limits["spot"] = math.nan
    assert not novelty.verdict(textures(1)[0])["trusted"]


def test_the_pixel_limit_is_the_quantile_of_good_pixels():
    bank, good = bank_of(textures(4)), {f"g{n}": image for n, image in enumerate(textures(6, seed=1))}
    novelty = calibrate_novelty(bank, good, pixel_rate=0.1)
    pixels = torch.cat([novelty_map(bank, image).flatten() for image in good.values()])
    assert abs((pixels > novelty.limits["pixel"]).float().mean() - 0.1) < 0.02
    assert torch.equal(bank.novelty.new(good["g0"]), novelty_map(bank, good["g0"]) / novelty.limits["pixel"] > 1)


def test_a_larger_bank_is_nearer():
    image = textures(1)[0]
    assert nearer_with_all(bank_of(textures(2))) == 1 and nearer_with_all(bank_of([image] * 3)) == 1
    bank, far = bank_of(textures(4)), {}
    for left in (1, 2):  # image i against all but itself, and all but itself and the next
        maps = [novelty_map(bank_of([i for m, i in enumerate(textures(4)) if (m - n) % 4 >= left]), textures(4)[n]) for n in range(4)]
        far[left] = torch.stack(maps).mean().item()
    power = math.log(far[2] / far[1]) / math.log(3 / 2)
    assert 0 < power and math.isclose(nearer_with_all(bank), (3 / 4) ** power, rel_tol=1e-4)
    scaled = [image_scores(found * nearer_with_all(bank), area=16)["whole"] for found in held_out_novelty(bank).values()]
    assert np.allclose([score["whole"] for score in calibrate_novelty(bank).scores], scaled)


def test_few_good_images_are_called_untrustworthy():
    images = textures(60, seed=2)
    bank = bank_of(images[:8])
    calibrate_novelty(bank, image_rate=0.2)
    table = bank.novelty.judge({f"t{n}": image for n, image in enumerate(images[8:])})
    assert 0 < (~table["trusted"]).mean() < 0.45
    stripes = scene([[0, 1] * 3] * 6)
    row = bank.novelty.judge({"stripes": stripes}).iloc[0]
    assert not row["trusted"] and "whole image" in row["reason"] and "Not to be trusted" in bank.novelty.note(bank.novelty(stripes))


def test_prediction_limit_by_hand():
    # logarithms 0 and 2: mean 1, s = sqrt 2; t(0.95, 1) = 6.3138
    expected = math.exp(1 + 6.3138 * math.sqrt(2) * math.sqrt(1.5))
    assert math.isclose(prediction_limit([1.0, math.e**2], 0.05), expected, rel_tol=1e-3)


def test_scores_of_an_image():
    found = torch.zeros(20, 20)
    found[3:5, 10:14] = 1.0  # 8 pixels
    assert image_scores(found, area=8)["spot"] == 1 and image_scores(found, area=9)["spot"] == 0
    assert math.isclose(image_scores(found, area=9)["whole"], 8 / 400, rel_tol=1e-6)
    place = image_scores(found, area=9)
    assert 2 <= place["y"] <= 5 and 10 <= place["x"] <= 13
    found[0] = torch.nan
    assert np.isfinite(list(image_scores(found).values())).all()


def test_what_cannot_be_calibrated():
    bank = bank_of(textures(1))
    with pytest.raises(AoiError, match="1 image"):
        calibrate_novelty(bank)
    with pytest.raises(AoiError, match="i0 is in the bank"):
        calibrate_novelty(bank, {"i0": textures(1)[0]})
    with pytest.raises(AoiError, match="two good ones"):
        calibrate_novelty(bank, {"a": textures(1)[0]})
    with pytest.raises(AoiError, match="pixel_rate"):
        calibrate_novelty(bank, pixel_rate=0)
    assert not hasattr(bank, "novelty")
    whole = bank_of(textures(2), recipe=make_recipe("paper", granularity="image"))
    with pytest.raises(AoiError, match="granularity='patch'"):
        novelty_map(whole, textures(1)[0])


def test_limits_belong_to_their_bank(tmp_path):
    bank = bank_of(textures(3))
    novelty = calibrate_novelty(bank)
    path = tmp_path / "novelty.json"
    novelty.save(path)
    same, image = bank_of(textures(3)), textures(1, seed=9)[0]
    assert torch.equal(load_novelty(path, same)(image), novelty(image)) and same.novelty.limits == novelty.limits
    bank.save(tmp_path / "bank")
    loaded = MemoryBank.load(tmp_path / "bank")
    assert torch.equal(loaded.novelty(image), novelty(image)) and loaded.novelty.image_rate == 0.05
    with pytest.raises(AoiError, match="stems"):
        load_novelty(path, bank_of(textures(2)))
    with pytest.raises(AoiError, match="encoder"):
        other = bank_of(textures(3))
        other.encoder.mean += 0.1
        load_novelty(path, other)
    path.write_text(json.dumps({"limits": {}}))
    with pytest.raises(AoiError, match="no 'pixel_rate'"):
        load_novelty(path, bank)
    bank.remove(stem="i0", calibrate=False)
    for use in (lambda: bank.novelty(image), lambda: bank.novelty.judge([image]), lambda: bank.novelty.save(path)):
        with pytest.raises(AoiError, match="changed"):
            use()


def replace_last(bank, image):
    "Forget the last of three images, and remember another under its name."
    rows = remember_image({"image": image, "mask": torch.zeros_like(image, dtype=torch.bool), "ignore": None}, bank.encoder, number=2)
    append_rows(bank.remove(stem="i2", calibrate=False), rows, [RECORD | {"stem": "i2"}], [], calibrate=False)


def test_another_image_under_the_same_name_is_noticed(tmp_path):
    images = textures(4)
    bank, path = bank_of(images[:3]), tmp_path / "novelty.json"
    calibrate_novelty(bank).save(path)
    bank.novelty(images[3])
    replace_last(bank, images[2])
    assert bank.novelty.verdict(images[3])["whole"] > 0  # the same image again
    replace_last(bank, images[3])
    for use in (bank.novelty, bank.novelty.verdict, lambda image: bank.novelty.judge([image]), lambda image: load_novelty(path, bank)):
        with pytest.raises(AoiError, match="has changed since|with keys"):
            use(images[3])
    kept = json.loads(path.read_text())
    del kept["bank"]["keys"]  # as older versions wrote it
    path.write_text(json.dumps(kept))
    assert load_novelty(path, bank_of(images[:3])).limits == kept["limits"]
