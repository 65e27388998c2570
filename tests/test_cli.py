"The commands: same defaults as in Python, one line for an error, exit codes, and the whole way through a shell."

import functools
import importlib
import inspect
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import aoi_ssl as aoi
from aoi_ssl import cli
from aoi_ssl.core import AoiError

VERBS = {
    cli.synth: aoi.render_folder,
    cli.pretrain: aoi.pretrain,
    cli.finetune: aoi.finetune,
    cli.demo: aoi.demo,
    cli.segment: aoi.segment,
    cli.bank: aoi.build_bank,
    cli._reading: aoi.load_folder,
}


COMMAND = [sys.executable, "-c", "from aoi_ssl.cli import main; main()"]


def aoi_shell(*words, **options):
    "A command in a process of its own, which imports everything anew: seconds. Once for each way out; the rest by `aoi_command`."
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=200, **options)


def aoi_command(*words):
    "The same command in this process: exit_code, stdout and stderr."
    return CliRunner().invoke(cli.app, [*map(str, words)])


@pytest.mark.parametrize("command", VERBS, ids=lambda c: c.__name__)
def test_a_command_has_the_defaults_of_its_verb(command):
    verb = inspect.signature(VERBS[command]).parameters
    reading = () if command is cli._reading else inspect.signature(cli._reading).parameters
    shared = 0
    for name, parameter in inspect.signature(command).parameters.items():
        if name == "out":
            continue  # a shell has nowhere else to keep the result
        name = {"written_format": "mask_format"}.get(name, name if name not in reading else None)
        if name in verb and inspect.Parameter.empty not in (parameter.default, verb[name].default):
            wanted = verb[name].default
            assert str(parameter.default) == str(wanted), name
            shared += 1
    assert shared


def test_help_is_there_for_every_command_and_does_not_load_torch():
    code = """
        import sys
        from aoi_ssl.cli import main

        sys.argv = ["aoi", "--help"]
        try:
            main()
        finally:
            print("torch" in sys.modules)
    """
    code = textwrap.dedent(code)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    for name in ("synth", "check", "pretrain", "bank", "finetune", "segment", "evaluate", "demo"):
        assert name in out
    assert out.strip().endswith("False")


def test_check_says_what_is_wrong_and_leaves_with_1(folder, tmp_path):
    assert aoi_command("check", folder).exit_code == 0
    broken = shutil.copytree(folder, tmp_path / "broken")
    orphan = next(broken.rglob("*_buffer0.png"))
    Path(str(orphan).replace("_buffer0", "_buffer1")).unlink()
    result = aoi_shell("check", broken)
    assert result.returncode == 1 and orphan.name in result.stdout and "1 error" in result.stdout


def test_an_error_is_one_line_and_leaves_with_2(tmp_path):
    for words in (
        ["check", tmp_path / "nowhere"],
        ["segment", tmp_path, "--with", tmp_path],
        ["pretrain", tmp_path, "--budget", "soon"],
    ):
        result = aoi_command(*words)
        assert result.exit_code == 2, words
        assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr and not result.stdout
    assert aoi_command("check", "--no-such-option").exit_code == 2
    result = aoi_shell("segment", tmp_path, "--with", tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_the_whole_way_from_command_to_command(folder, tmp_path, monkeypatch):
    "Nothing but folders goes from one to the next; the first runs in a shell, where all is new."
    monkeypatch.chdir(tmp_path)
    learn = ["pretrain", folder, "--split", "pretrain", "--budget", "2 steps", "--encoder", "nano", "-o", "encoder"]
    result = aoi_shell(*learn)
    assert result.returncode == 0 and "2 steps, last loss" in result.stdout, result.stderr
    steps = [
        ["bank", folder, "--split", "train", "--encoder", "encoder", "-o", "bank"],
        ["finetune", folder, "--split", "train", "--encoder", "encoder", "--budget", "2 steps", "-o", "segmenter"],
        ["segment", folder, "--with", "bank", "-o", "masks"],
        ["evaluate", folder, "--split", "new", "--with", "segmenter", "-o", "counts.csv"],
    ]
    for words in steps:
        result = aoi_command(*words)
        assert result.exit_code == 0, (words, result.output)
    assert "mIoU" in result.stdout and (tmp_path / "counts.csv").exists()
    assert len(list((tmp_path / "masks").rglob("*.png"))) == 5 * 4
    again = aoi_command(*steps[0])
    assert again.exit_code == 2 and "not empty" in again.stderr
    assert aoi_command(*steps[0], "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--from", "aoi-mae-small", "--crop", "64"],
        ["--objective", "dino", "--encoder", "nano", "--crop", "32"],
        ["--objective", "hiera", "--encoder", "nano", "--crop", "32"],
        ["--objective", "contrastive", "--encoder", "nano", "--crop", "32"],
    ],
    ids=lambda words: words[1],
)
def test_every_objective_and_going_on_from_an_encoder_write_one_that_opens(folder, tmp_path, words):
    from aoi_ssl.encoder import Encoder
    from aoi_ssl.runs import read_run

    out = tmp_path / "encoder"
    result = aoi_command("pretrain", folder, "--budget", "1 steps", "-o", out, *words)
    assert result.exit_code == 0 and "1 steps, last loss" in result.output, result.output
    run = read_run(out)
    assert len(run.history) == 1 and not run.live
    if words[0] == "--from":
        shipped, adapted = Encoder.from_pretrained("aoi-mae-small"), Encoder.from_pretrained(out)
        assert adapted.dim == 384 and torch.equal(adapted.mean, shipped.mean)
    if "hiera" in words:
        result = aoi_command("finetune", folder, "--split", "train", "--encoder", out, "--budget", "1 steps", "-o", tmp_path / "network")
        assert result.exit_code == 0 and "1 steps; segmenter written" in result.output, result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "gan"], "--objective is 'gan'; one of mae, contrastive, dino, ibot, hiera"),
        (["--objective", "ibot", "--from", "aoi-mae-tiny"], "no option of --objective ibot. Leave it out, or choose --objective mae or"),
        (["--twins", "."], "--twins is no option of --objective mae. Leave it out, or choose --objective contrastive."),
        (["--objective", "hiera", "--patch-size", "8"], "--patch-size is no option of --objective hiera"),
        (["--from", "aoi-mae-tiny", "--encoder", "small"], "encoder is 'small', but the weights of aoi-mae-tiny have encoder 'tiny'"),
        (["--from", "aoi-mae-tiny", "--patch-size", "8"], "patch_size is 8, but the weights of aoi-mae-tiny have patch_size 16"),
        (["--patience", "2"], "nothing to validate on"),
        (["--validation", "evening"], "has no split 'evening'; it has"),
        (["--validation", "new", "--split", "new"], "The split new is kept for judging, and no other is left to learn from"),
    ],
)
def test_an_objective_without_the_option_says_so(folder, tmp_path, words, message):
    result = aoi_command("pretrain", folder, "-o", tmp_path / "out", *words)
    assert result.exit_code == 2 and message in result.output


