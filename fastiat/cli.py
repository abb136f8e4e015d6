"""The `fastiat` command: dataclasses turned into flags, errors into one line."""

import argparse
import importlib
import importlib.metadata
import io
import os
import platform
import re
import signal
import stat
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch

from fastiat import __version__, data
from fastiat.config import (
    PRESETS,
    ConvertConfig,
    DiagnoseConfig,
    DoctorConfig,
    EvaluateConfig,
    NormsConfig,
    ReportConfig,
    ReproduceConfig,
    SweepConfig,
    TrainConfig,
    TransferConfig,
)
from fastiat.engine.device import free_memory, has_fast_bf16, pick_device, pick_precision
from fastiat.engine.graphs import pick_engine
from fastiat.images.ffcv import obstacle
from fastiat.system.errors import (
    InputError,
    RankLostError,
    complain,
    explain_os,
    one_line,
    out_of_memory,
)
from fastiat.system.ranks import ranks
from fastiat.system.settings import Settings, did_you_mean, flag_of, is_beton, number
from fastiat.system.signals import check_interrupts, remembering_interrupts


@dataclass(frozen=True)
class Command:
    """A subcommand: its settings, what it calls, and a line about it."""

    config: type[Settings]
    target: str
    """module:function, imported only when the command runs."""
    summary: str


COMMANDS = {
    "train": Command(
        TrainConfig, "fastiat.cli:train_and_evaluate", "train a robust classifier and measure it"
    ),
    "evaluate": Command(
        EvaluateConfig, "fastiat.evaluate:evaluate", "measure trained runs under attack"
    ),
    "sweep": Command(
        SweepConfig, "fastiat.evaluate:sweep", "measure runs over radii or numbers of PGD steps"
    ),
    "transfer": Command(
        TransferConfig, "fastiat.evaluate:transfer", "attack every run with every run's examples"
    ),
    "norms": Command(
        NormsConfig, "fastiat.analyse:norms", "compare the weight matrices of runs (Figure 1)"
    ),
    "diagnose": Command(
        DiagnoseConfig, "fastiat.analyse:diagnose", "check whether a run's robustness is real"
    ),
    "reproduce": Command(
        ReproduceConfig, "fastiat.reproduce:reproduce", "put a table of the paper beside one's own"
    ),
    "convert": Command(
        ConvertConfig,
        "fastiat.data:convert",
        "write images to one file for FFCV, of any size",
    ),
    "report": Command(ReportConfig, "fastiat.report:report", "show runs on one HTML page"),
    "doctor": Command(
        DoctorConfig, "fastiat.cli:doctor", "show what this machine has and what a run takes"
    ),
}

EXAMPLES = {
    "train": "fastiat train --arch preact18 --mix manifold\n"
    "fastiat train --dataset folder --data-dir my-images --preset modern",
    "evaluate": "fastiat evaluate runs/cifar10-preact18-pgd-manifold-s0 --attacks none pgd-100",
    "sweep": "fastiat sweep runs/* --eps 0.005 0.01 0.02 8/255\nfastiat sweep runs/* --steps",
    "transfer": "fastiat transfer runs/a runs/b runs/c --eps 0.01 0.02 0.04",
    "norms": "fastiat norms runs/*-mlp6-*",
    "diagnose": "fastiat diagnose runs/cifar10-preact18-pgd-manifold-s0 --limit 500",
    "reproduce": "fastiat reproduce table3 --dry-run\n"
    "fastiat reproduce table3 --epochs 10 --width 16 --limit 1000",
    "convert": "fastiat convert my-images my-images.beton --max-side 64\n"
    "fastiat train --dataset my-images.beton",
    "report": "fastiat report runs",
    "doctor": "fastiat doctor",
}


# What several processes of torchrun can do together.
SHARED = {"train", "evaluate", "sweep", "doctor"}

METAVARS = {
    "target": "TABLE",
    "runs": "RUN",
    "run": "RUN",
    "partner": "RUN",
    "dir": "DIR",
    "dataset": "DATASET",
    "out": "PATH",
    "data_dir": "DIR",
    "attacks": "ATTACK",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, and which takes -1/255 for a number."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-\.?(\d|inf|nan)")

    def error(self, message: str) -> NoReturn:
        """Print the complaint and exit with status 2."""
        complain(f"{self.prog}: {message} (see {self.prog} --help)")
        self.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for bad input, 128 + N for signal N.

    It is 1 where the other processes of a job that torchrun started, or a reader, went away.
    """
    argv = sys.argv[1:] if argv is None else argv
    _open_standard_streams()
    _find_caches()
    if _processes() == "1":
        return _run(argv)
    # Where a connection breaks, torch would write its C++ stack beside our line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from fastiat.system.ranks import run_distributed

    return run_distributed(lambda: _run(argv))


def _open_standard_streams() -> None:
    """Open /dev/null for what the shell has closed (`2>&-`).

    A checkpoint that is opened under the number 2 would get what libraries write to stderr.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            # What the terminal's encoding lacks is written as Python writes it.
            stream.reconfigure(errors="backslashreplace")


