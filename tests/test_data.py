"A folder in every state that users have them in, and what becomes of it."

import json
import pickle
import shutil
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageFile

from aoi_ssl.core import AoiError
from aoi_ssl.data import (
    ImageList,
    channel_count,
    channel_stats,
    check_folder,
    class_names,
    device_ids,
    device_names,
    few_shot,
    load_folder,
    native_item,
    source_folders,
    split_by_device,
)
from aoi_ssl.files import PROBLEMS, FileError, read_header, read_image, read_native, to_unit
from aoi_ssl.masks import MASK_FORMATS, fill_polygon, read_mask, write_mask

SIZE = (24, 32)
CLASSES = ["wire", "ball"]
DEEPPCB = Path(__file__).parents[2] / "shared" / "data" / "deeppcb"


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def noise(seed, shape=SIZE, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def crossing():
    mask = np.zeros((2, *SIZE), bool)
    mask[0, 10:13], mask[1, 5:18, 8:20] = True, True
    return mask


def pair(root, stem, seed, dtype=np.uint8):
    for light in range(2):
        save(root / f"{stem}_buffer{light}.png", noise(seed * 2 + light, dtype=dtype))


@pytest.fixture
def parts(tmp_path):
    "Two devices of one maker, two pairs each; three of four labelled with bits."
    root = tmp_path / "parts"
    for d in (1, 2):
        for i in range(2):
            pair(root, f"acme/d{d}/im{i}", seed=10 * d + i)
            if (d, i) != (2, 1):
                write_mask(root / f"acme/d{d}/masks/im{i}.png", crossing(), classes=CLASSES)
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES, "mask_format": "bits"}))
    return root


@pytest.fixture
def no_pixels(monkeypatch):
    "From now on every attempt to decode pixels fails the test."

    def fail(*_, **__):
        raise AssertionError("pixels were decoded")

    for owner, name in (
        (ImageFile.ImageFile, "load"),
        (tifffile.TiffFile, "asarray"),
        (tifffile.TiffPageSeries, "asarray"),
    ):
        monkeypatch.setattr(owner, name, fail)


def kinds(table, severity="error"):
    found = table.problem[table.severity == severity]
    return sorted(next(k for k in PROBLEMS if p.startswith(k)) for p in found)


# loading


def test_items(parts):
    folder = load_folder(parts)
    assert {k: len(v) for k, v in folder.items()} == {"labelled": 3, "unlabelled": 1}
    assert class_names(folder) == class_names(folder["unlabelled"]) == CLASSES and channel_count(folder) == 2
    item = folder["labelled"][0]
    assert (item["stem"], item["device"], item["manufacturer"]) == ("acme/d1/im0", "d1", "acme")
    assert (item["height"], item["width"], item["labelled"]) == (*SIZE, True)
    assert item["image"].dtype == torch.float32 and item["image"].shape == (2, *SIZE)
    assert torch.equal(item["image"][1], torch.from_numpy(noise(21)).float() / 255)  # light 1 is the second plane
    assert torch.equal(item["mask"], torch.from_numpy(crossing())) and not item["ignore"].any()


def test_a_missing_mask_is_unlabelled_never_background(parts):
    item = load_folder(parts)["unlabelled"][0]
    assert item["labelled"] is False and item["mask"] is None and item["ignore"] is None


def test_listing_reads_headers_only(tmp_path, no_pixels):
    first = tmp_path / "d1" / "im0_buffer0.png"
    save(first, np.zeros((8120, 8120), bool))
    for i in range(1000):
        for light in range(2):
            if (i, light) != (0, 0):
                (first.parent / f"im{i}_buffer{light}.png").hardlink_to(first)
    ds = load_folder(tmp_path)["unlabelled"]
    assert len(ds) == 1000 and set(ds["height"]) == {8120}
    with pytest.raises(AssertionError, match="pixels were decoded"):  # the guard works
        ds[0]


def test_metadata_never_reads_pixels(parts, no_pixels):
    ds = load_folder(parts)["labelled"]
    assert (
        list(ds["device"]) == ["d1", "d1", "d2"]
        and ds["stem"][2] == "acme/d2/im0"
        and ds.unique("device") == ["d1", "d2"]
    )
    assert len(ds.filter(lambda device: device == "d1", input_columns="device")) == 2
    both = datasets.concatenate_datasets([ds.select([2]), ds.select([0])])
    assert list(both["device"]) == ["d2", "d1"] and class_names(both) == CLASSES and channel_count(both) == 2


def test_selections_still_decode(parts, tmp_path):
    ds = load_folder(parts)["labelled"]
    both = datasets.concatenate_datasets([ds.select([2]), ds.select([0])]).sort("stem")
    assert torch.equal(both[1]["image"], ds[2]["image"])
    assert [tuple(x.shape) for x in ds[:2]["image"]] == [(2, *SIZE)] * 2
    assert torch.equal(next(iter(ds["image"])), ds[0]["image"])
    ds.save_to_disk(tmp_path / "saved")
    again = datasets.load_from_disk(tmp_path / "saved")
    assert class_names(again) == CLASSES and torch.equal(again[0]["mask"], ds[0]["mask"])


