"Patch retrieval: hand-computed cases, the published code's faults, and what happens to bad input."

import json
import math
import os
import re
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from aoi_ssl import recall, remember, retrieval, search
from aoi_ssl.core import AoiError
from aoi_ssl.crossval import cross_validate, held_out_search, judged_regions, patch_folds, region_masks
from aoi_ssl.data import class_names, load_folder
from aoi_ssl.encoder import Encoder, PixelEncoder, ViTEncoder
from aoi_ssl.explain import patch_images
from aoi_ssl.features import embed
from aoi_ssl.metrics import THRESHOLDS, threshold_counts
from aoi_ssl.patches import guided_filter, patchify_mask, rim_weights, unpatchify_mask
from aoi_ssl.predict import Segmenter, load_segmenter, predict_image
from aoi_ssl.recall import (
    attention_weights,
    bank_devices,
    bank_index,
    list_recall,
    patch_masks,
    similarity_weights,
    to_keys,
)
from aoi_ssl.recall import search as search_bank
from aoi_ssl.remember import Recipe, estimate_bank, learn_space, make_recipe, remember_image, turned
from aoi_ssl.retrieval import MemoryBank, build_bank, empty_bank, space_sample
from aoi_ssl.search import ExactIndex, IVFIndex, MaskRows, aggregate, pack_bits, top_k, unpack_bits

paper_bank = partial(build_bank, method="paper")
CLASSES = ("wire", "ball")


def write(folder, count, *, shape=(40, 56), classes=CLASSES, draw=None, first=0, unlabelled=(), lights=2):
    "Noise images whose bright pixels are `wire` and whose dark ones are `ball`; `draw(mask, i)` changes a mask."
    rng = np.random.default_rng(first)
    place = folder / "acme" / "d001"
    (place / "masks").mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps({"classes": list(classes), "mask_format": "bits"}))
    for i in range(first, first + count):
        grey = rng.integers(0, 256, (lights, *shape), dtype=np.uint8)
        for light in range(lights):
            Image.fromarray(grey[light]).save(place / f"im{i}_buffer{light}.png")
        mask = np.stack([grey[0] > 160, grey[0] < 60, *[np.zeros(shape, bool)] * (len(classes) - 2)])
        if draw:
            draw(mask, i)
        if i not in unlabelled:
            Image.fromarray((mask << np.arange(len(mask))[:, None, None]).sum(0).astype(np.uint8)).save(
                place / "masks" / f"im{i}.png"
            )
    return load_folder(folder)["unlabelled" if i in unlabelled else "labelled"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    "Five images of 40 x 56: two and a half patches of 16 high, three and a half wide."
    return write(tmp_path_factory.mktemp("noise"), 5)


@pytest.fixture(scope="module")
def pixels():
    return PixelEncoder(channels=2, patch_size=16)


@pytest.fixture
def bank(dataset, pixels):
    return paper_bank(dataset, pixels, k=3, calibrate=False)


# --- pure functions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (20, 33), (5, 40), (1, 1)])
def test_a_patch_is_the_slice_of_the_mask(shape):
    mask = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) > 0.5
    patches = patchify_mask(mask, 8, fill=True)
    assert patches.shape == (math.ceil(shape[0] / 8), math.ceil(shape[1] / 8), 3, 8, 8)
    for r in range(patches.shape[0]):
        for c in range(patches.shape[1]):
            own = mask[:, r * 8 : r * 8 + 8, c * 8 : c * 8 + 8]
            assert patches[r, c, :, : own.shape[1], : own.shape[2]].equal(own)
            assert patches[r, c, :, own.shape[1] :].all() and patches[r, c, :, :, own.shape[2] :].all()
    assert unpatchify_mask(patches, *shape).equal(mask)
    assert unpatchify_mask(torch.stack([patches, ~patches]).float(), *shape)[1].equal((~mask).float())


def test_bits_survive_packing():
    flags = torch.rand(9, 2 * 5 * 5, generator=torch.Generator().manual_seed(0)) > 0.5
    assert pack_bits(flags).shape == (9, 7)
    assert unpack_bits(pack_bits(flags), 50).equal(flags.float())


def test_similarity_weights_by_hand():
    assert torch.allclose(similarity_weights(torch.tensor([0.8, 0.6, 0.6])), torch.tensor([0.4, 0.3, 0.3]))
    assert torch.allclose(similarity_weights(torch.tensor([[0.5, -0.9]])), torch.tensor([[1.0, 0.0]]))
    assert similarity_weights(torch.tensor([-0.1, -0.2, 0.0, -1.0])).tolist() == [0.25] * 4


def test_a_perfect_match_never_has_a_negative_weight():
    above_one = torch.tensor([1.0 + 2**-22, 1.0, 0.99])  # what rounding makes of a patch's cosine with itself
    for weights in (similarity_weights(above_one), attention_weights(above_one, 0.01)):
        assert (weights > 0).all() and weights[0] == weights.max() and torch.isclose(weights.sum(), torch.tensor(1.0))


def test_attention_weights_by_hand():
    s, beta = [0.9, 0.7], 0.1
    expected = [math.exp(v / beta) / sum(math.exp(u / beta) for u in s) for v in s]
    assert torch.allclose(attention_weights(torch.tensor(s), beta), torch.tensor(expected))


def test_top_k_in_blocks_is_exact():
    keys = torch.nn.functional.normalize(torch.randn(301, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    similarity, index = top_k(keys[:50], keys, 9, query_block=7, key_block=40)
    expected = (keys[:50] @ keys.T).topk(9)
    assert torch.allclose(similarity, expected.values, atol=1e-6) and index.equal(expected.indices)
    assert top_k(keys[:2], keys[:4], 30)[1].shape == (2, 4)


def test_who_does_not_know_has_no_vote():
    values = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 0, 1]]).bool()
    known = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 0, 1]]).bool()
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    index = torch.tensor([[0, 1], [1, -1]])  # the second query has one neighbour only
    got = aggregate(weights, index, pack_bits(values), pack_bits(known), count=5)
    assert torch.allclose(got, torch.tensor([[1, 0.25, 1, 0, 1], [1, 1, 0, 0, 1.0]]))


def test_aggregate_in_blocks_equals_einsum():
    g = torch.Generator().manual_seed(0)
    values, index = torch.rand(60, 64, generator=g) > 0.7, torch.randint(0, 60, (33, 5), generator=g)
    weights = similarity_weights(torch.rand(33, 5, generator=g))
    expected = torch.einsum("qk,qkn->qn", weights, values.float()[index])
    assert torch.allclose(aggregate(weights, index, pack_bits(values), count=64, block=8), expected, atol=1e-6)


# --- what is remembered ---------------------------------------------------------------------------------------------


def test_ignored_patches_stay_out_and_ignored_pixels_do_not_count(pixels):
    mask = torch.ones(2, 32, 40, dtype=torch.bool)
    ignore = torch.zeros_like(mask)
    ignore[:, :16, :16] = True  # wholly ignored: not a key
    ignore[0, :16, 16:32] = True  # ignored for one class: a key
    ignore[1, 16, 0] = True  # one pixel
    part = remember_image({"image": torch.rand(2, 32, 40), "mask": mask, "ignore": ignore}, pixels, number=4)
    places = list(zip(part["y"].tolist(), part["x"].tolist(), strict=True))
    assert places == [(0, 16), (0, 32), (16, 0), (16, 16), (16, 32)] and set(part["image"].tolist()) == {4}
    known = unpack_bits(part["known"], 512).reshape(-1, 2, 16, 16)
    values = unpack_bits(part["values"], 512).reshape(-1, 2, 16, 16)
    assert known[0, 0].sum() == 0 and known[0, 1].all()
    assert known[1, :, :, :8].all() and known[1, :, :, 8:].sum() == 0  # beyond the border nothing is known
    assert known[2, 1, 0, 0] == 0 and known[2].sum() == 511
    assert values.equal(known)  # all labelled, and never where it is not known
    assert torch.allclose(part["keys"].norm(dim=-1), torch.ones(5))


def test_an_ignore_label_reaches_the_bank_and_the_prediction(tmp_path, pixels):
    def draw(mask, i):
        mask[2, :16, :16] = i == 0  # a patch of ignore in the first image
        mask[2, 20, 20] = True

    dataset = write(tmp_path, 2, shape=(32, 32), classes=("wire", "ball", "ignore"), draw=draw)
    assert class_names(dataset) == ["wire", "ball"]
    bank = paper_bank(dataset, pixels, k=1, calibrate=False)
    assert len(bank.keys) == 7
    own = bank.predict(dataset[0]["image"][None])[0]
    expected = dataset[0]["mask"] & ~dataset[0]["ignore"]
    assert (own[:, 16:] > 0.5).equal(expected[:, 16:]) and own[:, 20, 20].sum() == 0


