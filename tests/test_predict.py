import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from aoi_ssl import predict
from aoi_ssl.core import AoiError, write_json
from aoi_ssl.data import load_folder
from aoi_ssl.masks import read_mask, write_mask
from aoi_ssl.metrics import binary_counts, mean_iou, scores
from aoi_ssl.predict import (
    Segmenter,
    calibrate,
    evaluate,
    load_segmenter,
    predict_image,
    segment,
    to_mask,
)

CLASSES = ["wire", "epoxy"]


class Bright(Segmenter):
    "Light 0 is the probability of wire, light 1 that of epoxy."

    kind = "test-bright"

    def __init__(self, classes=CLASSES, channels=2, gain=1.0):
        super().__init__(classes, channels)
        self.gain = gain
        self.register_buffer("weight", torch.ones(1))

    def predict(self, images):
        assert images.shape[1] == self.channels and not torch.is_grad_enabled()
        return (self.gain * images[:, : len(self.classes)]).clamp(0, 1)

    def _save(self, folder):
        torch.save(self.weight, folder / "weight.pt")
        return {"gain": self.gain}

    @classmethod
    def _load(cls, folder, manifest):
        torch.load(folder / "weight.pt")
        return cls(manifest["classes"], manifest["channels"], manifest["gain"])


def make(root, *, labelled, epoxy=True, lights=2, classes=CLASSES, size=(40, 50)):
    "Wire pixels have 160 under light 0 and others 60; epoxy has 220 and others 110 under light 1; ../d1 and ../d2."
    rng = np.random.default_rng(0)
    for i, is_labelled in enumerate(labelled):
        stem = f"acme/d{i % 2 + 1}/im{i}"
        mask = np.zeros((len(classes), *size), bool)
        mask[0, 10 + i : 14 + i] = True
        if len(classes) > 1:
            mask[1, 20:30, 5:40] = epoxy
        (root / stem).parent.mkdir(parents=True, exist_ok=True)
        for light in range(lights):
            plane = mask[min(light, len(classes) - 1)]
            pixels = np.where(plane, (160, 220)[light % 2], (60, 110)[light % 2]) + rng.integers(-9, 10, size)
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"{stem}_buffer{light}.png")
        if is_labelled:
            write_mask(root / f"{stem}.png", mask, classes=classes, mask_format="bits")
    write_json(root / "classes.json", {"classes": classes, "mask_format": "bits"})
    return load_folder(root)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make(tmp_path_factory.mktemp("parts"), labelled=[True] * 4 + [False] * 2)


def test_protocol_is_abstract():
    with pytest.raises(TypeError, match="predict"):
        Segmenter(CLASSES, 2)
    assert Bright().thresholds.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 200), (2, 65, 40)])
def test_any_shape_passes(shape):
    "Also one that is not square and smaller than a patch."
    image = torch.rand(shape)
    assert torch.allclose(predict_image(Bright(), image, size=32, overlap=8), image, atol=1e-6)


def test_image_with_other_channels():
    with pytest.raises(AoiError, match=r"\(3, 40, 40\).*2 channels"):
        predict_image(Bright(), torch.rand(3, 40, 40))
    with pytest.raises(AoiError, match="C, H, W"):
        predict_image(Bright(), torch.rand(1, 2, 40, 40))


def test_logits_from_predict_are_refused():
    class Logits(Bright):
        kind = "test-logits"

        def predict(self, images):
            return torch.logit(images, 1e-6)

    with pytest.raises(AoiError, match="sigmoid"):
        predict_image(Logits(), torch.rand(2, 8, 8))


def test_training_mode_is_left_as_it_was():
    seen = []

    class Watch(Bright):
        kind = "test-watch"

        def predict(self, images):
            seen.append(self.training)
            return super().predict(images)

    for training in (True, False):
        segmenter = Watch().train(training)
        predict_image(segmenter, torch.rand(2, 8, 8))
        assert segmenter.training is training
    assert seen == [False, False]


def test_training_mode_comes_back_after_a_failure():
    class Fails(Bright):
        kind = "test-fails"

        def predict(self, images):
            raise RuntimeError("out of memory")

    segmenter = Fails().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_image(segmenter, torch.rand(2, 8, 8))
    assert segmenter.training


def test_mask_is_strictly_above_the_threshold():
    p = torch.tensor([0.2, 0.5, 1.0]).expand(2, 1, 3)
    assert to_mask(p, torch.tensor([0.5, 1.0])).int().tolist() == [[[0, 0, 1]], [[0, 0, 0]]]


