"""The encoders that ship with the package: render the training images, pre-train, and compare with the shipped ones.

    python tools/make_weights.py render runs/weights/data
    python tools/make_weights.py train aoi-mae-small runs/weights/data runs/weights/aoi-mae-small --budget 5m

Training devices have makers of their own (`drawn_maker`), in three picture sizes, each picture with its own drift; the five
named makers, on which everything else in this project is measured, are never seen."""

import argparse
import os
from pathlib import Path

RECIPES = {  # what `pretrain` is called with
    "aoi-mae-small": {"encoder": "small", "patch_size": 16, "crop": 224, "batch_size": 512, "base_lr": 7.5e-4},
    "aoi-mae-tiny": {"encoder": "tiny", "patch_size": 16, "crop": 224, "batch_size": 512, "base_lr": 1e-3},
}
SIZES = {20: 384, 21: 512, 22: 704}  # seed of the devices -> side of their pictures


def render(data: Path, workers: int, devices: int, images: int) -> None:
    "One folder for each picture size."
    from aoi_ssl.synthetic import render_folder

    for seed, size in SIZES.items():
        render_folder(data / f"size{size}", devices=0, new_devices=0, pretrain_devices=devices, images=images, calibration=0,
                      size=size, seed=seed, drift=(0, 1), makers="drawn", workers=workers, progress=True)  # fmt: skip


def images_of(data: Path):
    "All training images, as one dataset."
    from datasets import concatenate_datasets

    from aoi_ssl.data import load_folder

    return concatenate_datasets([load_folder(folder)["pretrain"] for folder in sorted(data.glob("size*"))])


def decode(data: Path) -> None:
    "Decode the images once, for all runs that follow."
    from aoi_ssl.crops import store_images

    print(store_images(images_of(data), data / "crops", cell=224))


def train(name: str, data: Path, out: Path, budget: str, seed: int) -> None:
    "Pre-train one encoder, by the recipe of its name."
    from aoi_ssl.augment import Augment
    from aoi_ssl.crops import CropStore
    from aoi_ssl.pretrain import pretrain

    crops = CropStore(data / "crops") if (data / "crops").is_dir() else None
    change = Augment(contrast=0.5, gamma=0.5, binary=0.05)
    result = pretrain(images_of(data), out, crops=crops, budget=budget, augment=change, seed=seed, overwrite=True, **RECIPES[name])
    history = result.history
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
    options = vars(parser.parse_args())
    {"render": render, "decode": decode, "train": train}[options.pop("verb")](**options)


if __name__ == "__main__":
    main()
