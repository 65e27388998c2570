"""What a bank costs in use: `routing` (a bank of many devices), `lists` (against exact search), `add` (one image more, and a prediction).

Each writes a CSV into nbs/experiments/results/bench_retrieval, with its own command in the first column. Parts of a run are kept, so that
one that was broken off goes on; --fresh measures them again."""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, concatenate_datasets

from aoi_ssl import search
from aoi_ssl.benchmark import arena, by_device, kept_frame
from aoi_ssl.encoder import Encoder
from aoi_ssl.metrics import mean_iou
from aoi_ssl.predict import evaluate
from aoi_ssl.retrieval import MemoryBank, build_bank

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "experiments" / "results" / "bench_retrieval"


def judged(bank: MemoryBank, images: Dataset) -> tuple[float, float]:
    "mIoU, and processor seconds an image."
    start = time.process_time()
    counts = evaluate(bank, images)
    return mean_iou(counts), (time.process_time() - start) / len(images)


def accuracy(bank: MemoryBank, images: Dataset) -> float:
    "The share of images whose own device comes first."
    return float(np.mean([next(iter(bank.like_devices(row["image"]))) == row["device"] for row in images]))


def routes(encoder: Encoder, args: argparse.Namespace) -> pd.DataFrame:
    "Which of 4, 8 and 12 devices is found; and on the 4, what the route is worth in mIoU."
    eight = arena(args.pictures, devices=8, images=7, drifts=(0.0, 0.5, 1.0), seed=40)
    four, tables = arena(args.pictures, devices=4, images=6, drifts=(0.0, 0.5, 1.0), seed=30), []
    few = {"method": "fast", "bank_shifts": 1, "calibrate": False}  # routes go by the first grid alone
    for sets, options in (([four], {"method": "aligned"}), ([eight], few), ([eight, four], few)):
        groups = {name: by_device(concatenate_datasets([data[name] for data in sets])) for name in eight}
        make = lambda groups=groups, options=options: routes_of(groups, encoder, options)
        tables.append(kept_frame(args.cache / f"routing-{sum(map(len, groups['new devices'].values()))}.csv", make))
    return pd.concat(tables)


def routes_of(groups: dict[str, dict[str, Dataset]], encoder: Encoder, options: dict) -> pd.DataFrame:
    "One bank of all these devices; how often its route is right, and what it is worth if the bank is calibrated."
    start, rows = time.process_time(), []
    bank = build_bank(pick(groups["new devices"], 0, 3), encoder, **options)
    print(bank, f"{time.process_time() - start:.0f} s", flush=True)
    for name, parts in groups.items():
        new = pick(parts, 3, 6)
        row = {"devices": len(parts), "images": name, "keys": len(bank.keys), "judged": len(new), "route right": accuracy(bank, new)}
        if options.get("calibrate", True):
            some = pick(parts, 3, 4)
            row["mIoU, all devices"], row["s, all devices"] = judged(bank, some)
            row["mIoU, routed"], row["s, routed"] = judged(bank.using(routes=1), some)
            row["mIoU, own bank"] = own_banks(bank, parts)
        rows.append(row)
        print(row, flush=True)
    return pd.DataFrame(rows)


def pick(parts: dict[str, Dataset], first: int, last: int) -> Dataset:
    "Some images of every device."
    return concatenate_datasets([part.select(range(first, last)) for part in parts.values()])


def own_banks(bank: MemoryBank, parts: dict[str, Dataset]) -> float:
    "mIoU where each device is asked its own patches, with the k and thresholds of the whole bank."
    own = lambda part: bank.subset(device=part["device"][0], calibrate=False)
    return mean_iou(pd.concat([evaluate(own(part), part.select([3])) for part in parts.values()]))


def lists(encoder: Encoder, args: argparse.Namespace) -> pd.DataFrame:
    "The default against exact search of float32 keys, and thresholds after an image was added; three devices to choose by."
    data = arena(args.pictures, devices=4, images=6, drifts=(0.0, 0.5), seed=30)
    parts = {name: by_device(part) for name, part in data.items()}
    first = [*parts["new devices"]][:3]
    own = lambda device: lists_of({name: part[device] for name, part in parts.items()}, encoder)
    kept = lambda device: kept_frame(args.cache / f"lists-{device.replace('/', '-')}.csv", lambda: own(device))
    return pd.concat([kept(device).assign(device=device) for device in first])


