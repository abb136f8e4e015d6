"""Two and three ranks on the CPU: equal bits, the numbers of a single process, and how they end."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_jobs import (
    METHODS,
    TRAINING,
    Ended,
    autoattacked,
    command,
    command_diverging,
    command_signalled,
    command_skipping,
    command_unlike,
    frozen_update,
    measured,
    numbers,
    together,
)
from torture import equal
from trainings import assert_same

from fastiat import cli, data
from fastiat.config import TrainConfig
from fastiat.data import Shard
from fastiat.engine.device import pick_device
from fastiat.runs.directory import METRICS, STATE
from fastiat.runs.weights import read_state
from fastiat.system import ranks
from fastiat.system.errors import InputError
from fastiat.train import Trainer

ROOT = Path(__file__).parents[2]
FLAGS = ("--epochs", "3", "--batch-size", "126", "--holdout", "200", "--ema", "0.9")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    """What each of two and of three ranks computed."""
    folder = tmp_path_factory.mktemp("numbers")
    results = {}
    for count in (2, 3):
        place = folder / str(count)
        ended = together(count, place, numbers, str(place))
        assert ended.statuses == [0] * count, ended.complaints
        results[count] = [torch.load(place / f"{rank}.pt") for rank in range(count)]
    return results


@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_after_some_updates_all_that_a_checkpoint_holds_is_bit_equal_on_both_ranks(found, engine):
    one, other = (result[engine] for result in found[2])
    assert [
        name for name in one["state"] if not equal(one["state"][name], other["state"][name])
    ] == []
    assert torch.equal(one["figures"], other["figures"]) and one["row"] == other["row"]
    assert one["state"]["step"] == 3 and one["state"]["ranks"] == 2
    tracked = [name for name in one["state"]["model"] if "running_var" in name]
    assert tracked and all((one["state"]["model"][name] != 1).any() for name in tracked)
    assert not any(map(torch.equal, one["own"], other["own"]))


def test_the_step_in_buffers_gives_the_bits_of_the_eager_one(found):
    eager, other = (found[2][0][engine] for engine in ("eager", "compile"))
    assert equal(eager["state"], other["state"]) and torch.equal(eager["figures"], other["figures"])


@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_to_the_bit_in_every_method_and_engine(found, method):
    first = found[2][0][method, "eager"]
    for rank in (0, 1):
        for engine in ("eager", "compile"):
            result = found[2][rank][method, engine]
            assert equal(result["state"], first["state"]) and result["row"] == first["row"]
            assert torch.equal(result["figures"], first["figures"])


@pytest.mark.parametrize("name", ["mlp6", "preact18", "awp"])
def test_two_halves_of_a_batch_give_the_gradient_and_the_figures_of_the_whole(found, name):
    whole = frozen_update("mlp6", awp=0.05) if name == "awp" else frozen_update(name)
    for rank in (0, 1):
        halves = found[2][rank][name]
        scale = max(float(grad.abs().max()) for grad in whole["grads"])
        for half, grad in zip(halves["grads"], whole["grads"], strict=True):
            torch.testing.assert_close(half, grad, rtol=1e-4, atol=1e-6 * scale)
        torch.testing.assert_close(halves["figures"], whole["figures"])
    assert all(map(torch.equal, found[2][0][name]["grads"], found[2][1][name]["grads"]))


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_ranks_fools_the_very_images_that_one_does(found, count):
    truth = measured()
    assert 0 < truth["linf, worst False"]["pgd-1"].sum() < 360
    for result in found[count]:
        assert equal(result["measured"], truth)


def test_two_ranks_autoattack_as_one_process_does(found):
    pytest.importorskip("pyautoattack")
    fooled, errors, _ = truth = autoattacked()
    assert len(errors) == 5 and errors["none"] < errors["square"] == fooled.sum() < 21
    for result in found[2]:
        assert equal(result["autoattack"], truth)


@pytest.mark.parametrize("count", [2, 3])
def test_means_sums_and_agreements_are_those_of_the_ranks_numbers(found, count):
    mean = sum(range(count)) / count
    for result in found[count]:
        wide, single = result["means"]
        torch.testing.assert_close(wide, torch.full((2, 3), mean))
        torch.testing.assert_close(single, torch.tensor(3 * mean))
        assert result["sum"].tolist() == [count, sum(range(count))]
        assert result["agreed"] == (count - 1, 0)
        assert result["texts"] == [f"of {rank}" for rank in range(count)]


def test_two_ranks_validate_to_the_errors_that_one_process_counts(found):
    """The held-out images are two batches; the random start depends on the batch, not the rank."""
    parts = found[2][0]["eager"]
    whole = Trainer(TRAINING, data.load("digits"))
    state = parts["state"] | {"ranks": 1}
    whole.load_state_dict(state)
    whole.best = None
    whole.validate(row := {})
    assert len(whole.holdout.labels) > 500 and row == parts["row"]


def test_one_rank_of_a_machine_is_through_before_the_others_begin(found):
    for results in found.values():
        first, *others = (result["came before"] for result in results)
        assert first == [] and all("turn 0" in names for names in others)


def test_gaps_lead_every_shard_to_its_own_batches():
    for count in (1, 2, 5):
        for rank in range(count):
            place, own = 0, []
            for gap, _ in zip(Shard(rank, count).gaps(), range(4), strict=False):
                place += gap
                own.append(place)
                place += 1
            assert own == [rank + count * turn for turn in range(4)]


@pytest.fixture(scope="module")
def flags(small) -> tuple[str, ...]:
    return (*small, *FLAGS)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """A run that two ranks have trained without interruption, and evaluated."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = together(2, folder / "log", command, "train", *flags, "--out", str(folder / "run"))
    assert ended.statuses == [0, 0] and ended.complaints == []
    lines = ended.out[0].splitlines()
    assert ended.out[1] == "" and "No attack" in lines[-2]
    assert [line.split(",")[0] for line in lines if line.startswith("epoch")] == [
        f"epoch {n}/3" for n in (1, 2, 3)
    ]
    return folder / "run"


