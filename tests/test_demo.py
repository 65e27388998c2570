"The main job from end to end, at a small size; what it writes, and what it refuses."

import importlib
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from datasets import DatasetDict, concatenate_datasets

from aoi_ssl import demo as demo_verb
from aoi_ssl.core import AoiError
from aoi_ssl.data import load_folder
from aoi_ssl.demo import (
    MAE_BANK,
    MAE_UPERNET,
    PAPER_BANK,
    PIXEL_BANK,
    RANDOM_BANK,
    SCRATCH_UPERNET,
    encoder_start,
    open_run,
    plan,
    roles,
    verdict,
)
from aoi_ssl.encoder import Encoder
from aoi_ssl.predict import load_segmenter

QUICK = {"encoder": "nano", "pretrain_budget": "2 steps", "finetune_budget": "2 steps", "labels": 2, "quiet": True}
DEEPPCB = Path(__file__).parents[2] / "shared" / "data" / "deeppcb"
METHODS = {MAE_BANK, PIXEL_BANK, RANDOM_BANK, PAPER_BANK, MAE_UPERNET, SCRATCH_UPERNET}


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    return out, demo_verb(folder, out, **QUICK)


def test_a_run_leaves_all_that_it_promises(run):
    out, table = run
    assert set(table.index) == METHODS and table.mIoU.between(0, 1).all()
    assert Encoder.from_pretrained(out / "encoder").channels == 2
    [bank] = (out / "bank").iterdir()
    for segmenter in (bank, out / "upernet-mae", out / "upernet-from-scratch"):
        assert load_segmenter(segmenter).classes == ["wire", "ball", "wedge", "epoxy"]
    figures, counts = pd.read_csv(out / "figures.csv"), pd.read_csv(out / "counts.csv")
    assert set(figures["method"]) == METHODS and len(counts) == len(METHODS) * 2 * 4  # test images, classes
    assert len(list((out / "masks" / "retrieval-mae").rglob("*.png"))) == 2
    assert set(json.loads((out / "run.json").read_text())) == {"settings", "seconds"}


def test_the_report_needs_nothing_but_itself(run):
    text = (run[0] / "report.html").read_text()
    assert text.count("data:image/") >= 6
    assert 'src="http' not in text and 'href="http' not in text and "<script src" not in text


def test_a_finished_run_is_not_touched(run, folder):
    before = (run[0] / "report.html").read_bytes()
    with pytest.raises(AoiError, match="not empty"):
        demo_verb(folder, run[0], **QUICK)
    assert (run[0] / "report.html").read_bytes() == before


def test_a_broken_run_goes_on_from_what_is_there(run, folder, tmp_path, monkeypatch):
    out = tmp_path / "again"
    shutil.copytree(run[0], out)
    for path in ("report.html", "upernet-from-scratch"):
        shutil.rmtree(out / path) if (out / path).is_dir() else (out / path).unlink()
    kept = (out / "encoder" / "model.safetensors").stat().st_mtime_ns
    table = demo_verb(folder, out, **QUICK)
    assert (out / "encoder" / "model.safetensors").stat().st_mtime_ns == kept
    pd.testing.assert_frame_equal(table, run[1])


def test_an_unfinished_run_with_other_settings_is_another_run(tmp_path):
    open_run(tmp_path / "a", {"seed": 0})
    with pytest.raises(AoiError, match="seed: 0 then, 1 now"):
        open_run(tmp_path / "a", {"seed": 1})
    open_run(tmp_path / "a", {"seed": 1}, overwrite=True)


