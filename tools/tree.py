"""Work on a copy of the source, never on the tree itself."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = {"build", "dist", "runs", "_docs", "_proc", "__pycache__"}


def made(part: str) -> bool:
    "Say whether a part of a path is something that is made from the source, or hidden."
    return part in MADE or part.startswith(".") or part.endswith(".egg-info")


def source_files(root: Path = ROOT) -> list[Path]:
    "List the files of the source, relative: what git tracks or would, or without git everything but what is made."
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True
    )
    if listing.returncode == 0:
        files = [Path(name) for name in listing.stdout.decode().split("\0") if name]
    else:
        files = [path.relative_to(root) for path in root.rglob("*")]
        files = [file for file in files if not any(made(part) for part in file.parts)]
    return sorted({f for f in files if (root / f).is_file()})


def copy_source(to: Path, root: Path = ROOT) -> Path:
    "Copy the files of the source into an empty folder."
    shutil.rmtree(to, ignore_errors=True)
    for file in source_files(root):
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / file, to / file)
    return to