def _find_caches() -> None:
    """Give libraries a folder for what they keep, where the user has no home to write to.

    matplotlib would warn, and torch's compiler and Triton could not work. What is set stays.
    """
    home = os.path.expanduser("~")
    if home != "~" and os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK):
        return
    folder = os.path.join(tempfile.gettempdir(), f"fastiat-cache-{os.getuid()}")
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        # Nobody else may put code there that we would run.
        there = os.lstat(folder)
        ours = stat.S_ISDIR(there.st_mode) and there.st_uid == os.getuid()
        if not ours or there.st_mode & 0o022:
            folder = tempfile.mkdtemp(prefix="fastiat-cache-")
    except OSError:
        return  # there is no place at all, which the libraries say themselves
    for variable, name in {
        "MPLCONFIGDIR": "matplotlib",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        # A home that can only be read may hold data sets.
        **({} if os.path.isdir(home) else {"XDG_CACHE_HOME": "cache"}),
    }.items():
        if variable not in os.environ:
            os.environ[variable] = os.path.join(folder, name)
            os.makedirs(os.environ[variable], exist_ok=True)


def _run(argv: Sequence[str]) -> int:
    try:
        with remembering_interrupts():
            command, config = parse(argv)
            _check_shared(command)
            module, function = COMMANDS[command].target.split(":")
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
    """Return how many processes torchrun has started, this one among them."""
    return os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"


def _check_shared(command: str) -> None:
    count = _processes()
    if count != "1" and command not in SHARED:
        raise InputError(
            f"{command} runs in one process, and torchrun has started {count}: "
            f"give it as fastiat {command}"
        )


def explain(error: Exception) -> tuple[int | None, str]:
    """Return the exit status and the line for an error of the user's or the machine's making.

    The status is None for a bug, which deserves its traceback.
    """
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone; nothing more can be told to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, "the reader of the output went away"
    if isinstance(error, OSError):
        return 2, explain_os(error)
    if out_of_memory(error):
        return 2, "this takes more memory than there is: lower --batch-size or --width"
    if isinstance(error, RankLostError):
        return 1, str(error)
    signum = getattr(error, "signum", None)
    return (None, "") if signum is None else (128 + signum, str(error))


