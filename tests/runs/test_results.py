"""evaluation.json: what it keeps, what it replaces, and what it refuses to read."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from fastiat import __version__, cli
from fastiat.config import EvaluateConfig
from fastiat.evaluate import evaluate
from fastiat.runs.directory import MODEL, Run, load_with_card
from fastiat.runs.results import EVALUATION, IDENTITY, Rate, fingerprint, read_results

CPU = ("--device", "cpu", "--precision", "fp32", "--limit", "60")


def measure(run: Path, *flags: str) -> list[dict]:
    assert cli.main(["evaluate", str(run), *CPU, *flags]) == 0
    return read_results(run)


@pytest.fixture
def run(good, tmp_path) -> Path:
    copy = Path(shutil.copytree(good, tmp_path / "run"))
    (copy / EVALUATION).unlink()
    return copy


def test_an_entry_has_its_figures_settings_and_origin(run):
    results = measure(run, "--attacks", "none", "fgsm", "pgd-2", "--eps", "8/255", "--seed", "4")
    assert [entry["attack"] for entry in results] == ["none", "fgsm", "pgd-2"]
    for entry in results:
        rate = Rate(entry["errors"], 60)
        assert entry["n"] == 60 and entry["error_percent"] == round(rate.percent, 4)
        assert entry["interval_95_percent"] == [round(end, 4) for end in rate.interval()]
        assert (entry["kind"], entry["dataset"], entry["split"]) == ("evaluation", "digits", "test")
        assert entry["versions"] == {"fastiat": __version__, "torch": torch.__version__}
        assert datetime.fromisoformat(entry["time"]).tzinfo == UTC
        assert entry["device"].startswith("cpu (") and entry["seconds"] > 0
        assert entry["model"] == fingerprint(run / MODEL) and entry["seed"] == 4
        assert set(IDENTITY) <= entry.keys()
    none, fgsm, pgd = results
    pgds = {"eps": 8 / 255, "alpha": 0.0075, "steps": 2, "norm": "linf", "loss": "ce"}
    pgds |= {"restarts": 1, "random_start": True, "precision": "fp32"}
    assert {name: pgd[name] for name in pgds} == pgds
    assert (fgsm["eps"], fgsm["steps"], fgsm["alpha"], fgsm["restarts"]) == (8 / 255, 1, None, None)
    assert all(none[name] is None for name in pgds)


def test_a_later_command_replaces_the_same_figures_and_keeps_the_others(run):
    first = measure(run, "--attacks", "none", "pgd-2")
    second = measure(run, "--attacks", "pgd-2", "pgd-3")
    assert second[0] == first[0]
    assert [entry["attack"] for entry in second] == ["none", "pgd-2", "pgd-3"]
    assert second[1]["errors"] == first[1]["errors"]
    for flag, value in (
        *(("--eps", "0.02"), ("--alpha", "0.01"), ("--norm", "l2"), ("--attack-loss", "margin")),
        *(("--restarts", "2"), ("--seed", "1"), ("--limit", "59"), ("--splits", "train")),
    ):
        before = len(read_results(run))
        assert len(measure(run, "--attacks", "pgd-2", flag, value)) == before + 1
    # The clean error does not depend on the attack's settings.
    before = read_results(run)
    after = measure(run, "--attacks", "none", "--eps", "0.01", "--norm", "l2", "--restarts", "3")
    assert len(after) == len(before)


def test_rows_of_metrics_carry_the_same_figures(run):
    before = len(list(Run.open(run).rows()))
    results = measure(run, "--attacks", "none", "pgd-2")
    rows = list(Run.open(run).rows())[before:]
    for row, entry in zip(rows, results, strict=True):
        del entry["time"]
        assert row == row | {name: value for name, value in entry.items() if value is not None}


def test_resuming_a_finished_run_keeps_every_measurement(run):
    assert cli.main(["sweep", str(run), *CPU, "--steps", "1", "2"]) == 0
    results, rows = read_results(run), list(Run.open(run).rows())
    assert cli.main(["train", "--resume", "--out", str(run)]) == 0
    assert [entry["kind"] for entry in results] == ["sweep", "sweep"]
    assert read_results(run)[:2] == results
    assert list(Run.open(run).rows())[: len(rows)] == rows


def test_results_of_other_weights_are_no_results(run):
    measure(run, "--attacks", "none")
    model, card = load_with_card(run)
    Run.open(run).save_model(model.state_dict(), card)
    assert len(read_results(run)) == 1
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    Run.open(run).save_model(model.state_dict(), card)
    assert read_results(run) == []
    assert len(measure(run, "--attacks", "fgsm")) == 1
    assert "none" not in (run / EVALUATION).read_text()


def test_a_run_without_a_model_or_a_measurement_has_no_results(run, tmp_path):
    assert read_results(run) == [] == read_results(tmp_path)


def test_a_model_whose_header_claims_too_much_is_named(complaint, run):
    (run / MODEL).write_bytes(b"\xff" * 64)
    assert str(run / MODEL) in complaint("report", run)


def test_somebody_elses_run_is_measured_and_not_written(run, monkeypatch, contents, capsys):
    before = contents(run)
    monkeypatch.setattr("os.access", lambda *_: False)
    config = EvaluateConfig(runs=(str(run),), attacks=("none",), device="cpu")
    assert evaluate(config)[str(run)]["test/none"].n == 360
    assert "360" in capsys.readouterr().out and contents(run) == before


def entry_with(**other: object) -> str:
    entry = dict.fromkeys(IDENTITY) | {"kind": "evaluation", "dataset": "digits", "split": "test"}
    entry |= {"attack": "none", "model": "0", "errors": 1, "n": 9, "error_percent": 11.1}
    return json.dumps([entry | {"interval_95_percent": [1, 2]} | other])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "not written by fastiat"),
        ("[3]", "not written by fastiat"),
        ('[{"kind": "evaluation"}]', "not written by fastiat"),
        (entry_with(kind="other"), "not written by fastiat"),
        (entry_with(n="9"), "not written by fastiat"),
        (entry_with(interval_95_percent=[1]), "not written by fastiat"),
        (entry_with(model=None), "not written by fastiat"),
        (entry_with(n=0, errors=0), "not written by fastiat"),
        (entry_with(errors=10), "not written by fastiat"),
        (entry_with(error_percent=float("nan")), "not JSON"),
        (entry_with(eps=10**400), "not JSON"),
        (entry_with(eps=10**300), "not written by fastiat"),
        (entry_with(eps="8/255"), "not written by fastiat"),
        (entry_with(attack="pgd-x"), "not written by fastiat"),
        (entry_with(attacks=[1]), "not written by fastiat"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_measured(complaint, run, contents, text, named):
    (run / EVALUATION).write_text(text)
    before = contents(run)
    line = complaint("evaluate", run, *CPU)
    assert str(run / EVALUATION) in line and named in line and "remove it" in line
    assert contents(run) == before
    (run / EVALUATION).write_text(entry_with())
    assert read_results(run) == []
