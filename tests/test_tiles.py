import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from aoi_ssl import tiles
from aoi_ssl.core import AoiError, write_json
from aoi_ssl.data import load_folder
from aoi_ssl.masks import write_mask
from aoi_ssl.tiles import CropSampler, ImageCache, axis_weights, blend, labelled_pixels, windows

CLASSES = ["wire", "wedge", "epoxy"]


@pytest.mark.parametrize("size, overlap", [(32, 0), (32, 8), (32, 31), (7, 3)])
@pytest.mark.parametrize("height, width", [(1, 1), (5, 200), (32, 33), (64, 64), (97, 150)])
def test_windows_cover_every_pixel_and_stay_inside(height, width, size, overlap):
    seen = np.zeros((height, width), dtype=int)
    found = windows(height, width, size=size, overlap=overlap)
    for y, x, h, w in found:
        assert (h, w) == (min(size, height), min(size, width)) and 0 <= y <= height - h and 0 <= x <= width - w
        seen[y : y + h, x : x + w] += 1
    assert seen.min() >= 1 and len(set(found)) == len(found)
    columns = sorted({x for _, x, _, _ in found})
    assert all(b - a <= size - overlap for a, b in zip(columns, columns[1:], strict=False))


@pytest.mark.parametrize("size, overlap", [(0, 0), (64, 64), (64, -1)])
def test_impossible_windows(size, overlap):
    with pytest.raises(AoiError, match="overlap"):
        windows(100, 100, size=size, overlap=overlap)


@pytest.mark.parametrize("length", [1, 20, 32, 33, 60, 100, 1000])
def test_weights_add_up_to_one_and_never_vanish(length):
    total = torch.zeros(length)
    for start, weight in axis_weights(length, size=32, overlap=8).items():
        assert weight.min() > 0
        total[start : start + len(weight)] += weight
    assert torch.allclose(total, torch.ones(length), atol=1e-6)  # the image's border pixels too


def test_weights_rise_linearly_from_the_window_border():
    rising = axis_weights(88, size=32, overlap=4)[28]
    assert torch.allclose(rising[:5], torch.arange(1, 6) / 5) and (rising[5:-5] == 1).all()


def pointwise(x):
    return torch.sigmoid(torch.cat([3 * x - 1, x[:, :1] * x[:, 1:]], dim=1))


@pytest.mark.parametrize("shape", [(2, 97, 130), (2, 64, 64), (2, 3, 5), (2, 200, 10), (2, 33, 65)])
@pytest.mark.parametrize("overlap", [0, 5, 16])
def test_no_seam_for_a_pointwise_predictor(shape, overlap):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    result = blend(pointwise, image, size=32, overlap=overlap, batch_size=3)
    assert result.dtype == torch.float32
    assert torch.allclose(result, pointwise(image[None])[0], atol=1e-5)


def test_blending_removes_the_seams_of_a_border_blind_predictor():
    def blind(x):
        inside = torch.minimum(torch.arange(32), torch.arange(31, -1, -1)).div(8).clamp(max=1)
        return x * torch.minimum(inside[:, None], inside)

    image = torch.ones(1, 80, 80)
    steps = [blend(blind, image, size=32, overlap=o)[0, 8:-8, 8:-8].diff(dim=1).abs().max() for o in (0, 16)]
    assert steps[0] > 0.1 and steps[1] < steps[0]
    middle = [blend(blind, image, size=32, overlap=o)[0, 8:-8, 8:-8].min() for o in (0, 16)]
    assert middle[0] == 0 and middle[1] > 0.3


class SlicedImage:
    "A 16-bit image on disk, for all `blend` can tell: it has a shape and can be sliced, and counts the slices."

    def __init__(self, pixels):
        self.pixels, self.shape, self.ndim, self.open = pixels, pixels.shape, 3, 0

    def __getitem__(self, key):
        part = self.pixels[key]
        assert part.shape[1] <= 512 and part.shape[2] <= 512, "more than a window was read at once"
        self.open += 1
        return part


def test_4096_by_3000_in_bounded_memory():
    pixels = (np.arange(3000, dtype=np.uint16)[:, None] * 16 + np.arange(4096, dtype=np.uint16))[None]
    image, alive, seen = SlicedImage(pixels), [], []

    def predict(x):
        assert image.open <= 4, "windows were cut long before they were needed"
        assert x.untyped_storage().nbytes() == x.numel() * 4 and len(x) <= 4
        alive.append(weakref.ref(x))
        assert sum(r() is not None for r in alive) <= 2, "windows are kept after their prediction"
        image.open = 0
        seen.append(len(x))
        return x

    result = blend(predict, image, size=512, overlap=64, batch_size=4)
    assert sum(seen) == len(windows(3000, 4096, size=512, overlap=64)) == 63
    assert result.shape == (1, 3000, 4096)
    assert np.abs(result.numpy() * 65535 - pixels).max() < 0.66  # 1e-5


def test_16_bit_is_divided_by_65535():
    assert blend(lambda x: x, np.full((1, 8, 8), 65535, np.uint16)).unique().tolist() == [1.0]
    assert blend(lambda x: x, np.full((1, 8, 8), 51, np.uint8)).unique().tolist() == pytest.approx([0.2])


