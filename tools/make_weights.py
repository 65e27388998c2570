"""The encoders that ship with the package: render the training images, pre-train, and compare with the shipped ones.

    python tools/make_weights.py render runs/weights/data
    python tools/make_weights.py decode runs/weights/data
    python tools/make_weights.py train aoi-mae-small runs/weights/data runs/weights/aoi-mae-small --budget 5m

Several processes share a run by `accelerate launch --multi_gpu --num_processes 2 tools/make_weights.py train ...`; --resume goes on
with one that was stopped. Training devices have makers of their own (`drawn_maker`), in three picture sizes, each picture with its own
drift; the five named makers, on which everything else in this project is measured, are never seen."""

import argparse
import os
from pathlib import Path

RECIPES = {  # the verb, and what it is called with
    "aoi-mae-small": ("pretrain", {"encoder": "small", "patch_size": 16, "crop": 224, "batch_size": 512, "base_lr": 7.5e-4}),
    "aoi-mae-tiny": ("pretrain", {"encoder": "tiny", "patch_size": 16, "crop": 224, "batch_size": 512, "base_lr": 1e-3}),
    "aoi-contrastive-tiny": ("pretrain_contrastive", {"start_from": "aoi-mae-tiny", "crop": 224, "precision": "bf16"}),
}
SIZES = {20: 384, 21: 512, 22: 704}  # seed of the devices -> side of their pictures


def drifted(device: int, image: int):
    "Another drift in each picture, of each kind."
    import numpy as np

    from aoi_ssl.core import step_seed
    from aoi_ssl.synthetic import Drift

    return Drift.draw(0, 1, np.random.default_rng(step_seed(device, 8, image)))


def undrifted(device: int, image: int):
    "Of the drift of a picture only what moves its patches, so that patch and patch can be compared."
    from dataclasses import replace

    return replace(drifted(device, image), light=0, focus=0, material=0)


def render(data: Path, workers: int, devices: int, images: int) -> None:
    "For each picture size a folder of drifted pictures, and one of their undrifted twins."
    from aoi_ssl.synthetic import render_folder

    for part, drift in {"images": drifted, "twins": undrifted}.items():
        for seed, size in SIZES.items():
            render_folder(data / part / f"size{size}", devices=0, new_devices=0, pretrain_devices=devices, images=images, calibration=0,
                          size=size, seed=seed, drift=drift, makers="drawn", workers=workers, progress=True)  # fmt: skip


def images_of(data: Path, part: str):
    "All pictures of a part, as one dataset."
    from datasets import concatenate_datasets

    from aoi_ssl.data import load_folder

    return concatenate_datasets([load_folder(folder)["pretrain"] for folder in sorted((data / part).glob("size*"))])


def decode(data: Path) -> None:
    "Decode the pictures once, for all runs that follow."
    from aoi_ssl.crops import store_images

    for part in ("images", "twins"):
        print(store_images(images_of(data, part), data / "crops" / part, cell=224))


def train(name: str, data: Path, out: Path, budget: str, seed: int, resume: bool) -> None:
    "Pre-train one encoder, by the recipe of its name."
    from accelerate import PartialState

    import aoi_ssl
    from aoi_ssl.augment import Augment
    from aoi_ssl.crops import CropStore

    decoded = lambda part: CropStore(data / "crops" / part)
    verb, options = RECIPES[name]
    if verb == "pretrain_contrastive":
        options = options | {"twins": decoded("twins")}
    change = Augment(contrast=0.5, gamma=0.5, binary=0.05)
    options = options | {"crops": decoded("images"), "augment": change, "budget": budget, "seed": seed, "resume": resume}
    result = getattr(aoi_ssl, verb)(images_of(data, "images"), out, overwrite=True, **options)
    history = result.history
    if PartialState().is_main_process:
        print(f"{name}: {len(history)} steps, loss {history.loss.tail(100).mean():.4f}, {history.seconds.iloc[-1]:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("render", help="the training images")
    verb.add_argument("data", type=Path)
    verb.add_argument("--workers", type=int, default=os.cpu_count())
    verb.add_argument("--devices", type=int, default=100, help="of each picture size")
    verb.add_argument("--images", type=int, default=14, help="of each device")
    verb = verbs.add_parser("decode", help="decode them once")
    verb.add_argument("data", type=Path)
    verb = verbs.add_parser("train", help="pre-train one encoder")
    verb.add_argument("name", choices=RECIPES)
    verb.add_argument("data", type=Path)
    verb.add_argument("out", type=Path)
    verb.add_argument("--budget", default="5m")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    options = vars(parser.parse_args())
    {"render": render, "decode": decode, "train": train}[options.pop("verb")](**options)


if __name__ == "__main__":
    main()
