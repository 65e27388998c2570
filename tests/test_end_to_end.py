"The whole way from files to masks with 16-bit images of two lights and of one, and rules that hold along it."

import numpy as np
import pytest
import tifffile
import torch
from datasets import concatenate_datasets

from aoi_ssl.core import write_json
from aoi_ssl.data import channel_count, few_shot, load_folder, native_item, split_by_device
from aoi_ssl.masks import write_mask
from aoi_ssl.metrics import binary_counts, counts_frame, mean_iou, scores
from aoi_ssl.predict import Segmenter, evaluate, predict_image, segment, to_mask
from aoi_ssl.pretrain import pretrain
from aoi_ssl.retrieval import build_bank
from aoi_ssl.segment import finetune

CLASSES = ["wire", "ball"]
SIZE = (72, 80)


def write_parts(root, lights):
    "Two devices, three images each, of 12 bits in 16-bit TIFF files; masks as bits. Returns stem -> (C, H, W) uint16."
    written = {}
    for seed, stem in enumerate(f"acme/d{d}/im{i}" for d in (1, 2) for i in range(3)):
        rng = np.random.default_rng(seed)
        mask = np.zeros((2, *SIZE), bool)
        mask[0, 20 + seed : 26 + seed], mask[1, 10:40, 30:60] = True, True  # they overlap
        grey = 300 + 1500 * mask[0] + 2000 * mask[1] + rng.integers(0, 200, (lights, *SIZE))
        written[stem] = grey.astype(np.uint16)
        (root / stem).parent.mkdir(parents=True, exist_ok=True)
        for light, plane in enumerate(written[stem]):
            tifffile.imwrite(root / f"{stem}_buffer{light}.tif" if lights > 1 else root / f"{stem}.tif", plane)
        (root / stem).with_name("masks").mkdir(exist_ok=True)
        write_mask((root / stem).parent / "masks" / f"im{seed % 3}.png", mask, classes=CLASSES)
    write_json(root / "classes.json", {"classes": CLASSES, "mask_format": "bits"})
    return written


@pytest.mark.parametrize("lights", [1, 2])
def test_from_16_bit_tiff_files_to_masks_that_load_again(tmp_path, lights):
    written = write_parts(tmp_path / "parts", lights)
    images = load_folder(tmp_path / "parts")["labelled"]
    assert len(images) == 6 and channel_count(images) == lights
    for i, stem in enumerate(images["stem"]):
        expected = torch.from_numpy(written[stem].astype(np.float64) / 65535)
        torch.testing.assert_close(images[i]["image"].double(), expected, atol=1e-7, rtol=0)
        assert native_item(images, i)["image"].dtype == np.uint16

    options = dict(encoder="nano", budget="2 steps", crop=32, batch_size=2, progress=False)
    encoder = pretrain(images, tmp_path / "encoder", **options).encoder
    pixels = np.stack([written[stem] for stem in images["stem"]]) / 65535
    assert encoder.channels == lights
    torch.testing.assert_close(
        encoder.mean.flatten().double(), torch.from_numpy(pixels.mean((0, 2, 3))), atol=1e-5, rtol=0
    )

    splits = split_by_device(images, new=1)
    bank = build_bank(splits["train"], encoder, k=1, calibrate=False)
    options = dict(budget="2 steps", crop=32, batch_size=2, hidden=8, progress=False)
    network = finetune(splits["train"], encoder, tmp_path / "network", calibration=splits["train"], **options)
    for name, segmenter in {"bank": bank, "network": network}.items():
        assert (segmenter.channels, segmenter.classes) == (lights, CLASSES)
        out = tmp_path / f"masks of the {name}"
        table = segment(segmenter, splits["new"], out)
        assert table["stem"].tolist() == list(splits["new"]["stem"])
        again = load_folder(tmp_path / "parts", masks=out)["labelled"]
        assert list(again["stem"]) == list(splits["new"]["stem"]) and len(again) == 3
        for i in range(3):
            item = again[i]
            assert item["image"].shape == (lights, *SIZE) and item["mask"].shape == (2, *SIZE)
            probabilities = predict_image(segmenter, item["image"])
            assert torch.equal(item["mask"], to_mask(probabilities, segmenter.thresholds))
        assert len(evaluate(segmenter, splits["new"])) == 3 * 2
        if name == "bank":
            bank.save(tmp_path / "bank")
        back = Segmenter.load(tmp_path / name)
        image = native_item(splits["new"], 0)["image"]
        torch.testing.assert_close(predict_image(back, image), predict_image(segmenter, image))


def test_two_swapped_classes_score_zero():
    "Classes are compared by name: no matching of predicted to labelled classes makes a wrong answer right."
    target = torch.zeros(2, 8, 8, dtype=torch.bool)
    target[0, :4], target[1, 4:] = True, True
    right, swapped = (counts_frame(binary_counts(p, target), CLASSES) for p in (target, target.flip(0)))
    assert mean_iou(right) == 1 and mean_iou(swapped) == 0
    assert scores(swapped)["iou"].tolist() == [0, 0] and scores(swapped)["dice"].tolist() == [0, 0]


@pytest.mark.parametrize("pattern", ["{stem}_buffer{light}", "{light}/{stem}", "{light}_{stem}"])
def test_both_lights_of_a_pair_are_in_one_row_and_one_split(tmp_path, pattern):
    "Each file tells its image and its light by its pixels; after every split each image is there once, and whole."
    number = 0
    for device in range(5):
        for image in range(4):
            for light in (0, 1):
                name = pattern.format(stem=f"im{image}", light=light)
                path = tmp_path / "acme" / f"d{device}" / f"{name}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.full((8, 8), 1000 * light + number, np.uint16)
                pixels[0, 0] = 65535 - number
                tifffile.imwrite(path, pixels)
            if image < 3:
                mask = tmp_path / "acme" / f"d{device}" / "masks" / f"im{image}.png"
                write_mask(mask, np.zeros((2, 8, 8), bool), classes=CLASSES)
            number += 1
    write_json(tmp_path / "classes.json", {"classes": CLASSES, "mask_format": "bits"})
    loaded = load_folder(tmp_path, pattern=pattern)

    def numbers(part):
        found = []
        for i in range(len(part)):
            first, second = native_item(part, i)["image"][:, 1, 1].tolist()
            assert second == first + 1000, f"{part['stem'][i]} has the lights of {first} and {second}"
            found.append(first)
        return found

    assert sorted(sum(map(numbers, loaded.values()), [])) == list(range(20))
    for seed in range(3):
        splits = split_by_device(loaded, new=1, validation=1, seed=seed)
        assert sorted(sum(map(numbers, splits.values()), [])) == list(range(20))
        devices = [{n // 4 for n in numbers(part)} for part in splits.values()]
        assert sum(map(len, devices)) == 5 == len(set.union(*devices))
        rows = [i for i, d in enumerate(loaded["labelled"]["device"]) if d == "d2"]
        bank, rest = few_shot(loaded["labelled"].select(rows), 2, seed=seed)
        assert sorted(numbers(bank) + numbers(rest)) == [8, 9, 10]
    shuffled = concatenate_datasets(list(loaded.values())).shuffle(seed=1)
    assert sorted(numbers(shuffled)) == list(range(20))
