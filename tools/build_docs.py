"""Build the docs site into _docs: nbdev's own preprocessing, then Quarto where it is on PATH and smalldocs otherwise.

Outputs are the ones committed in the notebooks; only imports and exported cells run, to read the signatures. The pages
fetch nothing from the network. Everything happens on a copy in build/docs, so the tree stays as it was."""

import argparse
import ast
import base64
import contextlib
import dataclasses
import functools
import html
import importlib
import inspect
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import time
import tokenize
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import yaml
from tree import ROOT, copy_source

WORK = ROOT / "build" / "docs"
PICTURE = re.compile(r'(<img (?:alt="[^"]*" )?src="data:image/png;base64,([\w+/=]{32})[^"]*") class="img-fluid">')
TABLE = re.compile(r'<table [^>]*"dataframe.*?</table>', re.S)
SENTENCE = re.compile(r"<td>[^<]{28,}</td>")  # such a table is read like a text, not down its columns
LOADED = re.compile(r"<(?:script|link)\b[^>]*(?:src|href)=\"https?://[^>]*>(?:</script>)?\s*")


def split_title(path: Path) -> None:
    "Put what follows the title and the `>` line of a notebook's first cell into a cell of its own: nbdev drops it."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = notebook["cells"][0] if notebook["cells"] else {}
    if first.get("cell_type") != "markdown":
        return
    source = "".join(first["source"])
    head = re.match(r"# .*\n*(?:>.*\n*)*(?:- .*: .*\n*)*", source)
    rest = source[head.end() :].strip() if head else ""
    if rest:
        first["source"] = head.group().strip()
        notebook["cells"].insert(1, {"cell_type": "markdown", "id": "after-title", "metadata": {}, "source": rest})
        path.write_text(json.dumps(notebook), encoding="utf-8")


