"""All the tests, in order: `make test` runs this. Each step has a heading and a time; a failure does not stop the rest.

The tests keep one core busy; docs, wheel and browser run meanwhile on another, and are shown after them.
The last line is `N passed, N failed, N skipped`: checks, notebooks and tests together."""

import argparse
import filecmp
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tree import ROOT, copy_source

BIN = Path(sys.executable).parent
REPORTS = ROOT / "build" / "reports"
TOTAL: Counter = Counter()
FAILED: list[str] = []


def tool(name: str) -> str:
    "The path of a command of this environment."
    return str(BIN / name)


def sh(*command: str | Path, cwd: Path = ROOT, **settings: str) -> int:
    "Run a command, what it prints shown; returns its exit code."
    sys.stdout.flush()
    settings = {"PYTHONDONTWRITEBYTECODE": "1", **settings}
    return subprocess.run([str(c) for c in command], cwd=cwd, env={**os.environ, **settings}).returncode


def verdict(name: str, ok: bool, remedy: str = "") -> None:
    "Count one check, and print it."
    TOTAL["passed" if ok else "failed"] += 1
    if not ok:
        FAILED.append(name)
    print(f"  {'ok    ' if ok else 'FAILED'}  {name}" + (f". {remedy}" if remedy and not ok else ""), flush=True)


@contextmanager
def heading(number: int, title: str) -> Iterator[None]:
    "Print a heading before a step and its time after it; an error is the step's failure, not the end."
    print(f"\n== {number}. {title}", flush=True)
    start = time.perf_counter()
    try:
        yield
    except Exception as e:
        verdict(f"{title}: {type(e).__name__}: {e}", False)
    print(f"   {time.perf_counter() - start:.0f} s", flush=True)


def differences(a: Path, b: Path, pattern: str) -> list[str]:
    "Names of the files of two folders that differ or are only in one of them."
    names = {path.relative_to(folder) for folder in (a, b) for path in folder.rglob(pattern)}
    names = {n for n in names if not any(part.startswith(".") for part in n.parts)}
    same = lambda n: (a / n).is_file() and (b / n).is_file() and filecmp.cmp(a / n, b / n, shallow=False)
    return sorted(str(n) for n in names if not same(n))


def house() -> None:
    "Style; notebooks clean and in step with modules and README; every module from a notebook. On a copy."
    verdict("ruff", sh(tool("ruff"), "check", "--quiet", "--no-cache") == 0)
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_source(Path(folder) / "aoi_ssl")
        subprocess.run([tool("nbdev_clean")], cwd=copy, check=True)
        unclean = differences(ROOT / "nbs", copy / "nbs", "*.ipynb")
        verdict("notebooks are clean", not unclean, f"Run `make prepare`: {', '.join(unclean)}")
        for path in (copy / "aoi_ssl").glob("*.py"):
            if path.name != "__init__.py":
                path.unlink()
        subprocess.run([tool("nbdev_export")], cwd=copy, check=True)
        for path in (ROOT / "aoi_ssl").glob("*.py"):  # what no notebook makes is an orphan
            if path.name != "__init__.py" and not (copy / "aoi_ssl" / path.name).exists():
                verdict(f"aoi_ssl/{path.name} comes from a notebook", False)
        stale = differences(ROOT / "aoi_ssl", copy / "aoi_ssl", "*.py")
        verdict("modules are in step with the notebooks", not stale, f"Run `make prepare`: {', '.join(stale)}")
    verdict("README.md is in step with nbs/index.ipynb", sh(sys.executable, "tools/make_readme.py", "--check") == 0)


