"""Pre-training on equal terms: the same images, crops and CPU seconds, judged on devices that none of the runs saw.

    python tools/compare_objectives.py                  # masked autoencoding, DINO, iBOT, Hiera, pairs of patches
    python tools/compare_objectives.py --study longer   # the first three, for ten times as long
    python tools/compare_objectives.py --study recipe   # one thing changed at a time
    python tools/compare_objectives.py --study adapt    # going on from the shipped encoder against starting from scratch
    python tools/compare_objectives.py --study boards   # the same on real pictures of another kind, DeepPCB

Rows that are in the table already are not computed again; --fresh makes all of them anew."""

import argparse
import csv
import inspect
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOARDS = ROOT.parent / "shared" / "data" / "deeppcb"
DEFECTS = ("open", "short", "mousebite", "spur", "copper", "pinhole")


@dataclass(frozen=True)
class Study:
    "A table: which runs, how long, and where in their budget they are judged."

    runs: str  # names in RECIPES
    baselines: str  # names in BASELINES
    seconds: float  # of training, of each run
    seeds: int
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # of the budget; patches under 16 pixels, slow to judge, only at its end
    scores: tuple[str, ...] = ("retrieval", "whitened", "probe")  # see `Judge`
    data: Path | None = None  # a folder of labelled devices, the last of them to judge on; None: rendered ones
    classes: tuple[str, ...] | None = None  # of that folder
    labelled: int = 3  # pictures of each device to judge on that are labelled
    validation_devices: int = 4  # new devices to judge on


STUDIES = {
    "objectives": Study("mae,dino,ibot,dino-dropped,mae-p8,hiera,contrastive,contrastive-twins",
                        "pixels,random,pixels-p8,random-p8,random-hiera", 30, 3),
    "longer": Study("mae,dino,ibot", "pixels,random,aoi-mae-tiny", 300, 2, (0.1, 0.25, 0.5, 1.0)),
    "recipe": Study(
        "default,mask 0.5,mask 0.85,patch 8,raw targets,decoder 64,decoder 256,no augmentation,6 devices,budget / 4,budget x 4",
        "pixels,random", 30, 2, (1.0,)),
    "adapt": Study("scratch,adapted,adapted fast,adapted in a fifth", "pixels,random,aoi-mae-tiny", 30, 2,
                   (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)),
    "boards": Study("scratch,adapted,adapted in a fifth", "pixels,random,aoi-mae-tiny", 120, 1, (0.2, 1.0),
                    ("retrieval", "aligned", "probe"), BOARDS, DEFECTS, 5, 2),
}  # fmt: skip


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    "The command line; what belongs to a study is its own by default."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--study", default="objectives", choices=STUDIES)
    add("--seconds", type=float, help="of training, for each run and seed: of the CPU, or on a GPU of the clock on the wall")
    add("--steps", type=int, help="a budget in steps in place of seconds: equal work is then not claimed")
    add("--seeds", type=int, help="the first so many")
    add("--runs", help=f"some of {', '.join(RECIPES)}")
    add("--baselines", help=f"some of {', '.join(BASELINES)}; '' for none")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--out", type=Path, default=ROOT / "nbs/experiments/results/pretraining", help="folder of the table, <study>.csv")
    add("--work", type=Path, default=ROOT / "build/pretraining", help="folder of the rendered images")
    add("--fresh", action="store_true", help="forget the rows that are there")
    add("--devices", type=int, default=24, help="rendered devices to learn from")
    add("--images", type=int, default=8, help="pictures of each")
    add("--size", type=int, default=320, help="pixels, side of a picture")
    add("--validation-devices", type=int, help="new devices to judge on")
    add("--queries", type=int, default=3, help="pictures of each of them to segment; others are labelled")
    add("--encoder", default="tiny", help="preset of the ViT")
    add("--crop", type=int, default=96)
    add("--batch-size", type=int, default=16)
    add("--drift", type=float, default=0.3, help="of the process, 0 to 1")
    add("--workers", type=int, default=os.cpu_count(), help="processes that render")
    add("--threads", type=int, default=1, help="of torch; CPU seconds are those of all threads together")
    args = parser.parse_args(arguments)
    for name in ("seconds", "seeds", "runs", "baselines", "validation_devices"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(STUDIES[args.study], name))
    return args


