"""The encoders that ship, against raw pixels, a random encoder and each other, on new devices and on boards.

    python tools/weights_eval.py                                # devices to report on, and deeppcb where it is
    python tools/weights_eval.py --ship aoi-mae-small runs/new  # replace the shipped weights, if the new ones are better

Three labelled images of each device (five of a board) in a bank, mIoU on others, as they were and drifted. Thresholds and k come from
the bank. Counts are kept; --fresh counts anew. About half an hour of one core. Weights to ship are chosen on devices of another seed."""

import argparse
import shutil
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOARDS = ROOT.parent / "shared" / "data" / "deeppcb"
DEFECTS = ["open", "short", "mousebite", "spur", "copper", "pinhole"]
RESULTS = ROOT / "nbs" / "experiments" / "results" / "weights"
CHOOSE, REPORT = 30, 40  # seeds of rendered devices
METHODS = {"paper": {"method": "paper"}, "aligned": {"method": "aligned"}}


def encoders(names: list[str]) -> dict:
    "Those by name or folder, and the two that have learned nothing."
    from aoi_ssl.benchmark import rivals
    from aoi_ssl.encoder import Encoder

    found = {name: Encoder.from_pretrained(name) for name in names}
    return found | rivals(Encoder.from_pretrained("aoi-mae-small"))


def counts_of(names: list[str], data: dict, **options):
    "Counts of all encoders by both methods. What has learned nothing may also whiten as suits it best."
    import pandas as pd

    from aoi_ssl import benchmark

    found = encoders(names)
    untaught, best = {n: e for n, e in found.items() if n not in names}, {"aligned, by variance": benchmark.VARIANCE}
    jobs = (found, METHODS), (untaught, best)
    return pd.concat([benchmark.few_shot_counts(*job, data, **options) for job in jobs], ignore_index=True)


def on_devices(names: list[str], work: Path, *, devices: int, seed: int):
    "Counts on rendered devices as they were, and drifted: two images of each."
    from aoi_ssl.benchmark import arena

    data = arena(work / "arena", devices=devices, images=5, size=384, seed=seed, drifts=(0.0, 0.5, 1.0), workers=2)
    return counts_of(names, data, cache=work / "counts")


def on_boards(names: list[str], work: Path, *, boards: int):
    "Counts on the first boards of DeepPCB: four images of each, five others labelled."
    from aoi_ssl.benchmark import by_device
    from aoi_ssl.data import load_folder

    whole = load_folder(BOARDS, classes=DEFECTS)["labelled"]
    devices = list(by_device(whole))[:boards]
    return counts_of(names, {"boards": whole}, devices=devices, labels=5, tests=4, cache=work / "counts")


def finished(run: Path):
    "What a run has written, whatever its objective."
    import pandas as pd

    from aoi_ssl.contrastive import PretrainedContrastive
    from aoi_ssl.encoder import Encoder
    from aoi_ssl.pretrain import holds_autoencoder, load_pretrained

    if holds_autoencoder(run):
        return load_pretrained(run)
    return PretrainedContrastive(Encoder.from_pretrained(run), pd.read_csv(run / "history.csv"))


def ship(name: str, run: Path, work: Path, *, devices: int) -> None:
    "Pack a run and put it in the place of the shipped encoder, if it segments the validation devices better under drift."
    from aoi_ssl.benchmark import few_shot_table
    from aoi_ssl.weights import SHIPPED

    packed, target = work / "packed" / name, SHIPPED / name
    finished(run).save(packed, packed=True, overwrite=True)
    if target.exists():
        table = few_shot_table(on_devices([str(packed), name], work, devices=devices, seed=CHOOSE))
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
    parser.add_argument("--boards", type=int, default=2, help="of DeepPCB")
    parser.add_argument("--fresh", action="store_true", help="forget the counts that are kept")
    scratch = Path(tempfile.gettempdir()) / "aoi_weights"
    parser.add_argument("--work", type=Path, default=scratch, help="pictures, and counts of an unfinished run")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.ship:
        ship(args.ship[0], Path(args.ship[1]), args.work, devices=args.devices)
        return
    from aoi_ssl.benchmark import few_shot_table, kept_frame
    from aoi_ssl.weights import shipped_encoders

    names, kept = list(shipped_encoders()), {part: RESULTS / f"{part}.csv" for part in ("devices", "boards")}
    if args.fresh:
        shutil.rmtree(args.work / "counts", ignore_errors=True)
        for path in kept.values():
            path.unlink(missing_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    counts = [kept_frame(kept["devices"], lambda: on_devices(names, args.work, devices=args.devices, seed=REPORT))]
    if kept["boards"].exists() or BOARDS.is_dir():
        counts.append(kept_frame(kept["boards"], lambda: on_boards(names, args.work, boards=args.boards)))
    for part in counts:
        print(few_shot_table(part).round(3).to_string(), end="\n\n")


if __name__ == "__main__":
    main()