def picture_words(cell: dict) -> list[str]:
    """What is said of each picture of a cell to those who cannot see it; "" where nothing is.

    The cell's own `#| fig-alt:` line, which Quarto knows too; else what the output says of itself, as a widget does."""
    given = re.search(r"^#\|\s*fig-alt:\s*(.+)$", "".join(cell["source"]), re.M)
    said = ["".join(o["data"].get("text/plain", "")) for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    return [yaml.safe_load(given[1]) if given else "" if text.startswith("<") else text for text in said]


def write_picture_words(path: Path) -> None:
    "Write what the pictures of a notebook say of themselves into `#| fig-alt:` lines, for the renderer."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        words = picture_words(cell) if cell["cell_type"] == "code" and "fig-alt:" not in source else []
        if any(words):
            # JSON is YAML
            cell["source"] = f"#| fig-alt: {json.dumps(' '.join(words), ensure_ascii=False)}\n{source}"
    path.write_text(json.dumps(notebook), encoding="utf-8")


def join_streams(path: Path) -> None:
    "Make one text of what a cell printed: a kernel may send it in pieces, and each would get a frame of its own."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        joined = []
        for output in cell.get("outputs", []):
            if joined and output.get("name") and output.get("name") == joined[-1].get("name"):
                joined[-1]["text"] = "".join(joined[-1]["text"]) + "".join(output["text"])
            else:
                joined.append(output)
        if joined:
            cell["outputs"] = joined
    path.write_text(json.dumps(notebook), encoding="utf-8")


def public_methods(source: str) -> dict[str, list[str]]:
    "List the documented public methods of each class that a cell defines, by the class's name."
    def documented(node: ast.stmt) -> bool:
        return isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and bool(ast.get_docstring(node))

    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {c.name: [node.name for node in c.body if documented(node)] for c in classes if not c.name.startswith("_")}


def docments(symbol: Callable) -> dict[str, str]:
    "The comment on each parameter of a function, or field of a dataclass, and on what it returns."
    if inspect.isclass(symbol) and not dataclasses.is_dataclass(symbol):
        symbol = symbol.__init__
    source = textwrap.dedent(inspect.getsource(symbol))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    notes = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    own_line = {n for n, line in enumerate(source.splitlines(), 1) if line.strip().startswith("#")}
    node = ast.parse(source).body[0]
    if isinstance(node, ast.ClassDef):
        spans = {f.target.id: (f.lineno, f.end_lineno) for f in node.body if isinstance(f, ast.AnnAssign)}
    else:
        a = node.args
        named = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
        starts = [p.lineno for p in named] + [node.returns.lineno if node.returns else node.body[0].lineno]
        spans = {p.arg: (p.lineno, max(p.lineno, after - 1)) for p, after in zip(named, starts[1:], strict=True)}
        if node.returns:
            spans["return"] = (node.returns.lineno, node.body[0].lineno - 1)
    found = {}
    for name, (first, last) in spans.items():
        after = next((notes[n] for n in range(first, last + 1) if n in notes and n not in own_line), "")
        above = []
        while first - 1 - len(above) in own_line:
            above.insert(0, notes[first - 1 - len(above)])
        found[name] = after or " ".join(above)
    return found


def renderer() -> type:
    "The look of `show_doc`: a link to the source, the call, the docstring, a table of parameters from the docments."
    from fastcore.docments import qual_name
    from nbdev.doclinks import NbdevLookup

    def code(value: object) -> str:
        text = value if isinstance(value, str) else inspect.formatannotation(value)
        text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", text).replace("|", "\\|")
        return f"`{text}`" if text else ""

    def plain(text: str) -> str:
        "Code that nbdev makes no link of: a parameter may have the name of a function elsewhere."
        return f"<code>{html.escape(text)}</code>".replace("|", "\\|")

    def default(value: object) -> str:
        text = getattr(value, "__name__", None) or " ".join(repr(value).split())
        return text if len(text) < 48 else text[:44] + " ..."

    class Table:
        def __init__(self, sym: Callable, name: str | None = None, title_level: int = 3):
            self.called = not isinstance(sym, property)
            self.sym, self.title_level = inspect.unwrap(sym if self.called else sym.fget), title_level
            self.nm, self.docs = name or qual_name(self.sym), inspect.cleandoc(self.sym.__doc__ or "")
            self.fn = f"{self.sym.__module__}.{qual_name(self.sym)}"
            self.own = not inspect.isclass(sym) or "__init__" in vars(sym)
            self.sig = inspect.signature(self.sym) if self.own else None

        def call(self, parameters: list[inspect.Parameter]) -> str:
            "The call as one types it: names and defaults, without types."
            words, star = [], False
            for p in parameters:
                if p.kind == p.KEYWORD_ONLY and not star:
                    words.append("*")
                star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
                prefix = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
                words.append(prefix + p.name + ("" if p.default is p.empty else f"={default(p.default)}"))
            line = f"{self.nm}({', '.join(words)})"
            if len(line) <= 88:
                return line
            return f"{self.nm}(\n    " + "\n    ".join(textwrap.wrap(", ".join(words), 84)) + "\n)"

        def rows(self, parameters: list[inspect.Parameter]) -> list[str]:
            about = docments(self.sym)
            comment = lambda name: about.get(name, "").replace("|", "\\|")
            rows = []
            if not any(map(comment, [*(p.name for p in parameters), "return"])):
                return []  # the call says as much: a method whose docstring names the function that it hands on to
            for p in parameters:
                kind = "" if p.annotation is p.empty else code(p.annotation)
                value = "required" if p.default is p.empty else plain(default(p.default))
                value = "" if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) else value
                rows.append(f"| {plain(p.name)} | {kind} | {value} | {comment(p.name)} |")
            returned = self.sig.return_annotation
            if comment("return") and not inspect.isclass(self.sym):
                kind = "" if returned is inspect.Signature.empty else code(returned)
                rows.append(f"| **returns** | {kind} | | {comment('return')} |")
            return rows

        def _repr_markdown_(self) -> str:
            source = NbdevLookup().code(self.fn)
            text = f"---\n\n{'#' * self.title_level} {self.nm}\n\n"
            if source:
                text += f"[source]({source}){{.source-link}}\n\n"
            parameters = [p for p in self.sig.parameters.values() if p.name != "self"] if self.own else []
            if self.own and self.called:
                text += f"```python\n{self.call(parameters)}\n```\n\n"
            text += self.docs
            if rows := self.rows(parameters) if self.own else []:
                text += "\n\n| name | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows)
            return text

    return Table


