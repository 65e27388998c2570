"""The encoders that ship, against raw pixels, a random encoder and each other, on new devices and on boards.

    python tools/weights_eval.py                                # validation devices, and deeppcb where it is
    python tools/weights_eval.py --ship aoi-mae-small runs/new  # replace the shipped weights, if the new ones are better

Three labelled images of each device in a bank, mIoU on its others, as they were and drifted. Thresholds and k come from the bank."""

import argparse
import shutil
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOARDS = ROOT.parent / "shared" / "data" / "deeppcb"
DEFECTS = ["open", "short", "mousebite", "spur", "copper", "pinhole"]


def encoders(names: list[str]) -> dict:
    "Those by name or folder, and the two that have learned nothing."
    from aoi_ssl.encoder import Encoder, PixelEncoder, ViTEncoder

    found = {name: Encoder.from_pretrained(name) for name in names}
    first = next(iter(found.values()))
    same = {"mean": first.mean, "std": first.std}
    return found | {"raw pixels": PixelEncoder(**same), "random": ViTEncoder("small", **same)}


def compare(names: list[str], work: Path, *, devices: int, seed: int, boards: bool):
    "One table for rendered devices, one for boards if they are there."
    from aoi_ssl import benchmark
    from aoi_ssl.data import load_folder

    methods = {"paper": {"method": "paper"}, "aligned": {"method": "aligned"}, "aligned, by variance": benchmark.VARIANCE}
    data = benchmark.arena(work / "arena", devices=devices, images=6, seed=seed, drifts=(0.0, 0.5, 1.0), workers=2)
    counts = benchmark.few_shot_counts(encoders(names), methods, data, cache=work / "counts", progress=True)
    tables = [benchmark.few_shot_table(counts)]
    if boards and BOARDS.is_dir():
        whole = load_folder(BOARDS, classes=DEFECTS)["labelled"]
        few = {name: methods[name] for name in ("paper", "aligned")}
        options = {"labels": 10, "tests": 8, "cache": work / "counts", "progress": True}
        counts = benchmark.few_shot_counts(encoders(names), few, {"boards": whole}, **options)
        tables.append(benchmark.few_shot_table(counts))
    return tables


def ship(name: str, run: Path, work: Path, *, devices: int, seed: int) -> None:
    "Pack a run and put it in the place of the shipped encoder, if it segments the validation devices better under drift."
    from aoi_ssl.pretrain import load_pretrained
    from aoi_ssl.weights import SHIPPED

    packed, target = work / "packed" / name, SHIPPED / name
    load_pretrained(run).save(packed, packed=True, overwrite=True)
    if target.exists():
        table, *_ = compare([str(packed), name], work, devices=devices, seed=seed, boards=False)
        means = table.xs("aligned", level="method")[["new devices", "drift 0.5", "drift 1"]].mean(axis=1)
        print(table.round(3).to_string())
        if not means[str(packed)] > means[name]:
            raise SystemExit(f"{run} has a mean of {means[str(packed)]:.3f}, the shipped {name} {means[name]:.3f}: nothing was replaced.")
    target.mkdir(parents=True, exist_ok=True)
    for file in packed.glob("[!.]*"):
        shutil.copyfile(file, target / file.name)
    print(f"{target} is new. Bring its README.md up to date.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ship", nargs=2, metavar=("NAME", "RUN"), help="replace these weights by those of a run")
    parser.add_argument("--devices", type=int, default=4, help="rendered devices")
    parser.add_argument("--seed", type=int, default=30, help="of the devices: 30 to choose by, 40 to report")
    scratch = Path(tempfile.gettempdir()) / "aoi_weights"
    parser.add_argument("--work", type=Path, default=scratch, help="pictures, and counts of an unfinished run")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.ship:
        ship(args.ship[0], Path(args.ship[1]), args.work, devices=args.devices, seed=args.seed)
        return
    from aoi_ssl.weights import shipped_encoders

    for table in compare(list(shipped_encoders()), args.work, devices=args.devices, seed=args.seed, boards=True):
        print(table.round(3).to_string(), end="\n\n")


if __name__ == "__main__":
    main()