# what is compared


def _mae(dataset, **options):
    from aoi_ssl.pretrain import pretrain

    return pretrain(dataset, **scaled(pretrain, options))


def _distill(dataset, **options):
    from aoi_ssl.distill import distill

    return distill(dataset, **scaled(distill, options))


def _contrastive(dataset, **options):
    from aoi_ssl.contrastive import pretrain_contrastive

    return pretrain_contrastive(dataset, **scaled(pretrain_contrastive, options))


def _hiera(dataset, *, encoder, **options):
    from aoi_ssl.hiera import pretrain_hiera

    return pretrain_hiera(dataset, encoder=f"hiera-{encoder}", **scaled(pretrain_hiera, options))


def scaled(train: Callable, options: dict) -> dict:
    "The rate that each objective has by default at a batch of 32, times the root of the batch over 32, times `rate`."
    from aoi_ssl.pretrain import base_rate

    asked, rate = inspect.signature(train).parameters["base_lr"].default, options.pop("rate", 1.0)
    base = base_rate(asked, adapting="start_from" in options)
    return {"base_lr": rate * base * (32 / options["batch_size"]) ** 0.5} | options


@dataclass(frozen=True)
class Recipe:
    "How an encoder is trained, and how its weights are read."

    train: Callable  # (dataset, **options) -> result with encoder and history
    own: dict = field(default_factory=dict)  # options beside those that all share; rate: a factor of the learning rate
    network: str = "vit"  # attribute of the encoder that holds the network
    also: dict = field(default_factory=dict)  # the same weights, read in another way: name -> options of the encoder
    budget: float = 1.0  # times that of the others
    devices: int | None = None  # the first so many to learn from; None: all
    seeds: int = 3  # at most
    twins: bool = False  # also learn from the same pictures without drift of light, focus and material


SHIPPED = "aoi-mae-tiny"
RECIPES = {
    "mae": Recipe(_mae),
    "mae-p8": Recipe(_mae, {"patch_size": 8}, seeds=2),
    "dino": Recipe(_distill, {"objective": "dino"}),
    "ibot": Recipe(_distill, {"objective": "ibot"}),
    "dino-dropped": Recipe(_distill, {"objective": "dino", "lights": "dropped"}, seeds=2),
    "contrastive": Recipe(_contrastive),
    "contrastive-twins": Recipe(_contrastive, twins=True),
    "dino-repeated": Recipe(_distill, {"objective": "dino", "lights": "repeated"}),
    "ibot-dropped": Recipe(_distill, {"objective": "ibot", "lights": "dropped"}),
    "dino-cls": Recipe(_distill, {"objective": "dino", "pool": "cls"}),
    "ibot-cls": Recipe(_distill, {"objective": "ibot", "pool": "cls"}),
    "hiera": Recipe(_hiera, {}, "hiera", seeds=2),
    "hiera-stages": Recipe(_hiera, {}, "hiera", {"hiera-stage3": {"stages": (3,)}, "hiera-stage2": {"stages": (2,)}}),
    "default": Recipe(_mae),
    "mask 0.5": Recipe(_mae, {"mask_ratio": 0.5}),
    "mask 0.85": Recipe(_mae, {"mask_ratio": 0.85}),
    "patch 8": Recipe(_mae, {"patch_size": 8}),
    "raw targets": Recipe(_mae, {"norm_pix": False}),
    "decoder 64": Recipe(_mae, {"decoder_width": 64}),
    "decoder 256": Recipe(_mae, {"decoder_width": 256}),
    "no augmentation": Recipe(_mae, {"augment": False}),
    "6 devices": Recipe(_mae, devices=6),
    "budget / 4": Recipe(_mae, budget=0.25),
    "budget x 4": Recipe(_mae, budget=4),
    "scratch": Recipe(_mae),
    "adapted": Recipe(_mae, {"start_from": SHIPPED}),
    "adapted fast": Recipe(_mae, {"start_from": SHIPPED, "rate": 6.0}),
    "adapted in a fifth": Recipe(_mae, {"start_from": SHIPPED}, budget=0.2),
}
BASELINES = ("pixels", "pixels-p8", "random", "random-p8", "random-hiera", SHIPPED)


