"The comparison of objectives: judged alike, and nothing is lost when it is killed."

import csv
import sys

import pytest
import torch
from from_tools import load_tool, needs_tools

pytestmark = needs_tools


@pytest.fixture(scope="module")
def tool():
    return load_tool("compare_objectives")


def test_the_probe_finds_what_is_linear(tool):
    draw = torch.Generator().manual_seed(0)
    grid = torch.randn(4, 5, 5, 6, generator=draw)
    share = grid @ torch.randn(6, 2, generator=draw) + 0.3
    place = torch.arange(4)
    assert torch.allclose(tool.ridge(grid, share, place < 3, place == 3, 1e-9), share[3:].double(), atol=1e-4)
    shrunk = tool.ridge(grid, share, place < 3, place == 3, 1e6)
    assert torch.allclose(shrunk, share[:3].double().mean((0, 1, 2)).expand_as(shrunk), atol=1e-3)


def test_iou_of_filled_patches_by_hand(tool):
    predicted, share = torch.tensor([0.9, 0.5, 0.1])[None, :, None, None], torch.tensor([0.5, 0.25, 0.25])[None, :, None, None]
    curve = tool.patch_iou(predicted, share)[:, 0]  # one class, three patches
    assert torch.allclose(curve[[0, 14, 43, 48]], torch.tensor([1.0 / 3.0, 0.75 / 2.25, 0.5 / 1.5, 0.0]))


def test_a_table_grows_by_whole_rows_and_is_read_again(tool, tmp_path):
    table = tool.Table(tmp_path / "t.csv")
    table.add({"run": "mae", "seed": 0, "share": 0.5})
    assert not table.has("mae", 0), "it was killed on the way"
    table.add({"run": "mae", "seed": 0, "share": 1.0, "retrieval": 0.4})
    again = tool.Table(tmp_path / "t.csv")
    assert again.has("mae", 0) and not again.has("mae", 1) and not again.has("dino", 0)
    assert [r["retrieval"] for r in again.rows] == ["", "0.4"]
    again.drop("mae", 0)
    assert not again.rows


def test_rates_scale_with_the_root_of_the_batch(tool):
    def train(*, base_lr=0.008, batch_size=32):
        pass

    for batch in (32, 128):
        lr = tool.scaled(train, {"batch_size": batch})["base_lr"] * batch / 256
        assert lr == pytest.approx(1e-3 * (batch / 32) ** 0.5)
    assert tool.scaled(train, {"batch_size": 64, "base_lr": 1.0})["base_lr"] == 1.0
    assert tool.scaled(train, {"batch_size": 32, "rate": 0.25}) == {"base_lr": 0.002, "batch_size": 32}


def test_an_encoder_is_adapted_at_the_rate_that_pretrain_takes_by_default(tool):
    from aoi_ssl.pretrain import ADAPT_LR, DRAWN_LR, pretrain

    rate = lambda **own: tool.scaled(pretrain, {"batch_size": 32, **own})["base_lr"]
    assert rate() == DRAWN_LR and rate(start_from="aoi-mae-tiny") == ADAPT_LR
    assert rate(**tool.RECIPES["adapted fast"].own) == pytest.approx(DRAWN_LR)


@pytest.mark.parametrize("name", ["objectives", "longer", "recipe", "adapt", "boards"])
def test_the_table_that_is_kept_has_all_that_its_study_names(tool, name):
    study, rows = tool.STUDIES[name], list(csv.DictReader((tool.options([]).out / f"{name}.csv").open()))
    judged = {(row["run"], int(row["seed"]), float(row["share"])) for row in rows if all(row[score] for score in study.scores)}
    assert len(judged) == len(rows), "a score is missing"
    for run in study.runs.split(","):
        recipe = tool.RECIPES[run]
        shares = study.shares[-1:] if recipe.own.get("patch_size") == 8 or run == "hiera" else study.shares
        assert {(run, seed, share) for seed in range(min(study.seeds, recipe.seeds)) for share in shares} <= judged
    assert {(run, 0, 0.0) for run in study.baselines.split(",")} <= judged
    assert tool.missing(tool.Table(tool.options([]).out / f"{name}.csv"), tool.options([f"--study={name}"])) == ([], [])


def test_a_folder_is_parted_by_device(tool, tmp_path):
    from dataclasses import replace

    from aoi_ssl.synthetic import CLASSES, render_folder

    render_folder(tmp_path / "own", devices=0, new_devices=3, images=3, size=96, calibration=0, progress=False)
    study = replace(tool.STUDIES["boards"], data=tmp_path / "own", classes=CLASSES, labelled=1, validation_devices=1)
    args = tool.options(["--study=boards", "--images=2", "--queries=1", "--crop=64"])
    args.validation_devices = 1
    (images, store), judged = tool.given(args, study)
    assert len(images) == 4 and len(store.images) == 4 and len(judged) == 2
    assert not set(images["device"]) & set(judged["device"])


def test_what_the_studies_name_exists_and_every_run_is_judged_at_its_end(tool):
    for name, study in tool.STUDIES.items():
        args = tool.options([f"--study={name}"])
        assert (args.seconds, args.seeds, args.runs) == (study.seconds, study.seeds, study.runs) and study.shares[-1] == 1
        assert set(study.runs.split(",")) <= set(tool.RECIPES) and set(study.baselines.split(",")) <= set(tool.BASELINES)


def test_all_runs_get_the_same_cpu_seconds_unless_their_name_says_otherwise(tool):
    args = tool.options(["--seconds=60"])
    budgets = {name: tool.budget_of(name, args) for name in tool.RECIPES}
    assert {budgets.pop(n) for n in ("budget / 4", "budget x 4", "adapted in a fifth")} == {"15.0 cpu s", "240.0 cpu s", "12.0 cpu s"}
    assert set(budgets.values()) == {"60.0 cpu s"}
    assert tool.budget_of("mae", tool.options(["--seconds=60", "--device=cuda"])) == "60.0 s"


def test_it_goes_on_after_the_last_whole_objective(tool, tmp_path, monkeypatch, capsys):
    options = {"steps": 4, "seeds": 1, "out": tmp_path, "work": tmp_path, "devices": 2, "images": 2, "size": 96, "crop": 64,
               "encoder": "nano", "batch-size": 2, "validation-devices": 1, "queries": 1, "workers": 1}  # fmt: skip
    arguments = ["compare_objectives", *(f"--{k}={v}" for k, v in options.items()), "--baselines=random"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(objectives):
        monkeypatch.setattr(sys, "argv", [*arguments, f"--runs={objectives}"])
        tool.main()
        return list(csv.DictReader((tmp_path / "objectives.csv").open())), capsys.readouterr().out

    first, _ = run("ibot")
    assert [r["run"] for r in first] == ["random"] + ["ibot"] * 4
    assert [r["share"] for r in first] == ["0", "0.25", "0.5", "0.75", "1.0"] and [r["steps"] for r in first[1:]] == list("1234")
    assert len({r["effective_rank"] for r in first}) > 2, "snapshots are of different weights"
    second, said = run("ibot,hiera-stages")
    late = [(r["run"], r["share"]) for r in second[5:]]
    early = [("hiera-stage3", share) for share in ("0.25", "0.5", "0.75")]  # the only one with patches of 16 pixels
    assert late == early + [(f"hiera-{name}", "1.0") for name in ("stages", "stage3", "stage2")]
    assert [r["retrieval"] for r in second[:5]] == [r["retrieval"] for r in first] and "run ibot" not in said
