"The tables: who is in the bank, what is counted, what is remembered."

import pandas as pd
import pytest
import torch

from aoi_ssl.benchmark import (
    ABLATION,
    ablation_for,
    arena,
    by_device,
    few_shot_counts,
    few_shot_table,
    kept_frame,
    key_name,
    method_costs,
    other_device_counts,
    remembered_encodings,
    rivals,
    short_names,
    worst_images,
)
from aoi_ssl.core import AoiError
from aoi_ssl.data import few_shot
from aoi_ssl.encoder import PixelEncoder, ViTEncoder
from aoi_ssl.features import with_layers
from aoi_ssl.predict import evaluate
from aoi_ssl.remember import make_recipe
from aoi_ssl.retrieval import build_bank

METHODS = {"paper": {"method": "paper", "k": 3}, "shifted": {"method": "paper", "bank_shifts": 2, "query_shifts": 2, "k": 3}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return arena(tmp_path_factory.mktemp("arena"), devices=2, images=4, size=128, seed=3)


@pytest.fixture(scope="module")
def counts(data):
    return few_shot_counts({"pixels": PixelEncoder()}, METHODS, data, labels=2, seeds=(0, 1))


def test_the_drifted_pictures_are_of_the_same_devices(data):
    plain, drifted = data.values()
    assert list(plain["stem"]) == list(drifted["stem"]) and list(data) == ["new devices", "drift 0.5"]
    assert not plain[0]["image"].equal(drifted[0]["image"])
    assert {name: len(part) for name, part in by_device(plain).items()} == dict.fromkeys(sorted(set(by_device(plain))), 4)
    with pytest.raises(AoiError, match="no device nowhere"):
        by_device(plain, ["nowhere"])


def test_a_random_encoder_is_read_as_one_that_has_not_learned_to_compare():
    learned = ViTEncoder("nano")
    learned.vit.config.compared_layers = [2]
    random = rivals(learned)["random encoder"]
    assert with_layers(learned, 1 / 3).layers == [2] and with_layers(random, 1 / 3).layers == [1]


def test_counts_are_those_of_banks_built_by_hand(data, counts):
    assert len(counts) == 2 * 2 * 2 * 2 * 2 * 4  # devices, seeds, methods, parts, images, classes
    device, images = next(iter(by_device(data["new devices"]).items()))
    bank_images, rest = few_shot(images, 2, seed=1)
    bank = build_bank(bank_images, PixelEncoder(), **METHODS["shifted"])
    mine = counts[(counts["method"] == "shifted") & (counts["seed"] == 1) & counts["stem"].isin(list(images["stem"]))]
    assert set(mine["stem"]) == set(rest["stem"])
    for test, part in data.items():
        expected = evaluate(bank, part.select([i for i, s in enumerate(part["stem"]) if s in set(rest["stem"])]))
        found = mine[mine["test"] == test][list(expected.columns)].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_a_table_of_two_makers_with_one_device_name_has_both(data):
    part = data["new devices"]
    assert list(short_names(by_device(part)).values()) == sorted(set(part["device"]))
    same = part.remove_columns("device").add_column("device", ["7"] * len(part))
    makers = sorted(set(part["manufacturer"]))
    assert len(makers) == 2 and list(short_names(by_device(same)).values()) == [f"{maker}/7" for maker in makers]


def test_the_table_averages_seeds_and_shows_their_spread(counts):
    table = few_shot_table(counts)
    assert list(table.index) == [("pixels", "paper"), ("pixels", "shifted")]
    assert list(table.columns) == ["new devices", "drift 0.5", "spread", "wire", "ball", "wedge", "epoxy"]
    one = few_shot_table(counts[counts["seed"] == 0])
    two = few_shot_table(counts[counts["seed"] == 1])
    assert "spread" not in one and torch.allclose(
        torch.tensor(table["new devices"].to_numpy()), torch.tensor(((one + two) / 2)["new devices"].to_numpy()))
    assert ((one - two)["new devices"].abs() / 2 - table["spread"]).abs().max() < 1e-9


def test_nothing_is_measured_twice(tmp_path):
    made = []

    def make():
        made.append(1)
        return pd.DataFrame({"device": ["007"], "tp": [3]})

    for _ in range(2):
        assert kept_frame(tmp_path / "a" / "t.csv", make).to_dict("list") == {"device": ["007"], "tp": [3]}
    assert len(made) == 1 and len(kept_frame(None, make)) == 1 and len(made) == 2
    assert key_name({"a": 1, "b": 2}) == key_name({"b": 2, "a": 1}) != key_name({"a": 1, "b": 3})


def test_remembered_encodings_are_the_encodings():
    encoder, image = ViTEncoder("nano", image_size=32), torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    other = ViTEncoder("nano", image_size=32, seed=1)
    plain = [e.encode(image) for e in (encoder, other)]
    with remembered_encodings() as kept:
        for _ in range(2):
            assert all(e.encode(image).equal(x) for e, x in zip((encoder, other), plain, strict=True))
        assert len(kept) == 2
    assert encoder.encode(image) is not plain[0]


def test_costs_and_failures(data, counts):
    images = by_device(data["new devices"])
    both = data["new devices"].select(range(5))
    table = method_costs(PixelEncoder(), METHODS, both)
    assert list(table.columns) == ["patches", "MiB", "build", "calibrate", "add", "predict"] and len(images) == 2
    assert table.loc["shifted", "patches"] > 2 * table.loc["paper", "patches"]
    worst = worst_images(counts, encoder="pixels", method="paper", most=2)
    assert worst["mean_iou"].is_monotonic_increasing and len(worst) == 2


def test_every_row_of_the_ablation_is_a_recipe():
    assert "layers" not in str(ablation_for(PixelEncoder())) and list(ablation_for(ViTEncoder("nano"))) == list(ABLATION)
    recipes = [make_recipe(**options) for options in ABLATION.values()]
    assert len(set(recipes)) == len(recipes)


def test_a_bank_of_other_devices_is_asked_about_the_new_ones(data, tmp_path):
    one, other = by_device(data["new devices"])
    tests = {name: by_device(part)[other] for name, part in data.items()}
    one = by_device(data["new devices"])[one]
    counts = other_device_counts({"pixels": PixelEncoder()}, METHODS, one, tests, tests=2, cache=tmp_path)
    bank = build_bank(one, PixelEncoder(), **METHODS["paper"])
    expected = evaluate(bank, tests["drift 0.5"].select([0, 1]))
    found = counts[(counts["method"] == "paper") & (counts["test"] == "drift 0.5")][list(expected.columns)].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    assert set(counts["labels"]) == {len(one)} and len(list(tmp_path.glob("*.csv"))) == 2
    with pytest.raises(AoiError, match="in the bank and among"):
        other_device_counts({"pixels": PixelEncoder()}, METHODS, one, data)