def baseline(name: str, *, channels: int, preset: str, crop: int, mean, std, seed: int):
    "An encoder that has learned nothing from these images."
    from aoi_ssl.encoder import Encoder, PixelEncoder, ViTEncoder

    if name == SHIPPED:
        return Encoder.from_pretrained(name)
    if name == "random-hiera":
        from aoi_ssl.hiera import HieraEncoder

        return HieraEncoder(f"hiera-{preset}", channels=channels, image_size=crop, mean=mean, std=std, seed=seed)
    common = {"channels": channels, "patch_size": 8 if name.endswith("-p8") else 16, "mean": mean, "std": std}
    if name.startswith("pixels"):
        return PixelEncoder(**common)
    return ViTEncoder(preset, image_size=crop, seed=seed, **common)


# watching a run


def snapshots(network: str, shares: tuple[float, ...], kept: list) -> Callable:
    "A function for `on_step`: copies the weights of the encoder at each share of the budget, without stopping the run."
    left = list(shares)

    def on_step(encoder, spent: float) -> None:
        if left and spent >= left[0]:
            left.pop(0)
            weights = getattr(encoder, network).state_dict()
            kept.append((spent, {name: value.detach().clone() for name, value in weights.items()}))

    return on_step


# judging an encoder


class Judge:
    "Patch retrieval and a linear probe on devices that no encoder was trained on; all pictures stay on the device."

    def __init__(self, dataset, *, labelled: int, device: str, scores: tuple[str, ...] = Study.scores):
        import torch

        from aoi_ssl.data import class_names

        self.classes, self.device = class_names(dataset), device
        names = list(dataset["device"])
        self.rows = {name: [i for i, n in enumerate(names) if n == name] for name in sorted(set(names))}
        self.banks = {name: dataset.select(rows[:labelled]) for name, rows in self.rows.items()}
        items = [dataset[i] for rows in self.rows.values() for i in rows]
        self.images = torch.stack([item["image"] for item in items]).to(device)
        self.masks = torch.stack([item["mask"] for item in items]).to(device)
        per = [len(rows) for rows in self.rows.values()]
        self.place = torch.cat([torch.arange(n) for n in per]).to(device)
        self.owner = torch.repeat_interleave(torch.arange(len(per)), torch.tensor(per)).to(device)
        self.labelled, self.scores = labelled, scores

    def __call__(self, encoder) -> dict:
        "All figures of an encoder."
        import torch

        from aoi_ssl.benchmark import ABLATION
        from aoi_ssl.distill import collapse_figures

        ways = {"retrieval": lambda: self.retrieve(encoder), "whitened": lambda: self.retrieve(encoder, **ABLATION["whitened"]),
                "aligned": lambda: self.retrieve(encoder, method="aligned"), "probe": lambda: self.probe(grid, encoder.patch_size)}

        encoder.to(self.device).eval()
        encoder.encode(self.images[:1])
        start = clock(self.device)
        grid = encoder.encode(self.images).float()
        cost = 1000 * (clock(self.device) - start) / len(self.images)
        with torch.no_grad():
            figures = {name: ways[name]() for name in self.scores}
            collapse = collapse_figures(grid.flatten(1, 2))
        flat = {
            f"{name}_{c}": round(v, 4) for name, iou in figures.items() for c, v in zip(self.classes, iou, strict=True)
        }
        means = {name: round(sum(iou) / len(iou), 4) for name, iou in figures.items()}
        return means | flat | {k: round(v, 4) for k, v in collapse.items()} | {"encode_ms": round(cost, 3)}

    def retrieve(self, encoder, **recipe) -> list[float]:
        "IoU of each class: a bank (k = 5, the paper's) of the labelled pictures of each device, counts summed over all devices."
        from aoi_ssl.metrics import binary_counts
        from aoi_ssl.predict import to_mask
        from aoi_ssl.retrieval import build_bank

        counts = 0
        for number, bank_images in enumerate(self.banks.values()):
            with warnings.catch_warnings(action="ignore"):
                bank = build_bank(bank_images, encoder, k=5, **{"method": "paper"} | recipe)
            asked = (self.owner == number) & (self.place >= self.labelled)
            found = to_mask(bank.predict(self.images[asked]), bank.thresholds)
            counts = counts + binary_counts(found, self.masks[asked])
        return (counts[:, 0] / counts.sum(1).clamp(min=1)).tolist()

    def probe(self, grid, patch_size: int) -> list[float]:
        """IoU of each class: ridge regression from embeddings to the share of the patch that a class covers, then cut.

        Strength and thresholds come from the last labelled picture of each device, predicted from the others."""
        import torch
        from torch.nn import functional as F

        share = F.avg_pool2d(self.masks.float(), patch_size, ceil_mode=True, count_include_pad=False).permute(
            0, 2, 3, 1
        )
        fit, check = self.place < self.labelled - 1, self.place == self.labelled - 1
        rated = []
        for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
            curve = patch_iou(ridge(grid, share, fit, check, strength), share[check])
            rated.append((curve.amax(0).mean().item(), strength, curve.argmax(0)))
        _, strength, best = max(rated, key=lambda r: r[0])
        learn, asked = self.place < self.labelled, self.place >= self.labelled
        curve = patch_iou(ridge(grid, share, learn, asked, strength), share[asked])
        return curve[best, torch.arange(len(best), device=best.device)].tolist()


