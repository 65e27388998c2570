"""Pre-training against the plain loop of a tutorial: crops a second, memory, and what a step waits for.

    python tools/bench_pretrain.py

The rival is written as the ViTMAE example of transformers does it: a dataset that opens the PNG files of an image each time it is
asked, random resized crops, and a DataLoader. Model, optimiser, batch and precision are the same. Each row has a process of its own with
one thread, and is timed in the CPU seconds of that process: on a busy machine they are those of a quiet one. Workers spend CPU seconds of
their own, so all rows also have their rate on the clock on the wall, which wants a machine that does nothing else."""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CROP, BATCH, WARM = 224, 32, 2  # pixels, crops in a step, steps that are not counted
ROWS = {  # what is timed: name -> options of `ours` or `plain`
    "plain loop": {"plain": True},
    "plain loop, 2 workers": {"plain": True, "workers": 2},
    "pretrain": {},
    "pretrain, images decoded for each crop": {"decode": True},
    "pretrain, no augmentation": {"augment": False},
    "pretrain, bf16": {"precision": "bf16"},
}


class Watch:
    "Seconds on a clock that the parts of a step take."

    def __init__(self, clock=time.process_time):
        self.clock, self.spent, self.started, self.ends, self.walls = clock, {}, {}, [], []

    def start(self, name: str) -> None:
        self.started[name] = self.clock()

    def stop(self, name: str) -> None:
        self.spent.setdefault(name, []).append(self.clock() - self.started.pop(name))

    def within(self, name: str, call):
        "The function, timed."

        def timed(*args, **options):
            self.start(name)
            try:
                return call(*args, **options)
            finally:
                self.stop(name)

        return timed

    def follow(self) -> None:
        "Time the forward pass of every ViTMAE and every step of an optimiser, and note when a step ends."
        from torch.nn.modules import module
        from torch.optim import optimizer
        from transformers import ViTMAEForPreTraining

        def forward(moment):
            return lambda model, *rest: moment("forward") if isinstance(model, ViTMAEForPreTraining) else None

        def end(*rest):
            self.stop("optimiser")
            self.ends.append(self.clock())
            self.walls.append(time.perf_counter())

        module.register_module_forward_pre_hook(forward(self.start))
        module.register_module_forward_hook(forward(self.stop))
        optimizer.register_optimizer_step_pre_hook(lambda *rest: self.start("optimiser"))
        optimizer.register_optimizer_step_post_hook(end)

    def table(self) -> dict:
        "Milliseconds of a step and of its parts, after the warm-up; what is left is the backward pass and bookkeeping."
        steps = len(self.ends) - WARM
        step = (self.ends[-1] - self.ends[WARM - 1]) / steps
        parts = {name: sum(times[-steps:]) / steps for name, times in self.spent.items()}
        parts["backward and the rest"] = step - sum(parts.values())
        return {"step_ms": round(1000 * step, 1)} | {f"{name}_ms": round(1000 * part, 1) for name, part in parts.items()}

    def on_the_wall(self) -> float:
        "Crops a second, after the warm-up."
        return round(BATCH * (len(self.walls) - WARM) / (self.walls[-1] - self.walls[WARM - 1]), 1)


# the rival


class Files:
    "A map-style dataset: each item is read from its two PNG files, cropped, resized, flipped and normalised."

    def __init__(self, folder: Path, mean, std):
        self.pairs = [(p, p.with_name(p.name.replace("buffer0", "buffer1"))) for p in sorted(folder.rglob("*_buffer0.png"))]
        self.mean, self.std = mean[:, None, None], std[:, None, None]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int):
        import numpy as np
        import torch
        from PIL import Image

        lights = [np.asarray(Image.open(path)) for path in self.pairs[index]]
        image = torch.from_numpy(np.stack(lights)).float() / 255
        side = int(min(image.shape[1:]) * (0.2 + 0.8 * torch.rand(()).item()) ** 0.5)
        y, x = (int(torch.randint(0, size - side + 1, ())) for size in image.shape[1:])
        cut = image[None, :, y : y + side, x : x + side]
        cut = torch.nn.functional.interpolate(cut, size=CROP, mode="bicubic", antialias=True)[0]
        cut = cut.flip(-1) if torch.rand(()) < 0.5 else cut
        return (cut - self.mean) / self.std