def parse(argv: Sequence[str]) -> tuple[str, Settings]:
    """Turn arguments into a command's name and its checked settings."""
    parser = Parser(
        prog="fastiat",
        description="Interpolated Adversarial Training: robust image classifiers that keep their "
        "clean accuracy, trained as fast as the hardware allows.",
        epilog="`fastiat COMMAND --help` documents a command's settings.",
    )
    parser.add_argument("--version", action="version", version=f"fastiat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subs = {}
    for name, command in COMMANDS.items():
        arguments = [_argument(command.config, field) for field in command.config.positional]
        subs[name] = commands.add_parser(
            name,
            help=command.summary,
            usage=" ".join(["fastiat", name, *arguments, "[SETTING ...]"]),
            # Argument help is wrapped, the examples are not.
            description=textwrap.fill(" ".join((command.config.__doc__ or "").split()), 78)
            + "\n\nFor example:\n"
            + textwrap.indent(EXAMPLES[name], "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            # A script that says --ep would break with the next flag that starts so.
            allow_abbrev=False,
        )
        add_settings(subs[name], command.config)
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    name = given.pop("command")
    if unknown:
        flags = [flag_of(field.name) for field in fields(COMMANDS[name].config)]  # type: ignore[arg-type]
        close = did_you_mean(unknown[0].split("=")[0], flags)
        subs[name].error(f"unknown argument {unknown[0]}{close}")
    config = resolve(COMMANDS[name].config, given)
    config.check()
    return name, config


def resolve(kind: type[Settings], given: dict[str, Any]) -> Any:
    """Lay what was given over the defaults: those of the preset, or a resumed run's settings."""
    if kind is not TrainConfig:
        return kind(**given)
    config = replace(PRESETS[given.get("preset", "paper")](), **given)
    if not config.resume and "dataset" not in given and config.data_dir:
        from fastiat.data import check_folder

        check_folder(config.dataset, config.data_dir, chosen=False)
    if not config.resume or config.out == "":
        return config
    from fastiat.runs.directory import Run, default_out

    out = config.out or str(default_out(config))
    if is_beton(given.get("dataset")):  # it is where it is named now
        given = {"data_dir": None, **given}
    return replace(Run.open(Path(out)).config, **{**given, "out": out})


def add_settings(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """Add a flag, or for a required setting an argument, for every field of the dataclass."""
    hints, docs = get_type_hints(kind), kind.docs()
    group: Any = parser
    # A command's own settings come before those that it shares.
    own = sorted(fields(kind), key=lambda field: field.name not in kind.__annotations__)  # type: ignore[arg-type]
    for field in own:
        if field.name in kind.groups:
            group = parser.add_argument_group(kind.groups[field.name])
        options = _parsing(hints[field.name])
        if field.name in kind.bare:
            options |= {"nargs": "*", "const": kind.bare[field.name]}
        if field.name in METAVARS:
            options["metavar"] = METAVARS[field.name]
        if field.name in kind.positional:
            parser.add_argument(field.name, help=docs[field.name], **options)
            continue
        default = _default(kind, field.name)
        text = docs[field.name]
        if default:
            text = f"{text.removesuffix('.')} (default: {default})."
        group.add_argument(
            flag_of(field.name), dest=field.name, help=text.replace("%", "%%"), **options
        )


def _argument(kind: type[Settings], name: str) -> str:
    """Write an argument as the usage line has it."""
    several = get_origin(get_type_hints(kind)[name]) is tuple
    return METAVARS[name] + (f" [{METAVARS[name]} ...]" if several else "")


def _parsing(hint: Any) -> dict[str, Any]:
    """Return the argparse options that read a value of this annotation."""
    if type(None) in get_args(hint):
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return _parsing(get_args(hint)[0]) | {"nargs": "+", "action": _StoreTuple}
    if hint is float:
        return {"type": _number, "metavar": "X"}
    return {"type": hint, "metavar": "N" if hint is int else "NAME"}


class _StoreTuple(argparse.Action):
    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, tuple(values or self.const))


def _number(text: str) -> float:
    try:
        return number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _default(kind: type[Settings], name: str) -> str:
    """Write a field's default, and those of presets that differ; "" without any.

    A field whose default is None, "what fits the others", has it told in its docstring.
    """
    default = next(field.default for field in fields(kind) if field.name == name)  # type: ignore[arg-type]
    others = ""
    if kind is TrainConfig and name != "preset":
        presets = {preset: getattr(make(), name) for preset, make in PRESETS.items()}
        others = "".join(
            f"; {preset}: {_write(value)}"
            for preset, value in presets.items()
            if value not in (default, None)
        )
    if default is None and not others:
        return ""
    return ("none" if default is None else _write(default)) + others


def _write(value: Any) -> str:
    """Write a value as one would type it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(_write, value))
    if isinstance(value, float):
        levels = round(255 * value)
        return f"{levels}/255" if 0 < levels < 255 and value == levels / 255 else f"{value:g}"
    return str(value)


def train_and_evaluate(config: TrainConfig) -> None:
    """Train, then print the errors under the paper's four attacks."""
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
    )
    with stoppable_measuring(path):
        evaluate(settings)


PACKAGES = ("torch", "torchvision", "triton", "numpy", "ffcv", "torchattacks", "foolbox")


def doctor(config: DoctorConfig) -> None:
    """Print the machine, the packages and what `fastiat train` would choose here."""
    device = pick_device(config.device)
    rows = [
        ("fastiat", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"),
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        seen = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{seen.name}, {seen.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "no device"))
    rows += [(package, _version(package)) for package in PACKAGES]
    fast = "fast bf16" if has_fast_bf16(device) else "no fast bf16"
    rows += [
        ("processes", f"{ranks().count} started by torchrun" if not ranks().alone else "1"),
        ("data", config.data_dir or _data_dir()),
        ("device", f"a run takes {device} ({fast})"),
        ("precision", f"a run takes {pick_precision('auto', device)}"),
        ("engine", f"a run takes {pick_engine('auto', device)}"),
        ("loader", _loader(device)),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _data_dir() -> str:
    try:
        return str(data.default_dir())
    except InputError as error:
        return str(error)


def _loader(device: torch.device) -> str:
    """Say which loader a run takes, and why."""
    if reason := obstacle():
        return f"a run takes resident; {reason}"
    if device.type == "cpu":
        most, where = "is in memory anyway", "memory"
    else:
        most, where = "fits", "the device's memory"
    half = free_memory(device) / 2 / 2**30
    return (
        f"a run takes resident for what {most}, ffcv for a .beton and for what takes more than "
        f"half of {where}'s free part, {half:.1f} GiB now"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