@pytest.mark.parametrize("i", [0, 3])
def test_a_known_image_recalls_its_own_mask_exactly(bank, dataset, i):
    bank.k = 1
    assert bank.predict(dataset[i]["image"][None])[0].equal(dataset[i]["mask"].float())


def test_prediction_by_hand(bank, dataset, pixels):
    "One query patch, three neighbours, similarity weights, computed from the keys and masks themselves."
    query = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    key = torch.nn.functional.normalize(pixels.encode(query).flatten(), dim=0)
    cosine = bank.keys @ key
    best = cosine.argsort(descending=True)[:3]
    w = cosine[best] / cosine[best].sum()
    whole = bank.x[best] + 16 <= 56
    assert whole.any()
    masks, known = patch_masks(bank, best).float(), patch_masks(bank, best, "known").float()
    expected = sum(w[j] * masks[j] for j in range(3)) / sum(w[j] * known[j] for j in range(3)).clamp(min=1e-9)
    assert torch.allclose(bank.predict(query)[0], expected, atol=1e-6)


def test_windows_do_not_change_a_local_encoder(pixels):
    image = torch.rand(1, 2, 100, 75, generator=torch.Generator().manual_seed(0))
    assert embed(pixels, image, size=32).allclose(pixels.encode(image), atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 40), (7, 3), (16, 16), (33, 90)])
def test_any_size_is_predicted(bank, shape):
    p = bank.predict(torch.rand(2, 2, *shape))
    assert p.shape == (2, 2, *shape) and p.min() >= 0 and p.max() <= 1
    assert predict_image(bank, torch.rand(2, *shape), size=32, overlap=8).shape == (2, *shape)


def test_k_beyond_the_bank_uses_all_there_is(bank):
    bank.k = 10_000
    bank.predict(torch.rand(1, 2, 16, 16))
    assert len(bank.neighbours(torch.rand(2, 16, 16), 0, 0)) == len(bank.keys)


# --- whole images ---------------------------------------------------------------------------------------------------


def test_image_granularity_averages_whole_masks(dataset, pixels):
    bank = paper_bank(dataset, pixels, k=2, granularity="image", calibrate=False)
    image = dataset[1]["image"]
    means = torch.stack([pixels.encode(dataset[i]["image"][None]).mean((0, 1, 2)) for i in range(5)])
    cosine = torch.nn.functional.cosine_similarity(means, means[1:2])
    first, second = cosine.argsort(descending=True)[:2].tolist()
    w = cosine[[first, second]] / cosine[[first, second]].sum()
    expected = w[0] * dataset[first]["mask"] + w[1] * dataset[second]["mask"]
    assert first == 1 and torch.allclose(bank.predict(image[None])[0], expected, atol=1e-6)
    assert bank.neighbours(image, 20, 20)["stem"].tolist() == [dataset[first]["stem"], dataset[second]["stem"]]


def test_image_granularity_skips_what_is_not_known(tmp_path, pixels):
    def draw(mask, i):
        mask[2, :16, :16] = i == 0

    dataset = write(tmp_path, 2, shape=(32, 32), classes=("wire", "ball", "ignore"), draw=draw)
    bank = paper_bank(dataset, pixels, k=2, granularity="image", calibrate=False)
    p = bank.predict(dataset[0]["image"][None])[0]
    assert torch.allclose(p[:, :16, :16], dataset[1]["mask"][:, :16, :16].float())
    assert len(bank.neighbours(dataset[0]["image"], 3, 3)) == 1


def test_image_granularity_needs_one_size(dataset, pixels):
    bank = paper_bank(dataset, pixels, granularity="image", calibrate=False)
    with pytest.raises(AoiError, match="64 x 64 .*40 x 56.*granularity='patch'"):
        bank.predict(torch.rand(1, 2, 64, 64))


# --- cross-validation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["patch", "image"])
@pytest.mark.parametrize("count", [3, 5])
def test_no_fold_answers_itself(dataset, pixels, granularity, count):
    bank = paper_bank(dataset.select(range(count)), pixels, granularity=granularity, calibrate=False)
    folds = patch_folds(bank)
    assert len(folds.unique()) == count  # leave-one-out below five, five folds of one at five
    for image in range(count):
        assert len(folds[bank.image == image].unique()) == 1
    queries = torch.arange(len(bank.keys))
    _, rows = held_out_search(bank, queries, folds, 30)
    assert (bank.image[rows] != bank.image[:, None]).all() and (rows >= 0).all()


def test_more_images_than_folds_go_in_groups(tmp_path, pixels):
    bank = paper_bank(write(tmp_path, 7, shape=(16, 16)), pixels, calibrate=False)
    folds = patch_folds(bank, folds=5)
    assert sorted(folds.bincount().tolist()) == [1, 1, 1, 2, 2]
    _, rows = held_out_search(bank, torch.arange(7), folds, 30)
    assert rows.shape == (7, 5)  # never more neighbours than the smallest rest has
    assert (folds[rows] != folds[:, None]).all() and len(patch_folds(bank).unique()) == 7


@pytest.mark.parametrize("aggregation", ["similarity", "attention"])
def test_cross_validation_equals_leaving_each_image_out_in_truth(dataset, pixels, aggregation):
    "The short cut over cached neighbours against banks that are really built without the image."
    options = {"aggregation": aggregation, "calibrate": False}
    bank = paper_bank(dataset.select(range(3)), pixels, **options)
    counts = cross_validate(bank, ks=(1, 4), betas=(0.05, 0.2))
    assert len(counts) == (2 if aggregation == "similarity" else 4)
    for (k, beta, _), got in counts.items():
        expected = 0
        for i in range(3):
            rest = paper_bank(dataset.select([j for j in range(3) if j != i]), pixels, k=k, beta=beta, **options)
            p = rest.predict(dataset[i]["image"][None])[0]
            expected = expected + threshold_counts(p, dataset[i]["mask"])
        assert (got - expected).abs().max() <= 2  # a pixel whose probability is a threshold, to the last bit


def test_the_best_k_and_thresholds_are_taken(dataset, pixels):
    bank = paper_bank(dataset, pixels)
    curves = bank.calibrate()
    best = curves.groupby(["k", "class"])["iou"].max().groupby("k").mean()
    assert best.idxmax() == bank.k and set(best.index) == {1, 3, 5, 10, 20, 30}
    chosen = curves[curves["k"] == bank.k]
    for name, t in zip(bank.classes, bank.thresholds.tolist(), strict=True):
        rows = chosen[chosen["class"] == name]
        assert rows["iou"].max() == rows.loc[(rows["threshold"] - t).abs().idxmin(), "iou"]
    assert len(curves) == 6 * len(CLASSES) * len(THRESHOLDS)


@pytest.mark.parametrize("decoder", ["ridge", "mixture"])
def test_another_deal_of_folds_is_judged_anew(dataset, pixels, decoder):
    made = [paper_bank(dataset, pixels, decoder=decoder, calibrate=False) for _ in range(2)]
    made[0].calibrate(folds=2, seed=0)
    deals = [patch_folds(made[0], folds=2, seed=seed) for seed in (0, 1)]
    assert not deals[0].equal(deals[1]) and [(d == 1).sum() for d in deals] == [deals[0].sum()] * 2  # another deal, of the same sizes
    made[0].k, made[0].mix = made[1].k, made[1].mix
    again, fresh = (bank.calibrate(folds=2, seed=1) for bank in made)
    pd.testing.assert_frame_equal(again, fresh)


def test_what_is_given_is_kept(dataset, pixels):
    bank = paper_bank(dataset, pixels, k=4, beta=0.07, aggregation="attention")
    assert (bank.k, bank.beta) == (4, 0.07) and (bank.thresholds != 0.5).any()


def test_one_seed_one_result_even_when_patches_are_sampled(bank):
    first, again = (cross_validate(bank, ks=(3,), max_patches=20, seed=1) for _ in range(2))
    (a,), (b,) = first.values(), again.values()
    assert a.equal(b) and 0 < a[0, 0].sum() <= 20 * 256