def ridge(grid, share, learn, asked, strength: float):
    "Predicted shares of the asked pictures (n, h, w, K), learned on others; strength as a share of n."
    import torch

    x, y = grid[learn].flatten(0, 2).double(), share[learn].flatten(0, 2).double()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, offset = (x - mean) / std, y.mean(0)
    gram = x.T @ x / len(x) + strength * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, x.T @ (y - offset) / len(x))
    return ((grid[asked].double() - mean) / std) @ weights + offset


def patch_iou(predicted, share):
    "IoU over pixels (T, K) if whole patches are filled where the prediction is above each of THRESHOLDS."
    from aoi_ssl.metrics import THRESHOLDS

    filled = predicted[None] > THRESHOLDS.to(predicted)[:, None, None, None, None]
    hit, alarm = ((filled * part).sum(dim=(1, 2, 3)) for part in (share, 1 - share))
    return hit / (share.sum(dim=(0, 1, 2)) + alarm).clamp(min=1e-9)


def clock(device: str) -> float:
    "Seconds, after the device has done what it was told."
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


# the table


class Table:
    "A CSV file that grows by a row at a time; a run that was killed goes on after its last whole objective."

    def __init__(self, path: Path):
        self.path = path
        self.rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []

    def has(self, run: str, seed: int) -> bool:
        "Whether a run was judged at its end; one that does not train has no other."
        return any(r["run"] == run and int(r["seed"]) == seed and float(r["share"]) in (0, 1) for r in self.rows)

    def drop(self, run: str, seed: int) -> None:
        self.rows = [r for r in self.rows if not (r["run"] == run and int(r["seed"]) == seed)]

    def add(self, row: dict) -> None:
        self.rows.append({k: str(v) for k, v in row.items()})
        names = list(dict.fromkeys(name for r in self.rows for name in r))
        aside = self.path.with_suffix(".tmp")
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(aside, self.path)


def summary(rows: list[dict]) -> str:
    "Mean and standard deviation over the seeds at the end of the budget."
    import pandas as pd

    frame = pd.DataFrame(rows)
    names = [n for n in frame if n not in ("run", "machine", "budget")]
    frame[names] = frame[names].apply(pd.to_numeric, errors="coerce")
    last = frame[frame["share"].isin([0, 1])].groupby("run", sort=False)
    scores = [name for name in ("retrieval", "whitened", "aligned", "probe") if name in frame]
    beside = ("steps", "images_per_second", "effective_rank", "feature_std", "information")
    shown = [name for name in (*scores, *beside, "encode_ms") if name in frame]
    mean, std = last[shown].mean(), last[shown].std()
    for name in scores:
        mean[name] = [f"{m:.3f} ± {s:.3f}" for m, s in zip(mean[name], std[name], strict=True)]
    return mean.round(3).to_string()


