"The package offers verbs; modules of the same name do not hide them."

import subprocess
import sys
import types

import pytest

import aoi_ssl as aoi


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_every_public_name_is_there_and_is_no_module():
    for name in aoi.__all__:
        value = getattr(aoi, name)
        assert callable(value) and not isinstance(value, types.ModuleType), name
        assert value.__name__ == name


def test_importing_a_module_does_not_hide_the_verb_of_its_name():
    code = "import aoi_ssl.pretrain, aoi_ssl.segment, aoi_ssl as a; print(callable(a.pretrain), callable(a.segment))"
    assert run(code).split() == ["True", "True"]


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(AttributeError, match="load_folder"):
        aoi.segmentation  # noqa: B018