def plain(folder: Path, steps: int, watch: Watch, *, workers: int = 0) -> list[float]:
    "The loop of the example, in its order; the losses."
    import torch
    from torch.utils.data import DataLoader, RandomSampler
    from transformers import ViTMAEForPreTraining, get_cosine_schedule_with_warmup

    from aoi_ssl.data import channel_stats
    from aoi_ssl.encoder import mae_config, new_vit

    model = new_vit(mae_config("tiny", image_size=CROP), model=ViTMAEForPreTraining)
    files = Files(folder, *channel_stats(images_of(folder)))
    sampler = RandomSampler(files, replacement=True, num_samples=steps * BATCH)
    loader = iter(DataLoader(files, batch_size=BATCH, sampler=sampler, num_workers=workers))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule, losses = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps), []
    for _ in range(steps):
        watch.start("data")
        pixels = next(loader)
        watch.stop("data")
        optimizer.zero_grad()
        loss = model(pixel_values=pixels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


# the package


def images_of(folder: Path):
    from aoi_ssl.data import load_folder

    return load_folder(folder)["pretrain"]


def decode_each(store, dataset) -> None:
    "Let a store open the files of each crop again, in place of reading its own pixels."
    import torch

    from aoi_ssl.crops import crop_places
    from aoi_ssl.data import native_item

    def batch(step, batch_size, *, size, part=slice(None)):
        found = []
        for i, y, x in zip(*(place[part].tolist() for place in crop_places(store, step, batch_size, size)), strict=True):
            found.append(torch.from_numpy(native_item(dataset, i, labels=False)["image"][:, y : y + size, x : x + size].copy()))
        return torch.stack(found).float().div_(255)

    store.batch = batch


def ours(folder: Path, steps: int, watch: Watch, *, decode=False, augment=True, precision="fp32", crop=CROP, batch=BATCH) -> list[float]:
    "The package's own loop; the losses."
    from aoi_ssl.augment import Augment
    from aoi_ssl.crops import store_images
    from aoi_ssl.pretrain import pretrain

    class Timed(Augment):
        __call__ = watch.within("augment", Augment.__call__)

    images = images_of(folder)
    store = store_images(images, cell=crop)
    if decode:
        decode_each(store, images)
    store.batch = watch.within("data", store.batch)
    options = {"crop": crop, "batch_size": batch, "precision": precision, "crops": store, "progress": False}
    history = pretrain(images, encoder="tiny", augment=Timed() if augment else False, budget=f"{steps} steps", **options).history
    return history.loss.tolist()


# one process for each row


def row(name: str, folder: Path, steps: int) -> dict:
    "Measure one row, in this process. What workers decode is CPU time of their own; what is waited for them shows on the wall."
    options = dict(ROWS[name])
    run, workers = plain if options.pop("plain", False) else ours, options.get("workers", 0)
    watch = Watch(time.perf_counter if workers else time.process_time)
    watch.follow()
    losses = run(folder, steps, watch, **options)
    assert all(loss == loss for loss in losses)
    found, (own, children) = watch.table(), map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    shown = {"row": name, "crops_per_second": round(1000 * BATCH / found["step_ms"], 1), "wall_crops_per_second": watch.on_the_wall(),
             **found, "waiting": round(found["data_ms"] / found["step_ms"], 4), "peak_MiB": round(own.ru_maxrss / 1024)}  # fmt: skip
    if workers:  # its parts are not those of one process
        shown = {name: shown[name] for name in ("row", "wall_crops_per_second", "waiting", "peak_MiB")}
        spent = 1000 * (children.ru_utime + children.ru_stime) / steps
        shown |= {"workers_ms": round(spent, 1), "worker_MiB": round(children.ru_maxrss / 1024)}
    return shown


def bf16_check(folder: Path, steps: int) -> dict:
    "The same run in both precisions: their losses at the end, and the largest difference of a step."
    fp32, bf16 = (ours(folder, steps, Watch(), precision=p, crop=96, batch=16) for p in ("fp32", "bf16"))
    end = max(1, steps // 4)
    return {"steps": steps, "fp32_loss": round(sum(fp32[-end:]) / end, 5), "bf16_loss": round(sum(bf16[-end:]) / end, 5),
            "largest_difference": round(max(abs(a - b) for a, b in zip(fp32, bf16, strict=True)), 5)}  # fmt: skip


def inside(function: str, *arguments) -> dict:
    "The answer of a function of this file, from a process of its own."
    code = f"from pathlib import *; import json, bench_pretrain as b; print(json.dumps(b.{function}(*{arguments!r})))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")]), "OMP_NUM_THREADS": "1"}
    env["ACCELERATE_USE_CPU"] = "true"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def rendered(work: Path) -> Path:
    "48 pictures of 512 x 512 under two lights, rendered once."
    from aoi_ssl.synthetic import render_folder

    folder = work / "parts"
    if not folder.exists():
        render_folder(folder, devices=0, new_devices=0, pretrain_devices=12, images=4, seed=11, drift=0.3, workers=2, progress=False)
    return folder


def main() -> None:
    "Measure all rows, write them, print them."
    import pandas as pd
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of each row, two of them to warm up")
    parser.add_argument("--check-steps", type=int, default=60, help="of the two runs that compare losses in fp32 and bf16")
    parser.add_argument("--render-only", action="store_true", help="make the pictures and stop, so that timing begins at once later")
    parser.add_argument("--work", type=Path, default=ROOT / "build/bench_pretrain", help="folder of the pictures")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/experiments/results/bench_pretrain", help="folder of bench.json, bench.csv")
    args = parser.parse_args()
    folder = rendered(args.work)
    if args.render_only:
        return
    about = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "load_before": round(os.getloadavg()[0], 2)}
    rows = [inside("row", name, folder, args.steps) for name in ROWS]
    table = pd.DataFrame(rows)
    check = inside("bf16_check", folder, args.check_steps)
    args.out.mkdir(parents=True, exist_ok=True)
    about |= {"threads": 1, "torch": torch.__version__, "crop": CROP, "batch": BATCH, "steps": args.steps}
    (args.out / "bench.json").write_text(json.dumps({"about": about, "rows": rows, "bf16": check}, indent=1) + "\n")
    table.to_csv(args.out / "bench.csv", index=False)
    print(table.to_string(index=False), about, check, sep="\n")


if __name__ == "__main__":
    main()