def test_workers_of_a_loader_decode(parts):
    ds = load_folder(parts)["labelled"]
    loader = torch.utils.data.DataLoader(ds, batch_size=None, num_workers=1)
    assert pickle.loads(pickle.dumps(ds))[1]["stem"] == "acme/d1/im1"  # what a platform without fork does
    assert [item["stem"] for item in loader] == list(ds["stem"])


def test_native_item_is_the_item(parts):
    ds = load_folder(parts)["labelled"].select([2, 0])
    native = native_item(ds, 0)
    assert native["stem"] == "acme/d2/im0" and native["image"].dtype == np.uint8 and native["mask"].dtype == bool
    assert torch.equal(to_unit(native["image"]), ds[0]["image"]) and np.array_equal(native["mask"], ds[0]["mask"])
    assert native_item(load_folder(parts)["unlabelled"], 0)["mask"] is None


def test_splits_by_meta(parts):
    rows = ["stem,device,split,angle", "acme/d1/im0,x7,train,3", "acme/d1/im1,x7,train,4", "acme/d2/im0,x8,test,5"]
    (parts / "meta.csv").write_text("\n".join(rows))
    folder = load_folder(parts)
    assert {k: list(v["stem"]) for k, v in folder.items()} == {
        "train": ["acme/d1/im0", "acme/d1/im1"],
        "test": ["acme/d2/im0"],
        "unlabelled": ["acme/d2/im1"],
    }
    assert folder["train"][1]["angle"] == 4 and set(folder["train"]["device"]) == {"x7"}
    assert folder["unlabelled"][0]["device"] == "d2"  # no row: from the path
    assert kinds(check_folder(parts), "warning") == ["image without meta row"]


NAMES = "paths mask_path mask_format mask_key mask_files height width channels bits labelled image mask ignore"
OTHERS = "Index index count files digest file folder severity path name meta_bits"


@pytest.mark.parametrize("name", NAMES.split() + OTHERS.split())
def test_any_column_of_meta_is_kept(parts, name):
    stems = ["acme/d1/im0", "acme/d1/im1", "acme/d2/im0"]
    (parts / "meta.csv").write_text("\n".join([f"stem,{name}", *(f"{s},v{i}" for i, s in enumerate(stems))]))
    there = load_folder(parts)
    column = f"meta_{name}" if name in NAMES.split() else name
    for part in there.values():
        for i in range(len(part)):
            item = part[i]
            assert item["image"].shape == (2, *SIZE) and item["height"] == SIZE[0]
            assert item[column] == (f"v{stems.index(item['stem'])}" if item["stem"] in stems else None)
    check_folder(parts)


def test_a_column_of_meta_does_not_take_the_name_of_another(parts):
    (parts / "meta.csv").write_text("stem,bits,meta_bits\nacme/d1/im0,a,b\n")
    rows = datasets.concatenate_datasets(list(load_folder(parts).values()))
    at = list(rows["stem"]).index("acme/d1/im0")
    assert rows[at]["meta_meta_bits"] == "a" and rows[at]["meta_bits"] == "b"


def test_bare_stems_in_meta(tmp_path):
    for i in range(2):
        pair(tmp_path / "img", f"b{i}", i)
        save(tmp_path / "lbl" / f"b{i}.png", np.eye(*SIZE, dtype=np.uint8))
    (tmp_path / "meta.csv").write_text("stem,device\nb0,x\nb1,y\nb2,z\n")
    with pytest.warns(UserWarning, match="read all masks to find 1 classes: class 1"):
        ds = load_folder(tmp_path)["labelled"]
    assert list(ds["device"]) == ["x", "y"] and ds[0]["mask"].sum() == 24
    with pytest.warns(UserWarning):
        assert kinds(check_folder(tmp_path), "warning") == ["meta row without image"]


# pixels


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "jpg"])
def test_suffixes(tmp_path, suffix):
    flat = np.full(SIZE, 51, np.uint8)
    save(tmp_path / f"a_buffer0.{suffix}", flat)
    ds = load_folder(tmp_path)["unlabelled"]
    assert channel_count(ds) == 1 and torch.allclose(ds[0]["image"], torch.tensor(0.2), atol=0.01)


def test_16_bit_is_scaled_by_65535(tmp_path):
    values = np.array([[0, 255, 4095, 65535]], np.uint16)
    for suffix in ("png", "tif"):
        got = read_image(save(tmp_path / f"a.{suffix}", values))
        assert torch.equal(got[0, 0], torch.tensor([0, 255 / 65535, 4095 / 65535, 1]))
        assert read_native(tmp_path / f"a.{suffix}").dtype == np.uint16


