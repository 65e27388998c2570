"""The figures of the house: rendering, images a second on one core, and the import, as a table and as JSON."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def wall(code: str) -> float:
    "Seconds that a new interpreter takes to run some code."
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    return time.perf_counter() - start


def import_seconds(runs: int = 5) -> float:
    "Median seconds of `import aoi_ssl` over the median of a bare interpreter; a first run warms the disk cache."
    wall("import aoi_ssl")
    pairs = [(wall("pass"), wall("import aoi_ssl")) for _ in range(runs)]
    bare, full = (statistics.median(times) for times in zip(*pairs, strict=True))
    return max(full - bare, 0.0)


def rendering() -> float:
    "Images of 512 x 512 a second on one core, as tools/bench_synthetic.py measures it, in a process with one thread."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tools")}
    code = "import bench_synthetic; print(bench_synthetic.bench())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return float(run.stdout.split()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench.json", help="where the JSON goes")
    out = parser.parse_args().out
    rows = [  # what, figure, unit, promise, kept
        ("import aoi_ssl", (seconds := import_seconds()), "s", "below 0.5", seconds < 0.5),
        ("rendering, 512 x 512, one core", (rate := rendering()), "images/s", "at least 2", rate >= 2),
    ]
    for name, figure, unit, promise, kept in rows:
        print(f"{name:32} {figure:8.3f} {unit:10} promised: {promise:12} {'kept' if kept else 'NOT KEPT'}")
    names = ("name", "figure", "unit", "promise", "kept")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2) + "\n", encoding="utf-8")
    print(f"Written to {out}.")
