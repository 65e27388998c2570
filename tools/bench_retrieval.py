"""What a large bank costs: seconds, bytes, recall and mIoU of ways to search it, against the plain method, in one run.

The plain method keeps keys and masks as float32, multiplies all queries with all keys, takes `topk`, gathers and sums.
Keys are embeddings of rendered images at 16 shifts of a quarter patch (16,384 keys an image) by the shipped encoder: as they are for
the plain method, in the feature space of the default recipe for the others. They are made once and kept in build/bench_retrieval, like
each table, so that a run which was broken off goes on. Queries are other images of the same devices; thresholds are chosen on one
image a device, mIoU is measured on two others. Seconds are processor seconds of one thread, so that a busy machine does not matter
much; the shortest of up to five runs counts. Where faiss is installed, it scans the lists of a bank: the goals are judged by that row
then, with its copy of the keys in the bytes, and the same lists are measured by torch alone beside it."""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from aoi_ssl import search
from aoi_ssl.core import atomic_path, write_json
from aoi_ssl.encoder import Encoder, PixelEncoder
from aoi_ssl.features import FeatureSpace, drift_light, fit_space, restore_space
from aoi_ssl.metrics import best_thresholds, threshold_counts
from aoi_ssl.patches import patchify_mask
from aoi_ssl.remember import METHODS, seeing
from aoi_ssl.search import (
    ExactIndex,
    Index,
    IVFIndex,
    MaskRows,
    aggregate,
    coreset,
    pack_bits,
    shown_classes,
    top_k,
)
from aoi_ssl.synthetic import CLASSES, render

matplotlib.use("agg")

ROOT = Path(__file__).resolve().parent.parent
P, COUNT, K = 16, len(CLASSES) * 16 * 16, 5  # patch size; flags of a mask; neighbours that vote
OUT = ROOT / "nbs" / "experiments" / "results" / "bench_retrieval" / "bench_retrieval.json"
KEYS = 400_000  # of the bank that the goals are about
SHIFTS = [(y, x) for y in range(0, P, 4) for x in range(0, P, 4)]
DEVICES, EACH = 5, 5  # the bank of KEYS keys: 25 images
GOALS = {"faster": 10, "smaller": 15, "mIoU lost": 0.005}


# --- keys -----------------------------------------------------------------------------------------------------------