def test_one_image_is_judged_by_its_halves(dataset, pixels):
    with pytest.warns(UserWarning, match="halves"):
        bank = paper_bank(dataset.select([2]), pixels)
    folds = patch_folds(bank)
    assert folds.equal((bank.x >= 28).long())  # 40 x 56: cut across the longer side
    _, rows = held_out_search(bank, torch.arange(len(bank.keys)), folds, 30)
    assert (folds[rows] != folds[:, None]).all()
    with pytest.warns(UserWarning, match="nothing to calibrate"):
        paper_bank(dataset.select([2]), pixels, granularity="image")


@pytest.mark.parametrize(("shape", "count", "granularity"), [
    ((16, 16), 1, "patch"),  # one patch
    ((32, 64), 1, "patch"),  # one image, its right half ignored
    ((32, 32), 1, "image"),
    ((32, 32), 2, "image"),  # two images, the second ignored
])
def test_one_fold_keeps_what_the_bank_has(tmp_path, pixels, shape, count, granularity):
    "There is nothing to segment from anything else: the bank is built all the same, and says so."

    def draw(mask, i):
        mask[2] = i == 1
        mask[2, :, 32:] = True

    dataset = write(tmp_path, count, shape=shape, classes=("wire", "ball", "ignore"), draw=draw)
    with pytest.warns(UserWarning, match=r"one fold: nothing to calibrate on. k stays 5 .*wire 0\.50, ball 0\.50"):
        bank = paper_bank(dataset, pixels, granularity=granularity)
    assert bank.k == 5 and bank.thresholds.tolist() == [0.5, 0.5]
    bank.k = 1
    own, item = bank.predict(dataset[0]["image"][None])[0], dataset[0]
    assert own[~item["ignore"]].equal(item["mask"][~item["ignore"]].float())


def test_an_ignored_image_takes_no_part_in_the_folds(tmp_path, pixels):
    "Its labels are under `ignore`: the halves of the other image are the folds, as if it were not there."

    def draw(mask, i):
        mask[2] = i == 1

    dataset = write(tmp_path, 2, shape=(32, 32), classes=("wire", "ball", "ignore"), draw=draw)
    with pytest.warns(UserWarning, match="halves"):
        bank = paper_bank(dataset, pixels)
    assert [record["classes"] for record in bank.images] == [["wire", "ball"], []]
    assert len(patch_folds(bank).unique()) == 2


def test_each_image_and_mask_is_decoded_once(tmp_path, pixels, monkeypatch):
    import aoi_ssl.data as data

    dataset, read, plain = write(tmp_path, 2), [], {n: getattr(data, n) for n in ("read_native", "read_mask")}
    for name in plain:
        monkeypatch.setattr(data, name, lambda *a, n=name, **o: (read.append(n), plain[n](*a, **o))[1])
    paper_bank(dataset, pixels, k=1, calibrate=False)
    assert sorted(read) == ["read_mask"] * 2 + ["read_native"] * 2


def test_a_class_that_the_bank_lacks_is_named_and_never_predicted(tmp_path, pixels):
    dataset = write(tmp_path, 3, classes=("wire", "ball", "wedge"))
    with pytest.warns(UserWarning, match="No image of the bank shows wedge"):
        bank = paper_bank(dataset, pixels)
    assert bank.thresholds[2] == 1.0 and (bank.thresholds[:2] < 1).all()
    assert bank.predict(dataset[0]["image"][None])[:, 2].max() == 0


def test_a_class_of_one_image_is_still_predicted(tmp_path, pixels):
    def draw(mask, i):
        mask[2, 4:12, 4:12] = i == 1

    dataset = write(tmp_path, 3, classes=("wire", "ball", "wedge"), draw=draw)
    with pytest.warns(UserWarning, match="wedge: never hit .* median"):
        bank = paper_bank(dataset, pixels)
    low, high = bank.thresholds[:2].min(), bank.thresholds[:2].max()
    assert low <= bank.thresholds[2] <= high < 1


def test_thresholds_from_a_dataset(bank, dataset):
    before = bank.k
    bank.k = 1
    bank.calibrate(dataset)  # the bank's own images: every threshold is perfect
    assert bank.k == 1 != before and ((bank.thresholds > 0.3) & (bank.thresholds < 0.7)).all()


# --- a bank to work with --------------------------------------------------------------------------------------------


def test_neighbours_say_where_a_pixel_comes_from(bank, dataset):
    image, table = dataset[4]["image"], None
    table = bank.neighbours(image, 35, 50, k=4)
    first = table.iloc[0]
    assert list(table.columns) == ["stem", "device", "row", "column", "similarity", "weight", "y", "x", "turn", "key"]
    assert (first.stem, first.device, first.row, first.column) == (dataset[4]["stem"], "d001", 2, 3)
    assert (first.y, first.x) == (32, 48) and first.similarity == pytest.approx(1) and len(table) == 4
    assert table.similarity.is_monotonic_decreasing and table.weight.sum() == pytest.approx(1)
    crop = patch_images(table, dataset)[0]
    assert crop[:, :8, :8].equal(image[:, 32:, 48:]) and crop[:, 8:].sum() == 0
    assert patch_images(table, dataset, margin=4).shape == (4, 2, 24, 24)
    assert patch_masks(bank, table["key"])[0, :, :8, :8].equal(dataset[4]["mask"][:, 32:, 48:])
    bank.size = 32  # only the window around the pixel is encoded; the answer is the same
    assert bank.neighbours(image, 35, 50, k=4).equals(table)