def test_blend_names_what_is_wrong():
    with pytest.raises(AoiError, match="no batch"):
        blend(pointwise, torch.rand(1, 2, 8, 8))
    with pytest.raises(AoiError, match="Resize inside predict"):
        blend(lambda x: x[..., ::2], torch.rand(2, 8, 8))
    with pytest.raises(AoiError, match="uint8 or uint16"):
        blend(pointwise, np.zeros((2, 8, 8), np.int64))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    "Six images whose pixels tell where they lie: a wire in each, a small wedge in one, no epoxy; one has no label."
    root = tmp_path_factory.mktemp("parts")
    y, x = np.meshgrid(np.arange(60), np.arange(80), indexing="ij")
    for i in range(6):
        for light in (0, 1):
            Image.fromarray((y + 20 * i if light == 0 else x).astype(np.uint8)).save(root / f"im{i}_buffer{light}.png")
        mask = np.zeros((3, 60, 80), bool)
        mask[0, :, 10:13] = True
        mask[1, 40:43, 70:73] = i == 3
        if i < 5:
            write_mask(root / f"im{i}.png", mask, classes=CLASSES, mask_format="bits")
    write_json(root / "classes.json", {"classes": CLASSES, "mask_format": "bits"})
    return load_folder(root)


def test_batch_is_a_function_of_seed_and_step(parts):
    one, two = (CropSampler(parts["labelled"], size=32, seed=7, foreground=0.5) for _ in range(2))
    for step in (0, 1, 2, 5):
        one.batch(step, 4)
    resumed, unbroken = two.batch(5, 4), one.batch(5, 4)
    assert resumed["stem"] == unbroken["stem"]
    assert all(torch.equal(resumed[k], unbroken[k]) for k in ("image", "mask", "ignore"))
    other = CropSampler(parts["labelled"], size=32, seed=8).batch(5, 4)
    assert not torch.equal(other["image"], unbroken["image"])


def test_image_mask_and_ignore_are_cut_at_one_place(parts):
    batch = CropSampler(parts["labelled"], size=24, foreground=0.5).batch(0, 16)
    assert batch["image"].shape == (16, 2, 24, 24) and batch["image"].dtype == torch.float32
    assert batch["mask"].shape == batch["ignore"].shape == (16, 3, 24, 24) and batch["mask"].dtype == torch.bool
    x = (batch["image"][:, 1] * 255).round()
    assert torch.equal(batch["mask"][:, 0], (x >= 10) & (x < 13)) and not batch["ignore"].any()
    row = (batch["image"][:, 0] * 255).round()
    y = row - 20 * torch.tensor([int(s[-1]) for s in batch["stem"]]).reshape(-1, 1, 1)
    wedge = torch.tensor([s == "im3" for s in batch["stem"]]).reshape(-1, 1, 1)
    assert torch.equal(batch["mask"][:, 1], wedge & (y >= 40) & (y < 43) & (x >= 70) & (x < 73))