def test_calibrate_equals_brute_force_over_whole_images(parts):
    segmenter, ds = Bright(gain=1.2), parts["labelled"]
    curve = segmenter.calibrate(ds, size=32, overlap=8)
    assert list(curve.columns[:2]) == ["class", "threshold"] and len(curve) == 2 * 49
    for t in (0.3, 0.5, 0.7):
        counts = sum(binary_counts(1.2 * ds[i]["image"] > t, ds[i]["mask"], ds[i]["ignore"]) for i in range(len(ds)))
        rows = curve[curve["threshold"] == t].set_index("class").loc[CLASSES, ["tp", "fp", "fn"]]
        assert rows.values.tolist() == counts.tolist()
    best = curve.loc[curve.groupby("class")["iou"].idxmax()].set_index("class")["iou"]
    assert (best == 1).all()  # the two classes are separable, but not at 0.5
    assert 60 * 1.2 / 255 < segmenter.thresholds[0] < 160 * 1.2 / 255
    assert 110 * 1.2 / 255 < segmenter.thresholds[1] < 1
    assert mean_iou(evaluate(segmenter, ds)) == 1
    assert mean_iou(evaluate(Bright(gain=1.2), ds)) < 1


def test_each_image_is_predicted_once(parts, monkeypatch):
    calls, real = [], predict.predict_image
    monkeypatch.setattr(predict, "predict_image", lambda *a, **k: calls.append(1) or real(*a, **k))
    calibrate(Bright(), parts["labelled"])
    assert len(calls) == 4


def test_ignored_pixels_are_not_calibrated_on(parts, monkeypatch):
    real = predict.native_item

    def half_ignored(*args, **options):
        item = real(*args, **options)
        left = np.zeros_like(item["mask"])
        left[..., :25] = True
        return item | {"mask": item["mask"] ^ left, "ignore": left}  # wrong labels where they are ignored

    clean = evaluate(Bright(gain=1.2), parts["labelled"])
    monkeypatch.setattr(predict, "native_item", half_ignored)
    segmenter = Bright(gain=1.2)
    segmenter.calibrate(parts["labelled"])
    dirty = evaluate(segmenter, parts["labelled"])
    assert dirty["fn"].sum() == dirty["fp"].sum() == 0
    assert dirty[["tp", "fn"]].sum().sum() < clean[["tp", "fn"]].sum().sum()


def test_class_that_calibration_lacks_is_never_predicted(tmp_path):
    ds = make(tmp_path, labelled=[True, True], epoxy=False)["labelled"]
    segmenter = Bright()
    with pytest.warns(UserWarning, match="epoxy has no labelled pixel.*never be predicted"):
        segmenter.calibrate(ds)
    assert segmenter.thresholds[1] == 1.0
    assert not to_mask(predict_image(segmenter, torch.ones(2, 8, 8)), segmenter.thresholds)[1].any()


def test_class_that_is_never_hit_is_named(parts):
    segmenter = Bright(gain=0.01)
    with pytest.warns(UserWarning, match="is hit at no threshold.*never be predicted") as caught:
        segmenter.calibrate(parts["labelled"])
    assert [str(w.message).split()[0] for w in caught] == CLASSES and segmenter.thresholds.tolist() == [1, 1]


def test_the_devices_of_two_makers_are_counted_apart(parts):
    ds = parts["labelled"]
    same = ds.remove_columns(["manufacturer", "device"])
    same = same.add_column("manufacturer", list(ds["device"])).add_column("device", ["7"] * len(ds))
    table = scores(evaluate(Bright(gain=1.2), same), by=("device", "class"))
    plain = scores(evaluate(Bright(gain=1.2), ds), by=("device", "class"))
    assert table["device"].tolist() == [f"{device}/7" for device in plain["device"]] and table["iou"].tolist() == plain["iou"].tolist()


def test_evaluate_makes_a_row_per_image_and_class(parts):
    frame = evaluate(Bright(), parts["labelled"], method="bright", labels=3)
    assert list(frame.columns) == ["method", "labels", "stem", "device", "class", "tp", "fp", "fn"]
    assert len(frame) == 8 and set(frame["device"]) == {"d1", "d2"} and set(frame["method"]) == {"bright"}
    assert frame["stem"].tolist()[::2] == [s for s in parts["labelled"]["stem"]]
    ds = parts["labelled"]
    counts = binary_counts(ds[2]["image"] > 0.5, ds[2]["mask"])
    assert frame[frame["stem"] == ds[2]["stem"]][["tp", "fp", "fn"]].values.tolist() == counts.tolist()
    assert len(scores(frame, by=("device", "class"))) == 4


def test_unlabelled_images_are_skipped_or_named(tmp_path):
    from datasets import concatenate_datasets

    parts = make(tmp_path, labelled=[True, False, True])
    both = concatenate_datasets([parts["labelled"], parts["unlabelled"]])
    assert evaluate(Bright(), both)["stem"].nunique() == 2
    for verb in (evaluate, calibrate):
        with pytest.raises(AoiError, match="None of the 1 images has a label"):
            verb(Bright(), parts["unlabelled"])


