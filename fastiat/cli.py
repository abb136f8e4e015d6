"""The `fastiat` command: dataclasses turned into flags, errors into one line."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from fastiat import __version__
from fastiat.config import (
    PRESETS,
    DoctorConfig,
    EvaluateConfig,
    ReportConfig,
    Settings,
    TrainConfig,
    flag_of,
    paper,
)
from fastiat.errors import InputError


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
    "report": Command(ReportConfig, "fastiat.report:report", "show runs on one HTML page"),
    "doctor": Command(
        DoctorConfig, "fastiat.doctor:doctor", "show what this machine has and what a run takes"
    ),
}

EXAMPLES = {
    "train": "fastiat train --arch preact18 --mix manifold\n"
    "fastiat train --dataset folder --data-dir my-images --preset modern --eps 8/255",
    "evaluate": "fastiat evaluate runs/cifar10-preact18-pgd-manifold-s0 --attacks none pgd-100",
    "report": "fastiat report runs",
    "doctor": "fastiat doctor",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Print the complaint and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for bad input, 128 + N for signal N."""
    try:
        command, config = parse(sys.argv[1:] if argv is None else argv)
        module, function = COMMANDS[command].target.split(":")
        getattr(importlib.import_module(module), function)(config)
    except Exception as error:
        status, line = explain(error)
        if status is None:
            raise
        print(f"fastiat: {line}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print("fastiat: interrupted", file=sys.stderr)
        return 130
    return 0


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
        where = f": {error.filename}" if error.filename else ""
        return 2, f"{error.strerror or error}{where}"
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
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=(command.config.__doc__ or "")
            + "\n\nFor example:\n  "
            # Argument help is wrapped, the examples are not.
            + EXAMPLES[name].replace("\n", "\n  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        add_settings(sub, command.config)
    given = vars(parser.parse_args(argv))
    name = given.pop("command")
    config = resolve(COMMANDS[name].config, given)
    config.check()
    return name, config


def resolve(kind: type[Settings], given: dict[str, Any]) -> Any:
    """Lay what was given over the defaults: the preset's, or those of the run to be resumed."""
    if kind is not TrainConfig:
        return kind(**given)
    config = replace(PRESETS[given.get("preset", "paper")](), **given)
    if not config.resume:
        return config
    from fastiat.run import Run, default_out

    out = config.out or str(default_out(config))
    return replace(Run.open(Path(out)).config, **{**given, "out": out})


def add_settings(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """Add a flag, or for a required setting an argument, for every field of the dataclass."""
    hints, docs = get_type_hints(kind), kind.docs()
    for field in fields(kind):  # type: ignore[arg-type]
        hint, text = hints[field.name], docs[field.name].replace("%", "%%")
        options: dict[str, Any] = _parsing(hint)
        if field.name in kind.positional:
            parser.add_argument(field.name, help=text, **options)
            continue
        if field.default not in (None, MISSING) and options.get("action") is None:
            text += f" (default: {_defaults(kind, field.name)})"
        elif options.get("action") is not None:
            text += f" (default: {'yes' if field.default else 'no'})"
        parser.add_argument(flag_of(field.name), dest=field.name, help=text, **options)


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
        return {"type": number, "metavar": "X"}
    return {"type": hint, "metavar": "N" if hint is int else "S"}


class _StoreTuple(argparse.Action):
    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


def number(text: str) -> float:
    """Read a number, or a fraction such as 8/255."""
    return float(Fraction(text)) if "/" in text else float(text)


def _defaults(kind: type[Settings], name: str) -> str:
    """Write a field's default, and the modern preset's where it differs."""
    if kind is not TrainConfig:
        default = getattr(kind(), name)
        return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    default = getattr(paper(), name)
    others = {
        preset: getattr(make(), name)
        for preset, make in PRESETS.items()
        if name != "preset" and getattr(make(), name) != default
    }
    return ", ".join(
        [f"{default:.4g}" if isinstance(default, float) else str(default)]
        + [
            f"{preset} {value:.4g}" if isinstance(value, float) else f"{preset} {value}"
            for preset, value in others.items()
        ]
    )


def train_and_evaluate(config: TrainConfig) -> None:
    """Train, then print the errors under the paper's four attacks."""
    from fastiat.evaluate import evaluate
    from fastiat.train import train

    path = train(config)
    evaluate(
        EvaluateConfig(
            runs=(str(path),),
            limit=config.eval_limit,
            data_dir=config.data_dir,
            device=config.device,
            precision=config.precision,
        )
    )