def test_an_epoch_is_a_permutation(parts):
    sampler = CropSampler(parts["labelled"], size=32)
    assert (sampler.steps_per_epoch(2), sampler.steps_per_epoch(5), sampler.steps_per_epoch(64)) == (3, 1, 1)
    epochs = [sampler.batch(e, 5)["stem"] for e in range(6)]
    assert all(sorted(e) == [f"im{i}" for i in range(5)] for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1


def test_crops_reach_every_place(parts):
    batch = CropSampler(parts["labelled"], size=32).batch(0, 300)
    corner = (batch["image"][:, 1, 0, 0] * 255).round().int()
    assert set(corner.tolist()) == set(range(80 - 32 + 1))


def test_foreground_finds_the_rare_class(parts):
    def share(**options):
        mask = CropSampler(parts["labelled"], size=16, **options).batch(0, 200)["mask"]
        return mask.any((2, 3)).float().mean(0)

    assert share()[1] < 0.1
    half, every = share(foreground=0.5), share(foreground=1.0)
    assert 0.2 < half[1] < 0.4 and 0.4 < every[1] < 0.65  # half of the classes that occur; epoxy occurs nowhere
    mask = CropSampler(parts["labelled"], size=16, foreground=1.0).batch(0, 200)["mask"]
    assert mask.any((1, 2, 3)).all()


def test_ignored_pixels_are_not_foreground(parts, monkeypatch):
    real = tiles.native_item

    def with_ignore(*args, **options):
        item = real(*args, **options)
        return item | {"ignore": torch.as_tensor(item["mask"]).clone().index_fill_(0, torch.tensor([0, 2]), False)}

    monkeypatch.setattr(tiles, "native_item", with_ignore)
    found = labelled_pixels(ImageCache(parts["labelled"]))
    assert len(found) == 1 and len(found[0]) == 5  # wire only: wedge is ignored wherever it is


def test_images_without_labels_are_refused(parts):
    with pytest.raises(AoiError, match="of [0-9]+ images have no label"):
        CropSampler(parts["unlabelled"], size=32)


def test_images_are_decoded_once_within_the_limit(parts, monkeypatch):
    real, read = tiles.native_item, []
    monkeypatch.setattr(tiles, "native_item", lambda ds, i: read.append(i) or real(ds, i))
    sampler = CropSampler(parts["labelled"], size=32)
    for step in range(5):
        sampler.batch(step, 5)
    assert sorted(read) == [0, 1, 2, 3, 4]
    one = sampler.images.bytes / 5
    assert one == 60 * 80 * (2 + 2)  # two lights of 8 bit, mask and ignore of one bit a class

    read.clear()
    small = ImageCache(parts["labelled"], limit=int(2 * one))
    for i in (0, 1, 0, 2, 0, 1):
        small[i]
        assert small.bytes <= 2 * one
    assert read == [0, 1, 2, 1]  # 1 was least recently used when 2 came
    read.clear()
    none = ImageCache(parts["labelled"], limit=0)
    assert np.array_equal(none[0]["image"], none[0]["image"]) and read == [0, 0] and none.bytes == 0


def test_crop_errors_name_the_remedy(parts):
    with pytest.raises(AoiError, match=r"side of 60\. Choose a crop of at most 48 \(a multiple of 16\)"):
        CropSampler(parts["labelled"], size=64)
    CropSampler(parts["labelled"], size=48)  # the advice holds
    with pytest.raises(AoiError, match="crops_per_image is 0; 1 or more"):
        CropSampler(parts["labelled"], size=32, crops_per_image=0)
    with pytest.raises(AoiError, match="no images"):
        CropSampler(parts["labelled"].select([]), size=32)
    with pytest.raises(AoiError, match="share"):
        CropSampler(parts["labelled"], size=32, foreground=50)


def test_no_crop_is_advised_where_none_fits(tmp_path):
    Image.fromarray(np.zeros((12, 40), np.uint8)).save(tmp_path / "im0_buffer0.png")
    with pytest.raises(AoiError, match=r"side of 12\. Leave them out\.$"):
        CropSampler(load_folder(tmp_path)["unlabelled"], size=16)


ONE = 60 * 80 * (2 + 2)  # bytes of an image with its masks


@pytest.mark.parametrize("foreground", [0.0, 0.5])
def test_decodes_fall_by_the_number_of_crops_per_image(parts, monkeypatch, foreground):
    real, read = tiles.native_item, []
    monkeypatch.setattr(tiles, "native_item", lambda ds, i: read.append(i) or real(ds, i))

    def decodes(**options):
        sampler = CropSampler(parts["labelled"], size=32, cache_bytes=ONE, foreground=foreground, **options)
        read.clear()
        turns = [sampler.batch(step, 1)["stem"][0] for step in range(40 * sampler.crops_per_image)]
        return len(read), sampler.crops_per_image, turns

    single, _, images = decodes(crops_per_image=1)
    shared, _, turns = decodes(crops_per_image=4)
    assert turns == [stem for stem in images for _ in range(4)]  # the same images, each four times in a row
    assert single == shared > 20  # so four times as many crops cost no decoding more
    assert decodes()[:2] == (single, 8)


def test_one_crop_per_image_unless_the_cache_is_too_small(parts):
    assert CropSampler(parts["labelled"], size=32).crops_per_image == 1
    assert CropSampler(parts["labelled"], size=32, cache_bytes=5 * ONE).crops_per_image == 1
    assert CropSampler(parts["labelled"], size=32, cache_bytes=5 * ONE - 1).crops_per_image == 8
    assert CropSampler(parts["labelled"], size=32, cache_bytes=0, crops_per_image=1).crops_per_image == 1


def test_crops_in_a_row_differ_and_are_a_function_of_seed_and_step(parts):
    options = {"size": 32, "cache_bytes": ONE, "foreground": 0.5, "crops_per_image": 3}
    one, two = (CropSampler(parts["labelled"], **options) for _ in range(2))
    for step in range(4):
        one.batch(step, 4)
    resumed, unbroken = two.batch(4, 4), one.batch(4, 4)
    assert all(torch.equal(resumed[k], unbroken[k]) for k in ("image", "mask", "ignore"))
    rows = [one.batch(step, 3) for step in range(20)]
    assert all(len(set(row["stem"])) == 1 for row in rows)
    crops = torch.stack([row["image"] for row in rows])
    for a, b in ((0, 1), (1, 2), (0, 2)):  # a few are the same by chance, where the wire lies near the border
        assert (crops[:, a] != crops[:, b]).any((1, 2, 3)).float().mean() > 0.7


def test_an_epoch_of_several_crops_per_image(parts):
    sampler = CropSampler(parts["labelled"], size=32, crops_per_image=3)
    assert (sampler.steps_per_epoch(5), sampler.steps_per_epoch(4)) == (3, 4)  # 15 crops
    for epoch in range(2):
        stems = [s for step in range(3) for s in sampler.batch(3 * epoch + step, 5)["stem"]]
        assert sorted(stems) == sorted(3 * [f"im{i}" for i in range(5)])
