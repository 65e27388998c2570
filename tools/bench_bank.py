"""What a bank costs in use: `routing` (a bank of many devices), `lists` (against exact search), `add` (one image more, and a prediction).

Each writes a CSV into nbs/experiments/results/bench_retrieval, with its own command in the first column."""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, concatenate_datasets

from aoi_ssl import search
from aoi_ssl.benchmark import arena, by_device
from aoi_ssl.encoder import Encoder
from aoi_ssl.metrics import mean_iou
from aoi_ssl.predict import evaluate
from aoi_ssl.retrieval import MemoryBank, build_bank

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "aoi_ssl" / "shipped" / "aoi-mae-small"
RESULTS = ROOT / "nbs" / "experiments" / "results" / "bench_retrieval"


def judged(bank: MemoryBank, images: Dataset) -> tuple[float, float]:
    "mIoU, and processor seconds an image."
    start = time.process_time()
    counts = evaluate(bank, images)
    return mean_iou(counts), (time.process_time() - start) / len(images)


def by_devices(bank: MemoryBank, images: Dataset, choose) -> tuple[float, float]:
    "The same, with a bank for each device: `choose(bank, device)`."
    counts, start = [], time.process_time()
    for device, part in by_device(images).items():
        counts.append(evaluate(choose(bank, device), part))
    return mean_iou(pd.concat(counts)), (time.process_time() - start) / len(images)


def accuracy(bank: MemoryBank, images: Dataset) -> float:
    "The share of images whose own device comes first."
    return float(np.mean([next(iter(bank.like_devices(row["image"]))) == row["device"] for row in images]))


def routes(encoder: Encoder, args: argparse.Namespace) -> pd.DataFrame:
    "Which device is found, by the number of devices; and on the first of these, what the route is worth in mIoU."
    rows = []
    for devices, images in ((8, 7), (24, 5)):
        data = arena(args.pictures, devices=devices, images=images, drifts=(0.0, 0.5, 1.0), seed=40)
        first = by_device(data["new devices"])
        known = concatenate_datasets([part.select(range(3)) for part in first.values()])
        few = {"method": "aligned"} if devices == 8 else {"method": "fast", "bank_shifts": 1}  # routes go by the first grid alone
        start = time.process_time()
        bank = build_bank(known, encoder, calibrate=devices == 8, **few)
        print(bank, f"{time.process_time() - start:.0f} s", flush=True)
        for name, part in data.items():
            new = concatenate_datasets([group.select(range(3, images)) for group in by_device(part).values()])
            row = {"devices": devices, "images": name, "keys": len(bank.keys), "judged": len(new), "route right": accuracy(bank, new)}
            if devices == 8:
                some = concatenate_datasets([group.select(range(3, 5)) for group in by_device(part).values()])
                row["mIoU, all devices"], row["s, all devices"] = judged(bank, some)
                row["mIoU, routed"], row["s, routed"] = judged(bank.using(routes=1), some)
                row["mIoU, own bank"], _ = by_devices(bank, some, lambda b, d: b.subset(device=d, calibrate=False))
            rows.append(row)
            print(row, flush=True)
    return pd.DataFrame(rows)


def lists(encoder: Encoder, args: argparse.Namespace) -> pd.DataFrame:
    "The default against an exact search of float32 keys, and ways to choose thresholds after an image was added; devices to choose by."
    data, rows, most = arena(args.pictures, devices=4, images=6, drifts=(0.0, 0.5), seed=30), [], search.MOST_EXACT
    for device, images in by_device(data["new devices"]).items():
        tests = {name: by_device(part)[device].select([4, 5]) for name, part in data.items()}
        banks = {}
        for name, limit in (("exact, float32", 2**40), ("lists, float16", most)):
            search.MOST_EXACT = limit
            banks[name] = bank = build_bank(images.select(range(3)), encoder)
            for part, some in tests.items():
                miou, seconds = judged(bank, some)
                rows.append({"device": device, "images": part, "way": name, "k": bank.k, "mIoU": miou, "s": seconds})
        for patches in (16384, 4096, 2048, 0):
            start, grown = time.process_time(), banks["lists, float16"].using()
            name = f"added, thresholds from {patches} patches" if patches else "added, thresholds as before"
            grown.add(images.select([3]), calibrate=False)
            if patches:
                grown.calibrate(ks=(grown.k,), betas=(grown.beta,), mixes=(grown.mix,), max_patches=patches)
            spent = time.process_time() - start
            for part, some in tests.items():
                rows.append({"device": device, "images": part, "way": name, "k": grown.k, "mIoU": judged(grown, some)[0], "s": spent})
        print(pd.DataFrame(rows).round(4).tail(12).to_string(), flush=True)
    return pd.DataFrame(rows)


def add(encoder: Encoder, args: argparse.Namespace) -> pd.DataFrame:
    "A bank of three images of 512 x 512 gets a fourth, thresholds are chosen anew, and a fifth is segmented."
    images, rows = next(iter(by_device(arena(args.pictures, devices=2, images=5, drifts=(0.0,), seed=30)["new devices"]).values())), []
    bank, query = build_bank(images.select(range(3)), encoder), images[4]["image"][None]
    more = images.select([3])
    for turn in range(4):
        grown = bank.using()
        marks = [(time.perf_counter(), time.process_time())]
        for step in (lambda b=grown: b.add(more), lambda b=grown: b.predict(query)):
            step()
            marks.append((time.perf_counter(), time.process_time()))
        (add_s, add_cpu), (predict_s, predict_cpu) = np.diff(marks, axis=0)
        if turn:  # the first warms up
            rows.append({"threads": torch.get_num_threads(), "keys": len(grown.keys), "add_s": add_s, "predict_s": predict_s,
                         "both_s": add_s + predict_s, "both_cpu_s": add_cpu + predict_cpu})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("routing", "lists", "add"))
    parser.add_argument("--encoder", type=Path, default=SHIPPED, help="folder of a saved encoder")
    parser.add_argument("--pictures", type=Path, default=ROOT / "build" / "arena", help="where the rendered pictures are kept")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = {"routing": routes, "lists": lists, "add": add}[args.what](Encoder.from_pretrained(args.encoder), args)
    args.out.mkdir(parents=True, exist_ok=True)
    table.insert(0, "command", f"python tools/bench_bank.py {args.what} --threads {args.threads}")
    table.to_csv(args.out / f"{args.what}.csv", index=False, float_format="%.5g")
    print(table.round(4).to_string())


if __name__ == "__main__":
    main()