def lists_of(parts: dict[str, Dataset], encoder: Encoder) -> pd.DataFrame:
    "The same for one device."
    images, most, rows = parts["new devices"], search.MOST_EXACT, []
    tests = {name: part.select([4, 5]) for name, part in parts.items()}

    def judge(way: str, bank: MemoryBank, spent: float | None = None) -> None:
        for name, some in tests.items():
            miou, seconds = judged(bank, some)
            rows.append({"images": name, "way": way, "k": bank.k, "mIoU": miou, "s": seconds if spent is None else spent})

    for name, limit in (("exact, float32", 2**40), ("lists, float16", most)):
        search.MOST_EXACT = limit
        bank = build_bank(images.select(range(3)), encoder)
        judge(name, bank)
    for patches in (16384, 4096, 2048, 0):
        start, grown = time.process_time(), bank.using()
        grown.add(images.select([3]), calibrate=False)
        if patches:
            grown.calibrate(ks=(grown.k,), betas=(grown.beta,), mixes=(grown.mix,), max_patches=patches)
        judge(f"added, thresholds from {patches} patches" if patches else "added, thresholds as before", grown, time.process_time() - start)
    return pd.DataFrame(rows)


def add(encoder: Encoder, args: argparse.Namespace) -> pd.DataFrame:
    """A bank of three images of 512 x 512 gets a fourth, thresholds are chosen anew, and a fifth is segmented.

    Two recipes, also in float32, which is what a processor without matrix instructions for bfloat16 takes."""
    images = next(iter(by_device(arena(args.pictures, devices=2, images=5, drifts=(0.0,), seed=30)["new devices"]).values()))
    ways = [(method, changes) for method in ("aligned", "fast") for changes in ({}, {"bfloat16": False})]
    return pd.concat([added(images, encoder, method, **changes) for method, changes in ways])


def added(images: Dataset, encoder: Encoder, method: str, **changes: bool) -> pd.DataFrame:
    "The same for one recipe, three times."
    bank, query, rows = build_bank(images.select(range(3)), encoder, method=method, **changes), images[4]["image"][None], []
    more = images.select([3])
    for turn in range(4):
        grown = bank.using()
        marks = [(time.perf_counter(), time.process_time())]
        for step in (lambda b=grown: b.add(more), lambda b=grown: b.predict(query)):
            step()
            marks.append((time.perf_counter(), time.process_time()))
        (add_s, add_cpu), (predict_s, predict_cpu) = np.diff(marks, axis=0)
        if turn:  # the first warms up
            named = {"method": f"{method}, float32" if changes else method, "threads": torch.get_num_threads(), "keys": len(grown.keys)}
            rows.append(named | {"add_s": add_s, "predict_s": predict_s, "both_s": add_s + predict_s, "both_cpu_s": add_cpu + predict_cpu})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("routing", "lists", "add"))
    parser.add_argument("--encoder", default="aoi-mae-small", help="folder of a saved encoder, or the name of one that ships")
    parser.add_argument("--pictures", type=Path, default=ROOT / "build" / "arena", help="where the rendered pictures are kept")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "bench_bank", help="where parts of a run are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--fresh", action="store_true", help="forget the parts that are kept")
    args = parser.parse_args()
    for part in args.cache.glob(f"{args.what}-*.csv") if args.fresh else ():
        part.unlink()
    torch.set_num_threads(args.threads)
    table = {"routing": routes, "lists": lists, "add": add}[args.what](Encoder.from_pretrained(args.encoder), args)
    args.out.mkdir(parents=True, exist_ok=True)
    table.insert(0, "command", f"python tools/bench_bank.py {args.what} --threads {args.threads}")
    table.to_csv(args.out / f"{args.what}.csv", index=False, float_format="%.5g")
    print(table.round(4).to_string())


if __name__ == "__main__":
    main()
