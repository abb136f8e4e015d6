"""The `fastiat` command: parse the subcommand, check its settings and call its function.

An error of the user or the machine becomes one line on stderr. Only the module of the given
command is imported, so that `--help` and wrong flags do not wait for torch.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import signal
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastiat import __version__
from fastiat.config import (
    PRESETS,
    CompareConfig,
    ConvertConfig,
    DiagnoseConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    NormsConfig,
    ReportConfig,
    ReproduceConfig,
    RobustBenchConfig,
    SweepConfig,
    TrainConfig,
    TransferConfig,
)
from fastiat.system.errors import (
    InputError,
    RankLostError,
    complain,
    explain_os,
    one_line,
    out_of_memory,
)
from fastiat.system.flags import Parser, add_settings, usage
from fastiat.system.settings import Settings, did_you_mean, flag_of, hints_of, is_beton, is_own_arch
from fastiat.system.signals import check_interrupts, remembering_interrupts
from fastiat.system.startup import find_caches, open_standard_streams

COMMANDS: dict[str, tuple[type[Settings], str, str]] = {
    "train": (TrainConfig, "fastiat.cli:train_and_evaluate", "train a robust classifier"),
    "evaluate": (EvaluateConfig, "fastiat.evaluate:evaluate", "measure runs under attack"),
    "compare": (CompareConfig, "fastiat.evaluate:compare", "test which of several runs is better"),
    "sweep": (SweepConfig, "fastiat.evaluate:sweep", "measure runs over radii or PGD steps"),
    "transfer": (TransferConfig, "fastiat.evaluate:transfer", "attack runs with others' examples"),
    "norms": (NormsConfig, "fastiat.analyse:norms", "compare weight matrices of runs (Figure 1)"),
    "diagnose": (DiagnoseConfig, "fastiat.analyse:diagnose", "check whether a run is robust"),
    "reproduce": (ReproduceConfig, "fastiat.reproduce:reproduce", "repeat a table of the paper"),
    "convert": (ConvertConfig, "fastiat.data:convert", "write images to a .beton file"),
    "export": (ExportConfig, "fastiat.runs.export:export", "write a network as ONNX or .pt2"),
    "robustbench": (
        RobustBenchConfig,
        "fastiat.runs.robustbench:robustbench",
        "print an entry for RobustBench",
    ),
    "report": (ReportConfig, "fastiat.report:report", "show runs on one HTML page"),
    "doctor": (DoctorConfig, "fastiat.cli:doctor", "show what this machine has"),
}
"""The settings of each command, the function that runs it (MODULE:FUNCTION), and a short help."""

EXAMPLES = {
    "train": "fastiat train --arch preact18 --mix manifold\n"
    "fastiat train --dataset folder --data-dir my-images --preset modern",
    "evaluate": "fastiat evaluate runs/cifar10-preact18-pgd-manifold-s0 --attacks none pgd-100",
    "compare": "fastiat compare runs/a runs/b\nfastiat compare runs/* --eps 8/255 --limit 1000",
    "sweep": "fastiat sweep runs/* --eps 0.005 0.01 0.02 8/255\nfastiat sweep runs/* --steps",
    "transfer": "fastiat transfer runs/a runs/b runs/c --eps 0.01 0.02 0.04",
    "norms": "fastiat norms runs/*-mlp6-*",
    "diagnose": "fastiat diagnose runs/cifar10-preact18-pgd-manifold-s0 --limit 500",
    "reproduce": "fastiat reproduce table3 --dry-run\n"
    "fastiat reproduce table3 --epochs 10 --width 16 --limit 1000",
    "convert": "fastiat convert my-images my-images.beton --max-side 64\n"
    "fastiat train --dataset my-images.beton",
    "export": "fastiat export runs/cifar10-preact18-pgd-manifold-s0 model.onnx",
    "robustbench": "fastiat robustbench runs/cifar10-preact18-pgd-manifold-s0",
    "report": "fastiat report runs",
    "doctor": "fastiat doctor",
}

DISTRIBUTED = {"train", "evaluate", "compare", "sweep", "doctor"}
"""The commands that torchrun can start in several processes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 for success, 2 for wrong input or a machine error such as a full disk, 128 + N
    after signal N, and 1 if another process of the same torchrun, or the program that reads stdout
    through a pipe, has ended. Any other exception is a bug and is raised.
    """
    argv = sys.argv[1:] if argv is None else argv
    open_standard_streams()
    find_caches()
    if _processes() == "1":
        return _run(argv)
    # Otherwise torch prints a C++ stack trace beside our one line when a connection breaks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from fastiat.system.ranks import run_distributed

    return run_distributed(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    """Run the command line in this process; return its exit status after printing any error."""
    try:
        with remembering_interrupts():
            command, config = parse(argv)
            if _processes() != "1" and command not in DISTRIBUTED:
                raise InputError(
                    f"{command} runs in one process, but torchrun has started {_processes()}: "
                    f"run fastiat {command} without torchrun"
                )
            module, function = COMMANDS[command][1].split(":")
            call = getattr(importlib.import_module(module), function)
            check_interrupts()
            call(config)
    except Exception as error:
        status, line = explain(error)
        if status is None:
            raise
        complain(f"fastiat: {one_line(line)}")
        return status
    except KeyboardInterrupt as error:
        signum = getattr(error, "signum", signal.SIGINT)
        complain(f"fastiat: {'interrupted' if signum == signal.SIGINT else 'terminated'}")
        return 128 + signum
    return 0


def _processes() -> str:
    """Return the number of processes that torchrun has started, as text; "1" without torchrun."""
    return os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"


def explain(error: Exception) -> tuple[int | None, str]:
    """Return the exit status and the message for an error that the user or the machine caused.

    Any other error is a bug: its status is None, and the caller raises it with its traceback.
    """
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, BrokenPipeError):
        # Python would fail again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, "the program that reads the output has ended"
    if isinstance(error, OSError):
        return 2, explain_os(error)
    if out_of_memory(error):
        return 2, "this takes more memory than there is: lower --batch-size or --width"
    if isinstance(error, RankLostError):
        return 1, str(error)
    # A `TrainingInterrupt`; no other `Exception` has a signal number.
    signum = getattr(error, "signum", None)
    return (None, "") if signum is None else (128 + signum, str(error))


def parse(argv: Sequence[str]) -> tuple[str, Settings]:
    """Return the command's name and its checked settings.

    Raises `InputError` for wrong settings, and `SystemExit` after printing the error for wrong
    arguments.
    """
    parser = Parser(
        prog="fastiat",
        description="Interpolated Adversarial Training: robust image classifiers that keep their "
        "clean accuracy, trained with compiled steps, fused kernels and CUDA graphs.",
        epilog="`fastiat COMMAND --help` documents a command's settings.",
    )
    parser.add_argument("--version", action="version", version=f"fastiat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subs = {}
    for name, (kind, _, summary) in COMMANDS.items():
        subs[name] = commands.add_parser(
            name,
            help=summary,
            usage=usage(f"fastiat {name}", kind),
            # This formatter wraps only the help of the settings, so that the examples keep their
            # lines; the description is wrapped here.
            description=textwrap.fill(" ".join((kind.__doc__ or "").split()), 78)
            + "\n\nFor example:\n"
            + textwrap.indent(EXAMPLES[name], "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            # With abbreviations, a script's --ep would break once a new flag starts with --ep too.
            allow_abbrev=False,
        )
        presets = {name: make() for name, make in PRESETS.items()} if kind is TrainConfig else {}
        add_settings(subs[name], kind, presets)
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    name = given.pop("command")
    kind = COMMANDS[name][0]
    if unknown:
        close = did_you_mean(unknown[0].split("=")[0], map(flag_of, hints_of(kind)))
        subs[name].error(f"unknown argument {unknown[0]}{close}")
    config = resolve(kind, given)
    config.check()
    return name, config


def resolve(kind: type[Settings], given: dict[str, Any]) -> Any:
    """Return the given settings, completed by the defaults or the values of the resumed run.

    Raises `InputError` for a data folder that holds no data set, and for a run that cannot be read.
    """
    config = kind(**given)
    if not isinstance(config, TrainConfig):
        return config
    if not config.resume and "dataset" not in given and config.data_dir:
        from fastiat.data import check_folder

        check_folder(config.dataset, config.data_dir, chosen=False)
    if not config.resume or config.out == "":
        return config
    from fastiat.runs.directory import Run, default_out

    out = config.out or str(default_out(config))
    # A .beton file in this command replaces the folder that the run has read its data from.
    moved = {"data_dir": None} if is_beton(given.get("dataset")) else {}
    run = Run.open(Path(out))
    if is_own_arch(run.config.arch) and "arch" not in given:
        raise InputError(
            f"{run.path} trains a network of your own, {run.config.arch}: give it again with "
            f"--arch, as a file of a run never says which code to import"
        )
    return replace(run.config, **moved | given | {"out": out})


def train_and_evaluate(config: TrainConfig) -> None:
    """Train, then print the errors without attack and under the paper's three attacks."""
    from fastiat.evaluate import evaluate
    from fastiat.train import train
    from fastiat.training.session import stoppable_measuring

    check_interrupts()
    path = train(config)
    settings = EvaluateConfig(
        runs=(str(path),),
        limit=config.eval_limit,
        data_dir=config.data_dir,
        device=config.device,
        precision=config.precision,
        arch=config.arch if is_own_arch(config.arch) else None,
    )
    with stoppable_measuring(path):
        evaluate(settings)