def test_1_bit_is_0_and_1(tmp_path):
    path = save(tmp_path / "a.png", np.array([[False, True]]))
    assert read_header(path) == (1, 2, 1, 1) and read_image(path).flatten().tolist() == [0, 1]


def test_mixed_depths_agree_exactly(tmp_path):
    shallow = noise(0)
    a, b = save(tmp_path / "a_buffer0.png", shallow), save(tmp_path / "a_buffer1.png", shallow.astype(np.uint16) * 257)
    image = read_image([a, b])
    assert torch.equal(image[0], image[1]) and torch.allclose(image[0], torch.from_numpy(shallow).float() / 255)
    assert "mixed bit depth" in kinds(check_folder(tmp_path), "warning")


@pytest.mark.parametrize("kind", ["pages", "samples", "planar", "png", "lzw"])
def test_one_file_with_two_lights(tmp_path, kind):
    lights = np.stack([noise(1), noise(2)])
    path = tmp_path / "d1" / "x.tif"
    path.parent.mkdir()
    if kind == "png":
        path = save(path.with_suffix(".png"), np.moveaxis(lights, 0, 2))
    elif kind == "lzw":
        first, second = (Image.fromarray(x) for x in lights)
        first.save(path, save_all=True, append_images=[second], compression="tiff_lzw")
    elif kind == "samples":
        tifffile.imwrite(path, np.moveaxis(lights, 0, 2), photometric="minisblack", planarconfig="contig")
    else:
        tifffile.imwrite(path, lights, photometric="minisblack", planarconfig="separate" if kind == "planar" else None)
    ds = load_folder(tmp_path)["unlabelled"]
    assert channel_count(ds) == 2 and np.array_equal(native_item(ds, 0)["image"], lights) and ds[0]["device"] == "d1"


def test_lights_in_folders_and_with_names(tmp_path):
    for name, value in (("ring", 10), ("coax", 20)):
        save(tmp_path / "d1" / name / "x.png", np.full(SIZE, value, np.uint8))
    ds = load_folder(tmp_path, pattern="{light}/{stem}", lights=["ring", "coax"])["unlabelled"]
    assert list(ds["stem"]) == ["d1/x"] and native_item(ds, 0)["image"][:, 0, 0].tolist() == [10, 20]
    with pytest.raises(AoiError, match="{stem}"):
        load_folder(tmp_path, pattern="buffer{light}")


def test_grey_saved_as_colour_is_read_and_real_colour_is_not(tmp_path):
    grey = noise(3)
    save(tmp_path / "a_buffer0.bmp", np.repeat(grey[..., None], 3, 2))
    save(tmp_path / "a_buffer1.png", grey)
    assert np.array_equal(native_item(load_folder(tmp_path)["unlabelled"], 0)["image"][0], grey)
    save(tmp_path / "a_buffer0.bmp", noise(3, (*SIZE, 3)))
    assert kinds(check_folder(tmp_path)) == ["wrong bit depth"]


def test_what_pillow_would_quietly_reduce_to_8_bit_is_refused(tmp_path):
    header = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (4).to_bytes(4) + (4).to_bytes(4) + bytes([16, 2, 0, 0, 0])
    whole = save(tmp_path / "a.png", noise(0, (4, 4, 3))).read_bytes()
    (tmp_path / "a.png").write_bytes(header + zlib.crc32(header[12:]).to_bytes(4) + whole[33:])
    with pytest.raises(FileError, match="wrong bit depth"):
        read_header(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(SIZE, np.float32))
    with pytest.raises(FileError, match="float32"):
        read_header(tmp_path / "a.tif")


def test_white_is_zero(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0, 255]], np.uint8), photometric="miniswhite")
    assert read_native(tmp_path / "a.tif").flatten().tolist() == [255, 0]


# masks


@pytest.mark.parametrize("name", [n for n in MASK_FORMATS if n != "binary"])
def test_formats_round_trip(tmp_path, name):
    mask, ignore = crossing(), np.zeros(SIZE, bool)
    ignore[20:] = True
    if name == "index":
        mask[0] &= ~mask[1]
    classes = ["wire", "ignore", "ball"]
    path = tmp_path / f"im0{MASK_FORMATS[name].suffix}"
    write_mask(path, mask, classes=classes, mask_format=name, ignore=ignore)
    got, skipped = read_mask(path, classes=classes, mask_format=name, size=SIZE)
    assert np.array_equal(got, mask) and np.array_equal(skipped, np.stack([ignore] * 2))
    assert got.dtype == skipped.dtype == torch.bool
    assert not any(".tmp" in f.name for f in tmp_path.iterdir())


