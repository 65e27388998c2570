"""Take the state of widgets out of the notebooks: megabytes of pixels with new names at each run, which nothing here reads.

The outputs keep the static picture of each widget."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def strip(path: Path) -> bool:
    "Rewrite one notebook if it carries state; says whether it did."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    if "widgets" not in notebook["metadata"]:
        return False
    del notebook["metadata"]["widgets"]
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    return True


if __name__ == "__main__":
    for notebook in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if strip(notebook):
            print(f"Took widget state out of {notebook.relative_to(ROOT)}.")