def processors() -> type:
    """nbdev's processors, but only the `show_doc` cells run, on the exported module; public methods are shown too.

    nbdev itself would run every cell with an import in it, examples included."""
    from execnb.nbio import mk_cell
    from nbdev.process import Processor
    from nbdev.processors import FilterDefaults, _default_exp, _show_docs, _want_doc, add_show_docs, exec_show_docs
    from nbdev.showdoc import show_doc

    class add_method_docs(Processor):
        def begin(self) -> None:
            cells = self.nb.cells
            shown = {c.source.strip() for c in cells if c.cell_type == "code"}
            for cell in [c for c in cells if _want_doc(c)]:
                for name, methods in public_methods(cell.source).items():
                    at = next((i for i, c in enumerate(cells) if c.source.strip() == f"show_doc({name})"), None)
                    for method in reversed(methods if at is not None else []):
                        if not any(f"show_doc({name}.{method}" in s for s in shown):
                            cells.insert(at + 1, mk_cell(f"show_doc({name}.{method}, title_level=4)"))

    class exec_only_show_docs(exec_show_docs):
        def begin(self) -> None:
            super().begin()
            self.k.user_ns["show_doc"] = functools.partial(show_doc, renderer=renderer())
            if module := _default_exp(self.nb):
                self.k.user_ns.update(vars(importlib.import_module(f"aoi_ssl.{module}")))

        def __call__(self, cell: dict) -> None:
            if cell.cell_type == "code" and _show_docs(cell.parsed_() or []):
                self.k.cell(cell)
                if self.k.exc:
                    raise RuntimeError(f"show_doc failed: {cell.source}") from self.k.exc

    class Processors(FilterDefaults):
        def base_procs(self) -> list:
            procs = super().base_procs()
            procs.insert(procs.index(add_show_docs) + 1, add_method_docs)
            procs[procs.index(exec_show_docs)] = exec_only_show_docs
            return procs

    return Processors


def preprocess(work: Path) -> Path:
    "Run nbdev's preprocessing in a copy of the source; returns the folder that a site is rendered from."
    os.chdir(work)
    sys.path.insert(0, str(work))
    os.environ.setdefault("MPLBACKEND", "agg")
    import nbdev.doclinks
    import nbdev.serve
    from nbdev.quarto import refresh_quarto_yml

    for path in (work / "nbs").rglob("*.ipynb"):
        split_title(path)
        write_picture_words(path)
        join_streams(path)
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    # names in backticks become links by this index; an installed nbdev project would have an entry point for it
    symbols = importlib.import_module("aoi_ssl._modidx").d["syms"]
    for module, names in symbols.items():
        symbols[module] = {name: where for name, where in names.items() if "._" not in name}
    index = EntryPoint(name="aoi_ssl", value="aoi_ssl._modidx:d", group="nbdev")
    nbdev.doclinks.entry_points = lambda group: [index]
    line = nbdev.doclinks._lineno  # knows names without their module
    nbdev.doclinks._lineno = lambda name, file: line(name.removeprefix(f"{file[:-3].replace('/', '.')}."), file)
    nbdev.serve.FilterDefaults = processors()
    with warnings.catch_warnings(), open(work / "preprocess.log", "w") as log, contextlib.redirect_stdout(log):
        warnings.simplefilter("ignore")
        cache = nbdev.serve.proc_nbs(n_workers=0)
    shutil.copy2(work / "CHANGELOG.md", cache / "changelog.md")
    return cache


