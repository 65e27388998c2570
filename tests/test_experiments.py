"What is to be measured anew is: no piece of an earlier run is read, and a run that was broken off goes on."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from from_tools import ROOT, load_tool

pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").exists() or not shutil.which("make"), reason="needs the source tree and make")

LOG = """#!/bin/sh
echo "$(basename "$0")" "$@" "AOI_RUNS=$AOI_RUNS" >> "$LOG"
[ -z "$BREAK" ] || case "$*" in *"$BREAK"*) exit 1;; esac
"""


@pytest.fixture
def tree(tmp_path):
    "The Makefile over two pages and three tables; python and jupyter only say how they were called."
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("venv/bin/python", "venv/bin/jupyter", "tools/install.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LOG if "venv" in name else "#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    for name in ("labels/labels.csv", "retrieval/report.csv", "ablation/boards.csv", "../a.ipynb", "../b.ipynb"):
        path = tmp_path / "nbs/experiments/results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return tmp_path


def make(tree: Path, *arguments: str, broken_at: str = "") -> tuple[bool, list[str]]:
    "Whether it ended well, and the commands of measuring that it ran."
    log, env = tree / "log", {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "AOI_"))}
    log.unlink(missing_ok=True)
    env |= {"LOG": str(log), "BREAK": broken_at}
    done = subprocess.run(["make", "experiments", "VENV=venv", *arguments], cwd=tree, env=env, capture_output=True, text=True)
    return done.returncode == 0, log.read_text().splitlines()


def tables(tree: Path) -> set[str]:
    "Names of the tables that are there."
    return {path.name for path in tree.rglob("*.csv")}


def test_a_fresh_measurement_reads_nothing_of_an_earlier_one(tree):
    ok, commands = make(tree, "FRESH=1", broken_at="nothing")
    assert ok and tables(tree) == {"boards.csv"}, "without boards, their counts are all that is kept"
    tools = [line for line in commands if line.startswith("python")]
    assert {line.split()[1] for line in tools} == {f"tools/{name}.py" for name in (
        "compare_objectives", "weights_eval", "bench_pretrain", "bench_retrieval", "bench_bank")}
    assert all("build/fresh/" in line for line in tools), "each has a folder of its own for what it keeps"
    pages = [line for line in commands if line.startswith("jupyter")]
    assert len(pages) == 2 and all(line.endswith(f"AOI_RUNS={tree}/build/fresh/runs") for line in pages)
    assert not (tree / "build/fresh").exists(), "the next one begins anew"


def test_a_fresh_measurement_that_was_broken_off_goes_on(tree):
    ok, commands = make(tree, "FRESH=1", broken_at="bench_bank.py lists")
    assert not ok and "bench_bank.py lists" in commands[-1] and (tree / "build/fresh").is_dir()
    (tree / "nbs/experiments/results/labels/labels.csv").write_text("measured")
    (tree / "build/fresh/kept").write_text("")
    ok, commands = make(tree, "FRESH=1", broken_at="b.ipynb")
    assert not ok and (tree / "build/fresh/kept").exists() and tables(tree) == {"boards.csv", "labels.csv"}
    assert any("bench_bank.py lists" in line for line in commands)
    ok, commands = make(tree)  # without saying it again
    assert ok and commands[-1].endswith("/build/fresh/runs") and not (tree / "build/fresh").exists()


def test_otherwise_the_pages_are_executed_from_what_is_kept(tree):
    ok, commands = make(tree)
    assert ok and [line.split()[0] for line in commands] == ["jupyter"] * 2 and commands[0].endswith("AOI_RUNS=")
    assert tables(tree) == {"labels.csv", "report.csv", "boards.csv"}


@pytest.mark.parametrize(("arguments", "steps"), [([], 0), (["--fresh"], 1)])
def test_parts_of_a_bench_are_measured_again_where_that_is_asked(tmp_path, monkeypatch, arguments, steps):
    bench = load_tool("bench_bank")
    measured = []
    part = lambda cache, what: bench.kept_frame(cache / f"{what}-8.csv", lambda: measured.append(what) or pd.DataFrame({"s": [2.0]}))
    monkeypatch.setattr(bench, "routes", lambda encoder, args: part(args.cache, "routing"))
    for what in ("routing", "lists"):
        tmp_path.joinpath(f"{what}-8.csv").write_text("s\n1.0\n")
    monkeypatch.setattr(sys, "argv", ["bench_bank", "routing", "--cache", str(tmp_path), "--out", str(tmp_path / "out"), *arguments])
    bench.main()
    assert len(measured) == steps and pd.read_csv(tmp_path / "out" / "routing.csv").s.tolist() == [1.0 + steps]
    assert (tmp_path / "lists-8.csv").exists(), "the parts of another table are its own"