def one_line(ended: Ended, status: int) -> str:
    """Check that all ranks ended with `status` and one line in all; return the line."""
    assert ended.statuses == [status] * len(ended.statuses), ended.complaints
    (line,) = ended.complaints
    assert line.startswith("fastiat")
    return line


def test_a_signal_to_either_rank_ends_both_after_one_checkpoint_that_resumes(
    whole, flags, tmp_path
):
    out = tmp_path / "run"
    argv = ["train", *flags, "--out", str(out)]
    for rank, number, step in ((1, signal.SIGTERM, 4), (0, signal.SIGINT, 13)):
        log = tmp_path / str(rank)
        ended = together(2, log, command_signalled, number, rank, step, *argv)
        line = one_line(ended, 128 + number)
        # The signal comes before an update, which is finished.
        assert f"stopped at step {step + 1}, checkpoint written" in line
        assert line.endswith(
            f"go on with: torchrun --nproc-per-node 2 -m fastiat train --resume --out {out}"
        )
        argv = ["train", "--resume", "--out", str(out)]
    ended = together(2, tmp_path / "last", command, *argv)
    assert ended.statuses == [0, 0] and ended.complaints == []
    assert_same(whole, out)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_collective_fails_says_in_one_line_how_to_resume(flags, tmp_path, rank):
    out = tmp_path / "run"
    argv = ("train", *flags, "--out", str(out))
    ended = together(2, tmp_path / "log", command_signalled, signal.SIGKILL, rank, 6, *argv)
    assert ended.statuses[rank] == -signal.SIGKILL and ended.statuses[1 - rank] == 1
    (line,) = ended.complaints
    assert "another of the 2 processes has ended (" in line and ") at step 6; go on with: " in line
    # The checkpoint from before the first update.
    assert read_state(out / STATE)["step"] == 0