def run(name: str, learn, seed: int, args, budget: str, kept: list):
    "Train by a recipe; its result."
    dataset, store = learn
    recipe = RECIPES[name]
    if recipe.devices is not None:
        dataset, store = first_devices(dataset, recipe.devices, args.crop)
    common = {"twins": undrifted(args)} if recipe.twins else {}
    common |= {
        "encoder": args.encoder,
        "crop": args.crop,
        "batch_size": args.batch_size,
        "budget": budget,
        "crops": store,
        "on_step": snapshots(recipe.network, STUDIES[args.study].shares, kept),
        "progress": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        return recipe.train(dataset, seed=seed, **common, **recipe.own)


def first_devices(dataset, count: int, crop: int) -> tuple:
    "The images of the first devices, with a store of their own."
    from aoi_ssl.crops import store_images

    names = list(dataset["device"])
    chosen = set(sorted(set(names))[:count])
    few = dataset.select([i for i, name in enumerate(names) if name in chosen])
    return few, store_images(few, cell=crop)


def budget_of(name: str, args) -> str:
    "What a run may spend: CPU seconds, on a GPU seconds on the wall, or steps."
    times = RECIPES[name].budget
    if args.steps:
        return f"{max(1, round(times * args.steps))} steps"
    return f"{times * args.seconds} {'cpu ' if args.device == 'cpu' else ''}s"


def train(name: str, learn, judge: Judge, table: Table, seed: int, args) -> None:
    "One run, one seed: a row for each share of the budget."
    recipe, kept, budget = RECIPES[name], [], budget_of(name, args)
    result = run(name, learn, seed, args, budget, kept)
    network, history = getattr(result.encoder, recipe.network), result.history
    encoders = {name: result.encoder}
    for other, reading in recipe.also.items():
        encoders[other] = type(result.encoder)(network, mean=result.encoder.mean, std=result.encoder.std, **reading)
    for each in encoders:
        table.drop(each, seed)
    for share, (spent, weights) in zip(STUDIES[args.study].shares, kept, strict=True):
        network.load_state_dict(weights)
        shared = progress_so_far(history, spent, args, recipe)
        for each, encoder in encoders.items():
            if share < 1 and encoder.patch_size < 16:
                continue
            row = {"run": each, "seed": seed, "share": share} | shared | judge(encoder)
            row |= {
                "parameters": sum(p.numel() for p in network.parameters()),
                "budget": budget,
                "machine": machine(judge.device),
            }
            table.add(row)
            print("  ".join(f"{k} {row[k]}" for k in SHOWN if k in row), flush=True)


def progress_so_far(history, spent: float, args, recipe: Recipe) -> dict:
    "What a run had done, and how it looked, when a share of its budget was spent."
    done = history.step < round(spent * len(history)) if args.steps else history.seconds <= spent * recipe.budget * args.seconds
    part = history[done] if done.any() else history[:1]
    seconds = part.seconds.iloc[-1]
    figures = {"seconds": round(seconds, 2), "steps": len(part), "images_per_second": round(len(part) * args.batch_size / seconds, 1),
               "loss": round(part.loss.tail(20).mean(), 5)}  # fmt: skip
    watched = {f: part[f].dropna() for f in ("teacher_entropy", "information", "collapsed") if f in part}
    return figures | {f: round(values.iloc[-1], 4) for f, values in watched.items() if len(values)}


SHOWN = ("run", "seed", "share", "steps", "loss", "retrieval", "whitened", "aligned", "probe", "effective_rank", "feature_std")


def machine(device: str) -> str:
    "What it ran on."
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def rendered(args) -> tuple:
    "The images to learn from, with their store, and those to judge on; rendered once."
    from aoi_ssl.crops import store_images
    from aoi_ssl.data import load_folder
    from aoi_ssl.synthetic import render_folder

    judge = args.work / f"judge-{args.validation_devices}x{args.queries}-{args.size}-{args.drift}"
    if not judge.exists():
        render_folder(judge, new_devices=args.validation_devices, images=3 + args.queries, seed=12, size=args.size, drift=args.drift,
                      workers=args.workers, devices=0, progress=False)  # fmt: skip
    images = to_learn_from(args, "learn", args.drift)
    return (images, store_images(images, cell=args.crop)), next(iter(load_folder(judge).values()))


def to_learn_from(args, part: str, drift):
    "Pictures without labels, rendered once."
    from aoi_ssl.data import load_folder
    from aoi_ssl.synthetic import render_folder

    folder = args.work / f"{part}-{args.devices}x{args.images}-{args.size}-{args.drift}"
    if not folder.exists():
        render_folder(folder, devices=0, new_devices=0, pretrain_devices=args.devices, images=args.images, seed=11, size=args.size,
                      drift=drift, workers=args.workers, progress=False)  # fmt: skip
    return load_folder(folder)["pretrain"]


def undrifted(args):
    "The pictures to learn from once more, without drift of light, focus and material: the twins of each."
    from dataclasses import replace

    from aoi_ssl.crops import store_images
    from aoi_ssl.synthetic import Drift

    twins = to_learn_from(args, "twins", replace(Drift.of(args.drift), light=0, focus=0, material=0))
    return store_images(twins, cell=args.crop)


def given(args, study: Study) -> tuple:
    "As `rendered`, from a folder: the first pictures of most devices, and of the last ones those that are labelled or segmented."
    from datasets import concatenate_datasets

    from aoi_ssl.benchmark import by_device
    from aoi_ssl.crops import store_images
    from aoi_ssl.data import load_folder

    whole = concatenate_datasets(list(load_folder(study.data, classes=list(study.classes)).values()))
    learn = list(by_device(whole).values())
    first = lambda parts, most: concatenate_datasets([part.select(range(len(part))[:most]) for part in parts])
    images, last = first(learn[:-args.validation_devices], args.images), learn[-args.validation_devices:]
    return (images, store_images(images, cell=args.crop)), first(last, study.labelled + args.queries)


def missing(table: Table, args) -> tuple[list, list]:
    "What the table lacks: encoders that are not trained here and runs, each by name and seed."
    names, untaught = ([name for name in listed.split(",") if name] for listed in (args.runs, args.baselines))
    once = [(name, seed) for name in untaught for seed in range(args.seeds if name.startswith("random") else 1)]
    runs = [(name, seed) for seed in range(args.seeds) for name in names if seed < RECIPES[name].seeds]
    return tuple([job for job in jobs if not table.has(*job)] for jobs in (once, runs))


def judge_untaught(name: str, seed: int, judge: Judge, table: Table, store, args) -> None:
    "The row of an encoder that is not trained here."
    same = {"channels": judge.images.shape[1], "preset": args.encoder, "crop": args.crop}
    encoder = baseline(name, **same, mean=store.mean, std=store.std, seed=seed)
    row = {"run": name, "seed": seed, "share": 0, "steps": 0, "seconds": 0}
    table.add(row | judge(encoder) | {"machine": machine(judge.device)})


def fill(table: Table, args) -> None:
    "Make the rows that the table lacks; where it lacks none, not even a picture is rendered."
    untaught, runs = missing(table, args)
    if not (untaught or runs):
        return
    study = STUDIES[args.study]
    learn, validation = given(args, study) if study.data else rendered(args)
    judge = Judge(validation, labelled=study.labelled, device=args.device, scores=study.scores)
    print(f"{len(learn[0])} images to learn from, {len(validation)} to judge on; {machine(args.device)}", flush=True)
    for name, seed in untaught:
        judge_untaught(name, seed, judge, table, learn[1], args)
    if args.device == "cuda":  # what is compiled and loaded on first use is not part of anybody's budget
        for name in dict(runs):
            judge(run(name, learn, 0, args, "3 steps", []).encoder)
    for name, seed in runs:
        train(name, learn, judge, table, seed, args)


def main() -> None:
    "Run what is not in the table yet, and print it."
    args = options()
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        (args.out / f"{args.study}.csv").unlink(missing_ok=True)
    table = Table(args.out / f"{args.study}.csv")
    fill(table, args)
    print(f"\n{summary(table.rows)}\n\nIn {table.path}.")


if __name__ == "__main__":
    main()
