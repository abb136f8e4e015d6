"""`make gpu`, `make gpu-train` and `make gpu-results`, rehearsed on the CPU with tiny sizes."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
MIXES = ("none", "mixup", "manifold")
PARTS = ["ceilings", "tests", "preact18", "wrn28_10", "kernels", "profile"]


def script(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    # Neither the suite's folder for $OUT nor a CUDA device, where there is one.
    inherited = {key: value for key, value in os.environ.items() if key != "OUT"}
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu" / name), *map(str, arguments)],
        cwd=ROOT,
        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
    )


def rehearse(out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return script(
        "run.py", "--device", "cpu", "--tiny", "--backend", "eager", "--out", out, *arguments
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = rehearse(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.long
def test_every_part_ends_well_and_leaves_its_measurements(rehearsal):
    parts = {name: json.loads((rehearsal / f"{name}.json").read_text()) for name in PARTS}
    assert {name: part["ending"] for name, part in parts.items()} == dict.fromkeys(PARTS, "done")
    assert not [row for part in parts.values() for row in part["rows"] if "error" in row]
    assert sorted(file.name for file in rehearsal.iterdir()) == sorted(
        ["summary.md", *(f"{name}.json" for name in PARTS)]
    )
    assert parts["ceilings"]["copy_bytes_per_s"] > 1e8 < parts["ceilings"]["bf16_flop_per_s"]
    assert parts["ceilings"]["machine"]["packages"]["torch"]
    assert parts["tests"]["counts"]["passed"] >= 1
    steps = {
        (row["engine"], row["method"]): row
        for row in parts["preact18"]["rows"]
        if row["what"] == "step"
    }
    assert steps.keys() == {(e, m) for e in ("eager", "compile") for m in ("plain", "IAT")}
    for (engine, _), row in steps.items():
        assert row["over_plain"] == row["seconds"] / steps[engine, "plain"]["seconds"]
        assert row["epoch_s"] == pytest.approx(12500 * row["seconds"])
        assert row["images_per_s"] == pytest.approx(4 / row["seconds"])
    attacks = [row for row in parts["wrn28_10"]["rows"] if row["what"] == "attack"]
    assert all(row["loss_gain"] > 0 for row in attacks) and len(attacks) == 2
    kernels = {(r["op"], r["implementation"]) for r in parts["kernels"]["rows"]}
    assert {i for _, i in kernels} == {"kernel", "eager", "compile"}
    (profile,) = parts["profile"]["rows"]
    assert profile["shares"]["convolution"] > 0 <= min(profile["shares"].values())


@pytest.mark.long
def test_summary_has_the_machine_every_part_and_goals_beside_measurements(rehearsal):
    text = (rehearsal / "summary.md").read_text()
    for part in PARTS:
        assert f"| {part} | done |" in text
    assert "| preact18, batch 64: IAT step, share of peak | 0.25 | - | - |" in text
    for title in ("Goals", "Step", "PGD-7", "Kernels", "Where a step's time goes"):
        assert f"## {title}\n" in text
    assert "## Errors" not in text and "| preact18 | 4 | compile | IAT |" in text


@pytest.mark.long
def test_part_that_is_stopped_keeps_its_rows_and_the_next_one_runs(tmp_path):
    # Too little time for the tests, which is noted, and the ceilings that follow are measured.
    done = rehearse(tmp_path, "--parts", "tests", "ceilings", "--minutes", "0.11")
    assert done.returncode == 1
    tests, ceilings = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("tests", "ceilings")
    )
    assert tests["ending"] != "done" and ceilings["ending"]
    assert "| tests | " in (tmp_path / "summary.md").read_text()


def test_goals_are_judged_by_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from gpu.summary import summary

    def step(engine, method, seconds, share, ratio):
        return {
            "what": "step", "network": "preact18", "batch": 64, "engine": engine, "method": method,
            "seconds": seconds, "of_peak": share, "epoch_s": 781 * seconds, "over_plain": ratio,
            "images_per_s": 64 / seconds,
        }  # fmt: skip

    rows = [step("eager", "IAT", 0.021, 0.1, 9.0), step("graph", "IAT", 0.007, 0.26, 6.9)]
    kernel = {"what": "kernel", "op": "mix", "direction": "forward", "batch": 4096}
    rows += [
        kernel
        | {"implementation": "kernel", "launched_s": 1e-4, "replayed_s": 5e-5, "of_copy": 0.9}
    ]
    rows += [{"what": "attack 512", "error": "Traceback: out of memory"}]
    (tmp_path / "preact18.json").write_text(json.dumps({"part": "preact18", "rows": rows}))
    text = summary(tmp_path)
    assert "| preact18, batch 64: IAT step, share of peak | 0.25 | 0.26 | yes |" in text
    assert "| preact18, batch 64: epoch in s | 5.6 | 5.47 | yes |" in text
    assert "| preact18, batch 64: IAT over plain step | 6.7 | 6.9 | no |" in text
    assert "| preact18, batch 64: graph over eager | 2 | 3 | yes |" in text
    assert "| mix forward, batch 4096: share of a copy's rate | 0.85 | 0.9 | yes |" in text
    assert "| mix | forward | 4096 | 50 | 0.9 |" in text
    assert "### attack 512" in text and "out of memory" in text


def test_gpu_run_without_a_gpu_says_so():
    done = script("run.py")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "there is no CUDA device; rehearse with --device cpu --tiny" in done.stderr


def image_tree(root: Path, n_train: int = 8, classes: int = 2) -> None:
    random = np.random.default_rng(0)
    for split, n in (("train", n_train), ("test", 4)):
        for label, name in enumerate(("dark", "light", "lighter", "lightest")[:classes]):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(50 * label, 50 * label + 100, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


@pytest.fixture
def train(tmp_path: Path):
    """Run a session of `gpu/train.py` on a tiny tree and return its report."""
    image_tree(tmp_path / "tree")
    flags = ["--data-dir", tmp_path / "tree", "--out", tmp_path / "out", "--device", "cpu"]
    flags += ["--arch", "mlp6", "--width", 8, "--batch-size", 8, "--steps", 2, "--lr", 0.01]

    def session(*more: object) -> dict:
        done = script("train.py", *flags, *more, FASTIAT_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / "out" / "gpu_train.json").read_text())

    return session


@pytest.mark.long
def test_training_by_the_clock_plans_trains_and_measures(train, tmp_path):
    report = train("--minutes", 0.01, "--session", 5)
    assert report["epochs"] == 1 and report["epoch_s"] > 2 * report["step_s"] > 0
    assert [(s["ended"], s["step"]) for s in report["sessions"]] == [("trained", 2)]
    assert report["measured"] and report["errors"].keys() >= {"none", "pgd-20"}
    assert all(error["n"] == 8 for error in report["errors"].values())
    config = json.loads((tmp_path / "out" / "run" / "config.json").read_text())
    assert (config["epochs"], config["adv"], config["mix"]) == (1, "pgd", "manifold")


@pytest.mark.long
def test_training_stopped_by_the_clock_goes_on_where_it_was(train):
    first = train("--epochs", 10**6, "--session", 0.01)
    second = train("--epochs", 10**6, "--session", 0.01)
    assert [s["ended"] for s in second["sessions"]] == ["stopped", "stopped"]
    steps = [s["step"] for s in second["sessions"]]
    assert 0 < first["sessions"][0]["step"] == steps[0] < steps[1]
    assert "errors" not in second


@pytest.mark.long
def test_first_results_go_on_after_a_session_and_leave_what_is_to_be_kept(tmp_path):
    image_tree(tmp_path / "tree", 16, 4)
    out, kept = tmp_path / "out", tmp_path / "kept"
    flags = ["--data-dir", tmp_path / "tree", "--out", out, "--device", "cpu", "--tiny"]

    def session(*more: object, status: int = 0) -> str:
        cache = str(tmp_path / "cache")
        done = script("sessions.py", *flags, *more, FASTIAT_CACHE=cache, OUT=str(kept))
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout.splitlines()[-1]

    assert "speed is not finished; run the same command to continue" in session("--session", 0)
    # A stage that fails does not keep the next one from running.
    line = session("--stages", "autoattack", "diagnose", status=1)
    assert "done, except autoattack, diagnose" in line
    assert "all done" in session("--epochs", 1)
    assert {file.name for file in kept.iterdir()} == {"figures.tar.gz", "checkpoint.tar.0"}
    with tarfile.open(kept / "figures.tar.gz") as archive:
        archive.extractall(kept, filter="data")
    report = json.loads((kept / "gpu_results.json").read_text())
    (tried,) = report["speed"]
    assert 0 < tried["epochs_s"] < tried["wall_s"]
    assert tried["errors"]["pgd-50"]["n"] == 16 and tried["errors"]["pgd-50"]["eps"] == 8 / 255
    assert {command["status"] for command in report["commands"]} == {0}
    rows = {file.parent.name for file in (kept / "table3").glob("*/evaluation.json")}
    assert rows == {f"folder-tree-mlp6-{a}-{m}-s0" for a in ("none", "pgd") for m in MIXES}
    run = kept / "table3" / "folder-tree-mlp6-pgd-manifold-s0"
    attacks = [entry["attack"] for entry in json.loads((run / "evaluation.json").read_text())]
    assert "autoattack" in attacks and (run / "diagnosis.json").exists()
    assert (kept / "table3" / "table3.md").exists()
    assert not [*kept.rglob("*.safetensors"), *kept.rglob("*.pt")]
    assert "all done" in session("--stages", "speed", "autoattack", "diagnose")
    assert json.loads((out / "gpu_results.json").read_text()) == report
    # On another machine the figures are there, and the newest checkpoint.
    flags[3] = tmp_path / "elsewhere"
    states = sorted(out.rglob("state.safetensors"), key=lambda file: file.stat().st_mtime)
    assert "all done" in session("--restore", kept, "--stages", "speed")
    restored = flags[3] / states[-1].relative_to(out)
    assert restored.read_bytes() == states[-1].read_bytes()
    assert json.loads((flags[3] / "gpu_results.json").read_text()) == report
