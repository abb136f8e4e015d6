"""Reproducing a table at a tiny scale: what is trained, kept, resumed, compared and written."""

import csv
import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest

from fastiat import cli
from fastiat import train as training
from fastiat.config import ReproduceConfig
from fastiat.paper import compare, plan, published
from fastiat.paper.estimate import Images, Speed
from fastiat.runs.directory import CONFIG, METRICS, MODEL, PREVIOUS, STATE

SCALE = (
    *("--dataset", "digits", "--arch", "mlp6", "--width", "8", "--epochs", "1"),
    *("--limit", "20", "--device", "cpu", "--precision", "fp32", "--lr", "0.02"),
)
ROWS = [f"{adv}-{mix}" for adv in ("none", "pgd") for mix in ("none", "mixup", "manifold")]


def _reproduce(target, out, *more, scale=SCALE):
    return cli.main(["reproduce", target, *scale, "--out", str(out), *map(str, more)])


def _path(out: Path, row: str, seed: int = 0) -> Path:
    return out / f"digits-mlp6-{row}-s{seed}"


@pytest.fixture
def no_report(monkeypatch) -> None:
    """Leave the report, which takes seconds, to test_report.py."""
    monkeypatch.setattr("fastiat.reproduce.report", lambda config: None)


@pytest.fixture(scope="module")
def table3(tmp_path_factory) -> Path:
    """A finished table3; not to be written to."""
    out = tmp_path_factory.mktemp("table3") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastiat.reproduce.report", lambda config: None)
        assert _reproduce("table3", out) == 0
    return out


@pytest.fixture
def done(table3, tmp_path, no_report) -> Path:
    """A copy of the finished table3."""
    return Path(shutil.copytree(table3, tmp_path / "runs"))


def _rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_table_has_every_row_trained_measured_and_beside_the_papers(table3):
    assert sorted(path.parent.name for path in table3.glob(f"*/{CONFIG}")) == sorted(
        _path(table3, row).name for row in ROWS
    )
    rows = _rows(table3 / "table3.csv")
    assert len(rows) == 48
    for row, cell in zip(rows, published.table("table3").cells, strict=True):
        assert (row["row"], row["measure"]) == (published.ROWS[cell.row].title, cell.measure)
        assert float(row["paper"]) == cell.error_percent
        assert int(row["n"]) == 20
        assert float(row["ours"]) == pytest.approx(100 * int(row["errors"]) / 20)
        assert float(row["difference"]) == pytest.approx(float(row["ours"]) - float(row["paper"]))
        assert float(row["low"]) <= float(row["ours"]) <= float(row["high"])


def test_the_caption_says_what_was_scaled_and_the_command_makes_it_again(table3):
    kept = compare.read(table3 / "table3.json")
    assert kept.caption == (
        "Error in %, difference in points. One seed (0). Scaled: data set digits instead of "
        "cifar10; network mlp6 instead of preact18; epochs 1 instead of 200; learning rate 0.02 "
        "instead of 0.1; width 8 instead of 512; measured on 20 of the 360 test images; "
        "measured on 20 of the 1437 training images."
    )
    command, asked = cli.parse(kept.command.split()[1:])
    again = cli.parse(["reproduce", "table3", *SCALE, "--out", str(table3)])[1]
    assert (command, asked) == ("reproduce", again)


def test_markdown_shows_the_same_figures_as_csv(table3):
    text = (table3 / "table3.md").read_text()
    shown = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)[2:]
    for line, row in zip(shown, _rows(table3 / "table3.csv"), strict=True):
        cells = [cell.strip() for cell in line.split(" | ")]
        numbers = [float(row[name]) for name in ("paper", "ours", "difference", "low", "high")]
        theirs, ours, difference, low, high = numbers
        assert cells == [
            *(row["row"], row["measure"], f"{theirs:.2f}", f"{ours:.2f}"),
            *(f"{difference:+.2f}", f"{low:.2f} to {high:.2f}"),
        ]
    assert "arXiv:1906.06784" in text and "Scaled: " in text


def test_what_is_done_is_not_done_again(done, contents, capsys):
    runs = {path: contents(path) for path in done.glob("digits-*")}
    assert _reproduce("table3", done) == 0
    for path, before in runs.items():
        after = contents(path)
        assert {name: after[name] for name in (METRICS, MODEL, STATE)} == {
            name: before[name] for name in (METRICS, MODEL, STATE)
        }
    assert capsys.readouterr().out.count("trained already") == 6