@pytest.mark.parametrize("name", list(MASK_FORMATS))
def test_formats_round_trip_in_a_folder(tmp_path, name):
    classes = CLASSES[: 1 if name == "binary" else 2]
    mask = crossing()[: len(classes)]
    if name == "index":
        mask[0] &= ~mask[1]
    for d in range(2):
        pair(tmp_path, f"m/d{d}/x", d)
        write_mask(tmp_path / f"m/d{d}/masks/x{MASK_FORMATS[name].suffix}", mask, classes=classes, mask_format=name)
    (tmp_path / "classes.json").write_text(json.dumps({"classes": classes, "mask_format": name}))
    assert check_folder(tmp_path).empty
    ds = load_folder(tmp_path)["labelled"]
    assert len(ds) == 2 and all(np.array_equal(item["mask"], mask) for item in ds)


def test_more_than_8_classes_make_a_16_bit_png(tmp_path):
    mask = np.random.default_rng(0).random((11, *SIZE)) < 0.3
    classes = [f"c{i}" for i in range(11)]
    write_mask(tmp_path / "a.png", mask, classes=classes)
    assert read_header(tmp_path / "a.png").bits == 16
    assert np.array_equal(read_mask(tmp_path / "a.png", classes=classes)[0], mask)
    with pytest.raises(AoiError, match="17 classes"):
        write_mask(tmp_path / "a.png", np.zeros((17, 2, 2), bool), classes=[f"c{i}" for i in range(17)])


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    with pytest.raises(AoiError, match="several classes.*bits"):
        write_mask(tmp_path / "a.png", crossing(), classes=CLASSES, mask_format="index")
    with pytest.raises(AoiError, match="'ignore'"):
        write_mask(tmp_path / "a.png", crossing(), classes=CLASSES, ignore=np.ones(SIZE, bool))
    with pytest.raises(AoiError, match=r"bool \(2, H, W\)"):
        write_mask(tmp_path / "a.png", crossing()[:1], classes=CLASSES)
    with pytest.raises(AoiError, match="one of index, bits"):
        write_mask(tmp_path / "a.png", crossing(), classes=CLASSES, mask_format="png")
    assert not list(tmp_path.iterdir())


