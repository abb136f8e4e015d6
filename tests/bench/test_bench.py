"""The benchmarks' own machinery: interleaved rounds, what they are filed as, FLOP counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bench_folder(monkeypatch):
    for folder in ("bench", "docs"):  # docs/scaling.py
        monkeypatch.syspath_prepend(str(ROOT / folder))


def test_every_round_has_each_call_once_and_rounds_differ_in_order():
    import timing

    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    rounds = timing.interleaved(calls, budget=1e9, most=12)
    if not timing.ON_GPU:  # there a round is many calls
        in_rounds = ["".join(called[i : i + 3]) for i in range(0, 36, 3)]
        assert len(called) == 36 and all(sorted(r) == ["a", "b", "c"] for r in in_rounds)
        assert len(set(in_rounds)) > 1
    assert {name: len(seconds) for name, seconds in rounds.items()} == dict.fromkeys("abc", 12)
    assert all(len(s) == 2 for s in timing.interleaved(calls, budget=0, least=2).values())


def test_scalings_constants_and_reduction_are_right():
    import scaling

    from fastiat import models
    from fastiat.models import running_statistics

    for name, network in scaling.NETWORKS.items():
        with torch.device("meta"):
            model = models.build(name)
        assert network.parameters == models.count_parameters(model)
        assert network.statistics == sum(t.numel() for t in running_statistics(model))
    # A ring of 8 moves 14/8 of the bytes; of 16 GPUs each then exchanges an eighth once over.
    assert scaling.all_reduce(360e9, 8) == pytest.approx(14 / 8, rel=1e-3)
    assert scaling.all_reduce(360e9, 16) == pytest.approx(14 / 8 + 45 / 40, rel=1e-3)
    network = scaling.NETWORKS["preact18"]
    # RECORDS.md: 32 % of 790 TFLOP/s at batch 64.
    assert network.compute(64) == pytest.approx(64 * 22.21e9 / (0.32 * 790e12), rel=1e-3)
    rows = {gpus: (seconds, share) for gpus, seconds, share in scaling.strong(network, 512)}
    assert rows[1] == (pytest.approx(97 * network.compute(512)), 1)
    assert rows[8][0] == pytest.approx(97 * (network.compute(64) + 0.254e-3 + 0.042e-3), rel=0.01)


def test_the_page_on_scaling_has_the_tables_that_the_script_makes():
    import scaling

    page = (ROOT / "docs" / "scaling.md").read_text()
    for part in scaling.tables().split("\n\n"):
        assert part.strip() in page


def test_flops_are_those_of_the_floor():
    import steps
    import timing

    gradient, full = timing.flops("preact18")
    # performance.md's table, in GFLOP: forward with input gradient, and a plain step.
    assert (gradient / 1e9, full / 1e9) == (
        pytest.approx(2.222, abs=1e-3),
        pytest.approx(3.329, abs=1e-3),
    )
    assert steps.flops("IAT", gradient, full) / full == pytest.approx(steps.FLOOR, rel=0.01)
    assert steps.flops("plain", gradient, full) == full


def test_attack_that_leaves_the_ball_or_is_weak_is_refused():
    import rivals

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    x, y = torch.rand(4, 3, 8, 8) * 0.8 + 0.1, torch.arange(4)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), x)
    x = x.detach()
    good, away = x + rivals.EPS * grad.sign(), x + 1.01 * rivals.EPS * grad.sign()
    assert rivals.check({"good": good}, x, y, model)["good"] > 0
    with pytest.raises(AssertionError, match="away leaves the ball"):
        rivals.check({"good": good, "away": away}, x, y, model)
    with pytest.raises(AssertionError, match="weak"):
        rivals.check({"good": good, "none": x + 0.3 * (good - x)}, x, y, model)


@pytest.mark.slow
def test_steps_are_filed_with_machine_commit_and_the_ratio_that_the_table_shows(tmp_path):
    file = tmp_path / "steps.json"
    command = ["-m", "pytest", "bench/bench_step.py", "-k", "eager", "--benchmark-only", "-q"]
    command += [f"--benchmark-json={file}", "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing where it believes itself to be one of several at a time.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600, env=alone
    )
    assert done.returncode == 0, done.stdout + done.stderr
    filed = json.loads(file.read_text())
    machine = filed["machine_info"]["fastiat"]
    assert machine["packages"]["torch"] == torch.__version__.split("+")[0] and machine["cpu"]
    assert {"id", "dirty"} <= filed["commit_info"].keys()
    medians = {}
    for test in filed["benchmarks"]:
        extra = test["extra_info"]
        assert test["stats"]["rounds"] == extra["rounds"] == len(test["stats"]["data"])
        assert test["stats"]["median"] == pytest.approx(extra["seconds"])
        medians[test["group"], extra["name"]] = test["stats"]["median"], extra["over plain"]
    for (group, name), (seconds, over_plain) in medians.items():
        assert over_plain == pytest.approx(seconds / medians[group, "plain eager"][0])
        assert name in done.stdout
    charts = list(tmp_path.glob("step-*.svg"))
    assert len(charts) == len({group for group, _ in medians})
    assert all("</svg>" in chart.read_text() for chart in charts)
