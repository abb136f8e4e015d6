"""Explaining: the norms of weight matrices (Figure 1), and reading what a diagnosis found.

`fastiat norms` leaves norms.json in a run directory and `fastiat diagnose` (`fastiat.diagnose`)
diagnosis.json; `read_norms` and `read_diagnosis` give both back as dataclasses.
"""

import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastiat.engine.device import own_defaults
from fastiat.page.figures import drawable
from fastiat.queries import NormsConfig
from fastiat.runs.directory import ModelCard, Run, load_with_card
from fastiat.system.errors import InputError, printable
from fastiat.system.files import check_place, finite_json, write
from fastiat.system.settings import expanded, from_json
from fastiat.system.untrusted import read_json_text

NORMS, DIAGNOSIS = "norms.json", "diagnosis.json"
Verdict = Literal["pass", "warn", "fail", "not done"]
T = TypeVar("T")


@dataclass(frozen=True)
class WeightNorms:
    """The norms of one weight; norms.json is a list of these."""

    name: str
    """Parameter, such as "groups.0.0.conv1.weight"."""
    shape: tuple[int, ...]
    """(out, in) of a linear layer, (out, in, kh, kw) of a convolution."""
    matrix: tuple[int, int]
    """What the norms are of: (out, in), or (out, in * kh * kw) for a convolution."""
    frobenius: float
    """Root of the sum of squares."""
    spectral: float
    """Largest singular value."""


@dataclass(frozen=True)
class Finding:
    """What one check for masked gradients found; diagnosis.json is a list of these."""

    check: str
    """Name of the check, such as "FGSM weaker than PGD"."""
    verdict: Verdict
    figures: dict
    """What was measured, by name with its unit: numbers, lists of numbers, text or None."""
    sentence: str
    """What it means, for a newcomer."""


@own_defaults()
def norms(config: NormsConfig) -> dict[str, list[WeightNorms]]:
    """Print the norms of every run of `config`, write their norms.json, and chart them together.

    Returns them as {run: norms}. A model file has no directory to write norms.json to, nor has
    somebody else's run. Raises `InputError` for runs that are missing or not comparable.
    """
    config.check()
    found: dict[str, list[WeightNorms]] = {}
    cards: dict[str, ModelCard] = {}
    for name in config.runs:
        model, cards[name] = load_with_card(name)
        if Path(name).is_dir():
            Run.open(Path(name))
        found[name] = _check(name, weight_norms(model))
    _check_comparable(found, cards)
    chart = _chart_path(config)
    check_place(chart.with_name(f"{chart.name}.png"))
    labels = _labels(config.runs)
    for name, layers in found.items():
        if Path(name).is_dir() and os.access(name, os.W_OK):
            write(Path(name) / NORMS, _json(layers))
    print(_table({labels[name]: layers for name, layers in found.items()}))
    chart.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw_norms({labels[name]: layers for name, layers in found.items()})
    for kind, content in pictures.items():
        write(chart.with_name(f"{chart.name}.{kind}"), content)
    print(f"chart: {chart}.png, {chart}.svg")
    return found


