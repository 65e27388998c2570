"Crops: from one decoded store, every cell in its turn, black and duplicate cells left out and counted."

import gc

import numpy as np
import pytest
import torch
from PIL import Image

from aoi_ssl.core import AoiError
from aoi_ssl.crops import CropStore, crop_places, cut_crops, find_cells, is_black, store_images
from aoi_ssl.data import channel_stats, load_folder, native_item
from aoi_ssl.files import to_unit


def write(folder, stem, pixels):
    "A pair of lights, in the bit depth of the array."
    folder.mkdir(parents=True, exist_ok=True)
    for light, plane in enumerate(pixels):
        Image.fromarray(plane).save(folder / f"{stem}_buffer{light}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("crops") / "parts" / "acme" / "d1"
    for n, shape in enumerate([(64, 96), (80, 64), (64, 64)]):
        write(path, f"im{n}", rng.integers(20, 256, (2, *shape), np.uint8))
    write(path, "im3", np.zeros((2, 64, 64), np.uint8))
    return path.parent.parent


@pytest.fixture(scope="module")
def images(folder):
    return load_folder(folder)["unlabelled"]


@pytest.fixture(scope="module")
def store(images):
    return store_images(images, cell=32, seed=3)


def test_black_is_judged_over_all_lights_and_by_share():
    cell = np.zeros((2, 10, 10), np.uint8)
    cell[1, 0, 0] = 255
    assert is_black(cell) and is_black(cell[:1])  # 0.5 %
    cell[1, 0, :2] = 255
    assert not is_black(cell)


def test_cells_cover_the_image_and_the_last_are_shifted_inside():
    pixels = np.random.default_rng(0).integers(50, 256, (1, 40, 64), np.uint8)
    kept, black, twice = find_cells(pixels, size=32, seen=set())
    assert kept == [(0, 0), (0, 32), (8, 0), (8, 32)] and (black, twice) == (0, 0)


def test_black_cells_and_duplicates_are_counted(store):
    assert store.about["black"] == 4 and store.about["duplicates"] == 0
    assert len(store) == 6 + 6 + 4 and set(store.cells[:, 0].tolist()) == {0, 1, 2}


def test_the_same_image_twice_is_one(tmp_path):
    pixels = np.random.default_rng(0).integers(20, 256, (2, 64, 64), np.uint8)
    write(tmp_path / "a" / "b", "im0", pixels)
    write(tmp_path / "a" / "b", "im1", pixels)
    store = store_images(load_folder(tmp_path)["unlabelled"], cell=32)
    assert len(store) == 4 and store.about["duplicates"] == 4 and "4 duplicate cells" in repr(store)


def test_crops_are_what_the_files_hold(store, images):
    image, y, x = crop_places(store, 2, 50, 24)
    crops = store.batch(2, 50, size=24)
    for n in range(50):
        whole = to_unit(native_item(images, int(image[n]), labels=False)["image"])
        assert torch.equal(crops[n], whole[:, y[n] : y[n] + 24, x[n] : x[n] + 24])


def test_the_last_rows_can_be_cut(store):
    "The very last pixels of the flat array too."
    last = torch.tensor([2])
    crop = cut_crops(store, last, torch.tensor([40]), torch.tensor([40]), 24)
    assert crop.shape == (1, 2, 24, 24)


def test_every_place_is_reached(store):
    _, y, x = (torch.cat(n) for n in zip(*(crop_places(store, step, 64, 32) for step in range(60)), strict=True))
    assert set(range(33)) <= set(y.tolist()) and set(range(65)) <= set(x.tolist())


def test_an_epoch_visits_each_cell_once_and_the_next_in_another_order(store):
    n = len(store)
    first, second = (crop_places(store, epoch, n, 32)[0] for epoch in (0, 1))
    expected = torch.bincount(store.cells[:, 0], minlength=4)
    assert torch.equal(torch.bincount(first, minlength=4), expected) and torch.equal(torch.bincount(second, minlength=4), expected)
    assert not torch.equal(first, second)
    assert store.steps_per_epoch(5) == 4


def test_parts_of_a_batch_are_the_batch(store):
    whole = store.batch(7, 6, size=32)
    parts = [store.batch(7, 6, size=32, part=slice(n, n + 2)) for n in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


def test_seeds_and_steps_differ(images, store):
    again = store_images(images, cell=32, seed=3)
    other = store_images(images, cell=32, seed=4)
    assert torch.equal(again.batch(1, 8, size=32), store.batch(1, 8, size=32))
    assert not torch.equal(other.batch(1, 8, size=32), store.batch(1, 8, size=32))
    assert not torch.equal(store.batch(0, 8, size=32), store.batch(1, 8, size=32))


def test_statistics_are_exact(images, store):
    for here, there in zip((store.mean, store.std), channel_stats(images), strict=True):
        assert torch.equal(here, there)


def test_16_bits_stay_exact_and_8_bits_beside_them_too(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / "a" / "b", "im0", rng.integers(20, 256, (2, 32, 32), np.uint8))
    write(tmp_path / "a" / "b", "im1", rng.integers(9000, 65536, (2, 32, 32)).astype(np.uint16))
    images = load_folder(tmp_path)["unlabelled"]
    store = store_images(images, cell=32)
    assert store.about["dtype"] == "uint16"
    crops = cut_crops(store, torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0, 0]), 32)
    for i in range(2):
        assert torch.equal(crops[i], to_unit(native_item(images, i, labels=False)["image"]))


def test_a_store_opens_again_and_a_damaged_one_does_not(images, tmp_path):
    store = store_images(images, tmp_path / "store", cell=32)
    again = CropStore(tmp_path / "store")
    assert torch.equal(again.batch(0, 4, size=32), store.batch(0, 4, size=32))
    with open(tmp_path / "store" / "pixels.bin", "ab") as f:
        f.write(b"x")
    with pytest.raises(AoiError, match="Remove the folder"):
        CropStore(tmp_path / "store")
    with pytest.raises(AoiError, match="does not exist"):
        CropStore(tmp_path / "nowhere")


def test_what_cannot_be_cut_is_refused(images, tmp_path):
    with pytest.raises(AoiError, match="smaller than a crop of 96"):
        store_images(images, cell=96)
    with pytest.raises(AoiError, match="no images"):
        store_images(images.select([]))
    with pytest.raises(AoiError, match="All 4 cells .* are black"):
        store_images(images.select([3]), tmp_path / "black", cell=32)
    assert not (tmp_path / "black").exists()


def test_a_temporary_store_goes_with_its_owner(images, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = store_images(images, cell=32)
    assert len(list(tmp_path.glob("aoi_ssl_crops_*"))) == 1
    del store
    gc.collect()
    assert not list(tmp_path.iterdir())
