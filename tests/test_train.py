"The loop: budgets, schedule, resume, early stop, broken losses."

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file
from torch import nn

from aoi_ssl.core import AoiError
from aoi_ssl.train import Budget, check_trackers, fit, lr_factor, parse_budget


def batch(index):
    g = torch.Generator().manual_seed(index)
    x = torch.randn(8, 3, generator=g)
    return {"x": x, "y": x.sum(1, keepdim=True)}


def loss(model, b):
    noise = 0.01 * torch.randn_like(b["y"])  # drawn from the step's seed
    return ((model(b["x"]) - b["y"] + noise) ** 2).mean()


def start(lr=0.05):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.GELU(), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def test_one_seed_one_result_another_seed_another():
    results = [fit(*_args(), budget="20 steps", seed=s, progress=False).loss for s in (0, 0, 1)]
    assert results[0].equals(results[1]) and not results[0].equals(results[2])


def _args():
    model, optimizer = start()
    return model, loss, batch, optimizer


@pytest.mark.parametrize("stop", [1, 7, 10, 19])
def test_a_run_killed_at_any_step_resumes_to_the_same_losses(tmp_path, stop):
    model, optimizer = start()
    whole = fit(model, loss, batch, optimizer, budget="20 steps", progress=False)

    def interrupted(index):
        if index == stop - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(index)

    file, before = tmp_path / "run.checkpoint", signal.getsignal(signal.SIGINT)
    broken, optimizer = start()
    with pytest.raises(KeyboardInterrupt, match=f"after step {stop}.*resume"):
        fit(broken, loss, interrupted, optimizer, budget="20 steps", checkpoint=file, progress=False)
    again, optimizer = start()
    resumed = fit(again, loss, batch, optimizer, budget="20 steps", checkpoint=file, resume=True, progress=False)
    assert resumed.loss.equals(whole.loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("moment", ["in a step", "while it saves"])
def test_a_run_that_is_killed_outright_goes_on_from_its_last_checkpoint(tmp_path, moment):
    "SIGKILL, which nobody can catch, in step 7 or with half a checkpoint written."
    script, file = tmp_path / "killed.py", tmp_path / "run.checkpoint"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        import torch
        sys.path.insert(0, {str(os.path.dirname(__file__))!r})
        import test_train as t

        torch.set_num_threads(1)
        model, optimizer = t.start()
        save, kill = torch.save, lambda: os.kill(os.getpid(), signal.SIGKILL)

        def half(state, path):
            save(state, path)
            if state["run"]["step"] == 7:
                os.truncate(path, 500)
                kill()

        def batch(index):
            return kill() if {moment!r} == "in a step" and index == 7 else t.batch(index)

        torch.save = half if {moment!r} == "while it saves" else save
        t.fit(model, t.loss, batch, optimizer, budget="12 steps", checkpoint={str(file)!r}, save_every=0.0, progress=False)
    """)
    )
    killed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = torch.load(file, weights_only=True)["run"]["step"]
    assert last == (7 if moment == "in a step" else 6)
    (model, optimizer), (again, more) = start(), start()
    whole = fit(model, loss, batch, optimizer, budget="12 steps", progress=False)
    resumed = fit(again, loss, batch, more, budget="12 steps", checkpoint=file, resume=True, progress=False)
    assert resumed.loss.equals(whole.loss) and resumed.seconds.is_monotonic_increasing
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_of_another_run_or_a_broken_one_is_refused(tmp_path):
    file = tmp_path / "run.checkpoint"
    model, optimizer = start()
    fit(model, loss, batch, optimizer, budget="5 steps", checkpoint=file, progress=False)
    for other in ({"seed": 1}, {"precision": "bf16"}, {"validate": lambda model: {"score": 0.0}}):
        with pytest.raises(AoiError, match="belongs to a run"):
            fit(model, loss, batch, optimizer, budget="5 steps", checkpoint=file, resume=True, progress=False, **other)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(AoiError, match="cannot be read"):
        fit(model, loss, batch, optimizer, budget="5 steps", checkpoint=file, resume=True, progress=False)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "run.checkpoint"
    model, optimizer = start()
    fit(model, loss, batch, optimizer, budget="5 steps", checkpoint=file, progress=False)
    before = file.read_bytes()

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        fit(model, loss, batch, optimizer, budget="5 steps", checkpoint=file, progress=False)
    assert file.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["run.checkpoint", "run.history.jsonl"]


def test_the_schedule_anneals_to_the_end_of_a_wall_clock_budget():
    model, optimizer = start()
    history = fit(model, loss, batch, optimizer, budget="0.5s", progress=False)
    assert history.lr.iloc[-1] < 0.1 * history.lr.max()
    assert 0.5 <= history.seconds.iloc[-1] < 2.0


def test_the_schedule_uses_every_step():
    model, optimizer = start(lr=1.0)
    lr = fit(model, loss, batch, optimizer, budget="20 steps", warmup=0.1, progress=False).lr
    assert lr.min() > 0 and lr.idxmax() == 2 and lr.iloc[2:].is_monotonic_decreasing
    assert lr_factor(0.55, warmup=0.1) == pytest.approx(0.5)


def test_every_group_keeps_its_own_rate():
    model, _ = start()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters(), "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups)
    fit(model, loss, batch, optimizer, budget="3 steps", progress=False)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[1]["lr"] / 2)


def test_early_stopping_restores_the_best_weights():
    seen = []

    def validate(model):
        seen.append(model[3].bias.item())
        return {"score": -abs(len(seen) - 2)}

    model, optimizer = start()
    history = fit(
        model, loss, batch, optimizer, budget="100 steps", validate=validate, validations=10, patience=3, progress=False
    )
    assert len(seen) == 5 and len(history) == 50
    assert model[3].bias.item() == seen[1] and not model.training


def test_a_run_ends_where_it_is_told_to_also_when_it_goes_on(tmp_path):
    file, stop = tmp_path / "run.checkpoint", lambda history: len(history) == 12
    model, optimizer = start()
    whole = fit(model, loss, batch, optimizer, budget="20 steps", checkpoint=file, save_every=0.0, stop=stop, progress=False)
    again, optimizer = start()
    resumed = fit(again, loss, batch, optimizer, budget="20 steps", checkpoint=file, resume=True, stop=stop, progress=False)
    assert len(whole) == 12 and resumed.loss.equals(whole.loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_to_expect_is_measured_on_a_copy_and_counts_what_is_left(capsys):
    "Every step works 20 ms of CPU time: 50 steps in a second, 40 of which are left."
    from aoi_ssl.train import expectation

    def working(index):
        asked.append(index)
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        return batch(index)

    asked, (model, _) = [], start()
    before = [p.clone() for p in model.parameters()]
    second = SimpleNamespace(num_processes=2, process_index=1, device=torch.device("cpu"), backward=lambda value: value.backward())
    line = expectation(model, loss, working, second, budget=Budget(steps=50, clock="cpu"), images=8, epoch=10, spent=0.2)
    speed, steps, epochs, seconds = re.match(r"About (\d+) images a second: (\d+) steps of 8, (.*) epochs, in (\d+) s", line).groups()
    assert asked == [1, 3, 5] and (steps, epochs) == ("40", "4.0") and 100 < int(speed) <= 400 and 1 <= int(seconds) < 4
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and model[0].weight.grad is None
    for progress, images in ((True, 8), (True, None), (False, 8)):
        fit(*_args(), budget="2 steps", images=images, epoch=5, progress=progress)
    assert capsys.readouterr().out.count("About") == 1


def test_patience_longer_than_the_run_is_refused():
    model, optimizer = start()
    with pytest.raises(AoiError, match="can never run out"):
        fit(
            model, loss, batch, optimizer, budget="10 steps", validate=lambda m: {"score": 0}, validations=5, patience=5
        )
    with pytest.raises(AoiError, match="nothing to validate on"):
        fit(model, loss, batch, optimizer, budget="10 steps", patience=2)


@pytest.mark.parametrize("name", [None, "run.checkpoint"])
def test_a_loss_that_is_not_finite_stops_the_run_and_its_batch_is_kept(tmp_path, monkeypatch, name):
    "Beside the checkpoint, or in a temporary folder; the error says where."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, optimizer = start()
    broken = lambda i: {**batch(i), "scale": torch.tensor(math.nan if i == 13 else 1.0), "crops": 8}
    options = {"budget": "40 steps", "checkpoint": name and tmp_path / name, "progress": False}
    with pytest.raises(AoiError, match="nan at step 13.*The batch is in ") as error:
        fit(model, lambda m, b: loss(m, b) * b["scale"], broken, optimizer, **options)
    file = Path(re.search(r"The batch is in (\S+)\. ", str(error.value))[1])
    kept = load_file(file)
    assert file.is_relative_to(tmp_path) and sorted(kept) == ["scale", "x", "y"] and kept["scale"].isnan()
    assert torch.equal(kept["x"], batch(13)["x"])


@pytest.mark.parametrize("warmup", [2.0, -0.1, math.nan, "half"])
def test_a_warmup_that_is_no_share_is_refused(warmup):
    with pytest.raises(AoiError, match=r"warmup is .*; a finite number from 0 to 1 was expected"):
        fit(*_args(), budget="10 steps", warmup=warmup, progress=False)


def test_a_tracker_that_is_not_there_is_no_tracker(monkeypatch):
    "accelerate would leave it out without a word."
    monkeypatch.setattr("aoi_ssl.train.get_available_trackers", lambda: ["mlflow"])
    for name in "comet_ml", ["mlflow", "comet_ml"]:
        with pytest.raises(AoiError, match=r"comet_ml is not installed here.*Run `pip install comet-ml`, or leave report_to out"):
            fit(*_args(), budget="10 steps", report_to=name, progress=False)
    with pytest.raises(AoiError, match="report_to is 'paper'; names of trackers that accelerate knows were expected: .*tensorboard"):
        fit(*_args(), budget="10 steps", report_to="paper", progress=False)
    for there in None, [], "mlflow", ["mlflow", "mlflow"], "all":
        check_trackers(there)
    monkeypatch.setattr("aoi_ssl.train.get_available_trackers", list)
    with pytest.raises(AoiError, match="no tracker is installed here.*pip install tensorboard"):
        check_trackers("all")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("90 cpu s", Budget(seconds=90, clock="cpu")),
        ("1.5 CPU minutes", Budget(seconds=90, clock="cpu")),
        ("90cpu", Budget(seconds=90, clock="cpu")),
        ("3 cpu steps", Budget(steps=3, clock="cpu")),
        ("2 epochs", Budget(epochs=2)),
    ],
)
def test_budgets_as_people_write_them(text, budget):
    assert parse_budget(text) == budget


def test_the_clock_of_epochs_stays_when_they_become_steps():
    assert parse_budget("2 cpu epochs").resolve(5) == Budget(steps=10, clock="cpu")


def test_waiting_does_not_spend_cpu_seconds():
    def slow(index):
        time.sleep(0.02)
        return batch(index)

    model, optimizer = start()
    began = time.monotonic(), time.process_time()
    history = fit(model, loss, slow, optimizer, budget="0.2 cpu s", progress=False)
    waited = time.monotonic() - began[0] - (time.process_time() - began[1])
    assert 0.2 <= history.seconds.iloc[-1] <= time.process_time() - began[1] and waited > 0.015 * len(history)
    assert history.lr.iloc[-1] < 0.1 * history.lr.max(), "the schedule ends with the budget"


def test_a_resumed_run_spends_the_rest_of_its_cpu_seconds(tmp_path):
    def interrupted(index):
        if not stopped and time.process_time() - began > 0.2:
            stopped.append(index)
            os.kill(os.getpid(), signal.SIGINT)
        return batch(index)

    file, stopped, began = tmp_path / "run.checkpoint", [], time.process_time()
    model, optimizer = start()
    with pytest.raises(KeyboardInterrupt):
        fit(model, loss, interrupted, optimizer, budget="0.4 cpu s", checkpoint=file, progress=False)
    sum(i * i for i in range(3_000_000))  # what others do in between is not part of the run
    history = fit(model, loss, batch, optimizer, budget="0.4 cpu s", checkpoint=file, resume=True, progress=False)
    assert history.step.tolist() == list(range(len(history))) and history.seconds.is_monotonic_increasing
    gap = history.seconds.diff().iloc[stopped[0] + 1]
    assert 0.4 <= history.seconds.iloc[-1] < 0.5 and gap < 0.1, "it goes on where it stopped"


@pytest.mark.parametrize(("processes", "device"), [(2, "cpu"), (1, "cuda")])
def test_the_cpu_clock_does_not_judge_what_it_cannot_see(monkeypatch, processes, device):
    state = SimpleNamespace(num_processes=processes, device=torch.device(device))
    monkeypatch.setattr("aoi_ssl.train.PartialState", lambda: state)
    with pytest.raises(AoiError, match="measures one process on a CPU"):
        fit(*_args(), budget="1 cpu s", progress=False)


@pytest.mark.parametrize("text", ["", "soon", "-5s", "0", "1.5 steps", "10 parsecs", "5 gpu s", "cpu"])
def test_what_is_no_budget(text):
    with pytest.raises(AoiError):
        parse_budget(text)


def test_a_budget_is_one_thing():
    with pytest.raises(AoiError, match="clock is 'sun'"):
        Budget(seconds=1, clock="sun")
    with pytest.raises(AoiError, match="exactly one"):
        Budget(seconds=1, steps=1)
    with pytest.raises(AoiError, match="resolve"):
        Budget(epochs=1).progress(0, 0)


SCRIPT = """
import sys, torch
from torch import nn
from accelerate import PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import broadcast_object_list
from aoi_ssl.train import fit

per = 8 // PartialState(cpu=True).num_processes

def batch(index):
    rows = torch.arange(index * per, (index + 1) * per)
    x = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(int(r))) for r in rows])
    return {"x": x, "y": x.sum(1, keepdim=True)}

