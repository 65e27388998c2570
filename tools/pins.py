"""Print constraints.txt: exact pins of everything that aoi_ssl[dev] needs, as installed in this environment.

Use it in an environment that the whole suite passes in: `python tools/pins.py > constraints.txt`."""

import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
NEVER = {"pip", "setuptools", "aoi-ssl"}


def needed(requirement: Requirement, extra: str) -> bool:
    "Say whether a requirement applies on any of the Pythons that are supported, on the system that this runs on."
    if requirement.marker is None:
        return True
    return any(
        requirement.marker.evaluate({"extra": extra, "python_version": p, "python_full_version": p + ".0"})
        for p in PYTHONS
    )


def closure(requirements: list[str]) -> dict[str, str]:
    "Follow the requirements of the requirements; name -> installed version."
    versions, seen = {}, set()
    todo = [Requirement(r) for r in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            print(f"not installed here, so not pinned: {requirement}", file=sys.stderr)
            continue
        if name not in NEVER:
            versions[name] = dist.version.split("+")[0]  # +cpu is the builder's, not the version's
        for extra in ["", *requirement.extras]:
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += [r for r in map(Requirement, dist.requires or []) if needed(r, extra)]
    return versions


if __name__ == "__main__":
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = config["DEFAULT"]
    print("# The versions that were tested, for aoi_ssl and its dev extra. Made by tools/pins.py.")
    wanted = [r for key in ("requirements", "faiss_requirements", "dev_requirements") for r in cfg[key].split()]
    for name, version in sorted(closure(wanted).items()):
        print(f"{name}=={version}")
