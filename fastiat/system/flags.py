"""Command-line flags: each field of a settings dataclass becomes an argparse flag or argument.

The annotation of the field decides how its value is parsed, its docstring is the help text, and its
default is appended to the help text. This module does not import torch, so that `--help` is fast.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, get_args, get_origin

from fastiat.system.errors import complain
from fastiat.system.settings import Settings, flag_of, hints_of, norm_name, number, number_text

HEADINGS: dict[str, tuple[str, ...]] = {
    "measurement": ("attacks", "worst", "autoattack", "partner", "splits", "limit"),
    "method": (
        *("preset", "arch", "pretrained", "init", "width", "activation", "variant", "normalise"),
        *("mix", "adv", "objective", "beta", "awp", "awp_warmup", "attack_mixed"),
    ),
    "data": (
        *("dataset", "data_dir", "train_limit", "class_limit", "image_size", "augment", "loader"),
        *("pad", "flip", "extra", "extra_fraction"),
        *("batch_size", "format", "quality", "max_side", "force"),
    ),
    "optimisation": (
        *("epochs", "lr", "schedule", "momentum", "nesterov", "weight_decay"),
        *("decay_norm", "loss", "smoothing", "clean_weight", "ema", "holdout", "patience"),
    ),
    "attack": (
        *("norm", "eps", "alpha", "steps", "restarts", "random_start", "attack_loss", "bn"),
        "noise",
    ),
    "mixing": ("mix_alpha", "mix_at", "mix_space", "lam_per_sample", "shared_mix"),
    "machine": ("device", "engine", "precision", "deterministic"),
    "run and output": (
        *("seed", "seeds", "dry_run", "checkpoint_every", "on_nan", "eval_limit", "out", "resume"),
    ),
}
"""The headings of `--help` with the fields under each, in the order in which they are printed.

A command prints the headings that have one of its fields. Every field that is not positional must
be under exactly one heading.
"""

METAVARS = {
    "target": "TARGET",
    "runs": "RUN",
    "run": "RUN",
    "partner": "RUN",
    "arch": "ARCH",
    "init": "FILE",
    "extra": "FILE",
    "dir": "DIR",
    "dataset": "DATASET",
    "out": "PATH",
    "data_dir": "DIR",
    "attacks": "ATTACK",
}
"""Placeholders for values in `--help`, for fields whose type is not a clear placeholder."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line and reads -1/255 as a number."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # argparse reads "-1/255" or "-inf" as a flag unless this private pattern matches it.
        self._negative_number_matcher = re.compile(r"-\.?(\d|inf|nan)")

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit with status 2."""
        complain(f"{self.prog}: {message} (see {self.prog} --help)")
        self.exit(2)


def add_settings(
    parser: argparse.ArgumentParser, kind: type[Settings], presets: Mapping[str, Settings]
) -> None:
    """Add an argument for every positional field of the dataclass and a flag for every other field.

    The help text of a flag gives its default, and the values that differ from it in `presets`,
    which maps names of presets to their settings.
    """
    hints, docs = hints_of(kind), kind.docs()
    for name in kind.positional:
        parser.add_argument(name, help=docs[name], **_options(kind, name))
    flags = hints.keys() - kind.positional
    for heading, names in HEADINGS.items():
        if flags.isdisjoint(names):
            continue
        group = parser.add_argument_group(heading)
        for name in filter(flags.__contains__, names):
            text, default = docs[name], _default(kind, name, presets)
            if default:
                text = f"{text.removesuffix('.')} (default: {default})."
            # argparse reads a single % as the start of a placeholder.
            text = text.replace("%", "%%")
            group.add_argument(flag_of(name), dest=name, help=text, **_options(kind, name))


def usage(prog: str, kind: type[Settings]) -> str:
    """Return the usage line of a command, which lists its arguments but not its flags."""
    words = [prog]
    for name in kind.positional:
        words.append(METAVARS[name])
        if get_origin(hints_of(kind)[name]) is tuple:
            words.append(f"[{METAVARS[name]} ...]")
    return " ".join([*words, "[SETTING ...]"])


def _options(kind: type[Settings], name: str) -> dict[str, Any]:
    """Return the options of `add_argument` for this field."""
    options = _reading(hints_of(kind)[name])
    if name in kind.bare:
        options |= {"nargs": "*", "const": kind.bare[name]}
    if name == "norm":
        options["type"] = norm_name
    # Without a placeholder, argparse lists the choices.
    placeholder = name in METAVARS and "choices" not in options
    return options | ({"metavar": METAVARS[name]} if placeholder else {})


def _reading(hint: Any) -> dict[str, Any]:
    """Return the options of `add_argument` that parse a value of this annotation."""
    if type(None) in get_args(hint):
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return _reading(get_args(hint)[0]) | {"nargs": "+", "action": _StoreTuple}
    if hint is float:
        return {"type": _number, "metavar": "X"}
    return {"type": hint, "metavar": "N" if hint is int else "NAME"}


class _StoreTuple(argparse.Action):
    """Store several values as a tuple; a flag without values stores its constant."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, tuple(values or self.const))


def _number(text: str) -> float:
    try:
        return number(text)
    except ValueError as error:
        # argparse prints the message of an ArgumentTypeError, but not that of a ValueError.
        raise argparse.ArgumentTypeError(str(error)) from None


def _default(kind: type[Settings], name: str, presets: Mapping[str, Settings]) -> str:
    """Return the text of a field's default and of the presets' values that differ from it, or "".

    A default of None depends on other settings; the docstring of the field explains it.
    """
    default = getattr(kind, name)
    others = {} if name == "preset" else {key: getattr(of, name) for key, of in presets.items()}
    written = [f"{key}: {_write(v)}" for key, v in others.items() if v not in (default, None)]
    if default is not None or written:
        written.insert(0, "none" if default is None else _write(default))
    return "; ".join(written)


def _write(value: Any) -> str:
    """Return a value as the text that a user would type."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(_write, value))
    return number_text(value, "g") if isinstance(value, float) else str(value)