def test_full_disk_keeps_the_old_mask(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_mask(path, crossing(), classes=CLASSES)

    def full(self, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_mask(path, ~crossing(), classes=CLASSES)
    monkeypatch.undo()
    assert np.array_equal(read_mask(path, classes=CLASSES)[0], crossing()) and len(list(tmp_path.iterdir())) == 1


def test_index_map_of_0_and_1_is_one_class(tmp_path):
    pair(tmp_path, "a", 0)
    save(tmp_path / "a_mask.png", np.tri(*SIZE, dtype=np.uint8))
    with pytest.warns(UserWarning, match="class 1"):
        ds = load_folder(tmp_path)["labelled"]
    assert (
        class_names(ds) == ["class 1"]
        and ds[0]["mask"].shape == (1, *SIZE)
        and ds[0]["mask"].sum() == np.tri(*SIZE).sum()
    )


def test_index_map_of_0_and_255_is_not_guessed_at(tmp_path):
    pair(tmp_path, "a", 0)
    save(tmp_path / "a.png", np.tri(*SIZE, dtype=np.uint8) * 255)
    for options in ({}, {"classes": ["defect"]}):
        assert kinds(check_folder(tmp_path, **options)) == ["unknown class value"]
    with pytest.raises(AoiError, match="mask_format='binary'"):
        load_folder(tmp_path, on_error="skip")
    ds = load_folder(tmp_path, classes=["defect"], mask_format="binary")["labelled"]
    assert ds[0]["mask"].sum() == np.tri(*SIZE).sum() and not ds[0]["ignore"].any()


def test_ignore_label_of_an_index_map(tmp_path):
    values = np.zeros(SIZE, np.uint8)
    values[:4], values[4:6], values[6:9] = 1, 2, 255
    path = save(tmp_path / "a.png", values)
    mask, ignore = read_mask(path, classes=CLASSES, mask_format="index")
    assert mask.sum((1, 2)).tolist() == [4 * 32, 2 * 32] and ignore[:, 6:9].all() and ignore.sum() == 2 * 3 * 32
    with pytest.raises(FileError, match="unknown class value: 255"):
        read_mask(path, classes=CLASSES, mask_format="index", ignore_index=None)


@pytest.mark.parametrize("missing", ["unknown", "background"])
def test_a_class_without_a_file_is_ignored_unless_told(tmp_path, missing):
    for stem in "ab":
        pair(tmp_path, stem, ord(stem))
        save(tmp_path / f"{stem}_wire.png", crossing()[0].astype(np.uint8) * 255)
    save(tmp_path / "b_ball.png", crossing()[1].astype(np.uint8))
    ds = load_folder(tmp_path, classes=CLASSES, missing_class=missing)["labelled"]
    assert ds[0]["ignore"].flatten(1).all(1).tolist() == [False, missing == "unknown"] and not ds[0]["mask"][1].any()
    assert np.array_equal(ds[1]["mask"], crossing()) and not ds[1]["ignore"].any()
    with pytest.warns(UserWarning, match="ball, wire"):
        assert class_names(load_folder(tmp_path)) == ["ball", "wire"]


def test_a_class_file_of_an_unknown_class_is_named(tmp_path):
    pair(tmp_path, "a", 0)
    save(tmp_path / "a_wyre.png", np.ones(SIZE, np.uint8))
    assert kinds(check_folder(tmp_path, classes=CLASSES)) == ["orphan mask"]


def test_coco_for_a_whole_folder(tmp_path):
    for seed, stem in enumerate(("d1/a", "d1/b", "d2/a")):
        pair(tmp_path, stem, seed)
    images = [
        {"id": i, "file_name": n, "height": 24, "width": 32} for i, n in enumerate(["d1/a.png", "d1/b_buffer0.png"])
    ]
    square = {"image_id": 0, "category_id": 5, "segmentation": [[2, 3, 6, 3, 6, 8, 2, 8]]}
    run = {"image_id": 0, "category_id": 7, "segmentation": {"size": [24, 32], "counts": [24, 48, 24 * 29]}}
    content = {
        "images": images,
        "annotations": [square, run],
        "categories": [{"id": 5, "name": "ball"}, {"id": 7, "name": "wire"}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="ball, wire"):
        folder = load_folder(tmp_path)
    first, second = folder["labelled"]
    expected = np.zeros((2, *SIZE), bool)
    expected[0, 3:8, 2:6], expected[1, :, 1:3] = True, True
    assert np.array_equal(first["mask"], expected)
    assert not second["mask"].any() and second["labelled"]  # in the file without polygons: annotated, nothing there
    assert list(folder["unlabelled"]["stem"]) == ["d2/a"]  # not in the file: unlabelled
    assert set(kinds(check_folder(tmp_path, classes=["ball"]))) == {"unknown class value"}
    content["images"].append({"id": 9, "file_name": "nobody.png", "height": 24, "width": 32})
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert kinds(check_folder(tmp_path, classes=["ball", "wire"])) == ["orphan mask"]


def packed(counts):
    "The string of COCO's maskApi.c (rleToString)."
    out = []
    for i, count in enumerate(counts):
        x = count - (counts[i - 2] if i > 2 else 0)
        more = True
        while more:
            c, x = x & 31, x >> 5
            more = x != -1 if c & 16 else x != 0
            out.append(chr((c | 32 if more else c) + 48))
    return "".join(out)


def test_packed_run_lengths(tmp_path):
    counts = [30, 100, 5, 3, 400, 2, 228]
    entry = {
        "images": [{"id": 1, "file_name": "a.png", "height": 24, "width": 32}],
        "categories": [{"id": 1, "name": "wire"}],
    }
    masks = []
    for i, form in enumerate((counts, packed(counts))):
        annotation = {"image_id": 1, "category_id": 1, "segmentation": {"size": [24, 32], "counts": form}}
        (tmp_path / f"{i}.json").write_text(json.dumps(entry | {"annotations": [annotation]}))
        masks.append(read_mask(tmp_path / f"{i}.json", classes=["wire"], mask_format="coco")[0])
    assert torch.equal(*masks) and masks[0].sum() == 105 and masks[0][0, 6, 1] and not masks[0][0, 5, 1]


def test_labelme_beside_a_light(tmp_path):
    pair(tmp_path, "a", 0)
    shapes = [
        {"label": "ball", "shape_type": "rectangle", "points": [[4, 2], [10, 6]]},
        {"label": "wire", "points": [[0, 10], [32, 10], [32, 13], [0, 13]]},
        {"label": "ignore", "shape_type": "circle", "points": [[25, 20], [25, 23]]},
    ]
    content = {"shapes": shapes, "imageHeight": 24, "imageWidth": 32}
    (tmp_path / "a_buffer0.json").write_text(json.dumps(content))
    item = load_folder(tmp_path, classes=CLASSES)["labelled"][0]
    assert item["mask"][1].sum() == 24 and item["mask"][1, 2:6, 4:10].all() and item["mask"][0].sum() == 3 * 32
    assert 24 <= item["ignore"][0].sum() <= 32
    shapes[0]["shape_type"] = "linestrip"
    (tmp_path / "a_buffer0.json").write_text(json.dumps(content))
    assert "has no area" in check_folder(tmp_path, classes=CLASSES).problem[0]


def test_polygon_matches_pixel_centres():
    rng = np.random.default_rng(0)
    for _ in range(20):
        (ax, ay), (bx, by), (cx, cy) = corners = rng.uniform(-5, 45, (3, 2))
        y, x = np.mgrid[:40, :40] + 0.5
        sides = [
            (x - px) * (qy - py) - (y - py) * (qx - px) > 0
            for (px, py), (qx, qy) in (((ax, ay), (bx, by)), ((bx, by), (cx, cy)), ((cx, cy), (ax, ay)))
        ]
        mask = np.zeros((40, 40), bool)
        fill_polygon(mask, corners)
        assert np.array_equal(mask, np.all(sides, 0) | ~np.any(sides, 0))


def test_masks_in_another_folder(parts, tmp_path):
    shutil.copytree(parts, tmp_path / "bare", ignore=shutil.ignore_patterns("masks", "classes.json"))
    write_mask(tmp_path / "predicted/acme/d2/im1.png", crossing(), classes=CLASSES)
    shutil.copy(parts / "classes.json", tmp_path / "predicted")
    folder = load_folder(tmp_path / "bare", masks=tmp_path / "predicted")
    assert list(folder["labelled"]["stem"]) == ["acme/d2/im1"] and len(folder["unlabelled"]) == 3


def test_bits_need_names(parts):
    (parts / "classes.json").unlink()
    with pytest.raises(AoiError, match="classes.json"):
        load_folder(parts, mask_format="bits")


# what is wrong with a folder


def no_light(root):
    (root / "acme/d1/im0_buffer1.png").unlink()


def no_image(root):
    shutil.copy(root / "acme/d1/masks/im0.png", root / "acme/d1/masks/im9.png")


def other_size_of_light(root):
    save(root / "acme/d1/im0_buffer1.png", noise(0, (24, 33)))


def other_size_of_mask(root):
    save(root / "acme/d1/masks/im0.png", np.zeros((24, 31), np.uint8))


def truncated_header(root):
    (root / "acme/d1/im0_buffer0.png").write_bytes(b"\x89PNG\r\n\x1a\n")


def truncated(root):
    path = root / "acme/d1/im0_buffer0.png"
    path.write_bytes(path.read_bytes()[:-200])


def truncated_mask(root):
    path = root / "acme/d1/masks/im0.png"
    path.write_bytes(path.read_bytes()[:-40])


def no_bytes(root):
    (root / "acme/d1/im0_buffer0.png").write_bytes(b"")


def third_class(root):
    save(root / "acme/d1/masks/im0.png", np.full(SIZE, 4, np.uint8))


def two_masks(root):
    np.save(root / "acme/d1/im0.npy", np.zeros((*SIZE, 2), bool))


def lossy_mask(root):
    (root / "acme/d1/masks/im0.png").unlink()
    save(root / "acme/d1/masks/im0.jpg", np.zeros(SIZE, np.uint8))


def other_number_of_lights(root):
    for light in range(2):
        (root / f"acme/d1/im0_buffer{light}.png").unlink()
    tifffile.imwrite(root / "acme/d1/im0_buffer0.tif", np.zeros((3, *SIZE), np.uint8), photometric="minisblack")


def same_in_two_devices(root):
    for light in range(2):
        tifffile.imwrite(
            root / f"acme/d2/new_buffer{light}.tif", read_native(root / f"acme/d1/im0_buffer{light}.png")[0]
        )


def same_in_two_splits(root):
    for light in range(2):
        shutil.copy(root / f"acme/d1/im0_buffer{light}.png", root / f"acme/d1/im1_buffer{light}.png")
    stems = ["acme/d1/im0,train", "acme/d1/im1,test", "acme/d2/im0,train", "acme/d2/im1,train"]
    (root / "meta.csv").write_text("\n".join(["stem,split", *stems]))


ALWAYS = {
    no_light: "orphan light",
    no_image: "orphan mask",
    other_size_of_light: "size mismatch",
    two_masks: "two masks",
    other_size_of_mask: "size mismatch",
    truncated_header: "unreadable",
    no_bytes: "unreadable",
    lossy_mask: "wrong bit depth",
    other_number_of_lights: "orphan light",
}
DEEP = {
    truncated: "unreadable",
    truncated_mask: "unreadable",
    third_class: "unknown class value",
    same_in_two_devices: "same image",
    same_in_two_splits: "same image",
}


@pytest.mark.parametrize("fault", list(ALWAYS) + list(DEEP), ids=lambda f: f.__name__)
def test_faults_are_named(parts, fault):
    assert check_folder(parts).empty
    fault(parts)
    table = check_folder(parts)
    expected = (ALWAYS | DEEP)[fault]
    assert expected in kinds(table) and list(table.columns) == ["severity", "file", "problem", "remedy"]
    assert kinds(table) == (["another mask format", "two masks"] if fault is two_masks else [expected])
    assert Path(table.file[0]).name and table.remedy[0]
    assert (expected in kinds(check_folder(parts, deep=False))) == (fault in ALWAYS)
    if fault in ALWAYS:
        with pytest.raises(AoiError, match=f"(?s){expected}.*aoi check"):
            load_folder(parts)
    else:
        load_folder(parts)


def test_another_number_of_channels(tmp_path):
    for i, pages in enumerate((2, 2, 3)):
        tifffile.imwrite(tmp_path / f"a{i}.tif", noise(i, (pages, *SIZE)), photometric="minisblack")
    assert kinds(check_folder(tmp_path)) == ["number of lights"]
    with pytest.raises(AoiError, match="a2.tif: number of lights: 3 channels, most images have 2"):
        load_folder(tmp_path)


def test_a_truncated_image_is_an_error_when_read(parts):
    truncated(parts)
    with pytest.raises(FileError, match="im0_buffer0.png: unreadable"):
        load_folder(parts)["labelled"][0]


def test_a_truncated_tiff_is_an_error_when_read(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise(0))
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:-100])
    with pytest.raises(FileError, match="unreadable"):
        read_native(tmp_path / "a.tif")


def blank(root):
    save(root / "acme/d1/im0_buffer0.png", np.zeros(SIZE, np.uint8))


def duplicate(root):
    for light in range(2):
        shutil.copy(root / f"acme/d1/im0_buffer{light}.png", root / f"acme/d1/im1_buffer{light}.png")


def same_light(root):
    shutil.copy(root / "acme/d1/im0_buffer0.png", root / "acme/d1/im0_buffer1.png")


def stray_json(root):
    (root / "acme/settings.json").write_text("{}")


@pytest.mark.parametrize(
    "fault, kind",
    [
        (blank, "blank light"),
        (duplicate, "duplicate image"),
        (same_light, "duplicate light"),
        (stray_json, "unused file"),
    ],
)
def test_warnings_do_not_stop_loading(parts, fault, kind):
    fault(parts)
    table = check_folder(parts)
    assert kinds(table, "warning") == [kind] and kinds(table) == []
    load_folder(parts)


def test_dark_16_bit_images(tmp_path):
    for i, top in enumerate((200, 4095)):
        for light in range(2):
            save(
                tmp_path / f"a{i}_buffer{light}.png",
                np.random.default_rng(i + 9 * light).integers(0, top, SIZE).astype(np.uint16),
            )
    table = check_folder(tmp_path)
    assert kinds(table, "warning") == ["dark image"] * 2 and "multiply by 16" in table.remedy[1]


@pytest.mark.parametrize("make", [False, True])
def test_empty_folder(tmp_path, make):
    path = tmp_path / "nothing"
    if make:
        path.mkdir()
        assert kinds(check_folder(path)) == ["empty folder"]
    with pytest.raises(AoiError, match="empty folder" if make else "is no folder"):
        load_folder(path)


def test_skip_says_what_is_left_out(parts):
    no_light(parts)
    other_size_of_mask(parts)
    no_image(parts)
    with pytest.warns(
        UserWarning, match="(?s)1 of 4 images left out, for 3 errors.*orphan light.*orphan mask"
    ) as caught:
        folder = load_folder(parts, on_error="skip")
    assert len(caught) == 1 and sum(map(len, folder.values())) == 3


def test_broken_metadata_cannot_be_skipped(parts):
    (parts / "meta.csv").write_text("name,device\na,b\n")
    assert kinds(check_folder(parts)) == ["unreadable"]
    with pytest.raises(AoiError, match="'stem'"):
        load_folder(parts, on_error="skip")


# splits and statistics


def test_split_by_device_shares_no_device(tmp_path):
    for d in range(6):
        for maker in "ab":
            save(tmp_path / maker / f"d{d}" / "x_buffer0.png", noise(d))
    folder = load_folder(tmp_path)
    splits = split_by_device(folder, new=0.25, validation=2, seed=1)
    owners = {n: {(m, d) for m, d in zip(s["manufacturer"], s["device"], strict=True)} for n, s in splits.items()}
    assert {n: len(o) for n, o in owners.items()} == {"train": 7, "validation": 2, "new": 3}
    assert len(set.union(*owners.values())) == 12
    again = split_by_device(folder, new=0.25, validation=2, seed=1)
    assert all(list(again[n]["stem"]) == list(splits[n]["stem"]) for n in splits)
    assert any(
        list(split_by_device(folder, new=0.25, validation=2, seed=s)["new"]["stem"]) != list(splits["new"]["stem"])
        for s in (2, 3)
    )
    assert set(split_by_device(folder, new=["a/d0"])["new"]["stem"]) == {"a/d0/x"}
    for bad in ("d0", "d9", 12, 1.0):  # two makers have a d0; nobody has a d9; nothing left to train on
        with pytest.raises(AoiError, match="new="):
            split_by_device(folder, new=bad)


def test_one_device_cannot_be_split(tmp_path):
    for i in range(3):
        pair(tmp_path, f"acme/d7/im{i}", i)
    one = load_folder(tmp_path)
    for options in ({}, {"new": 1}, {"new": ["d7"]}, {"new": 0, "validation": 0.5}):
        with pytest.raises(AoiError, match=r"images are of one device \(acme/d7\); at least two are needed.*meta.csv"):
            split_by_device(one, **options)
    assert len(split_by_device(one, new=0)["train"]) == 3


def test_a_device_is_known_by_its_manufacturer_too(tmp_path):
    for i, folder in enumerate(("acme/d1", "bosch/d1", "bosch/d1")):
        pair(tmp_path, f"{folder}/im{i}", i)
    images = load_folder(tmp_path)["unlabelled"]
    assert device_ids(images) == ["acme/d1", "bosch/d1", "bosch/d1"]
    assert device_ids(images.select([2, 0])) == ["bosch/d1", "acme/d1"]
    with pytest.raises(AoiError, match="acme/d1, bosch/d1"):
        few_shot(images, 1)


def test_source_folders_open_nothing(parts, no_pixels):
    both = datasets.concatenate_datasets(list(load_folder(parts).values()))
    rows = both.select([list(both["stem"]).index("acme/d1/im0")])
    assert {parts / "acme" / "d1"} <= set(source_folders(rows)) and parts / "acme" / "d2" not in source_folders(rows)
    assert all(f.is_absolute() and f.is_dir() for f in source_folders(both))


def test_few_shot(parts):
    ds = load_folder(parts)["labelled"]
    one = ds.filter(lambda d: d == "d1", input_columns="device")
    bank, rest = few_shot(one, 1, seed=3)
    assert sorted([*bank["stem"], *rest["stem"]]) == ["acme/d1/im0", "acme/d1/im1"] and len(bank) == 1
    assert {tuple(few_shot(one, 1, seed=s)[0]["stem"]) for s in range(8)} == {("acme/d1/im0",), ("acme/d1/im1",)}
    with pytest.raises(AoiError, match="2 devices"):
        few_shot(ds, 1)
    with pytest.raises(AoiError, match="out of 1 labelled"):
        few_shot(bank, 1)


def test_channel_stats_are_exact(tmp_path):
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (3, *SIZE), dtype=np.uint16)
    for i, plane in enumerate(deep):
        save(tmp_path / f"a{i}_buffer0.png", plane)
        save(tmp_path / f"a{i}_buffer1.png", np.full(SIZE, 77, np.uint8))
    ds = load_folder(tmp_path)["unlabelled"]
    mean, std = channel_stats(ds)
    assert torch.allclose(mean, torch.tensor([deep.mean() / 65535, 77 / 255], dtype=torch.float32), atol=1e-7)
    assert torch.allclose(
        std, torch.tensor([deep.std() / 65535, 1.0], dtype=torch.float32), atol=1e-7
    )  # constant light: 1
    few = channel_stats(ds, max_images=1, seed=5)[0][0].item()
    assert min(abs(few - plane.mean() / 65535) for plane in deep) < 1e-6
    with pytest.raises(AoiError, match="no image"):
        channel_stats(ds.select([]))


