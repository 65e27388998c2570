"""Make README.md from nbs/index.ipynb: `--check` only says whether they are in step.

nbdev_readme would need Quarto; this needs nothing. Links to pages become links to the notebooks, pictures that a cell
made are written to nbs/images; hidden cells stay hidden."""

import argparse
import base64
import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp|include:\s*false)", re.M)
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
LINK = re.compile(r"(\]\(|src=\"|href=\")(?![a-z]+:|//|#|/)([^)\s\"#]+)")


def text_of(value: str | list[str]) -> str:
    "Join what a notebook stores as a list of lines."
    return value if isinstance(value, str) else "".join(value)


def relink(text: str, folder: str) -> str:
    "Make links that are relative to the notebook's folder relative to the root."
    parts = re.split(r"(```.*?```)", text, flags=re.S)  # code is left alone
    new = [
        part if n % 2 else LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join(folder, m[2])), part)
        for n, part in enumerate(parts)
    ]
    return "".join(new)


def output_text(output: dict, name: str, images: dict[str, bytes]) -> str:
    "Markdown for one output of a cell; a picture is added to `images`."
    if output["output_type"] == "stream":
        return "" if output["name"] == "stderr" else f"```text\n{text_of(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    if "image/png" in data:
        images[name] = base64.b64decode(text_of(data["image/png"]))
        return f"![]({name})"
    if "text/markdown" in data:
        return text_of(data["text/markdown"]).strip()
    if "text/plain" in data:
        return f"```text\n{text_of(data['text/plain']).rstrip()}\n```"
    return ""


def readme(notebook: Path) -> tuple[str, dict[str, bytes]]:
    "The Markdown of a notebook with its outputs, and the pictures that it made, by their path from the root."
    folder = notebook.parent.relative_to(ROOT).as_posix()
    parts, images = [], {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = text_of(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(relink(source, folder))
        elif cell["cell_type"] == "code" and not HIDDEN.search(source):
            code = DIRECTIVE.sub("", source).strip()
            if code and not re.search(r"^#\|\s*echo:\s*false", source, re.M):
                parts.append(f"```python\n{code}\n```")
            for output in cell["outputs"]:
                name = f"{folder}/images/{notebook.stem}-{len(images) + 1}.png"
                parts.append(output_text(output, name, images))
    body = "\n\n".join(part for part in parts if part)
    return f"<!-- Made from {folder}/{notebook.name} by `make readme`; edit that. -->\n\n{body}\n", images


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when README.md is not in step")
    check = parser.parse_args().check
    text, images = readme(ROOT / "nbs" / "index.ipynb")
    wanted = {ROOT / "README.md": text.encode(), **{ROOT / name: data for name, data in images.items()}}
    stale = [path for path, data in wanted.items() if not path.is_file() or path.read_bytes() != data]
    if check and stale:
        print("not in step with nbs/index.ipynb: " + ", ".join(str(p.relative_to(ROOT)) for p in stale))
        sys.exit("Run `make readme`.")
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wanted[path])
    print("README.md is in step with nbs/index.ipynb." if not stale else f"Wrote {len(stale)} file(s).")