def test_an_update_that_one_rank_cannot_make_is_left_out_by_all(flags, tmp_path):
    out = tmp_path / "run"
    argv = ("train", *flags, "--out", str(out))
    ended = together(2, tmp_path / "log", command_skipping, *argv)
    assert ended.statuses == [0, 0], ended.complaints
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert [row["skipped"] for row in rows if row["kind"] == "epoch"] == [1, 0, 0]


def torchrun(count: int, script: Path, job: str, *arguments: object) -> subprocess.CompletedProcess:
    """Start a function of `rank_jobs` in `count` processes of the real torchrun."""
    script.write_text(f"import sys, rank_jobs\nsys.exit(rank_jobs.{job}(*{arguments!r}))\n")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "tools")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node", str(count), str(script)],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.long
def test_torchrun_ends_the_ranks_that_a_device_blocks_when_another_is_killed(flags, tmp_path):
    out = tmp_path / "run"
    argv = ("train", *flags, "--out", str(out), "--batch-size", "60")
    ended = torchrun(3, tmp_path / "job.py", "command_waiting", *argv)
    assert ended.returncode != 0 and "exitcode  : -9" in ended.stderr
    assert read_state(out / STATE)["step"] == 0


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_ends_all_and_the_checkpoint_resumes_to_the_same_bits(
    whole, flags, tmp_path
):
    out = tmp_path / "run"
    argv = ("train", *flags, "--checkpoint-every", "0", "--out", str(out))
    ended = torchrun(
        2, tmp_path / "job.py", "command_signalled", signal.SIGKILL.value, 1, 12, *argv
    )
    assert ended.returncode != 0
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("fastiat: ")]
    assert "another of the 2 processes has ended" in line
    assert "at step 12; go on with: torchrun" in line
    assert line.endswith(f" train --resume --out {out}")
    assert read_state(out / STATE)["step"] == 12
    again = together(2, tmp_path / "log", command, "train", "--resume", "--out", str(out))
    assert again.statuses == [0, 0], again.complaints
    assert_same(whole, out)


def test_another_number_of_processes_may_not_resume(whole, tmp_path, complaint, contents):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / ".lock").unlink()  # it names who had it last
    before = contents(out)
    line = complaint("train", "--resume", "--out", out)
    assert "a training of 2 processes, not of 1" in line and "--nproc-per-node 2" in line
    ended = together(3, tmp_path / "log", command, "train", "--resume", "--out", str(out))
    assert "a training of 2 processes, not of 3" in one_line(ended, 2)
    (out / ".lock").unlink()
    assert contents(out) == before