@pytest.mark.skipif(not DEEPPCB.is_dir(), reason="the shared data are not here")
def test_deeppcb_as_it_is():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = load_folder(DEEPPCB)
    assert any("read all masks" in str(w.message) for w in caught)
    ds = folder["labelled"]
    assert list(folder) == ["labelled"] and len(ds) == 567 and len(set(ds["device"])) == 8
    assert class_names(ds) == [f"class {i}" for i in range(1, 7)] and channel_count(ds) == 2
    assert set(ds[0]["image"].unique().tolist()) == {0.0, 1.0} and ds[0]["mask"].any()


@pytest.mark.parametrize(
    ("makers", "devices", "names"),
    [
        ("aab", "112", "112"),
        ("aab", "121", ["a/1", "2", "b/1"]),
        (["unknown", "b", "b"], "112", ["1", "b/1", "2"]),
        ("", "", ""),
    ],
)
def test_a_device_is_called_by_its_maker_only_where_two_share_its_name(makers, devices, names):
    assert device_names(makers, devices) == list(names)


def test_images_come_in_many_ways(folder):
    "A dataset, a mapping, a list of images or of rows: the same images; what has no name gets a number."
    new = load_folder(folder)["new"]
    rows = [new[i] for i in range(2)]
    ways = (new.select([0, 1]), {row["stem"]: row["image"].numpy() for row in rows}, rows, [row["image"] for row in rows])
    for way in ways:
        listed = ImageList(way)
        assert len(listed) == 2 and all(torch.equal(image, row["image"]) for image, row in zip(listed, rows, strict=True))
    assert ImageList(ways[0]).names == ImageList(ways[1]).names == ImageList(rows).names == [row["stem"] for row in rows]
    assert ImageList(ways[3]).names == ["image_00", "image_01"] and ImageList(ways[3]).devices == ["unknown"] * 2
    assert ImageList(ways[0]).devices == ImageList(rows).devices == [row["device"] for row in rows]


def test_images_that_cannot_be_told_apart_are_refused(folder):
    splits = load_folder(folder)
    row = splits["new"][0]
    for images, without, message in (([row, row], (), "occurs twice"), ([row], [row["stem"]], "in the bank already")):
        with pytest.raises(AoiError, match=message):
            ImageList(images).distinct(without=without)
    with pytest.raises(AoiError, match="splits .*new"):
        ImageList(splits)
    with pytest.raises(AoiError, match="a row with an image was expected"):
        ImageList([{"stem": "a"}])