def crops(device: int, number: int, shifts: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    "One rendered image of 528 x 528 cut at shifts to 512 x 512, (n, 2, 512, 512), and its masks (n, 4, 512, 512)."
    sample = render(device, number, size=528)
    image, mask = torch.from_numpy(sample.image).float() / 255, torch.from_numpy(sample.mask)
    cut = lambda whole: torch.stack([whole[:, y:y + 512, x:x + 512] for y, x in shifts])
    return cut(image), cut(mask)


def encode(encoder: Encoder, device: int, number: int, shifts: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    "Embeddings (n, 1024, D) and packed masks (n * 1024, 128) of one image."
    images, masks = crops(device, number, shifts)
    grids = torch.cat([encoder.encode(part).flatten(1, 2) for part in images.split(4)])
    return grids, pack_bits(torch.cat([patchify_mask(mask, P).flatten(0, 1).flatten(1) for mask in masks]))


def centred(grids: Tensor) -> Tensor:
    "(n, 1024, D) -> (n * 1024, D): without the mean of each window, as the bank's default recipe has it."
    return (grids - grids.mean(1, keepdim=True)).flatten(0, 1)


def learn(encoder: Encoder, size: int) -> FeatureSpace:
    "The feature space of the default recipe, whitened against drift, from one image of each device."
    images, where = [crops(device, 0, [(8, 8)])[0] for device in range(DEVICES)], torch.full((DEVICES * 1024, 2), 0.5)
    seen = lambda change: torch.cat([centred(encoder.encode(change(image)).flatten(1, 2)) for image in images])
    drifted = torch.stack([seen(partial(drift_light, seed=seed)) for seed in range(4)])
    return fit_space(seen(lambda image: image), where, whiten=size, shrink=1.0, drifted=drifted)


def kept_tensors(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    "Tensors that are made once; delete the file to make them anew."
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as aside:
            save_file(make(), aside)
    return load_file(file)


def make_keys(encoder: Encoder, images: int, size: int, cache: Path) -> dict[str, Tensor]:
    "Raw embeddings of the first KEYS, keys and masks of all, queries with their masks; each image is kept in a file."
    home, first = cache / f"{encoder.fingerprint()}-{size}", DEVICES * EACH
    encoder = seeing(encoder, METHODS["aligned"])
    state = kept_tensors(home / "space.safetensors", lambda: learn(encoder, size).state_dict())
    space = restore_space([{"kind": "steady"}], state)

    def tensors(device: int, number: int, shifts: list[tuple[int, int]], raw: bool) -> dict[str, Tensor]:
        grids, masks = encode(encoder, device, number, shifts)
        return {"keys": space(centred(grids), None).half(), "masks": masks} | ({"raw": grids.flatten(0, 1).half()} if raw else {})

    parts, start = [], time.perf_counter()
    for i in range(images):
        where = (i % DEVICES, i // DEVICES) if i < first else (i // EACH, i % EACH)
        parts.append(kept_tensors(home / f"image{i:03}.safetensors", lambda where=where, i=i: tensors(*where, SHIFTS, i < first)))
        print(f"\rimage {i + 1} of {images}, {time.perf_counter() - start:.0f} s", end="", flush=True)
    print()
    asked = [(device, EACH + i) for i in range(3) for device in range(DEVICES)]
    queries = [kept_tensors(home / f"query{d}-{n}.safetensors", lambda d=d, n=n: tensors(d, n, [(8, 8)], True)) for d, n in asked]
    made = {"raw": torch.cat([part["raw"] for part in parts[:first]])[:KEYS]}
    made |= {name: torch.cat([part[name] for part in parts]) for name in ("keys", "masks")}
    return made | {f"asked {name}": torch.cat([part[name] for part in queries]) for name in ("raw", "keys", "masks")}


# --- judging --------------------------------------------------------------------------------------------------------


def seconds(run: Callable, *arguments, times: int = 5) -> float:
    "The shortest of some runs; no more of them after two seconds."
    taken = []
    while len(taken) < times and sum(taken) < 2:
        start = time.process_time()
        run(*arguments)
        taken.append(time.process_time() - start)
    return min(taken)


def miou(probabilities: Tensor, truth: Tensor) -> float:
    "Thresholds from the first image of each device, IoU from summed counts of the others, mean over the classes."
    p, target = (x.view(-1, len(CLASSES), P, P) for x in (probabilities.clamp(max=1), truth))
    own = DEVICES * 1024  # queries of the first image of each
    thresholds = best_thresholds(threshold_counts(p[:own], target[:own]))
    hit, target = p[own:] > thresholds[:, None, None], target[own:]
    iou = (hit & target).sum((0, 2, 3)) / (hit | target).sum((0, 2, 3)).clamp(min=1)
    return iou.mean().item()


def weigh(similarity: Tensor) -> Tensor:
    "Votes by the inverse fourth power of the distance. Nearly equal votes would make mIoU jump with a threshold near 2/5."
    w = ((2 - 2 * similarity).clamp(min=0) + 1e-3) ** -2
    return w / w.sum(-1, keepdim=True)


class Method(NamedTuple):
    "A way to find neighbours and to lay their masks over each other."
    search: Callable[[Tensor], tuple[Tensor, Tensor]]
    masks: Callable[[Tensor, Tensor], Tensor]
    nbytes: int
    keys: int


FAISS = search._faiss()  # the module, or None


def ask(index: Index, queries: Tensor, by_faiss: bool = FAISS is not None) -> tuple[Tensor, Tensor]:
    "Search, by faiss or without it."
    search.FAISS = by_faiss
    return index.search(queries, K)


def packed(index: Index, masks: Tensor | MaskRows, by_faiss: bool = FAISS is not None) -> Method:
    "An index and masks that are kept once each; what faiss holds is there once it has been asked."
    rows = MaskRows.of(masks)
    ask(index, index.keys(torch.arange(1)), by_faiss)
    lay = lambda similarity, found: aggregate(weigh(similarity), found, rows, count=COUNT)
    return Method(lambda q: ask(index, q, by_faiss), lay, index.nbytes + rows.nbytes, len(index))


def plain(keys: Tensor, masks: Tensor) -> Method:
    "float32, everything at once."
    keys = F.normalize(keys.float(), dim=1)
    values = torch.empty(len(masks), COUNT)
    for part, bits in zip(values.split(2**14), masks.split(2**14), strict=True):
        part.copy_(torch.from_numpy(np.unpackbits(bits.numpy(), axis=1)))
    lay = lambda similarity, rows: torch.einsum("qk,qkn->qn", weigh(similarity), values[rows])
    return Method(lambda q: (q @ keys.T).topk(K), lay, keys.nbytes + values.nbytes, len(keys))


def judge(name: str, method: Method, queries: Tensor, truth: Tensor, *, build: float = 0.0, recall: Callable | None = None) -> dict:
    "One row of the table."
    asked = queries[-1024:]
    search = seconds(method.search, asked)
    found = method.search(asked)
    masks = seconds(method.masks, *found)
    every = [method.search(part) for part in queries.split(1024)]
    score = miou(torch.cat([method.masks(*part) for part in every]), truth)
    row = {"method": name, "keys": method.keys, "build_s": build, "search_s": search, "masks_s": masks}
    row |= {"seconds": search + masks, "bytes_per_key": method.nbytes / method.keys, "nbytes": method.nbytes}
    row |= {"recall": recall(torch.cat([rows for _, rows in every])) if recall else 1.0, "miou": score}
    print(f"{name:44} {search + masks:7.3f} s {row['bytes_per_key']:7.0f} B/key  recall {row['recall']:.3f}  mIoU {score:.4f}", flush=True)
    return row


def recall_of(queries: Tensor, keys: Tensor) -> Callable[[Tensor], float]:
    "The share of the K nearest that are found, judged by their true cosine, so that ties count."
    least = top_k(queries, keys, K)[0][:, -1:] - 1e-6

    def recall(rows: Tensor) -> float:
        parts = zip(queries.split(1024), rows.split(1024), least.split(1024), strict=True)
        return torch.cat([(q[:, None] * keys[r]).sum(-1) >= s for q, r, s in parts]).float().mean().item()

    return recall


def built(make: Callable, *arguments, **options) -> tuple[Index, float]:
    "An index and the seconds that it took to build."
    start = time.process_time()
    return make(*arguments, **options), time.process_time() - start


FACTORIES = {"float16": "IVF1012,SQfp16", "RaBitQ": "IVF1012,RaBitQfs,Refine(SQfp16)"}  # as faiss names them


def faiss_row(keys: Tensor, masks: Tensor, kind: str, probes: int, factor: int = 0, **judged) -> dict:
    "An index of faiss alone, with its own centres and as many lists for each query; the best `factor` * K are compared again."

    def make():
        index = FAISS.index_factory(keys.shape[1], FACTORIES[kind], FAISS.METRIC_INNER_PRODUCT)
        index.train(keys[:: max(1, len(keys) // 65536)].contiguous().numpy())
        index.add(keys.numpy())
        FAISS.extract_index_ivf(index).nprobe = probes
        if factor:
            index.k_factor = factor
        return index

    FAISS.omp_set_num_threads(torch.get_num_threads())
    index, took = built(make)
    find = lambda q: tuple(torch.from_numpy(found) for found in index.search(q.contiguous().numpy(), K))
    rows = MaskRows.of(masks)
    lay = lambda similarity, found: aggregate(weigh(similarity), found, rows, count=COUNT)
    size = FAISS.serialize_index(index).nbytes + rows.nbytes
    name = f"faiss alone, {kind}, {probes} lists" + f", best {factor * K} again" * bool(factor)
    return judge(name, Method(find, lay, size, len(keys)), build=took, **judged)


# --- the tables -----------------------------------------------------------------------------------------------------


def bits(packed_masks: Tensor) -> Tensor:
    "Masks as flags (n, 1024)."
    return torch.from_numpy(np.unpackbits(packed_masks.numpy(), axis=1)).bool()


def methods(data: dict[str, Tensor]) -> list[dict]:
    "The plain method and its rivals at KEYS keys."
    raw, masks, truth = data["raw"], data["masks"][: len(data["raw"])], bits(data["asked masks"])
    rows = [judge("plain: float32, exact", plain(raw, masks), F.normalize(data["asked raw"].float(), dim=1), truth)]
    keys, queries, masks = data["keys"][: len(raw)].float(), data["asked keys"].float(), MaskRows.of(masks)
    options = {"queries": queries, "truth": truth, "recall": recall_of(queries, keys)}
    kinds = {"exact": ExactIndex, "lists": IVFIndex}
    for name, dtype in (("exact", "float32"), ("lists", "float16"), ("exact", "int8"), ("lists", "int8")):
        index, took = built(kinds[name], keys, dtype=dtype)
        rows.append(judge(f"{name}, {dtype}", packed(index, masks, False), build=took, **options))
        if FAISS and (name, dtype) == ("lists", "float16"):
            _, more = built(ask, index, queries[:1])
            rows.append(judge(f"{name}, {dtype}, faiss", packed(index, masks), build=took + more, **options))
    if FAISS:
        rows += [faiss_row(keys, masks, "float16", probes, **options) for probes in (16, 32)]
        rows += [faiss_row(keys, masks, "RaBitQ", 16, factor, **options) for factor in (10, 20)]
    else:
        print("faiss is not installed, or not used on this system: lists are scanned by torch alone")
    return rows


def recalls(encoders: dict[str, Encoder], size: int, images: int = 6) -> list[dict]:
    "What lists find of the true neighbours, in the embeddings of several encoders: smaller banks of the same devices."
    rows = []
    for name, encoder in encoders.items():
        eye = seeing(encoder, METHODS["aligned"])
        space = learn(eye, size)
        seen = [encode(eye, i % DEVICES, i // DEVICES, SHIFTS)[0] for i in range(images)]
        keys = torch.cat([space(centred(grids), None) for grids in seen])
        asked = [encode(eye, device, EACH, [(8, 8)])[0] for device in range(DEVICES)]
        queries = torch.cat([space(centred(grids), None) for grids in asked])
        recall = recall_of(queries, keys)
        kinds = {"lists, float16": (IVFIndex, "float16"), "lists, int8": (IVFIndex, "int8"), "exact, int8": (ExactIndex, "int8")}
        for label, (kind, dtype) in kinds.items():
            index = kind(keys, dtype=dtype)
            rows.append({"encoder": name, "keys": len(keys), "index": label, "recall": recall(index.search(queries, K)[1])})
            print(rows[-1], flush=True)
    return rows


def reaches(keys: Tensor, masks: Tensor, queries: Tensor, truth: Tensor) -> list[dict]:
    "What `reach` buys."
    index, recall, masks, rows = IVFIndex(keys), recall_of(queries, keys), MaskRows.of(masks), []
    for reach in (1.0, 1.25, 1.5, 1.75, 2.0, 2.5):
        index.reach.fill_(reach)
        rows.append({"reach": reach, **judge(f"reach {reach}", packed(index, masks), queries, truth, recall=recall)})
    return rows


def coresets(keys: Tensor, masks: Tensor, queries: Tensor, truth: Tensor) -> list[dict]:
    "What fewer keys cost, chosen in three ways."
    shown, rows = shown_classes(masks, len(CLASSES), COUNT), []
    shuffled = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
    for part in (2, 4, 8):
        n = len(keys) // part
        chosen = {"random": shuffled[:n], "k-centre": coreset(keys, n), "rare classes first": coreset(keys, n, classes=shown)}
        for name, kept in chosen.items():
            method = packed(IVFIndex(keys[kept]), masks[kept])
            rows.append({"choice": name, "part": 1 / part, **judge(f"1/{part} of the keys, {name}", method, queries, truth)})
    return rows


def curve(data: dict[str, Tensor]) -> list[dict]:
    "Seconds, bytes and recall by size."
    rows, queries = [], data["asked keys"].float()[-1024:]
    total = len(data["keys"])
    for n in [n for n in (10_000, 25_000, 65_536, 100_000, 200_000, 400_000, 800_000, 1_600_000) if n <= total]:
        keys = data["keys"][:n].float()
        recall = recall_of(queries, keys)
        index, masks = ExactIndex(keys), MaskRows.of(data["masks"][:n]).nbytes
        row = {"keys": n, "exact_s": seconds(index.search, queries, K), "exact_bytes": index.nbytes + masks}
        index, row["build_s"] = built(IVFIndex, keys)
        row |= {"lists_s": seconds(ask, index, queries, False), "recall": recall(ask(index, queries, False)[1])}
        row |= {"lists_bytes": index.nbytes + masks, "plain_bytes": n * 4 * (data["raw"].shape[1] + COUNT)}
        if FAISS:
            row["faiss_build_s"] = built(ask, index, queries[:1])[1]
            row |= {"faiss_s": seconds(ask, index, queries), "faiss_recall": recall(ask(index, queries)[1])}
            row["faiss_bytes"] = index.nbytes + masks
        if n <= KEYS:
            method, asked = plain(data["raw"][:n], data["masks"][:n]), F.normalize(data["asked raw"][-1024:].float(), dim=1)
            row["plain_s"] = seconds(method.search, asked)
            method = None
        rows.append(row)
        print({name: round(value, 3) for name, value in row.items()}, flush=True)
    return rows


def verdicts(rows: list[dict]) -> list[dict]:
    "The goals, for what a bank does by default against the plain method: lists, by faiss where it is installed."
    named = {row["method"]: row for row in rows}
    base, exact, ours = rows[0], named["exact, float32"], named.get("lists, float16, faiss", named["lists, float16"])
    figures = {
        "times faster than plain": (base["seconds"] / ours["seconds"], GOALS["faster"], True),
        "times smaller than plain": (base["nbytes"] / ours["nbytes"], GOALS["smaller"], True),
        "mIoU lost against plain": (base["miou"] - ours["miou"], GOALS["mIoU lost"], False),
        "mIoU lost against exact in the same space": (exact["miou"] - ours["miou"], GOALS["mIoU lost"], False),
    }
    return [{"goal": name, "figure": figure, "bound": bound, "kept": figure >= bound if above else figure <= bound}
            for name, (figure, bound, above) in figures.items()]


def kept_rows(file: Path, make: Callable[[], list[dict]]) -> list[dict]:
    "A table that is measured once, so that a run which was broken off goes on; delete the file to measure it anew."
    if not file.exists():
        write_json(file, make())
    else:
        print(f"{file} is kept from an earlier run; --fresh measures it again")
    return json.loads(file.read_text())


def draw(result: dict, file: Path) -> None:
    "The figure, from the JSON alone: cost by size, and what reach and fewer keys do, as far as they were measured."
    from matplotlib import pyplot as plt

    drawn = [panel for name, panel in (("curve", draw_curve), ("reach", draw_reach), ("coreset", draw_coreset)) if name in result]
    if not drawn:
        return
    count = len(drawn) + ("curve" in result)
    fig, axes = plt.subplots(1, count, figsize=(3.8 * count, 3.6), layout="constrained", squeeze=False)
    free = iter(axes[0])
    for panel in drawn:
        panel(result, free)
    fig.savefig(file, dpi=110)


def draw_curve(result: dict, axes: Iterator) -> None:
    "Seconds and bytes by size."
    names = {"plain": "plain, float32", "exact": f"exact, {result['size']} numbers, float32"}
    names |= {"lists": f"lists, {result['size']} numbers, float16", "faiss": "the same lists, by faiss"}
    for what, unit in (("s", "CPU seconds for 1024 queries"), ("bytes", "bytes, keys and masks")):
        ax = next(axes)
        for name, label in names.items():
            points = [(row["keys"], row[f"{name}_{what}"]) for row in result["curve"] if f"{name}_{what}" in row]
            if not points:
                continue
            ax.loglog(*zip(*points, strict=True), "o-", label=label, markersize=4)
        ax.set(xlabel="keys in the bank", ylabel=unit)
        ax.legend(frameon=False, fontsize=8)


def draw_reach(result: dict, axes: Iterator) -> None:
    "mIoU by seconds."
    ax, reach = next(axes), result["reach"]
    exact = next(row for row in result["methods"] if row["method"] == "exact, float32")
    ax.plot([row["search_s"] for row in reach], [row["miou"] for row in reach], "o-", label="lists, by reach")
    for row in reach:
        ax.annotate(f"{row['reach']}", (row["search_s"], row["miou"]), xytext=(4, -9), textcoords="offset points", fontsize=8)
    ax.axhline(exact["miou"], color="grey", linestyle="--", label=f"exact, {exact['search_s']:.2f} s")
    ax.set(xlabel="CPU seconds for 1024 queries", ylabel="mIoU")
    ax.legend(frameon=False, fontsize=8)


def draw_coreset(result: dict, axes: Iterator) -> None:
    "mIoU by the share of the keys."
    ax = next(axes)
    exact = next(row for row in result["methods"] if row["method"] == "exact, float32")
    for name in ("rare classes first", "k-centre", "random"):
        points = [(row["part"], row["miou"]) for row in result["coreset"] if row["choice"] == name]
        ax.plot(*zip((1.0, exact["miou"]), *points, strict=True), "o-", label=name, markersize=4)
    ax.set(xscale="log", xlabel="share of the keys that is kept", ylabel="mIoU")
    ax.set_xticks([1, 1 / 2, 1 / 4, 1 / 8], ["all", "1/2", "1/4", "1/8"])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="aoi-mae-small", help="folder of a saved encoder, or the name of one that ships")
    parser.add_argument("--images", type=int, default=100, help="in the largest bank; 25 for the goals alone, 100 for 1.6 million keys")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON; figure and table go beside it")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "bench_retrieval", help="where keys are kept")
    parser.add_argument("--size", type=int, default=64, help="numbers of a projected or whitened key")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--stage", default="all", help="only one of methods, curve, recall, reach, coreset, beside what is kept")
    parser.add_argument("--fresh", action="store_true", help="measure the chosen stages again; keys are kept")
    parser.add_argument("--draw", action="store_true", help="only draw the figure of an existing JSON")
    args = parser.parse_args()
    figure = args.out.with_suffix(".png")
    if args.draw:
        draw(json.loads(args.out.read_text()), figure)
        return
    if args.images < DEVICES * EACH:
        parser.error(f"--images {args.images}: at least {DEVICES * EACH} are needed for {KEYS} keys")
    torch.set_num_threads(args.threads)
    encoder = Encoder.from_pretrained(args.encoder)
    start = time.perf_counter()
    with torch.inference_mode():
        data = make_keys(encoder, args.images, args.size, args.cache)
        few = lambda: (data["keys"][:KEYS].float(), data["masks"][:KEYS], data["asked keys"].float(), bits(data["asked masks"]))
        both = {Path(args.encoder).name: encoder, "raw pixels": PixelEncoder(channels=2, patch_size=P)}
        stages = {"methods": lambda: methods(data), "curve": lambda: curve(data), "recall": lambda: recalls(both, args.size),
                  "reach": lambda: reaches(*few()), "coreset": lambda: coresets(*few())}
        size = {"curve": args.images}  # the others see the first 25 images alone
        files = {name: args.cache / f"{name}-{size.get(name, DEVICES * EACH)}.json" for name in stages}
        for name in stages if args.fresh else ():
            if args.stage in ("all", name):
                files[name].unlink(missing_ok=True)
        chosen = [name for name in stages if args.stage in ("all", name) or files[name].exists()]
        result = {name: kept_rows(files[name], stages[name]) for name in chosen}
    if "methods" not in result:
        return
    rows, result["goals"] = result["methods"], verdicts(result["methods"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    about = {"encoder": Path(args.encoder).name, "fingerprint": encoder.fingerprint(), "dimensions": encoder.dim, "size": args.size, "k": K}
    about |= {"threads": args.threads, "torch": torch.__version__, "faiss": FAISS and FAISS.__version__}
    result = {**about, "peak_gib": peak, **result}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    draw(result, figure)
    pd.DataFrame(rows).to_csv(args.out.with_suffix(".csv"), index=False, float_format="%.6g")
    for goal in result["goals"]:
        print(f"{goal['goal']:44} {goal['figure']:8.3f}  bound {goal['bound']:6}  {'kept' if goal['kept'] else 'NOT KEPT'}")
    print(f"{time.perf_counter() - start:.0f} s, at most {peak:.1f} GiB. Written to {args.out} and {figure}.")


if __name__ == "__main__":
    main()
