"What the house promises: a light import, honest requirements, documented verbs, tools that notice what they are for."

import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from configparser import ConfigParser
from pathlib import Path

import pytest
from from_tools import load_tool
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT / "aoi_ssl").glob("*.py") if not p.name.startswith("_"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pandas", "scipy", "kornia", "faiss", "nbdev", "fastcore")
FORBIDDEN = {"torchvision", "timm", "segmentation-models-pytorch", "lightly", "lightly-train", "albumentations"}

pytestmark = pytest.mark.skipif(not (ROOT / "settings.ini").exists(), reason="needs the source tree")


def settings() -> dict[str, str]:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[Requirement]:
    return [Requirement(r) for key in ("requirements", "faiss_requirements", "dev_requirements") for r in settings()[key].split()]


# the import


def test_import_is_light():
    code = f"import sys, aoi_ssl; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.split() == []


def test_every_verb_is_there():
    import aoi_ssl

    assert aoi_ssl.__all__
    for name in aoi_ssl.__all__:
        assert callable(getattr(aoi_ssl, name)), name


# versions and requirements


def test_versions_agree():
    import aoi_ssl

    version = settings()["version"]
    assert aoi_ssl.__version__ == version
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_pins_satisfy_requirements():
    pinned = pins()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no pin"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} but pinned {pinned[name]}"


def test_no_forbidden_requirement():
    named = {canonicalize_name(r.name) for r in requirements()} | {canonicalize_name(name) for name in pins()}
    assert not named & FORBIDDEN
    runtime = {canonicalize_name(Requirement(r).name) for r in settings()["requirements"].split()}
    assert not runtime & {"nbdev", "fastcore", "execnb", "pytest", "jupyterlab"}


def test_imports_are_declared():
    "What a module imports is in the requirements, so that an empty environment has it."
    declared = {canonicalize_name(Requirement(r).name) for r in settings()["requirements"].split()}
    declared |= {"faiss-cpu"}  # an extra: `search` does without it
    names = {"PIL": "pillow", "IPython": "ipywidgets", "traitlets": "ipywidgets", "huggingface_hub": "transformers", "yaml": "transformers",
             "faiss": "faiss-cpu"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            absolute = isinstance(node, ast.ImportFrom) and not node.level
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if absolute else []
            for top in {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {"aoi_ssl"}:
                assert canonicalize_name(names.get(top, top)) in declared, f"{path.name} imports {top}"


def siblings(source: str) -> set[str]:
    "The modules of aoi_ssl that one of them imports, wherever in it and however that is written."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(part for part in ("aoi_ssl" * bool(node.level), node.module) if part)
            found |= {start} | {f"{start}.{a.name}" for a in node.names}
    modules = {path.stem for path in MODULES}
    return {name.split(".")[1] for name in found if name.startswith("aoi_ssl.")} & modules


@pytest.mark.parametrize(
    "line",
    [
        "from .report import write_report",
        "from . import report",
        "from aoi_ssl import report",
        "from aoi_ssl.report import write_report",
        "import aoi_ssl.report as r",
        "def f():\n    from .report import write_report",
    ],
)
def test_the_street_is_seen_in_every_kind_of_import(line):
    assert siblings(f"import os\nfrom torch import nn\n{line}\n") == {"report"}


def test_street_runs_one_way():
    "A module imports only modules that come before it in the street."
    number = {}
    for path in NOTEBOOKS:
        if path.parent.name == "api":
            number[path.stem.split("_", 1)[1]] = int(path.stem.split("_", 1)[0])
    imports = {path.stem: siblings(path.read_text(encoding="utf-8")) for path in MODULES}
    assert {"core", "data", "tiles"} <= imports["predict"]
    for module, names in imports.items():
        late = {name for name in names if number[name] >= number[module]}
        assert not late, f"{module} imports {', '.join(sorted(late))}, which comes after it"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_what_modules_share_is_public(path):
    "A name with an underscore is its module's own business: nothing tells a reader that another depends on it."
    found = [
        f"{node.module}.{a.name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("aoi_ssl"))
        for a in node.names
        if a.name.startswith("_")
    ]
    assert not found


def test_no_registry_host():
    "Packages are named, never the hosts they come from: an index is the user's choice (TORCH_INDEX, pip's settings)."
    names = ("py" "pi.org", "python" "hosted.org", "py" "torch.org/whl", "npm" "js.org", "deb" "ian.org/debian")
    for file in load_tool("tree").source_files():
        text = (ROOT / file).read_bytes().decode("utf-8", "ignore")
        assert not [name for name in names if name in text], file


# documentation


def comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}


def undocumented(source: str, *, command: str = "") -> list[str]:
    "Public functions and classes without a docstring, and their parameters and returns without a comment."
    notes, faults = comments(source), []

    def check(function: ast.FunctionDef, name: str) -> None:
        parameters = [a for a in function.args.posonlyargs + function.args.args + function.args.kwonlyargs]
        parameters += [a for a in (function.args.vararg, function.args.kwarg) if a]
        lines = source.splitlines()
        for a in parameters:
            above = a.lineno - 1
            own_line = above in notes and lines[above - 1].strip().startswith("#")
            if a.arg not in ("self", "cls") and not own_line and not any(
                n in notes for n in range(a.lineno, (a.end_lineno or a.lineno) + 1)
            ):
                faults.append(f"{name}: parameter {a.arg} has no comment")
        returns = function.returns
        nothing = returns is None or (isinstance(returns, ast.Constant) and returns.value is None)
        if not nothing and not any(n in notes for n in range(returns.lineno, function.body[0].lineno)):
            faults.append(f"{name}: what it returns has no comment")

    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            faults.append(f"{node.name} has no docstring")
        if isinstance(node, ast.FunctionDef):
            if not any(command and command in ast.unparse(d) for d in node.decorator_list):
                check(node, node.name)
            continue
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and (item.name == "__init__" or not item.name.startswith("_")):
                if item.name != "__init__" and not ast.get_docstring(item):
                    faults.append(f"{node.name}.{item.name} has no docstring")
                if item.name == "__init__":
                    check(item, node.name)
    return faults


def test_the_check_of_docments_sees_what_is_missing():
    good = 'def f(\n    x: int,  # a number\n) -> int:  # the same\n    "Doc."\n    return x\n'
    assert undocumented(good) == []
    assert undocumented(good.replace('    "Doc."\n', "")) == ["f has no docstring"]
    assert undocumented(good.replace("  # a number", "")) == ["f: parameter x has no comment"]
    assert undocumented(good.replace("  # the same", "")) == ["f: what it returns has no comment"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_everything_public_is_documented(path):
    # a typer command documents its options by their help
    faults = undocumented(path.read_text(encoding="utf-8"), command="app.command" if path.stem == "cli" else "")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_show(path):
    "Every cell ran without an error, outputs are committed, exported cells are short, the file is not a burden to git."
    assert path.stat().st_size < 2**20, f"{path.stat().st_size / 2**20:.1f} MiB: make its pictures fewer or smaller"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"], "it carries the state of widgets: run `make prepare`"
    cells = notebook["cells"]
    for cell in cells:
        source = "".join(cell["source"])
        errors = [o for o in cell.get("outputs", []) if o["output_type"] == "error"]
        assert not errors, f"{errors[0].get('ename')} under: {source[:80]}"
        if "#| export" in source:
            for node in ast.parse(source).body:
                length = (node.end_lineno or 0) - node.lineno + 1
                most = 90 if isinstance(node, ast.ClassDef) else 60
                assert length <= most, f"{getattr(node, 'name', 'a statement')} has {length} lines"
            assert "nbdev" not in source and "fastcore" not in source
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not code or any(cell.get("outputs") for cell in code), "no output is committed"


def test_the_sidebar_has_every_notebook():
    text = (ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+\.ipynb", text))
    assert named == {p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS}


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name != "api"], ids=lambda p: p.stem)
def test_a_page_uses_what_its_readers_may_use(path):
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    private = re.compile(r"^from aoi_ssl\S* import .*\b_[a-z]\w*|\b(?:aoi|aoi_ssl|show|benchmark|search)\._[A-Za-z]\w*", re.M)
    assert not (found := [m[0] for c in cells for m in private.finditer("".join(c["source"]))]), found


# tools


def test_broken_links_are_found(tmp_path):
    page = '<a href="b.html">b</a><a href="b.html#there">x</a><a href="#here">y</a><p id="here"><img src="data:," alt="one black dot">'
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.html").write_text('<h2 id="there">b</h2><a href="https://example.org">outside is allowed</a>')
    check_site = load_tool("check_links").check_site
    assert check_site(tmp_path) == []
    faulty = '<a href="gone.html"></a><a href="b.html#gone"></a><img src="gone.png" alt="a lost picture"><a href="/b.html"></a>'
    (tmp_path / "c.html").write_text(faulty)
    assert [fault.split(": ", 1)[1] for fault in check_site(tmp_path)] == [
        "gone.html: no such file",
        "b.html#gone: no such anchor",
        "/b.html: starts at the root of the host, and the site may live in a folder",
        "gone.png: no such file",
    ]
    (tmp_path / "c.html").write_text('<script src="https://example.org/x.js"></script>')
    (tmp_path / "d.css").write_text('@import url("https://example.org/font");')
    assert len(check_site(tmp_path)) == 2


def test_docs_load_nothing_from_elsewhere():
    page = '<link rel="stylesheet" href="https://example.org/k.css"><script src="https://example.org/k.js"></script>'
    offline = load_tool("build_docs").offline
    assert offline(page) == ""
    assert "<math" in offline(r'<span class="math inline">\(s_j / \sum_i s_i\)</span>')


def test_readme_links_start_at_the_root():
    relink = load_tool("make_readme").relink
    text = "[a](tutorials/a.ipynb) ![b](images/b.png) [c](https://example.org) [d](#d)\n```\n[e](f)\n```"
    assert relink(text, "nbs") == text.replace("(tut", "(nbs/tut").replace("(im", "(nbs/im")


def test_nothing_is_lost_after_a_title(tmp_path):
    "nbdev's front matter swallows the whole first cell; the docs keep what follows the title."
    path = tmp_path / "a.ipynb"
    cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# title\n\n> idea\n\nMore."}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    load_tool("build_docs").split_title(path)
    assert [c["source"] for c in json.loads(path.read_text())["cells"]] == ["# title\n\n> idea", "More."]


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize("fault", ["old", "broken"])
def test_a_failed_installation_leaves_no_stamp(tmp_path, fault):
    "An old Python is refused in plain words, and an installation that fails half-way is not taken for a whole one."
    for name in ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt", "tools/install.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / "python"
    if fault == "old":
        python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    else:  # makes an environment whose pip fails
        made = 'mkdir -p "$4/bin"; cp "$0.made" "$4/bin/python"'
        (tmp_path / "python.made").write_text('#!/bin/sh\ncase "$*" in *install*) exit 1;; esac\n')
        (tmp_path / "python.made").chmod(0o755)
        python.write_text(f'#!/bin/sh\ncase "$*" in *venv*) {made};; esac\n')
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "VENV": str(tmp_path / "env"), "TORCH_INDEX": ""}
    run = subprocess.run(["bash", str(tmp_path / "tools/install.sh"), "base"], env=env, capture_output=True, text=True)
    assert run.returncode
    assert not list(tmp_path.glob("env/.installed*"))
    if fault == "old":
        assert "needs Python 3.11 or newer; found Python 3.9.2" in run.stderr