def rename_pages(cache: Path, url: str) -> None:
    """Name each page after its module (api/00_core.ipynb -> api/core.ipynb) and make links to the site itself relative.

    Quarto would do the first by the page's output-file, which smalldocs does not read."""
    names = {}
    for path in sorted(cache.rglob("*.ipynb")):
        new = re.sub(r"^\d+[a-z]?_", "", path.name)
        if new != path.name:
            names[path.name] = new
            path.rename(path.with_name(new))
    for path in [*cache.rglob("*.ipynb"), *cache.rglob("*.md"), cache / "_quarto.yml"]:
        text = path.read_text(encoding="utf-8")
        for old, new in names.items():
            text = re.sub(rf"(?<![\w-]){re.escape(old)}", new, text)
        up = "../" * (len(path.relative_to(cache).parts) - 1)
        text = re.sub(re.escape(url) + r"/(?=[\w/]+\.html)", up or "./", text)
        path.write_text(text, encoding="utf-8")


def render(cache: Path) -> str:
    "Render the site with Quarto or smalldocs; returns the tool's name."
    if shutil.which("quarto"):
        config = cache / "_quarto.yml"
        text = config.read_text(encoding="utf-8")
        config.write_text(text.replace("  html:\n", "  html:\n    html-math-method: mathml\n", 1), encoding="utf-8")
        subprocess.run(["quarto", "render", "--no-cache", "--no-execute", "--to", "html"], cwd=cache, check=True)
        return "Quarto"
    from smalldocs.site import build

    site = build(cache, quiet=True)
    ignored = ("commonmark", "output-file is not read")
    for warning in dict.fromkeys(re.sub(r"^\S+: (?=broken link /)", "", w) for w in site.warnings):
        if not any(text in warning for text in ignored):
            print(f"  {warning}")
    return "smalldocs"


def offline(page: str) -> str:
    "Make one page fetch nothing from the network: maths become MathML, what a content network would serve goes."

    def maths(match: re.Match) -> str:
        from latex2mathml.converter import convert

        source = html.unescape(match[2]).strip()
        source = re.sub(r"^\\[(\[]|\\[)\]]$|^\$+|\$+$", "", source).strip()
        return convert(source, display="block" if match[1] == "display" else "inline")

    page = re.sub(r'<span class="math (inline|display)">(.*?)</span>', maths, page, flags=re.S)
    page = LOADED.sub(lambda m: m[0] if re.search(r'rel="(?:canonical|license)"', m[0]) else "", page)
    page = TABLE.sub(lambda m: m[0].replace('"dataframe', '"words dataframe', 1) if SENTENCE.search(m[0]) else m[0], page)
    return PICTURE.sub(shape_picture, page)


def shape_picture(picture: re.Match) -> str:
    "Let the style know a picture that is much wider than a phone, and the browser that a picture can wait."
    strip = " strip" * (struct.unpack(">I", base64.b64decode(picture[2])[16:20])[0] >= 640)
    return f'{picture[1]} class="img-fluid{strip}" loading="lazy">'


def build() -> Path:
    "Build the whole site; _docs is replaced only when all went well."
    start = time.perf_counter()
    work = copy_source(WORK / "source")
    from configparser import ConfigParser

    config = ConfigParser(delimiters=["="])
    config.read(work / "settings.ini", encoding="utf-8")
    cfg = config["DEFAULT"]
    cache = preprocess(work)
    rename_pages(cache, cfg["doc_host"] + cfg["doc_baseurl"])
    tool = render(cache)
    made, site = cache / cfg["doc_path"], ROOT / cfg["doc_path"]
    for path in made.rglob("*.html"):
        path.write_text(offline(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in made.rglob("*.css"):  # the themes would fetch a font; the reader's own sans-serif does
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"""@import\s+url\(["']?https?://[^)]*\);?""", "", text), encoding="utf-8")
    (made / ".nojekyll").touch()
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(made, site)
    pages = len(list(site.rglob("*.html")))
    print(f"Built {pages} pages with {tool} in {time.perf_counter() - start:.0f} s: {site / 'index.html'}")
    return site


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    build()
    sys.stdout.flush()
    os._exit(0)  # the shells of all notebooks would tidy up one after the other, for half as long as the build took