def test_a_missing_measurement_and_a_missing_run_are_made_up_for(done):
    before = (done / "table3.csv").read_text()
    shutil.rmtree(_path(done, "pgd-mixup"))
    (_path(done, "none-none") / "evaluation.json").unlink()
    assert _reproduce("table3", done) == 0
    # Trainings and attacks repeat exactly.
    assert (done / "table3.csv").read_text() == before


def test_an_interrupted_row_is_resumed_by_the_same_command(
    tmp_path, table3, no_report, monkeypatch, capsys
):
    out, steps = tmp_path / "runs", []
    update = training.Trainer.update

    def interrupted(self, images, y):
        steps.append(self.config.adv)
        if len(steps) == 30:
            signal.raise_signal(signal.SIGTERM)
        return update(self, images, y)

    monkeypatch.setattr(training.Trainer, "update", interrupted)
    assert _reproduce("table3", out) == 128 + signal.SIGTERM
    assert f"go on with: fastiat reproduce table3 --out {out}" in capsys.readouterr().err
    assert len(compare.read(out / "table3.json").lines) == 48
    monkeypatch.setattr(training.Trainer, "update", update)
    assert _reproduce("table3", out, "--dry-run") == 0
    monkeypatch.setattr(training.Trainer, "update", interrupted)
    listed = capsys.readouterr().out.splitlines()
    assert "done" in listed[0] and "resume" in listed[1] and "to train" in listed[2]
    assert _reproduce("table3", out) == 0
    # 22 updates a row, not one of them twice.
    assert len(steps) == 6 * 22
    assert _rows(out / "table3.csv") == _rows(table3 / "table3.csv")


def test_a_row_that_was_killed_before_its_first_checkpoint_starts_again(done):
    path = _path(done, "pgd-none")
    for name in (STATE, PREVIOUS, MODEL, "evaluation.json", METRICS):
        (path / name).unlink()
    assert _reproduce("table3", done) == 0
    assert (path / MODEL).exists()


def test_dry_run_lists_and_writes_nothing(done, contents, capsys):
    shutil.rmtree(_path(done, "pgd-manifold"))
    before = contents(done)
    assert _reproduce("table3", done, "--dry-run") == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 7
    assert all(" done " in line for line in listed[:5])
    assert "to train, 1 epochs" in listed[5] and "nothing was trained or written" in listed[6]
    assert contents(done) == before
    assert _reproduce("table3", done.parent / "none", "--dry-run") == 0
    assert not (done.parent / "none").exists()


def test_estimates_count_updates_tests_and_passes():
    images = Images(train=130, test=50, size=8, channels=1, classes=10)
    speed = Speed(update=1.0, forward=0.01, step=0.1)
    config = plan.Plan(ReproduceConfig(target="table3", dataset="digits", epochs=3)).used
    # Two batches of 64 an epoch, three epochs, one update done; three tests of 50 images.
    assert speed.training(config, images, 1) == pytest.approx(5 * 64 + 3 * (50 * 0.01))
    # A pass that judges, and PGD's steps, for each image.
    assert speed.measuring([("none", 10), ("pgd-20", 5)]) == pytest.approx(0.1 + 5 * (0.01 + 2))


@pytest.mark.slow
def test_tables_5_to_7_use_the_runs_of_table_3(done, capsys):
    for name, cells in (("table5", 27), ("table6", 24), ("table7", 18)):
        scale = tuple("4" if word == "20" else word for word in SCALE)
        if name == "table7":
            # A thousand steps on four images.
            scale = tuple("2" if word == "4" else word for word in scale)
        assert _reproduce(name, done, scale=scale) == 0
        rows = _rows(done / f"{name}.csv")
        assert len(rows) == cells and all(row["ours"] for row in rows)
        assert "training: " not in capsys.readouterr().out
    assert len(list(done.glob(f"*/{CONFIG}"))) == 6


def test_several_seeds_are_averaged_with_the_interval_of_their_mean(tmp_path):
    found = [{"errors": 10, "n": 100}, {"errors": 14, "n": 100}, {"errors": 18, "n": 100}]
    cell = published.table("table3").cells[0]
    line = compare.line(cell, found)
    # Student's t with two degrees of freedom: 4.3027; the deviation is 4 points.
    half = 4.302653 * 4 / math.sqrt(3)
    # scipy.stats.binomtest(14, 100).proportion_ci(method="wilson")
    low, high = 8.526344, 22.137188
    reach = math.hypot(14 - low, half), math.hypot(high - 14, half)
    assert (line.ours, line.errors, line.n) == (14, 42, 300)
    assert (line.low, line.high) == pytest.approx((14 - reach[0], 14 + reach[1]), rel=1e-5)
    # Seeds that agree by chance do not make the images any more.
    same = compare.line(cell, [found[1]] * 3)
    assert (same.low, same.high) == pytest.approx((low, high), rel=1e-5)
    assert compare.line(cell, [found[0], None]).ours is None