def weight_norms(model: nn.Module) -> list[WeightNorms]:
    """Return the Frobenius and spectral norm of every weight of `model` with two or more axes.

    A convolution's (out, in, kh, kw) counts as the matrix (out, in * kh * kw), as it multiplies
    one patch; that is not the norm of the whole linear map over an image. Biases and BatchNorm's
    scales are vectors and left out. (Section 4.4 of the IAT paper, after Bartlett et al. 2017.)
    """
    layers = []
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        matrix = weight.detach().flatten(1).double()
        layers.append(
            WeightNorms(
                name=name,
                shape=tuple(weight.shape),
                matrix=(matrix.shape[0], matrix.shape[1]),
                frobenius=float(torch.linalg.matrix_norm(matrix)),
                spectral=spectral_norm(matrix),
            )
        )
    return layers


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value of `matrix`, (M, N), NaN if it is not finite.

    It is the root of the largest eigenvalue of the smaller Gram matrix, in float64. Squaring costs
    the small singular values their digits, not the largest; and no kernel here has a smaller side
    above 640, so that this takes milliseconds where a full SVD takes a second.
    """
    matrix = matrix.double()
    if not matrix.isfinite().all():
        return math.nan
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0))


def draw_norms(found: dict[str, list[WeightNorms]]) -> dict[str, bytes]:
    """Draw the norms as the paper's Figure 1: grouped bars, a group per layer, a bar per run.

    `found` maps labels to norms of the same layers. Returns {"png": bytes, "svg": bytes}.
    """
    layers = next(iter(found.values()))
    names = [layer.name.removesuffix(".weight") for layer in layers]
    width = 0.8 / len(found)
    figure = Figure(figsize=(max(8.0, 0.28 * len(layers) * (1 + len(found) / 2)), 6.4))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, norm in zip(axes, ("frobenius", "spectral"), strict=True):
        for number, (label, of_run) in enumerate(found.items()):
            at = [layer - 0.4 + (number + 0.5) * width for layer in range(len(layers))]
            heights = [getattr(layer, norm) for layer in of_run]
            axis.bar(at, heights, width, label=drawable(label))
        axis.set_ylabel(f"{norm.capitalize()} norm")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[1].set_xticks(range(len(layers)), names)
    if len(layers) > 8:
        axes[1].tick_params(axis="x", rotation=45)
        for name in axes[1].get_xticklabels():
            name.set(ha="right", rotation_mode="anchor")
    axes[1].set_xlim(-0.6, len(layers) - 0.4)
    axes[1].set_xlabel("layer, input first")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    pictures = {}
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        # Without a date and random ids, so that the same norms make the same file.
        with rc_context({"svg.hashsalt": "fastiat"}):
            figure.savefig(buffer, format=kind, dpi=100, metadata=_UNDATED[kind])
        pictures[kind] = buffer.getvalue()
    return pictures


_UNDATED: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}}


def read_norms(run_dir: str | os.PathLike[str]) -> list[WeightNorms]:
    """Return what `fastiat norms` found for a run, [] if it was not called on it.

    Raises `InputError` for a norms.json that is damaged.
    """
    return _read(Path(expanded(run_dir)) / NORMS, WeightNorms)


def read_diagnosis(run_dir: str | os.PathLike[str]) -> list[Finding]:
    """Return what `fastiat diagnose` last found for a run, [] if it was not called on it.

    Raises `InputError` for a diagnosis.json that is damaged.
    """
    return _read(Path(expanded(run_dir)) / DIAGNOSIS, Finding)


def write_norms(run_dir: Path, layers: Sequence[WeightNorms]) -> None:
    """Write norms.json, whole or not at all."""
    write(run_dir / NORMS, _json(layers))


def write_diagnosis(run_dir: Path, findings: Sequence[Finding]) -> None:
    """Write diagnosis.json, whole or not at all."""
    write(run_dir / DIAGNOSIS, _json(findings))


def _json(rows: Sequence[Any]) -> bytes:
    return json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False).encode() + b"\n"


def _read(file: Path, kind: type[T]) -> list[T]:
    if not file.exists():
        return []
    try:
        rows = finite_json(read_json_text(file))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError("it is not a list of JSON objects")
        return [from_json(kind, row) for row in rows]
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{file} is damaged: remove it and make it again") from None


def _check(name: str, layers: list[WeightNorms]) -> list[WeightNorms]:
    for layer in layers:
        if not math.isfinite(layer.frobenius):
            raise InputError(
                f"{name}: {layer.name} holds NaN or infinity, its training diverged: "
                f"train it again with a lower --lr"
            )
    return layers


def _check_comparable(found: dict[str, list[WeightNorms]], cards: dict[str, ModelCard]) -> None:
    """Raise `InputError`, naming the first that differs, unless all have the same weights."""
    first, *others = found
    shapes = {name: [(layer.name, layer.shape) for layer in found[name]] for name in found}
    for other in others:
        if shapes[other] != shapes[first]:
            raise InputError(
                f"{other} is {_describe(cards[other])}, but {first} is {_describe(cards[first])}: "
                f"chart runs of one architecture at a time"
            )


def _describe(card: ModelCard) -> str:
    return (
        f"{card.arch} of width {card.width} for {card.num_classes} classes of "
        f"{card.in_channels}x{card.image_size}x{card.image_size} images"
    )


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Name runs by their last part, or in full where two would be called the same."""
    short = {name: printable(Path(name).resolve().name) for name in names}
    taken = list(short.values())
    return {name: label if taken.count(label) == 1 else name for name, label in short.items()}


def _chart_path(config: NormsConfig) -> Path:
    """Return where the chart goes, without the ending."""
    if config.out:
        out = Path(config.out)
        return out.with_suffix("") if out.suffix in (".png", ".svg") else out
    folders = [Path(name) if Path(name).is_dir() else Path(name).parent for name in config.runs]
    return (folders[0] if len(folders) == 1 else folders[0].absolute().parent) / "norms"


def _table(found: dict[str, list[WeightNorms]]) -> str:
    """Write the norms as text, a row per weight; a column per run under each norm."""
    first = next(iter(found.values()))
    names = max(len(layer.name) for layer in first) + 2
    column = max(12, *(len(label) + 2 for label in found))
    lines = []
    for norm in ("frobenius", "spectral"):
        lines.append(f"{norm.capitalize()} norm")
        lines.append(
            " " * names + f"{'matrix':>12}" + "".join(f"{label:>{column}}" for label in found)
        )
        for row, layer in enumerate(first):
            size = f"{layer.matrix[0]}x{layer.matrix[1]}"
            cells = "".join(f"{getattr(of[row], norm):{column}.4g}" for of in found.values())
            lines.append(f"{layer.name:<{names}}{size:>12}{cells}")
    lines.append("convolutions count as matrices of (out, in x kernel height x kernel width)")
    return "\n".join(lines)