def test_a_folder_with_errors_ends_the_job_before_training(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    next(broken.rglob("*_buffer1.png")).unlink()
    with pytest.raises(AoiError, match="1 error"):
        demo_verb(broken, tmp_path / "run", **QUICK)
    assert not (tmp_path / "run" / "encoder").exists()


def test_the_rendered_devices_are_the_default(tmp_path, monkeypatch):
    small = {"devices": 2, "pretrain_devices": 1, "new_devices": 1, "images": 3, "calibration": 1}
    monkeypatch.setattr(importlib.import_module("aoi_ssl.demo"), "DEVICES", small)
    table = demo_verb(out=tmp_path / "run", size=128, **QUICK)
    assert set(table.index) == METHODS
    assert len(list((tmp_path / "run" / "data").rglob("*_buffer0.png"))) == 4 * 3


def test_the_output_and_the_images_keep_apart(folder, tmp_path):
    for out in (folder, folder.parent, folder / "run"):
        with pytest.raises(AoiError, match="one another"):
            demo_verb(folder, out, overwrite=True, **QUICK)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(AoiError, match="did not write|not empty"):
        open_run(tmp_path, {"seed": 0}, overwrite=True)
    assert (tmp_path / "thesis.tex").exists() and len(list(folder.rglob("*_buffer0.png"))) == 20


def test_two_makers_may_use_one_name_for_their_devices(folder):
    splits = load_folder(folder)
    pooled = concatenate_datasets([s for s in splits.values() if all(s["labelled"])])
    same = pooled.remove_columns("device").add_column("device", ["d"] * len(pooled))
    parts = plan(DatasetDict({"labelled": same}), labels=2)
    assert len(parts.bank) == 1 and "/" in next(iter(parts.bank))


def test_meta_csv_may_not_have_a_device_both_ways(folder):
    splits = load_folder(folder)
    with pytest.raises(AoiError, match="both as new"):
        roles(DatasetDict({"train": splits["new"], "new": splits["new"]}))


def test_images_that_have_no_part_are_named(folder):
    splits = load_folder(folder)
    parts = plan(DatasetDict({**splits, "archive": splits["pretrain"]}), labels=2)
    assert any("'archive' are not used" in note for note in parts.notes)


@pytest.mark.skipif(not DEEPPCB.exists(), reason="the DeepPCB images are not beside the project")
def test_a_plan_for_real_boards():
    parts = plan(load_folder(DEEPPCB), tests=6)
    assert len(parts.test) == 2 and not set(parts.test) & set(parts.train["device"])
    assert any("judged on 3 of" in note for note in parts.notes)


def test_no_image_and_no_new_device_is_in_two_roles(folder):
    splits = load_folder(folder)
    pooled = DatasetDict({"labelled": concatenate_datasets([s for s in splits.values() if all(s["labelled"])])})
    for given in (splits, pooled):
        parts = plan(given, labels=2)
        seen = [*parts.pretrain["stem"], *parts.train["stem"]]
        tested = [s for d in parts.test.values() for s in d["stem"]]
        bank = [s for d in parts.bank.values() for s in d["stem"]]
        assert not set(tested) & {*seen, *bank, *parts.calibration["stem"]} and tested and bank
        assert not set(parts.pretrain["device"]) & set(parts.test)
        assert not set(parts.calibration["stem"]) & set(parts.train["stem"])


def test_too_little_to_work_with_is_said(folder):
    splits = load_folder(folder)
    with pytest.raises(AoiError, match="(?i)label"):
        roles(DatasetDict({"unlabelled": splits["pretrain"]}))
    with pytest.raises(AoiError):
        roles(DatasetDict({"labelled": splits["new"]}))  # one device
    with pytest.raises(AoiError, match="(?i)label"):
        plan(splits, labels=4)  # no image left to test on


def test_the_verdict_says_so_when_pretraining_lost():
    means = pd.Series(dict.fromkeys(METHODS, 0.3)) + pd.Series({MAE_BANK: -0.1, MAE_UPERNET: 0.1}).reindex(
        METHODS, fill_value=0
    )
    text = " ".join(verdict(means))
    assert "Pre-training lost to raw pixels" in text and "beat starting from scratch" in text


def test_what_the_encoder_of_a_run_means():
    assert encoder_start("nano", 2) == (None, "nano")
    assert encoder_start("aoi-mae-tiny", 2) == ("aoi-mae-tiny", "tiny")
    assert encoder_start("aoi-mae-small", 1) == (None, "small")  # one light: nothing to go on from