def test_dataset_must_fit_the_segmenter(parts, tmp_path):
    with pytest.raises(AoiError, match="in this order"):
        evaluate(Bright(classes=CLASSES[::-1]), parts["labelled"])
    with pytest.raises(AoiError, match="ball"):
        calibrate(Bright(classes=["wire", "ball"]), parts["labelled"])
    one_light = make(tmp_path / "one", labelled=[True], lights=1)["labelled"]
    for call in (evaluate, calibrate, lambda s, d: segment(s, d, tmp_path / "out")):
        with pytest.raises(AoiError, match=r"1 channels.*expects 2"):
            call(Bright(), one_light)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mask_format", ["bits", "classes", "npy"])
def test_segment_writes_masks_that_are_read_again(parts, tmp_path, mask_format):
    ds, segmenter = parts["labelled"], Bright()
    table = segment(segmenter, ds, tmp_path / "out", mask_format=mask_format)
    said = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert said == {"classes": CLASSES, "mask_format": mask_format}
    assert table["stem"].tolist() == list(ds["stem"]) and (table["seconds"] > 0).all()
    suffix = ".npy" if mask_format == "npy" else ".png"
    for i, row in table.iterrows():
        assert len(list((tmp_path / "out").glob(row["file"]))) == (2 if mask_format == "classes" else 1)
        want = ds[i]["image"] > 0.5
        got, ignore = read_mask(tmp_path / "out" / (row["stem"] + suffix), classes=CLASSES, mask_format=mask_format)
        assert torch.equal(got, want) and not ignore.any()
        assert row[CLASSES].tolist() == pytest.approx(want.float().mean((1, 2)).tolist())


def test_segment_never_reads_labels(parts, tmp_path, monkeypatch):
    real, asked = predict.native_item, []
    monkeypatch.setattr(predict, "native_item", lambda *a, labels=True: asked.append(labels) or real(*a, labels=labels))
    assert len(segment(Bright(), parts["unlabelled"], tmp_path / "a")) == 2
    assert len(segment(Bright(), parts["labelled"], tmp_path / "b")) == 4
    assert asked == [False] * 6


def test_segment_says_what_novelty_says(parts, tmp_path):
    segmenter = Bright()
    segmenter.novelty = SimpleNamespace(verdict=lambda image: {"new": image.max().item(), "y": 3, "trusted": False, "reason": "odd"})
    table = segment(segmenter, parts["labelled"], tmp_path / "out")
    assert table.columns[-3:].tolist() == ["new", "trusted", "reason"] and table["new"].between(0, 1).all()
    assert "new" not in segment(Bright(), parts["labelled"], tmp_path / "plain")


def test_segment_can_write_probabilities(parts, tmp_path):
    segment(Bright(), parts["labelled"], tmp_path / "out", probabilities=True)
    item = parts["labelled"][1]
    stored = np.load(tmp_path / "out" / f"{item['stem']}.npz")["probabilities"]
    assert stored.dtype == np.float16 and np.allclose(stored, item["image"], atol=1e-3)


