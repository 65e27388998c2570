"What a reader of the tutorials does: sets a path, opens a solution, looks for the time and the goals."

import ast
import builtins
import json
import re
import shutil
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs" / "tutorials"
TAUGHT = ("meet_the_data", "what_a_vit_sees", "three_labels")

pytestmark = pytest.mark.skipif(not NBS.exists(), reason="needs the source tree")


def cells(name: str, kind: str) -> list[str]:
    "The sources of the cells of one kind."
    notebook = json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def own_data(name: str, path: str) -> str:
    "The cell that takes a reader's own folder, with the folder set."
    (cell,) = [c for c in cells(name, "code") if c.startswith('mine = ""')]
    return cell.replace('mine = ""', f"mine = {path!r}", 1)


@pytest.mark.parametrize("name", TAUGHT)
@pytest.mark.parametrize("labelled", [True, False])
def test_the_cell_for_own_data_works_by_setting_one_path(name, labelled, folder, tmp_path):
    "With masks and without any, on a folder that no renderer's settings describe."
    from aoi_ssl.encoder import Encoder

    mine = tmp_path / "parts" / "acme"
    shutil.copytree(folder / "acme", mine)
    if labelled:
        shutil.copy(folder / "classes.json", mine)
    else:
        for masks in [*mine.rglob("masks")]:
            shutil.rmtree(masks)
    shown = []
    names = {"display": shown.append, "encoder": Encoder.from_pretrained("aoi-mae-tiny")}
    exec(cells(name, "code")[0], names)  # the imports
    exec(own_data(name, str(mine)), names)
    assert shown, "nothing was shown"
    assert {p.name for p in mine.parent.iterdir()} <= {"acme", "acme_masks"}, "masks go beside the folder"


def test_the_quickstart_takes_a_folder(folder):
    "Labelled images of some devices, and one path."
    shown = []
    names = {"display": shown.append}
    exec("\n".join(line for line in cells("quickstart", "code")[0].splitlines() if line.startswith(("import ", "from "))), names)
    exec(own_data("quickstart", str(folder)), names)
    problems, scores = shown
    assert list(scores["class"]) == names["class_names"](names["my_parts"].test[names["my_device"]])


def defined(source: str) -> set[str]:
    "Every name that a piece of code assigns, imports or defines."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


def unknown(solution: str, notebook: str) -> set[str]:
    "Names that a solution uses and neither it nor the notebook has."
    used = {n.id for n in ast.walk(ast.parse(solution)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return used - defined(solution) - defined(notebook) - set(dir(builtins)) - {"display"}


def test_a_solution_with_a_name_that_is_gone_is_found():
    assert unknown("a = len(bank)\nb = a", "bank = 1") == set() and unknown("len(banks)", "bank = 1") == {"banks"}


@pytest.mark.parametrize("name", ("quickstart", *TAUGHT))
def test_solutions_fit_the_notebook(name):
    "Two exercises at least, each with a folded solution; its code uses what the notebook has."
    text, code = "\n\n".join(cells(name, "markdown")), "\n".join(cells(name, "code"))
    exercises = re.findall(r"^\*\*\d\. .*?\*\*", text.split("## Exercises")[1], re.M)
    assert 2 <= len(exercises) <= 4 and text.count("<details>") == text.count("</details>") == len(exercises)
    for solution in re.findall(r"```python\n(.*?)```", text.split("## Exercises")[1], re.S):
        assert unknown(solution, code) == set()


@pytest.mark.parametrize("name", TAUGHT)
def test_a_tutorial_says_what_it_costs_and_what_for(name):
    text = "\n\n".join(cells(name, "markdown"))
    assert "**Time:**" in text and "At the end you can" in text and "## With your own data" in text
