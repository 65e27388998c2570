"Files are whole or not there; errors say what to do."

import errno
import importlib
import importlib.util
import os
import subprocess
import sys

import pytest

from aoi_ssl.core import (
    AoiError,
    atomic_path,
    check_free,
    new_folder,
    read_json,
    require_transformers,
    step_seed,
    write_json,
)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_the_old_file_survives_a_failed_write(tmp_path, failure):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(type(failure)), atomic_path(tmp_path / "a.json") as aside:
        aside.write_text("{")
        raise failure
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_old_file_survives_a_disk_that_fills_up_at_the_last_moment(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        write_json(tmp_path / "a.json", {"new": 2})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path):
    with new_folder(tmp_path / "run") as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(OSError), new_folder(tmp_path / "run", overwrite=True) as folder:
        (folder / "weights").write_text("new")
        full_disk()
    assert (tmp_path / "run" / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["run"]


def test_an_error_names_the_folder_that_was_asked_for(tmp_path):
    "And not the one aside, which has another name each time and is gone when the message is read."
    with pytest.raises(AoiError, match="cannot hold this") as caught, new_folder(tmp_path / "masks") as folder:
        raise AoiError(f"{folder / 'd0' / 'im0.png'} cannot hold this.")
    assert str(caught.value) == f"{tmp_path / 'masks' / 'd0' / 'im0.png'} cannot hold this." and not list(tmp_path.iterdir())


def test_a_folder_whose_last_rename_fails_is_put_back(tmp_path, monkeypatch):
    with new_folder(tmp_path / "run") as folder:
        (folder / "weights").write_text("old")
    real, calls = os.replace, []

    def second_fails(a, b):
        calls.append(a)
        return full_disk() if len(calls) == 2 else real(a, b)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError), new_folder(tmp_path / "run", overwrite=True) as folder:
        (folder / "weights").write_text("new")
    assert (tmp_path / "run" / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["run"]


def test_an_output_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(AoiError, match="not empty.*overwrite"), new_folder(tmp_path):
        pytest.fail("the body must not run")
    with pytest.raises(AoiError, match="did not write"), new_folder(tmp_path, overwrite=True):
        pytest.fail("nor with overwrite: the folder is somebody else's")
    with pytest.raises(AoiError, match="is a file"):
        check_free(tmp_path / "keep.txt", overwrite=True)
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_a_broken_manifest_is_a_clear_error(tmp_path):
    (tmp_path / "a.json").write_text('{"k": ')
    (tmp_path / "b.json").write_text("[1]")
    for name, words in [("a.json", "cannot be read"), ("b.json", "list"), ("c.json", "does not exist")]:
        with pytest.raises(AoiError, match=words):
            read_json(tmp_path / name)


def test_seeds_of_neighbouring_steps_are_unrelated():
    bits = [step_seed(0, i) ^ step_seed(0, i + 1) for i in range(1000)]
    mean = sum(b.bit_count() for b in bits) / len(bits)
    assert 30 < mean < 33  # half of 63
    assert step_seed(1, 23) != step_seed(12, 3)


def test_a_torchvision_that_breaks_transformers_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        importlib, "import_module", lambda name: full_disk() if name == "torchvision" else sys.modules[name]
    )
    with pytest.raises(AoiError, match="pip uninstall torchvision"):
        require_transformers()


FIRST = """
import os
import torch  # once for all: it takes seconds, and is not what breaks

for module in ("encoder", "pretrain", "retrieval", "segment", "demo"):
    if os.fork() == 0:
        try:
            __import__(f"aoi_ssl.{module}")
        except Exception as e:
            print(f"{module}: {e}", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each module comes first in a fork")
def test_whichever_module_comes_first_a_broken_torchvision_is_named(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    info = tmp_path / "torchvision-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", FIRST], env=environment, capture_output=True, text=True, timeout=200)
    said = [line.split(": ", 1) for line in result.stdout.splitlines()]
    assert [module for module, _ in said] == ["encoder", "pretrain", "retrieval", "segment", "demo"], result.stderr
    assert all("pip uninstall torchvision" in words for _, words in said)