def notebooks() -> None:
    "Run every notebook, two at a time, each on one core."
    names = [p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(x.startswith((".", "_")) for x in p.parts[-3:])]
    command = [tool("nbdev_test"), "--n_workers", str(min(2, os.cpu_count() or 1)), "--timing"]
    settings = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    print("\n".join("  " + line for line in run.stdout.splitlines()), flush=True)
    if run.returncode:
        print(run.stderr[-8000:], flush=True)
    bad = [n for n in re.findall(r"^\t(\S+\.ipynb)", run.stderr, re.M)] if run.returncode else []
    bad = bad or (["nbdev_test"] if run.returncode else [])
    TOTAL["failed"] += len(bad)
    TOTAL["passed"] += len(names) - len(bad)
    FAILED.extend(bad)


def pytest(*arguments: str, report: str, **settings: str) -> None:
    "Run pytest on what the arguments name, and add its counts to the total."
    file = REPORTS / f"{report}.xml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    common = ["-q", "--durations=5", "-p", "no:cacheprovider", f"--junitxml={file}"]
    code = sh(sys.executable, "-m", "pytest", *common, *arguments, **settings)
    count = Counter()
    for suite in ET.parse(file).getroot().iter("testsuite") if file.exists() else []:
        count.update({key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")})
    failed = count["failures"] + count["errors"]
    TOTAL["failed"] += failed
    TOTAL["skipped"] += count["skipped"]
    TOTAL["passed"] += count["tests"] - failed - count["skipped"]
    if failed:
        FAILED.append(f"{failed} of pytest {' '.join(a for a in arguments if not a.startswith('-'))}")
    elif code:
        verdict(f"pytest ended with exit code {code}", False)


def docs() -> None:
    "Build the docs site and follow its links."
    built = sh(sys.executable, "tools/build_docs.py") == 0
    verdict("docs site is built", built)
    if built:
        verdict("docs have no broken link and load from no other host", sh(sys.executable, "tools/check_links.py") == 0)


def environment(folder: Path, *packages: str | Path) -> tuple[Path, bool]:
    "Make an environment with these packages and what they need, pinned; its Python, and whether all could be installed."
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-compile", "--no-input"]
    return python, sh(*pip, "--constraint", ROOT / "constraints.txt", *packages) == 0


def build_wheel(folder: Path) -> Path | None:
    "Build the sdist, and from it the wheel, in an environment that has what pyproject.toml names and nothing else."
    copy = copy_source(folder / "source")
    needs = tomllib.loads((copy / "pyproject.toml").read_text())["build-system"]["requires"]
    python, _ = environment(folder / "builder", "build", *needs)
    done = subprocess.run([python, "-m", "build", "--no-isolation", "--outdir", folder / "dist"], cwd=copy, capture_output=True)
    built = list((folder / "dist").glob("*.whl"))
    verdict("sdist and wheel are built", bool(built), done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:])
    return built[0] if built else None


def wheel() -> None:
    "Build sdist and wheel, install the wheel in an empty environment, and use it there."
    with tempfile.TemporaryDirectory(prefix="aoi-wheel-") as folder:
        folder = Path(folder)
        built = build_wheel(folder)
        if built is None:
            return
        python, installed = environment(folder / "empty", built)
        verdict("the wheel installs in an empty environment", installed)
        script = (
            "import importlib.util as u, importlib, pkgutil, pathlib, aoi_ssl\n"
            f"assert not pathlib.Path(aoi_ssl.__file__).is_relative_to({str(ROOT)!r}), aoi_ssl.__file__\n"
            "names = [m.name for m in pkgutil.iter_modules(aoi_ssl.__path__)]\n"
            "for name in names: importlib.import_module('aoi_ssl.' + name)\n"
            "bad = [n for n in ('nbdev', 'fastcore', 'torchvision', 'timm') if u.find_spec(n)]\n"
            "assert not bad, bad\n"
            "print(f'  aoi_ssl {aoi_ssl.__version__}: {len(names)} modules imported')\n"
        )
        (folder / "elsewhere").mkdir()
        verdict("every module imports there, without nbdev", sh(python, "-c", script, cwd=folder / "elsewhere") == 0)
        command = [python.parent / "aoi", "--help"]
        done = subprocess.run(command, cwd=folder / "elsewhere", capture_output=True, text=True)
        verdict("aoi --help", done.returncode == 0 and "demo" in done.stdout, done.stderr[-2000:])


def browser() -> None:
    "The notebooks in JupyterLab and the docs site, in a real browser."
    found = any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    if not found and not os.environ.get("AOI_REQUIRE_BROWSER"):
        print("  SKIPPED: no Chromium on PATH, so nothing was tested in a browser (Debian: apt-get install chromium).")
        TOTAL["skipped"] += 1
        return
    pytest("tests/test_browser.py", "tests/test_browser_widgets.py", report="browser", AOI_REQUIRE_BROWSER="1")


STEPS: dict[str, tuple[str, Callable[[], None]]] = {
    "house": ("Style, and everything in step with the notebooks", house),
    "notebooks": ("Notebooks run", notebooks),
    "tests": ("Tests", lambda: pytest("tests", "--ignore-glob=tests/test_browser*.py", report="tests")),
    "docs": ("Docs", docs),
    "wheel": ("The wheel in an empty environment", wheel),
    "browser": ("In a browser", browser),
}


BESIDE = ("docs", "wheel", "browser")  # run in turn beside "tests"


def run_steps(names: list[str], numbers: dict[str, int]) -> None:
    "One step after the other."
    for name in names:
        with heading(numbers[name], STEPS[name][0]):
            STEPS[name][1]()


def run_aside(names: list[str], numbers: dict[str, int], told: Path, counts: multiprocessing.SimpleQueue) -> None:
    "In a process of its own: run steps, write what they print to a file, hand over the counts."
    with open(told, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    TOTAL.clear()
    FAILED.clear()
    run_steps(names, numbers)
    counts.put((TOTAL, FAILED))


@contextmanager
def meanwhile(names: list[str], numbers: dict[str, int]) -> Iterator[None]:
    "Run steps aside; at the end show what they printed and print, and add their counts to the total."
    with tempfile.TemporaryDirectory(prefix="aoi-check-") as folder:
        told, counts = Path(folder) / "told.txt", multiprocessing.SimpleQueue()
        told.touch()
        process = multiprocessing.Process(target=run_aside, args=(names, numbers, told, counts))
        process.start()
        yield
        with open(told) as shown:
            while process.is_alive():
                print(shown.read(), end="", flush=True)
                process.join(0.5)
            print(shown.read(), end="", flush=True)
        total, failed = ({"failed": 1}, [f"{', '.join(names)}: ended early"]) if counts.empty() else counts.get()
        TOTAL.update(total)
        FAILED.extend(failed)


def run_all(names: list[str]) -> None:
    "The steps in order; where there is a second core, those that may run beside the tests do so."
    numbers = {name: number for number, name in enumerate(names, 1)}
    beside = [name for name in names if name in BESIDE]
    if "tests" not in names or not beside or (os.cpu_count() or 1) < 2:
        return run_steps(names, numbers)
    run_steps([name for name in names if name not in (*BESIDE, "tests")], numbers)
    with meanwhile(beside, numbers):
        run_steps(["tests"], numbers)


def close(start: float) -> int:
    "Print the time, what failed, and the counts; the exit code."
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"\nAll of it took {minutes} min {seconds} s.")
    for name in FAILED:
        print(f"FAILED: {name}")
    skipped = f", {TOTAL['skipped']} skipped" if TOTAL["skipped"] else ""
    print(f"{TOTAL['passed']} passed, {TOTAL['failed']} failed{skipped}")
    return int(bool(TOTAL["failed"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"only these, of: {', '.join(STEPS)}")
    chosen = parser.parse_args().steps or list(STEPS)
    if unknown := set(chosen) - set(STEPS):
        parser.error(f"unknown step {', '.join(unknown)}; expected some of: {', '.join(STEPS)}")
    start = time.perf_counter()
    run_all(chosen)
    sys.exit(close(start))