def test_neighbours_see_a_patch_as_the_bank_did(dataset):
    "A ViT gives a patch another embedding in another window: `neighbours` must take the window that was remembered."
    bank = paper_bank(dataset.select([0, 1]), ViTEncoder("nano", image_size=32), size=32, k=1, calibrate=False)
    for y, x in [(3, 50), (20, 20), (20, 50), (39, 40)]:
        first = bank.neighbours(dataset[1]["image"], y, x).iloc[0]
        assert (first.stem, first.row, first.column) == (dataset[1]["stem"], y // 16, x // 16)
        assert first.similarity == pytest.approx(1, abs=1e-5)


def test_neighbours_of_no_pixel(bank, dataset):
    for y, x in [(-1, 0), (40, 0), (0, 56)]:
        with pytest.raises(AoiError, match="outside the image of 40 x 56"):
            bank.neighbours(dataset[0]["image"], y, x)
    with pytest.raises(AoiError, match="k is 0"):
        bank.neighbours(dataset[0]["image"], 0, 0, k=0)
    with pytest.raises(AoiError, match="lacks acme/d001/im0"):
        patch_images(bank.neighbours(dataset[0]["image"], 0, 0, k=1), dataset.select([1]))


def test_adding_images_is_building_with_them(dataset, pixels):
    grown = paper_bank(dataset.select([0, 1]), pixels, k=3, calibrate=False).add(dataset.select([2, 3]))
    whole = paper_bank(dataset.select(range(4)), pixels, k=3)
    assert grown.images == whole.images and grown.image.equal(whole.image)
    assert grown.predict(dataset[4]["image"][None]).equal(whole.predict(dataset[4]["image"][None]))
    assert grown.thresholds.equal(whole.thresholds) and grown.k == 3


def test_a_refused_addition_changes_nothing(tmp_path, bank, dataset):
    before = bank.keys.clone(), list(bank.images)
    with pytest.raises(AoiError, match="acme/d001/im1 would be in the bank twice"):
        bank.add(dataset.select([1]))
    with pytest.raises(AoiError, match=r"\['ball', 'wire'\].*\['wire', 'ball'\]"):
        bank.add(write(tmp_path, 1, classes=("ball", "wire"), first=9))
    assert bank.keys.equal(before[0]) and bank.images == before[1]


def test_save_and_load(tmp_path, dataset):
    bank = paper_bank(dataset, ViTEncoder("nano", image_size=32), aggregation="attention")
    bank.save(tmp_path / "bank")
    again = Segmenter.load(tmp_path / "bank")
    image = torch.rand(1, 2, 40, 50)
    assert isinstance(again, MemoryBank) and repr(again) == repr(bank) and again.images == bank.images
    assert again.predict(image).equal(bank.predict(image)) and again.thresholds.equal(bank.thresholds)
    files = {f.name for f in (tmp_path / "bank").rglob("*") if f.is_file()}
    assert {"segmenter.json", "bank.safetensors", "encoder.json"} <= files
    assert not [f for f in files if f.endswith((".pt", ".pth", ".bin", ".pkl"))]


def test_a_folder_that_does_not_belong_together_is_refused(tmp_path, bank):
    bank.save(tmp_path / "bank")
    other = PixelEncoder(channels=2, patch_size=16, mean=[0.1, 0.2])
    other.save_pretrained(tmp_path / "bank" / "encoder", overwrite=True)
    with pytest.raises(AoiError, match="the bank was built with"):
        MemoryBank.load(tmp_path / "bank")
    bank.encoder.save_pretrained(tmp_path / "bank" / "encoder", overwrite=True)
    file = tmp_path / "bank" / "bank.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AoiError, match="cannot be read"):
        MemoryBank.load(tmp_path / "bank")
    file.unlink()
    with pytest.raises(AoiError, match="cannot be read"):
        MemoryBank.load(tmp_path / "bank")


def test_a_full_disk_leaves_the_old_bank(tmp_path, bank, monkeypatch):
    bank.save(tmp_path / "bank")
    old = (tmp_path / "bank" / "bank.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(retrieval, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        bank.save(tmp_path / "bank", overwrite=True)
    assert (tmp_path / "bank" / "bank.safetensors").read_bytes() == old
    assert [f.name for f in tmp_path.iterdir()] == ["bank"]


# --- bad input ------------------------------------------------------------------------------------------------------


def test_an_encoder_of_another_length_is_refused(bank):
    tensors = {name: getattr(bank, name) for name in retrieval.BANK_TENSORS}
    with pytest.raises(AoiError, match="512 numbers, the encoder's embeddings 48"):
        MemoryBank(ViTEncoder("nano", image_size=32), bank.classes, tensors, bank.images)
    with pytest.raises(AoiError, match="64 bytes a patch, 3 classes need 96"):
        MemoryBank(bank.encoder, [*bank.classes, "wedge"], tensors, bank.images)


def test_other_lights_are_refused(bank, dataset):
    with pytest.raises(AoiError, match="2 channels; this model was made for 1"):
        paper_bank(dataset, PixelEncoder(channels=1))
    with pytest.raises(AoiError, match="channels"):
        bank.predict(torch.rand(1, 3, 32, 32))


def test_unlabelled_images_are_refused_by_name(tmp_path, pixels):
    with pytest.raises(AoiError, match="acme/d001/im0 has no labels"):
        paper_bank(write(tmp_path, 1, unlabelled=(0,)), pixels)


def test_nothing_to_remember(tmp_path, dataset, pixels):
    with pytest.raises(AoiError, match="0 images and no labelled patch"):
        paper_bank(dataset.select([]), pixels)

    def draw(mask, i):
        mask[2] = True

    ignored = write(tmp_path, 1, classes=("wire", "ball", "ignore"), draw=draw)
    with pytest.raises(AoiError, match="1 images and no labelled patch"):
        paper_bank(ignored, pixels)


@pytest.mark.parametrize(
    "option",
    [{"k": 0}, {"k": 2.5}, {"aggregation": "mean"}, {"beta": 0.0}, {"mix": 1.5}, {"granularity": "pixel"}, {"size": 100},
     {"method": "best"}, {"halo": -1}, {"turns": 3}, {"decoder": "tree"}, {"position": "lost"}, {"whiten": 0}],
)
def test_options_that_do_not_exist(dataset, pixels, option):
    with pytest.raises(AoiError, match=f"{next(iter(option))} is {next(iter(option.values()))!r}"):
        paper_bank(dataset, pixels, **option)


def test_the_encoder_is_left_as_it_was(dataset):
    encoder = ViTEncoder("nano", image_size=32).train()
    before = encoder.fingerprint()
    with warnings.catch_warnings(action="ignore"):
        bank = MemoryBank.build(dataset.select([0]), encoder)
    assert isinstance(bank.encoder, Encoder) and bank.encoder.vit is encoder.vit and encoder.training and encoder.vit.training
    assert encoder.fingerprint() == before and not bank.predict(dataset[0]["image"][None]).requires_grad


# --- shifted grids, halos, turns ------------------------------------------------------------------------------------


def crops(image, mask, shape, corners):
    "A labelled item for each corner, cut from one picture."
    (h, w), items = shape, []
    for y, x in corners:
        part = np.s_[:, y : y + h, x : x + w]
        items.append({"image": image[part], "mask": mask[part], "ignore": None})
    return items


def test_an_image_moved_by_a_quarter_patch_is_recalled_exactly(pixels):
    "16 grids are a quarter patch apart: of a picture that moves by one, each inner patch finds itself."
    g = torch.Generator().manual_seed(0)
    image, mask = torch.rand(2, 80, 80, generator=g), torch.rand(2, 80, 80, generator=g) > 0.5
    known, moved = crops(image, mask, (64, 64), [(0, 0), (4, 12)])
    for shifts, exact in ((16, True), (1, False)):
        recipe = Recipe(bank_shifts=shifts)
        rows = remember_image(known, pixels, recipe=recipe)
        record = {"stem": "a", "device": "d", "height": 64, "width": 64, "classes": list(CLASSES)}
        bank = MemoryBank(pixels, CLASSES, rows, [record], recipe=recipe, k=1)
        recalled = bank.predict(moved["image"][None])[0, :, :48, :48]  # further on lies what the bank has not seen
        assert recalled.equal(moved["mask"][:, :48, :48].float()) == exact


@pytest.mark.parametrize("turns", [2, 4, 8])
def test_a_turned_image_is_recalled_exactly(dataset, pixels, turns):
    bank = paper_bank(dataset.select([0]), pixels, k=1, turns=turns, calibrate=False)
    assert len(bank.keys) == 12 * turns
    item = dataset[0]
    for turn in range(turns):
        image, mask = (turned(item[name], turn)[:, :32, :32] for name in ("image", "mask"))
        # a grid that starts at the other end of 40 x 56 pixels has other patches: only those that fit are the same
        first = bank.neighbours(turned(item["image"], turn), 5, 5).iloc[0]
        assert first.turn == turn and first.similarity == pytest.approx(1, abs=1e-5)
        assert patch_masks(bank, [first.key])[0].equal(mask[:, :16, :16])
        picture = patch_images(bank.neighbours(turned(item["image"], turn), 5, 5, k=1), dataset)[0]
        assert picture.equal(image[:, :16, :16])


def test_votes_of_several_grids_and_halos_by_hand(dataset, pixels):
    "Each pixel: all patches that reach it, each with its rim weight, each with its neighbours' weights."
    recipe = {"bank_shifts": 4, "query_shifts": 2, "halo": 3, "aggregation": "distance"}
    bank = paper_bank(dataset.select(range(3)), pixels, k=4, calibrate=False, **recipe)
    image = dataset[4]["image"]
    predicted = bank.predict(image[None])[0]
    for y, x in ((0, 0), (8, 21), (39, 55), (17, 30)):
        votes, cast = torch.zeros(2), torch.zeros(2)
        for shift in ((0, 0), (8, 8)):
            grid = embed(pixels, image[None], shift=shift)[0]
            for r in range(grid.shape[0]):
                for c in range(grid.shape[1]):
                    dy, dx = y - (r * 16 - 16 * (shift[0] > 0) + shift[0]) + 3, x - (c * 16 - 16 * (shift[1] > 0) + shift[1]) + 3
                    if not (0 <= dy < 22 and 0 <= dx < 22):
                        continue
                    cosine = bank.keys @ torch.nn.functional.normalize(grid[r, c], dim=0)
                    best = cosine.argsort(descending=True)[:4]
                    w = ((2 - 2 * cosine[best]).clamp(min=0) + 1e-3) ** -2
                    w = w / w.sum() * rim_weights(16, 3)[dy, dx]
                    says, knows = (patch_masks(bank, best, what)[:, :, dy, dx].float() for what in ("values", "known"))
                    votes, cast = votes + w @ says, cast + w @ knows
        assert torch.allclose(predicted[:, y, x], votes / cast.clamp(min=1e-12), atol=1e-4)


@pytest.mark.parametrize("changes", [
    {"query_shifts": 2, "halo": 2, "aggregation": "distance"},
    {"query_shifts": 4, "decoder": "mixture", "whiten": 12},
    {"query_shifts": 1, "decoder": "ridge", "halo": 1},
    {"query_shifts": 2, "refine": 1},
])
def test_cross_validation_of_averaged_predictions_equals_leaving_out_in_truth(dataset, pixels, changes):
    "Held-out probabilities come from all query grids, as those of a new image do."
    options = {"bank_shifts": 4, "calibrate": False} | changes
    options["space"] = learn_space(dataset, pixels, method="paper", whiten=changes.get("whiten"))
    bank = paper_bank(dataset.select(range(3)), pixels, **options)
    counts = cross_validate(bank, ks=(4,), mixes=(0.3,))
    assert len(counts) == 1
    ((setting, got),) = counts.items()
    expected = 0
    for i in range(3):
        rest = paper_bank(dataset.select([j for j in range(3) if j != i]), pixels, k=4, mix=0.3, **options)
        expected = expected + threshold_counts(rest.predict(dataset[i]["image"][None])[0], dataset[i]["mask"])
    assert (got - expected).abs().max() <= 6  # a pixel whose probability is a threshold, to the last bit


def test_what_is_judged_is_a_sample_of_squares_that_hardly_changes(tmp_path, pixels):
    dataset = write(tmp_path, 3, shape=(256, 256))
    bank = paper_bank(dataset.select([0, 1]), pixels, bank_shifts=2, query_shifts=2, k=1, calibrate=False)
    whole = judged_regions(bank)
    assert [tuple(r) for r in whole] == [(0, 0, 0, 256, 256), (1, 0, 0, 256, 256)]
    some = judged_regions(bank, max_patches=2 * 81 * 3)
    assert len(some) == 3 and all(r.height == r.width == 128 for r in some) and some == judged_regions(bank, max_patches=486)
    for region in whole + some:
        mask, known = region_masks(bank, region)
        own = dataset[region.image]["mask"][:, region.y : region.y + region.height, region.x : region.x + region.width]
        assert mask.equal(own) and known.all()
    bank.add(dataset.select([2]), calibrate=False)
    assert len(set(some) & set(judged_regions(bank, max_patches=486))) >= 1


def test_thresholds_after_adding_are_those_of_building_at_once(dataset, pixels):
    options = {"bank_shifts": 4, "query_shifts": 2, "k": 3}
    space = learn_space(dataset, pixels, method="paper", whiten=20)
    grown = paper_bank(dataset.select([0, 1, 2]), pixels, space=space, whiten=20, **options)
    grown.add(dataset.select([3, 4]))
    whole = paper_bank(dataset, pixels, space=space, whiten=20, **options)
    assert all(getattr(grown, name).equal(getattr(whole, name)) for name in retrieval.BANK_TENSORS)
    assert grown.thresholds.equal(whole.thresholds)


# --- a bank that waits for labels -----------------------------------------------------------------------------------


def test_an_empty_bank_that_learns_is_the_bank_that_is_built(dataset, pixels):
    for method in ("paper", "fast"):
        whole = build_bank(dataset.select(range(4)), pixels, method=method)
        space = whole.space if method == "fast" else None
        grown = empty_bank(dataset, pixels, method=method, space=space)
        assert grown.classes == list(CLASSES) and len(grown.keys) == len(grown.images) == 0 and grown.thresholds.tolist() == [0.5, 0.5]
        assert grown.add(dataset.select(range(4))) is grown and grown.images == whole.images
        assert all(getattr(grown, name).equal(getattr(whole, name)) for name in retrieval.BANK_TENSORS)
        assert grown.k == whole.k and grown.thresholds.equal(whole.thresholds)


def test_the_space_of_an_empty_bank_needs_no_labels(tmp_path, dataset, pixels):
    bare = write(tmp_path, 5, unlabelled=range(5))  # the images of `dataset`, without their masks
    listed = [row["image"] for row in dataset]
    made = [empty_bank(images, pixels, CLASSES, method="fast", most=9).space.fingerprint()
            for images in (dataset, bare, listed, dict(enumerate(listed)), [{"stem": "a", "image": image} for image in listed])]
    assert set(made) == {learn_space(dataset, pixels, method="fast").fingerprint()}
    some = [empty_bank(listed, pixels, CLASSES, method="fast", most=2, seed=seed).space.fingerprint() for seed in (0, 0, 1)]
    assert some[0] == some[1] and len({*some, *made}) == 3


def test_a_large_image_is_seen_in_its_middle():
    wide = torch.arange(2 * 100 * 61.0).view(2, 100, 61)
    (middle,) = space_sample([wide], size=32)
    assert middle.equal(wide[:, 34:66, 14:46]) and space_sample([wide], size=128)[0].equal(wide)
    assert [int(image[0, 0, 0]) for image in space_sample([torch.full((1, 8, 8), n) for n in range(9)], most=9)] == [*range(9)]


def test_an_empty_bank_says_that_it_is(tmp_path, dataset, pixels):
    bank = empty_bank(dataset, pixels, method="fast")
    image = dataset[0]["image"]
    for ask in (lambda b: b.predict(image[None]), lambda b: b.neighbours(image, 0, 0), lambda b: b.explain(image, 0, 0),
                lambda b: b.like_devices(image), lambda b: b.using(routes=1).predict(image[None]),
                lambda b: b.using(decoder="ridge").predict(image[None]), lambda b: b.using(decoder="mixture").predict(image[None])):
        with pytest.raises(AoiError, match="0 patches"):
            ask(bank)
    with pytest.warns(UserWarning, match="nothing to calibrate on"):
        assert bank.calibrate().empty and len(bank.frame()) == 0
    bank.save(tmp_path / "bank")
    again = Segmenter.load(tmp_path / "bank").add(dataset.select([0, 1]))
    assert again.space.fingerprint() == bank.space.fingerprint() and again.predict(image[None])[0].gt(0.5).any()
    assert bank.merge(again).keys.equal(again.keys) and again.merge(bank).keys.equal(again.keys)
    assert bank.using(decoder="mixture").add(dataset.select([0, 1])).regression is not None


def test_an_empty_bank_needs_images_and_classes(dataset, pixels):
    with pytest.raises(AoiError, match="0 images"):
        empty_bank([], pixels, CLASSES)
    with pytest.raises(AoiError, match="classes is None"):
        empty_bank([dataset[0]["image"]], pixels)


@pytest.fixture
def lists(monkeypatch):
    "Banks of 100 keys are large, and lists are good enough."
    monkeypatch.setattr(search, "MOST_EXACT", 100)
    monkeypatch.setattr(recall, "LEAST_RECALL", 0.0)


GRIDS = {"method": "paper", "bank_shifts": 4, "query_shifts": 2, "k": 3, "whiten": 20}


def test_a_small_bank_is_searched_exactly(dataset, pixels):
    "Every key is compared in float32, in the blocks in which `top_k` does it: bit for bit."
    bank, image = build_bank(dataset, pixels, **GRIDS), dataset[0]["image"][None]
    assert isinstance(bank_index(bank), ExactIndex) and bank.keys.dtype == torch.float32
    grid = embed(pixels, image)
    similarity, rows = search_bank(bank, grid, 40, 56)
    expected = top_k(to_keys(bank, grid, 40, 56).flatten(0, 2), bank.keys, 3)
    assert similarity.equal(expected[0]) and rows.equal(expected[1])
    assert bank_index(bank).codes.data_ptr() == bank.keys.data_ptr()  # no second copy
    folds = patch_folds(bank)
    for query in (0, 70, len(bank.keys) - 1):
        others = (folds != folds[query]).nonzero().flatten()
        _, place = top_k(bank.keys[[query]], bank.keys[others], 3)
        assert held_out_search(bank, torch.tensor([query]), folds, 3)[1].equal(others[place])


def test_a_large_bank_is_searched_by_lists(dataset, pixels, lists, tmp_path):
    "Nearly what the exact bank says; and the index stays right, whatever is done to the bank."
    bank, image = build_bank(dataset.select([0, 1, 2, 3]), pixels, **GRIDS), dataset[4]["image"][None]
    index = bank_index(bank)
    assert isinstance(index, IVFIndex) and bank.keys.dtype == torch.float16 and index.codes.data_ptr() == bank.keys.data_ptr()
    assert not (bank.image[held_out_search(bank, torch.arange(len(bank.keys)), patch_folds(bank), 3)[1]] == bank.image[:, None]).any()
    before, twin = bank.predict(image), bank.using(k=3)
    bank.save(tmp_path / "bank")
    again = Segmenter.load(tmp_path / "bank")
    assert again._cache["index"].order.equal(index.order) and torch.allclose(again.predict(image), before, atol=1e-5)
    bank.add(dataset.select([4]))
    assert bank_index(bank) is not index and bank_index(bank).centres.equal(index.centres) and len(bank_index(bank)) == len(bank.keys)
    assert torch.allclose(twin.predict(image), before, atol=1e-5)  # it still has its own index
    own = bank.using(k=1).predict(image)[0] > 0.5
    assert (own == dataset[4]["mask"]).float().mean() > 0.99  # it finds itself
    table = bank.explain(dataset[4]["image"], 20, 30)
    told = table[bank.classes].mul(table["weight"], axis=0).sum()
    assert np.allclose(told, bank.predict(image)[0, :, 20, 30], atol=1e-4)
    bank.remove(stem=bank.images[0]["stem"])
    stems = [record["stem"] for record in bank.images]
    parts = bank.subset(stem=stems[:2]).merge(bank.subset(stem=stems[2:]))
    for made in (bank, parts):
        found = bank_index(made).search(made.keys[[0, 99, -1]].float(), 1)[1].flatten()
        assert torch.allclose(made.keys[found].float(), made.keys[[0, 99, -1]].float())
    assert parts.keys.equal(bank.keys) and parts.values.equal(bank.values)


def test_lists_that_miss_too_much_are_not_used(dataset, pixels, lists, monkeypatch):
    "The recall that is measured is that of a search by hand; where it is too low, every key is looked at."
    bank = build_bank(dataset, pixels, calibrate=False, **GRIDS)
    index = bank_index(bank)
    index.reach.fill_(1.0)
    measured = list_recall(bank, index, count=len(bank.keys), k=3)
    same = bank.image[:, None] == bank.image
    truth = (bank.keys.float() @ bank.keys.float().T).masked_fill(same, -1).topk(3).values[:, -1]
    found, _ = index.search(bank.keys.float(), 3, apart=(bank.image.long(), bank.image.long()))
    assert measured == pytest.approx((found >= truth[:, None] - 1e-4).float().mean().item(), abs=0.01) and measured < 1
    monkeypatch.setattr(recall, "LEAST_RECALL", 1.01)
    again = bank.subset(device=bank.images[0]["device"], calibrate=False)
    assert isinstance(bank_index(again), ExactIndex) and bank_index(again).codes.data_ptr() == again.keys.data_ptr()


def test_lists_cost_little(dataset, pixels, lists, monkeypatch):
    "Probabilities of lists and of an exact search, for the same half-precision keys."
    bank, image = build_bank(dataset, pixels, calibrate=False, **GRIDS), dataset[2]["image"].roll(3, -1)[None]
    near = bank.predict(image)
    monkeypatch.setitem(bank._cache, "index", ExactIndex(bank.keys, dtype="float16"))
    assert (near - bank.predict(image)).abs().mean() < 0.02


def test_masks_are_not_stored_twice(dataset, pixels):
    "Of five images of 3 x 4 patches, patches inside, at the lower and the right border and in the corner know different pixels."
    whole = build_bank(dataset, pixels, calibrate=False, method="paper")
    assert len(whole.known) == 5 * 12 and len(whole.known.table) == 5 * 4
    moved = whole.to("cpu").values
    assert isinstance(moved, MaskRows) and moved.equal(whole.values)


@pytest.fixture
def stripes(tmp_path, pixels):
    "Four images: two of a device with stripes across and wires on the bright ones, two with stripes down and no wire; and a query of each."
    rng, images = np.random.default_rng(0), []
    bright = (torch.arange(64) // 3 % 2 == 0).expand(64, 64)
    for down in (False, False, False, True, True, True):
        picture = (bright if down else bright.T).float() * 0.6 + 0.2 + torch.from_numpy(rng.normal(0, 0.02, (2, 64, 64))).float()
        images.append((picture, torch.stack([bright.T & ~torch.tensor(down), bright & torch.tensor(down)])))
    made = []
    for device, numbers in (("across", (0, 1)), ("down", (3, 4))):
        for n in numbers:
            rows = remember_image({"image": images[n][0], "mask": images[n][1], "ignore": None}, pixels, number=len(made))
            made.append((rows, {"stem": f"im{n}", "device": device, "height": 64, "width": 64, "classes": ["wire"]}))
    tensors = {name: torch.cat([rows[name] for rows, _ in made]) for name in made[0][0]}
    return MemoryBank(pixels, CLASSES, tensors, [record for _, record in made], k=3), images[2], images[5]


def test_a_route_asks_the_device_that_the_image_is_like(stripes):
    bank, across, down = stripes
    assert [next(iter(bank.like_devices(image))) for image, _ in (across, down)] == ["across", "down"]
    routed = bank.using(routes=1)
    images = torch.stack([across[0], down[0]])
    alone = {device: bank.subset(device=device, calibrate=False) for device in ("across", "down")}
    for image, device, found in zip(images, alone, routed.predict(images), strict=True):
        assert found.equal(alone[device].predict(image[None])[0])
        assert set(routed.neighbours(image, 20, 20, k=40)["device"]) == set(routed.explain(image, 20, 20)["device"]) == {device}
        table = routed.explain(image, 21, 30)
        told = table[bank.classes].mul(table["weight"], axis=0).sum()
        assert np.allclose(told, found[:, 21, 30], atol=1e-5)
    assert set(bank.neighbours(images[0], 20, 20, k=40)["device"]) == {"across", "down"}
    everywhere = bank.predict(images)
    assert all(bank.using(routes=n).predict(images).equal(everywhere) for n in (2, 9))


def test_a_route_knows_images_that_came_later(stripes):
    bank, across, down = stripes
    small = bank.subset(device="across", calibrate=False).using(routes=1)
    assert [*small.like_devices(down[0])] == ["across"]
    grown = small.merge(bank.subset(device="down", calibrate=False), calibrate=False)
    assert grown.recipe.routes == 1 and next(iter(grown.like_devices(down[0]))) == "down"
    assert grown.predict(down[0][None]).equal(bank.using(routes=1).predict(down[0][None]))


def test_devices_of_two_makers_with_one_name_are_told_apart(dataset, pixels, tmp_path):
    names = ["acme/d001"] * 2 + ["borealis/d001"] * 3
    makers = [name.split("/")[0] for name in names]
    both = dataset.remove_columns("manufacturer").add_column("manufacturer", makers)
    bank = paper_bank(both, pixels, k=3, calibrate=False)
    assert bank_devices(bank) == names and set(bank.frame()["device"]) == set(names)
    routed = bank.using(routes=1)
    for i, name in enumerate(names):
        image = both[i]["image"]
        assert next(iter(bank.like_devices(image))) == name and set(routed.neighbours(image, 5, 5, k=40)["device"]) == {name}
    with pytest.raises(AoiError, match="no device 'd001'; one of acme/d001, borealis/d001"):
        bank.remove(device="d001")
    bank.save(tmp_path / "bank")
    assert bank_devices(load_segmenter(tmp_path / "bank")) == names
    bank.remove(device="acme/d001", calibrate=False)
    assert bank_devices(bank) == ["d001"] * 3 and [record["stem"] for record in bank.images] == both["stem"][2:]


def test_routes_need_patches_that_vote(bank):
    for wrong, message in (({"routes": -1}, "routes is -1"), ({"routes": 1, "decoder": "ridge"}, "routes is 1 with granularity='patch'")):
        with pytest.raises(AoiError, match=message):
            bank.using(**wrong)
    with pytest.raises(AoiError, match="granularity='image'"):
        make_recipe("paper", granularity="image", routes=1)


def test_between_and_beyond_16_grids_only_edges_are_remembered(tmp_path, pixels):
    def draw(mask, i):
        mask[:] = False
        mask[0, :, 20:] = True  # one straight edge, between the columns 19 and 20

    dataset = write(tmp_path, 1, shape=(64, 96), draw=draw)
    banks = {}
    for name, options in {"few": {"bank_shifts": 16}, "many": {"bank_shifts": 64}, "between": {"bank_shifts": 16, "between": True}}.items():
        bank = banks[name] = paper_bank(dataset, pixels, halo=2, calibrate=False, **options)
        late = torch.arange(len(bank.keys)) >= len(banks["few"].keys)
        assert bank.keys[~late].equal(banks["few"].keys)
        assert ((bank.x[late] - 2 < 20) & (bank.x[late] + 18 >= 20)).all() and bank.keys.isfinite().all()
        for row in late.nonzero().flatten()[::17].tolist():  # and the masks are cut where the patch is
            x = int(bank.x[row])
            inside = patch_masks(bank, [row], "known")[0, 0]
            assert patch_masks(bank, [row])[0, 0].equal(inside & (torch.arange(x - 2, x + 18) >= 20))
    assert len(banks["few"].keys) < len(banks["between"].keys) <= len(banks["many"].keys)
    with pytest.raises(AoiError, match="between is True with bank_shifts=8"):
        paper_bank(dataset, pixels, bank_shifts=8, between=True)


def test_refinement_needs_the_lights(dataset, pixels):
    bank = paper_bank(dataset, pixels, refine=1, calibrate=False)
    assert len(bank.lights) == 5 and bank.using(refine=0).lights == []
    assert bank.subset(stem=dataset[1]["stem"]).lights[0].equal(bank.lights[1])
    image = dataset[0]["image"][None]
    plain = bank.using(refine=0).predict(image)
    assert torch.allclose(bank.predict(image), guided_filter(plain, image, radius=1))
    with pytest.raises(AoiError, match="keeps no lights"):
        bank.using(refine=0).using(refine=1)


# --- a bank that one can edit ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe():
    return {"method": "aligned", "bank_shifts": 4, "between": False, "whiten": 24, "k": 3, "refine": 0}


@pytest.fixture(scope="module")
def space(dataset, pixels, recipe):
    return learn_space(dataset, pixels, **{name: recipe[name] for name in ("method", "whiten", "between", "bank_shifts")})


def same(a, b):
    "Two banks with the same contents."
    return a.images == b.images and a.classes == b.classes and a.thresholds.equal(b.thresholds) and all(
        getattr(a, name).equal(getattr(b, name)) for name in retrieval.BANK_TENSORS)


def test_what_is_removed_was_never_there(dataset, pixels, recipe, space):
    whole = build_bank(dataset, pixels, space=space, **recipe)
    stems = dataset["stem"]
    less = build_bank(dataset, pixels, space=space, **recipe).remove(stem=[stems[1], stems[3]])
    assert same(less, build_bank(dataset.select([0, 2, 4]), pixels, space=space, **recipe))
    assert same(less, whole.subset(stem=[stems[0], stems[2], stems[4]])) and len(whole.images) == 5
    back = less.add(dataset.select([1, 3]))
    assert same(back, build_bank(dataset.select([0, 2, 4, 1, 3]), pixels, space=space, **recipe))


def test_merging_is_building_with_both(dataset, pixels, recipe, space):
    parts = [build_bank(dataset.select(rows), pixels, space=space, **recipe) for rows in ([0, 1], [2, 3, 4])]
    assert same(parts[0].merge(parts[1]), build_bank(dataset, pixels, space=space, **recipe))
    assert len(parts[0].images) == 2
    with pytest.raises(AoiError, match="im2 would be in the bank twice"):
        parts[1].merge(build_bank(dataset.select([2]), pixels, space=space, calibrate=False, **recipe))
    for changes, what in (({"halo": 0}, "recipe"), ({"space": None}, "feature space")):
        other = build_bank(dataset.select([2]), pixels, calibrate=False, **{"space": space} | recipe | changes)
        with pytest.raises(AoiError, match=f"differ in their {what}"):
            parts[0].merge(other)


def test_a_class_is_forgotten(dataset, pixels, recipe, space):
    whole = build_bank(dataset, pixels, space=space, **recipe)
    image = dataset[4]["image"][None]
    expected, threshold = whole.predict(image)[:, 1:], whole.thresholds[1:]
    for one in (whole.subset(classes="ball"), whole.remove(classes="wire")):
        assert one.classes == ["ball"] and {n for r in one.images for n in r["classes"]} == {"ball"}
        assert torch.allclose(one.predict(image), expected, atol=1e-6) and one.thresholds.equal(threshold)


def test_names_that_are_not_there(bank):
    for which, message in (({"stem": "x"}, "no stem 'x'"), ({"device": "x"}, "no device 'x'"), ({"classes": "x"}, "no class 'x'")):
        with pytest.raises(AoiError, match=message):
            bank.remove(**which)
        with pytest.raises(AoiError, match=message):
            bank.subset(**which)
    for which, value in (({"stem": 3}, "3"), ({"device": [None]}, r"\[None\]"), ({"classes": 0.5}, "0.5")):
        for ask in (bank.remove, bank.subset):
            with pytest.raises(AoiError, match=f"{[*which][0]} is {value}; a name, or a list of names"):
                ask(**which)
    for which, message in (({"device": "d001"}, "None of the 5 images"), ({"classes": CLASSES}, "No class would be left"),
                           ({}, "to be forgotten"), ({"stem": []}, "to be forgotten"), ({"calibrate": False}, "to be forgotten")):
        with pytest.raises(AoiError, match=message):
            bank.remove(**which)
    assert len(bank.images) == 5 and bank.classes == list(CLASSES)


@pytest.mark.parametrize("kind", ["pixels", "hiera"])
def test_blocks_that_an_encoder_does_not_have_are_refused(dataset, pixels, kind):
    from aoi_ssl.hiera import HieraEncoder

    encoder = pixels if kind == "pixels" else HieraEncoder("hiera-nano", image_size=64)
    for layers in (2, 99, (1, 2)):
        with pytest.raises(AoiError, match=f"layers is .*{type(encoder).__name__} has no blocks to choose from"):
            build_bank(dataset.select([0, 1]), encoder, method="paper", layers=layers)
    assert build_bank(dataset.select([0, 1]), encoder, method="fast", calibrate=False).recipe.layers == 1 / 3


@pytest.mark.parametrize("changes", [{}, {"halo": 0, "query_shifts": 4}, {"decoder": "mixture"}, {"centre": "window", "size": 32}])
def test_an_explanation_adds_up(dataset, pixels, recipe, changes):
    bank = build_bank(dataset.select(range(3)), pixels, calibrate=False, **recipe | changes)
    image = dataset[4]["image"]
    predicted = bank.predict(image[None])[0]
    for y, x in ((0, 0), (20, 31), (39, 55)):
        table = bank.explain(image, y, x)
        assert table["weight"].sum() == pytest.approx(1) and table["weight"].is_monotonic_decreasing
        told = table[bank.classes].mul(table["weight"], axis=0).sum()
        if not table.attrs["ridge"]:
            assert np.allclose(told, predicted[:, y, x], atol=1e-4)
        else:
            alone = bank.using(decoder="neighbours").predict(image[None])[0]
            assert np.allclose(told, alone[:, y, x], atol=1e-4) and table.attrs["ridge"] == bank.mix
        for row in table.head(3).itertuples():  # the remembered mask, at the pixel's place in it
            source = next(i for i in range(3) if dataset[i]["stem"] == row.stem)
            py, px = row.y + row.dy - bank.recipe.halo, row.x + row.dx - bank.recipe.halo
            assert row.wire == dataset[source]["mask"][0, py, px] and row.ball == dataset[source]["mask"][1, py, px]
    with pytest.raises(AoiError, match="compares by image"):
        paper_bank(dataset, pixels, granularity="image", calibrate=False).explain(image, 0, 0)


def test_recalling_otherwise_is_building_otherwise(dataset, pixels, recipe):
    options = recipe | {"calibrate": False}
    bank, image = build_bank(dataset, pixels, **options), dataset[1]["image"][None]
    for changes in ({"query_shifts": 1}, {"aggregation": "similarity"}, {"decoder": "ridge"}, {"k": 1}):
        assert torch.allclose(bank.using(**changes).predict(image), build_bank(dataset, pixels, **options | changes).predict(image))
    with pytest.raises(AoiError, match="halo cannot be changed"):
        bank.using(halo=2)
    with pytest.raises(AoiError, match="query_shifts is 8"):
        bank.using(query_shifts=8)


def test_the_estimate_is_what_it_takes(dataset, pixels, recipe):
    for changes in ({}, {"method": "paper", "whiten": None}, {"position": "append", "turns": 4}):
        options = recipe | changes
        bank = build_bank(dataset, pixels, calibrate=False, **options)
        table = estimate_bank(dataset, pixels, **{name: value for name, value in options.items() if name != "k"})
        assert table["patches"].sum() == len(bank.keys) and table["key_bytes"].sum() == bank.keys.nbytes
        known = bank.known.table.nbytes  # the estimate takes it that all is known
        assert table["mask_bytes"].sum() >= bank.values.nbytes + bank.known.nbytes - known > 0.8 * table["mask_bytes"].sum()


def test_the_estimate_counts_what_the_search_takes(dataset, pixels, lists, monkeypatch):
    "Lists, and what faiss holds where it is used; nothing for whole images, which are not searched by lists."
    monkeypatch.setattr(remember, "MOST_EXACT", 100)
    bank = build_bank(dataset, pixels, calibrate=False, **GRIDS)
    table = estimate_bank(dataset, pixels, **{name: value for name, value in GRIDS.items() if name != "k"})
    bank.predict(dataset[0]["image"][None])
    assert 0 <= table["search_bytes"].sum() - (bank_index(bank).nbytes - bank.keys.nbytes) < len(table)
    assert (table["bytes"] == table[["key_bytes", "mask_bytes", "search_bytes", "light_bytes"]].sum(axis=1)).all()
    assert not estimate_bank(dataset, pixels, method="paper", granularity="image")["search_bytes"].any()


def test_the_estimate_counts_the_images_that_a_bank_keeps(dataset, pixels):
    for refine in (0, 2):
        bank = build_bank(dataset, pixels, calibrate=False, method="paper", refine=refine)
        kept = estimate_bank(dataset, pixels, method="paper", refine=refine)["light_bytes"].sum()
        assert kept == 2 * sum(light.nbytes for light in bank.lights) and bool(kept) == bool(refine), "8 bits here, 16 are counted"


def test_the_frame_has_a_row_a_patch(bank, dataset):
    table = bank.frame()
    assert len(table) == len(bank.keys) and set(CLASSES) <= set(table.columns)
    row = table.iloc[7]
    mask = dataset[0]["mask"][:, row.y : row.y + 16, row.x : row.x + 16]
    assert row.stem == dataset[0]["stem"] and row[list(CLASSES)].tolist() == mask.flatten(1).any(1).tolist()


@pytest.mark.parametrize("changes", [{}, {"decoder": "mixture", "refine": 1}, {"position": "append", "layers": 2, "centre": "window"}])
def test_every_kind_of_bank_survives_saving(tmp_path, dataset, recipe, changes):
    encoder = ViTEncoder("nano", image_size=32)
    bank = build_bank(dataset.select(range(3)), encoder, **recipe | changes)
    bank.save(tmp_path / "bank")
    again, image = MemoryBank.load(tmp_path / "bank"), dataset[4]["image"][None]
    assert again.recipe == bank.recipe and again.predict(image).equal(bank.predict(image)) and repr(again) == repr(bank)
    manifest = json.loads((tmp_path / "bank" / "segmenter.json").read_text())
    assert manifest["recipe"]["bank_shifts"] == 4 and manifest["method"] == "custom"
    assert again.add(dataset.select([3])).thresholds.equal(bank.add(dataset.select([3])).thresholds)


def test_rows_are_mapped_into_memory(tmp_path, bank):
    bank.save(tmp_path / "bank")
    again = MemoryBank.load(tmp_path / "bank")
    assert again.keys.equal(bank.keys)
    size = (tmp_path / "bank" / "bank.safetensors").stat().st_size
    assert again.keys.untyped_storage().nbytes() in (again.keys.nbytes, size)  # a view of the file's pages
    maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else str(tmp_path / "bank")
    assert str(tmp_path / "bank") in maps


def test_rows_of_another_bank_are_refused(tmp_path, bank, dataset, pixels):
    bank.save(tmp_path / "bank")
    paper_bank(dataset.select([1, 0, 2, 3, 4]), pixels, k=3, calibrate=False).save(tmp_path / "other")
    (tmp_path / "bank" / "bank.safetensors").write_bytes((tmp_path / "other" / "bank.safetensors").read_bytes())
    with pytest.raises(AoiError, match="not the one that segmenter.json was written with"):
        MemoryBank.load(tmp_path / "bank")


def rewritten(folder, **changes):
    "Change what the manifest of a bank says; None takes it out."
    path = folder / "segmenter.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))


@pytest.mark.parametrize("part", ["keys", "values.table", "known.number", "image", "y", "image_keys"])
def test_a_bank_with_any_flipped_bytes_is_refused(tmp_path, part):
    rows = write(tmp_path / "images", 4, shape=(160, 160))
    paper_bank(rows, PixelEncoder(channels=2, patch_size=8), k=3, calibrate=False).save(tmp_path / "bank")
    file = tmp_path / "bank" / "bank.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    first, last = json.loads(whole[8:start])[part]["data_offsets"]
    for place in np.linspace(first, last - 1, 20).astype(int):
        damaged = bytearray(whole)
        damaged[start + place] ^= 0xFF
        file.unlink()  # its pages may be mapped
        file.write_bytes(damaged)
        with pytest.raises(AoiError, match="not the one that segmenter.json was written with"):
            MemoryBank.load(tmp_path / "bank")


def test_a_manifest_that_says_something_else_is_refused(tmp_path, bank):
    bank.save(tmp_path / "bank")
    good = (tmp_path / "bank" / "segmenter.json").read_text()
    kept = json.loads(good)
    for changes in ({"classes": kept["classes"][::-1]}, {"images": kept["images"][::-1]}, {"recipe": kept["recipe"] | {"routes": 1}},
                    {"images": [kept["images"][0] | {"device": "d9"}, *kept["images"][1:]]}, {"space": "x"}, {"size": 256},
                    {"method": "aligned"}):
        rewritten(tmp_path / "bank", **changes)
        with pytest.raises(AoiError, match="together with its classes, images and recipe"):
            MemoryBank.load(tmp_path / "bank")
        (tmp_path / "bank" / "segmenter.json").write_text(good)
    for name in ("images", "encoder", "recipe", "bank", "k"):
        rewritten(tmp_path / "bank", **{name: None})
        with pytest.raises(AoiError, match=f"cannot be read .KeyError: '{name}'"):
            MemoryBank.load(tmp_path / "bank")
        (tmp_path / "bank" / "segmenter.json").write_text(good)
    rewritten(tmp_path / "bank", thresholds=[0.25, 0.75])  # what is chosen by hand is no part of it
    assert MemoryBank.load(tmp_path / "bank").thresholds.tolist() == [0.25, 0.75]
    for thresholds in (["a", "b"], 0.5, [math.nan, 0.5], [9, 9], [-0.1, 0.5], [0.5], [0.5] * 3, [True, 0.5]):
        rewritten(tmp_path / "bank", thresholds=thresholds)
        with pytest.raises(AoiError, match=re.escape(f"has the thresholds {str(thresholds)[:6]}") + ".*from 0 to 1, were expected. Put"):
            MemoryBank.load(tmp_path / "bank")
    (tmp_path / "bank" / "segmenter.json").write_text(good)
    for changes, message in (({"patches": 7}, f"patches is 7; the bank beside it has {len(bank.keys)}, .* Copy both"), ({"k": 0}, "k is 0"),
                             ({"beta": -1}, "beta is -1"), ({"mix": 2}, "mix is 2"), ({"channels": 3}, "channels")):
        rewritten(tmp_path / "bank", **changes)
        with pytest.raises(AoiError, match=message):
            MemoryBank.load(tmp_path / "bank")
        (tmp_path / "bank" / "segmenter.json").write_text(good)


def test_a_threshold_that_could_not_be_loaded_is_not_saved(tmp_path, bank):
    bank = bank.using()
    bank.thresholds = torch.tensor([0.5, 1.5])
    with pytest.raises(AoiError, match=r"This MemoryBank has the thresholds \[0.5, 1.5\]"):
        bank.save(tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_a_bank_of_fewer_patches(dataset, pixels, tmp_path):
    "Those that would be missed most; every class stays, and so do thresholds, k and the images."
    bank = build_bank(dataset, pixels, method="paper", k=3)
    small = bank.subset(patches=30)
    assert len(small.keys) == 30 and len(bank.keys) > 50 and small.k == bank.k and small.thresholds.equal(bank.thresholds)
    whole, left = bank.frame(), small.frame()
    places = ["stem", "y", "x", *bank.classes]
    assert len(left[places].merge(whole[places].drop_duplicates(), how="left", indicator=True).query("_merge == 'both'")) == 30
    assert (left[bank.classes].any() == whole[bank.classes].any()).all()
    image = dataset[0]["image"][None]
    again = load_segmenter(small.save(tmp_path / "small") or tmp_path / "small")
    assert again.predict(image).equal(small.predict(image)) and small.predict(image).shape == bank.predict(image).shape
    assert bank.subset(patches=10**6).keys.equal(bank.keys)
    one = bank.subset(stem=bank.images[0]["stem"], patches=5, calibrate=False)
    assert len(one.keys) == 5 and len(one.images) == 1
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(AoiError, match="patches is .*whole number from 1"):
            bank.subset(patches=wrong)


def test_a_size_that_the_patches_do_not_divide_names_one_that_they_do(dataset):
    with pytest.raises(AoiError, match="size is 512; a multiple of the patch size 14 .* Try 504"):
        build_bank(dataset, PixelEncoder(channels=dataset[0]["image"].shape[0], patch_size=14), method="paper")