@pytest.mark.slow
def test_figure_1_has_norms_of_all_rows_over_seeds(tmp_path, no_report):
    out = tmp_path / "runs"
    # Without --lr, which has a value of its own in Figure 1.
    assert _reproduce("figure1", out, "--seeds", 0, 1, scale=SCALE[:-2]) == 0
    rows = _rows(out / "figure1.csv")
    assert len(rows) == 4 * 6 * 2
    assert all(float(r["lowest"]) <= float(r["mean"]) <= float(r["highest"]) for r in rows)
    text = (out / "figure1.md").read_text()
    assert "Mean over seeds 0, 1" in text and "Scaled: data set digits" in text
    config = json.loads((_path(out, "pgd-none") / CONFIG).read_text())
    # recipe.md's settings for Figure 1, which the paper does not give.
    assert [config[name] for name in ("lr", "weight_decay", "eps", "alpha", "batch_size")] == [
        *(0.01, 0.0, 0.1, 0.025, 64)
    ]
    for name in ("figure1-frobenius.svg", "figure1-spectral.png"):
        assert (out / name).exists()


def test_a_run_of_other_settings_is_named(complaint, done, contents):
    before = contents(done)
    line = complaint("reproduce", "table3", *SCALE, "--out", done, "--epochs", "2")
    assert f"{_path(done, 'none-none')} was trained with --epochs 1, not 2" in line
    line = complaint("reproduce", "table3", *SCALE, "--out", done, "--lr", "0.5")
    assert "--lr 0.02, not 0.5" in line
    assert contents(done) == before


def test_measurements_of_other_weights_or_fewer_images_do_not_count(done):
    path = _path(done, "none-none")
    config = cli.parse(["reproduce", "table3", *SCALE, "--out", str(done)])[1]
    assert plan.Plan(config).missing(plan.Plan(config).jobs[0]) == []
    shutil.copy(_path(done, "pgd-none") / MODEL, path / MODEL)
    assert len(plan.Plan(config).missing(plan.Plan(config).jobs[0])) == 8
    fewer = cli.parse(["reproduce", "table3", *SCALE, "--limit", "10", "--out", str(done)])[1]
    assert all(len(plan.Plan(fewer).missing(job)) == 8 for job in plan.Plan(fewer).jobs)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("table8", "'table1', 'table2'"),
        ("", "target"),
        ("table3 --epochs 0", "--epochs is 0"),
        ("table3 --limit 0", "--limit is 0"),
        ("table3 --splits val", "choose from test, train"),
        ("table6 --splits train --dataset digits", "table6 is measured on the test images"),
        ("table3 --splits test test", "--splits names a value twice"),
        ("table3 --seeds -1", "--seeds is -1"),
        ("table3 --seeds 1 1", "--seeds names a value twice"),
        ("table3 --lr nan", "--lr is nan"),
        ("table3 --out=", "--out is empty"),
        ("table3 --device tpu --dataset digits", "choose from auto, cpu, cuda"),
        ("table3 --dataset folder", "--data-dir"),
        ("table3 --dataset folder --data-dir nowhere", "nowhere does not exist"),
    ],
)
def test_wrong_arguments_get_one_line_and_nothing_is_written(
    complaint, tmp_path, monkeypatch, flags, named
):
    monkeypatch.chdir(tmp_path)
    assert named in complaint("reproduce", *flags.split())
    assert not list(tmp_path.iterdir())


def test_fewer_images_than_a_batch_get_one_line_before_anything_is_measured(complaint, tmp_path):
    from test_cli import make_tree

    make_tree(tmp_path / "images", count=8)
    scale = ("--dataset", "folder", "--data-dir", tmp_path / "images", "--arch", "mlp6")
    line = complaint("reproduce", "table3", *scale, "--dry-run", "--out", tmp_path / "runs")
    assert "folder has 16 training images" in line and "64 at a time" in line


def test_a_folder_of_something_else_under_a_rows_name_is_left_alone(complaint, tmp_path):
    path = _path(tmp_path, "none-none")
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    line = complaint("reproduce", "table3", *SCALE, "--out", tmp_path)
    assert f"{path} is a folder with other files in it" in line
    assert [file.name for file in tmp_path.rglob("*.*")] == ["notes.txt"]