def test_a_run_of_one_process_is_not_resumed_by_two(trained, tmp_path):
    ended = together(2, tmp_path / "log", command, "train", "--resume", "--out", str(trained))
    assert "a training of 1 process, not of 2: start as many, without" in one_line(ended, 2)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("train", "--dataset", "digits", "--batch-size", "63"), "--batch-size 63 cannot be"),
        (("train", "--bath-size", "64"), "did you mean --batch-size?"),
        (("norms", "runs/none"), "norms runs in one process"),
        (("train", "--dataset", "digits", "--device", "cuda:0"), "shared by the 2 processes"),
        (("evaluate", "nowhere"), "nowhere: no such run"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_once(tmp_path, argv, named):
    out = ("--out", str(tmp_path / "run")) if argv[0] == "train" else ()
    ended = together(2, tmp_path / "log", command, *argv, *out)
    assert named in one_line(ended, 2) and not (tmp_path / "run").exists()


def test_ranks_with_other_settings_do_not_train_together(flags, tmp_path):
    out = str(tmp_path / "run")
    ended = together(2, tmp_path / "log", command_unlike, "train", *flags, "--out", out)
    line = one_line(ended, 2)
    assert "the 2 processes do not have the same settings, data and weights" in line


def test_one_ranks_divergence_is_every_ranks_end(flags, tmp_path):
    out = tmp_path / "run"
    ended = together(2, tmp_path / "log", command_diverging, "train", *flags, "--out", str(out))
    assert "the training diverged" in one_line(ended, 2)
    assert read_state(out / STATE)["step"] == 0


def test_two_ranks_measure_a_run_as_one_process_does(run, whole, tmp_path):
    rows = []
    argv = ("--attacks", "none", "pgd-2", "--restarts", "2", "--batch-size", "64")
    other = Path(shutil.copytree(run, tmp_path / "other"))
    assert cli.main(["evaluate", str(run), *argv]) == 0
    ended = together(2, tmp_path / "log", command, "evaluate", str(other), *argv)
    assert ended.statuses == [0, 0] and ended.complaints == [] and ended.out[1] == ""
    for path in (run, other):
        entries = json.loads((path / "evaluation.json").read_text())[-2:]
        rows.append([(e["attack"], e["errors"], e["n"]) for e in entries])
    assert rows[0] == rows[1] and rows[0][0][2] == 360


def test_two_ranks_compare_runs_as_one_process_does(run, whole, tmp_path, capsys):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    argv = ("compare", str(run), str(other), "--attacks", "none", "pgd-2", "--batch-size", "64")
    assert cli.main(argv) == 0
    alone = capsys.readouterr().out
    ended = together(2, tmp_path / "log", command, *argv)
    assert ended.statuses == [0, 0] and ended.complaints == []
    assert ended.out == [alone, ""]


def test_the_batch_of_each_rank_is_part_of_the_one_that_a_single_process_sees(monkeypatch):
    config = TrainConfig(dataset="digits", arch="mlp6", width=4, batch_size=6, device="cpu")
    monkeypatch.setattr(ranks.Ranks, "all_reduce_max", lambda self, *values: values)
    batches = []
    for place in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(ranks, "_ranks", ranks.Ranks(*place))
        batches.append(next(iter(Trainer(config, data.load("digits")).loader)))
    (x, y), *parts = batches
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert torch.equal(torch.cat([part[1] for part in parts]), y)


def test_the_flat_buffer_has_the_tensors_own_memory_order(monkeypatch):
    monkeypatch.setattr(ranks.Ranks, "all_reduce_sum_", lambda self, flat: flat.mul_(3))
    job = ranks.Ranks(0, 2)
    image = torch.randn(4, 3, 2, 2)
    tensors = [image.contiguous(memory_format=torch.channels_last), torch.randn(3, 5).t()]
    tensors += [torch.randn(()), image[:1, :1], torch.randn(7)[::2]]
    for _ in range(2):
        expected = [1.5 * tensor for tensor in tensors]
        job.all_reduce_mean_(tensors)
        for mean, wanted in zip(tensors, expected, strict=True):
            torch.testing.assert_close(mean, wanted, rtol=0, atol=0)
    # Else CUDA copies one tensor at a time.
    ((_, parts),) = job._flat.values()
    assert [part.stride() for part in parts[:2]] == [(12, 1, 6, 3), (1, 5)]


def test_half_of_torchruns_environment_gets_one_line(monkeypatch, capsys, complaint):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["doctor", "--device", "cpu"]) == 0  # other launchers set this, too
    monkeypatch.setenv("RANK", "0")
    assert "but not LOCAL_RANK: start fastiat with torchrun" in complaint("doctor")


def test_every_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(ranks, "_ranks", ranks.Ranks(6, 8, 2, 4))
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:2")
    assert pick_device("cpu") == torch.device("cpu")
    assert ranks.ranks().launcher == "torchrun --nnodes 2 --nproc-per-node 4 -m fastiat"
    with pytest.raises(InputError, match="cuda:1 would be shared by the 4 processes"):
        pick_device("cuda:1")
    monkeypatch.setattr(ranks, "_ranks", ranks.Ranks(1, 2, 0, 1, 1))
    assert pick_device("cuda") == torch.device("cuda:0")
    assert pick_device("cuda:3") == torch.device("cuda:3")
    with pytest.raises(InputError, match="cuda:4: this machine has 4 CUDA devices"):
        pick_device("cuda:4")
    monkeypatch.setattr(ranks, "_ranks", ranks.Ranks(6, 8, 6, 8))
    with pytest.raises(InputError, match=r"8 processes on this machine need .* has 4"):
        pick_device("auto")