def test_segment_leaves_a_folder_with_files_alone(parts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(AoiError, match="not empty"):
        segment(Bright(), parts["labelled"], tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"
    with pytest.raises(AoiError, match="out"):  # foreign files are never replaced
        segment(Bright(), parts["labelled"], tmp_path / "out", overwrite=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(AoiError, match="mask_format"):
        segment(Bright(), parts["labelled"], tmp_path / "new", mask_format="gif")


def test_segment_replaces_its_own_masks_when_told(parts, tmp_path):
    segment(Bright(), parts["labelled"], tmp_path / "out")
    with pytest.raises(AoiError, match="not empty"):
        segment(Bright(), parts["labelled"], tmp_path / "out")
    segment(Bright(), parts["unlabelled"], tmp_path / "out", overwrite=True)
    assert len(list((tmp_path / "out").rglob("*.png"))) == len(parts["unlabelled"])


@pytest.fixture
def never_predicts(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("predicted before the output was checked")

    monkeypatch.setattr(predict, "predict_image", fail)


def everything(root):
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "out, how",
    [
        (".", "contains"),
        ("acme", "contains"),
        ("acme/d1", "is"),
        ("acme/d1/new", "lies in"),
        ("acme/x/../d1", "is"),
        ("drawn/acme/d1", "is"),
        ("drawn", "contains"),
        ("drawn/acme/d1/sub/dir", "lies in"),
    ],
)
def test_segment_never_writes_among_the_images_or_masks(tmp_path, never_predicts, out, how, overwrite):
    make(tmp_path, labelled=[False, False])
    make(tmp_path / "drawn", labelled=[True, True])
    for image in (tmp_path / "drawn").rglob("*_buffer?.png"):
        image.unlink()
    images, before = load_folder(tmp_path, masks=tmp_path / "drawn")["labelled"], everything(tmp_path)
    with pytest.raises(AoiError, match=rf"{how} .*, where images or masks of the dataset lie") as caught:
        segment(Bright(), images, tmp_path / out, overwrite=overwrite)
    assert str(tmp_path / out) in str(caught.value)
    assert everything(tmp_path) == before


def test_segment_sees_through_links(tmp_path, never_predicts):
    images = make(tmp_path / "real", labelled=[True, True])["labelled"]
    (tmp_path / "link").symlink_to(tmp_path / "real" / "acme", target_is_directory=True)
    with pytest.raises(AoiError, match="contains"):
        segment(Bright(), images, tmp_path / "link", overwrite=True)
    linked = load_folder(tmp_path / "real")["labelled"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data").symlink_to(tmp_path / "real", target_is_directory=True)
    linked = load_folder(tmp_path / "in" / "data")["labelled"]
    with pytest.raises(AoiError, match="contains"):
        segment(Bright(), linked, tmp_path / "in", overwrite=True)


def test_segment_may_write_beside_the_images(tmp_path):
    images = make(tmp_path / "data", labelled=[True, True])["labelled"]
    for out in (tmp_path / "data" / "predicted", tmp_path / "data2", tmp_path / "data" / "acme" / "d12"):
        assert len(segment(Bright(), images, out)) == 2


def test_a_format_too_small_for_the_classes_is_refused_at_once(parts, tmp_path, never_predicts):
    with pytest.raises(AoiError, match=r"'binary' holds 1 class at most; .* has 2 \(wire, epoxy\)\. Use .*'bits'"):
        segment(Bright(), parts["labelled"], tmp_path / "out", mask_format="binary")
    many = Bright(classes=[f"c{i}" for i in range(17)])
    with pytest.raises(AoiError, match="'bits' holds 16 classes at most.*'npy'"):
        segment(many, parts["labelled"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_overlap_stops_an_index_map_and_leaves_nothing(parts, tmp_path):
    with pytest.raises(AoiError, match="several classes.*mask_format='bits'"):
        segment(Bright(gain=3.0), parts["labelled"], tmp_path / "out", mask_format="index")
    assert list(tmp_path.iterdir()) == []


def test_segment_broken_off_leaves_nothing(parts, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "write_mask", stop)
    with pytest.raises(KeyboardInterrupt):
        segment(Bright(), parts["labelled"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_save_and_load(parts, tmp_path):
    segmenter = Bright(gain=0.9)
    segmenter.calibrate(parts["labelled"])
    segmenter.save(tmp_path / "s")
    for back in (load_segmenter(tmp_path / "s"), Segmenter.load(str(tmp_path / "s")), Bright.load(tmp_path / "s")):
        assert type(back) is Bright and back.gain == 0.9 and not back.training
        assert back.classes == CLASSES and torch.equal(back.thresholds, segmenter.thresholds)
        pd.testing.assert_frame_equal(evaluate(back, parts["labelled"]), evaluate(segmenter, parts["labelled"]))
    with pytest.raises(AoiError, match="not empty"):
        segmenter.save(tmp_path / "s")


def test_a_full_disk_while_saving_keeps_the_old_one(tmp_path, monkeypatch):
    Bright(gain=0.5).save(tmp_path / "s")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        Bright(gain=0.7).save(tmp_path / "s", overwrite=True)
    assert load_segmenter(tmp_path / "s").gain == 0.5 and [p.name for p in tmp_path.iterdir()] == ["s"]


def test_loading_what_is_no_segmenter(tmp_path):
    with pytest.raises(AoiError, match="no segmenter.json"):
        load_segmenter(tmp_path / "nowhere")
    write_json(tmp_path / "encoder" / "encoder.json", {})
    with pytest.raises(AoiError, match="It holds an encoder"):
        load_segmenter(tmp_path / "encoder")
    good = {"kind": "test-bright", "classes": CLASSES, "channels": 2, "thresholds": [0.5, 0.5], "gain": 1}
    for change, message in [
        ({"kind": "quantum"}, "quantum.*known are.*bank.*upernet"),
        ({"thresholds": [0.5]}, r"thresholds \[0.5\] and the classes.*threshold for each class, a number from 0 to 1"),
    ]:
        write_json(tmp_path / "s" / "segmenter.json", good | change)
        with pytest.raises(AoiError, match=message):
            load_segmenter(tmp_path / "s")
    write_json(tmp_path / "s" / "segmenter.json", {"classes": CLASSES})
    with pytest.raises(AoiError, match="missing.*kind"):
        load_segmenter(tmp_path / "s")


def test_loading_another_kind_than_expected(tmp_path):
    class Other(Bright):
        kind = "test-other"

    Bright().save(tmp_path / "s")
    with pytest.raises(AoiError, match="test-bright.*no Other"):
        Other.load(tmp_path / "s")
