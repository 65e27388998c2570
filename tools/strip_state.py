"""Take live widgets out of the notebooks: their state, megabytes with new names at each run, and outputs that only a kernel fills.

What stays is the static picture of each widget."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VIEW = "application/vnd.jupyter.widget-view+json"


def still(output: dict) -> bool:
    "Takes the live form of a widget out of an output; says whether anything is left to show."
    data = output.get("data")
    if data is None:
        return True
    data.pop(VIEW, None)
    if 'class="aoi-still"' in "".join(data.get("text/html", "")):
        del data["text/html"]
    return bool(data)


def strip(path: Path) -> bool:
    "Rewrite one notebook if it carries live widgets; says whether it did."
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if still(output)]
    if notebook == json.loads(text):
        return False
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    return True


if __name__ == "__main__":
    for notebook in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if strip(notebook):
            print(f"Took live widgets out of {notebook.relative_to(ROOT)}.")