@pytest.mark.parametrize("objective", ["mae", "contrastive", "dino", "hiera"])
def test_every_option_reaches_every_objective(folder, tmp_path, monkeypatch, objective):
    "As it was given, and nothing that was not given; the images that are held out are not learned from."
    given, verb = {}, cli._OBJECTIVES[objective]

    def note(images, out, **options):
        given.update(options, images=images, out=out)
        raise AoiError("far enough")

    monkeypatch.setattr(aoi, verb, functools.wraps(getattr(aoi, verb))(note))
    words = ["--batch-size", 8, "--base-lr", 1e-3, "--precision", "bf16", "--report-to", "wandb,mlflow", "--validation", "new"]
    aoi_command("pretrain", folder, "--objective", objective, "-o", tmp_path / "out", "--patience", 3, *words)
    learned, held = ({stem.split("/")[1] for stem in given.pop(name)["stem"]} for name in ("images", "validation"))
    assert learned and held and not learned & held
    expected = {"batch_size": 8, "base_lr": 1e-3, "precision": "bf16", "report_to": ["wandb", "mlflow"], "patience": 3, "budget": "5m"}
    expected |= {"out": tmp_path / "out", "seed": 0, "resume": False, "overwrite": False}
    assert given == expected | ({"objective": "dino"} if objective == "dino" else {})


def test_twins_are_the_same_pictures_of_another_folder(folder, tmp_path, monkeypatch):
    given = {}

    def note(images, out, **options):
        given.update(options, images=images)
        raise AoiError("far enough")

    monkeypatch.setattr(aoi, "pretrain_contrastive", functools.wraps(aoi.pretrain_contrastive)(note))
    aoi_command("pretrain", folder, "--objective", "contrastive", "--twins", folder, "--validation", "new", "-o", tmp_path / "out")
    assert list(given["twins"]["stem"]) == list(given["images"]["stem"])


def test_images_for_thresholds_and_for_choosing_are_not_trained_on(folder, tmp_path, monkeypatch):
    given = {}

    def note(images, encoder, out, **options):
        given.update(options, images=images)
        raise AoiError("far enough")

    monkeypatch.setattr(importlib.import_module("aoi_ssl.segment"), "finetune", note)
    words = ["--encoder", "aoi-mae-tiny", "--calibration", "calibration", "--validation", "new", "--patience", 2, "--lr", 0.01]
    result = aoi_command("finetune", folder, *words, "--batch-size", 4, "--report-to", "mlflow", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "far enough" in result.stderr
    stems = [set(given.pop(name)["stem"]) for name in ("images", "calibration", "validation")]
    assert [len(s) for s in stems] == [6, 2, 4] and len(set.union(*stems)) == 12
    expected = {"patience": 2, "lr": 0.01, "batch_size": 4, "report_to": ["mlflow"], "budget": "5m", "precision": "auto"}
    assert given == expected | {"seed": 0, "resume": False, "overwrite": False}


def test_ctrl_c_saves_and_leaves_with_130(folder, tmp_path):
    command = [*COMMAND, "pretrain", str(folder), "--encoder", "nano", "--budget", "10m", "-o", "encoder"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    seen = ""
    start = time.monotonic()
    while "step 1" not in seen and time.monotonic() - start < 60:
        seen += process.stderr.read(20)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "resume" in rest
    assert (tmp_path / "encoder.checkpoint").exists() and not (tmp_path / "encoder").exists()