class Notes(GeneralTracker):
    name, requires_logging_directory, tracker = "notes", False, None
    def __init__(self): pass
    def store_init_configuration(self, values): pass
    def log(self, values, step=None, **kwargs): pass

torch.manual_seed(0)
model = nn.Linear(3, 1)
loss = lambda m, b: ((m(b["x"]) - b["y"]) ** 2).mean()
fit(model, loss, batch, torch.optim.SGD(model.parameters(), lr=0.1), budget="8 steps", progress=False, report_to=[Notes()])
"""


class Notes(GeneralTracker):
    "A tracker that knows when it was told what."

    name, requires_logging_directory, tracker = "notes", False, None

    def __init__(self):
        self.steps, self.finished = [], 0

    def store_init_configuration(self, values):
        assert "budget" in values

    def log(self, values, step=None, **kwargs):
        assert not self.finished, "it has been told that the run is over"
        self.steps.append(step)

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("how", ["at the end", "early", "by Ctrl-C", "by a broken loss"])
def test_a_tracker_is_told_of_the_end_once_and_last_however_it_comes(how):
    def asked(index):
        if index == 12 and how == "by Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        return {**batch(index), "scale": torch.tensor(math.nan if index == 12 and how == "by a broken loss" else 1.0)}

    notes, (model, optimizer) = Notes(), start()
    stop = lambda history: how == "early" and len(history) == 13
    options = {"budget": "25 steps", "stop": stop, "report_to": [notes], "progress": False}
    broken = {"by Ctrl-C": pytest.raises(KeyboardInterrupt), "by a broken loss": pytest.raises(AoiError)}
    with broken.get(how, nullcontext()):
        fit(model, lambda m, b: loss(m, b) * b["scale"], asked, optimizer, **options)
    assert notes.steps == {"at the end": [9, 19, 24], "early": [9, 12], "by Ctrl-C": [9, 12], "by a broken loss": [9]}[how]
    assert notes.finished == 1


def test_two_processes_give_the_losses_of_one(tmp_path):
    "Two CPU processes with batches of 4 see what one process, this one, sees with batches of 8."
    script, out = tmp_path / "two.py", tmp_path / "two.pt"
    talk = "assert per == 4\nbroadcast_object_list([0])\n"  # that the tracker is told of the end does not end the talk between processes
    script.write_text(SCRIPT + talk + "if PartialState().is_main_process:\n    torch.save(model.state_dict(), sys.argv[1])\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, str(script), str(out)], check=True, capture_output=True, timeout=120, env=env)
    exec(SCRIPT, one := {})
    assert one["per"] == 8
    torch.testing.assert_close(torch.load(out, weights_only=True), dict(one["model"].state_dict()))


def test_after_step_follows_every_step_and_its_figures_are_in_the_history():
    model, optimizer = start()
    seen = []

    def follow(spent):
        seen.append((spent, model[0].weight[0, 0].item()))
        return {"figure": 7.0} if len(seen) == 2 else None

    history = fit(model, loss, batch, optimizer, budget="4 steps", after_step=follow, progress=False)
    assert [spent for spent, _ in seen] == [0.25, 0.5, 0.75, 1.0]
    assert len({weight for _, weight in seen}) == 4 and seen[-1][1] == model[0].weight[0, 0].item()
    assert history.figure.isna().tolist() == [True, False, True, True] and history.figure[1] == 7


def test_the_history_is_told_from_the_first_step_on_and_the_first_checkpoint_comes_soon(tmp_path):
    from aoi_ssl.train import journal_beside, read_journal

    model, optimizer = start()
    file, seen = tmp_path / "run.checkpoint", []

    def look(spent):
        seen.append((len(read_journal(journal_beside(file))) if journal_beside(file).exists() else 0, file.exists()))

    whole = fit(model, loss, batch, optimizer, budget="0.6s", checkpoint=file, after_step=look, save_every=0.2, progress=False)
    assert seen[0] == (0, False) and seen[1] == (1, False) and seen[-1][1]
    assert read_journal(journal_beside(file)).loss.equals(whole.loss)


def test_what_a_killed_run_left_is_no_part_of_the_next(tmp_path):
    "A run that is begun anew finds neither the history nor the snapshots of the one before; one that goes on finds both."
    from aoi_ssl.train import checkpoint_beside, journal_beside

    checkpoint = tmp_path / "run.checkpoint"
    snapshot, journal = tmp_path / "run.snapshots" / "0", journal_beside(checkpoint)
    snapshot.mkdir(parents=True)
    for file in (checkpoint, journal):
        file.write_text("{}")
    assert checkpoint_beside(tmp_path / "run", resume=True, overwrite=False) == checkpoint and snapshot.exists() and journal.exists()
    checkpoint_beside(tmp_path / "run", resume=False, overwrite=True)
    assert not any(tmp_path.iterdir())
