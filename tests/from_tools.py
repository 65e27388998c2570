"The scripts of tools/ for the tests: they are no package, and are there in a source tree only."

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"

needs_tools = pytest.mark.skipif(not TOOLS.is_dir(), reason="needs the source tree")


def load_tool(name: str) -> ModuleType:
    "A script of tools/ as a module, loaded anew; it finds its neighbours."
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    sys.path.insert(0, str(TOOLS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module