PACKAGES = (
    *("torchvision", "triton", "numpy", "ffcv", "timm", "pyautoattack", "torchattacks", "foolbox"),
)
"""The packages whose versions `fastiat doctor` prints."""


def doctor(config: DoctorConfig) -> None:
    """Print the machine, its packages and the choices of `fastiat train` on it."""
    import torch

    from fastiat.engine.device import has_fast_bf16, pick_device, pick_precision
    from fastiat.engine.graphs import pick_engine
    from fastiat.system.ranks import ranks

    device = pick_device(config.device)
    rows = [
        ("fastiat", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        (
            "cpu",
            f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"instructions {torch.backends.cpu.get_cpu_capability()}",
        ),
        ("torch", f"{torch.__version__}, {_accelerator(torch.version)}"),
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        seen = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{seen.name}, {seen.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "no device"))
    for package in PACKAGES:
        # `importlib.util.find_spec` would also find a folder with the name of the package.
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    fast = "fast bf16" if has_fast_bf16(device) else "no fast bf16"
    rows += [
        ("processes", f"{ranks().count} started by torchrun" if not ranks().alone else "1"),
        ("data", config.data_dir or _data_dir()),
        ("device", f"a run uses {device} ({fast})"),
        ("precision", f"a run uses {pick_precision('auto', device)}"),
        ("engine", f"a run uses {pick_engine('auto', device)}"),
        ("loader", _loader(device)),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _accelerator(build: Any) -> str:
    """Return what torch is built for; `build` is `torch.version`."""
    names = (("CUDA", "cuda"), ("ROCm", "hip"), ("XPU", "xpu"))
    found = [f"{name} {getattr(build, key)}" for name, key in names if getattr(build, key, None)]
    return f"built for {' and '.join(found) or 'the CPU alone'}"


def _data_dir() -> str:
    """Return the default folder of data sets, or why there is none."""
    from fastiat.images.load import default_dir

    try:
        return str(default_dir())
    except InputError as error:
        return str(error)


def _loader(device: Any) -> str:
    """Return which loader a run on this device uses, and why."""
    from fastiat.engine.device import free_memory
    from fastiat.images.ffcv import apparent_obstacle

    if reason := apparent_obstacle():
        return f"a run uses resident; {reason}"
    where = "RAM" if device.type == "cpu" else "GPU memory"
    half = free_memory(device) / 2 / 2**30
    return (
        f"a run uses resident; ffcv for .beton files and above {half:.1f} GiB, half of the free "
        f"{where}"
    )
