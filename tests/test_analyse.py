"""Norms of weight matrices: against numpy's SVD, in files and charts, and what is refused."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open

from fastiat import cli, models
from fastiat.measuring.norms import NORMS, read_norms, spectral_norm, weight_norms
from fastiat.measuring.rows import write_rows
from fastiat.measuring.verdicts import DIAGNOSIS, Finding, read_diagnosis
from fastiat.page.figures import COLOURS
from fastiat.runs.directory import MODEL


@pytest.mark.parametrize(
    ("arch", "width", "layers"), [("mlp6", 32, 6), ("preact18", 8, 21), ("wrn28_10", 1, 28)]
)
def test_norms_of_every_weight_are_numpys(arch, width, layers):
    torch.manual_seed(0)
    model = models.build(arch, width=width)
    found = weight_norms(model)
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    assert [layer.name for layer in found] == list(weights)
    assert len(found) == layers
    for layer in found:
        weight = weights[layer.name].detach().numpy().astype(np.float64)
        assert layer.shape == weight.shape
        matrix = weight.reshape(len(weight), -1)
        assert layer.matrix == matrix.shape
        assert layer.spectral == pytest.approx(np.linalg.svd(matrix)[1][0], rel=1e-12)
        assert layer.frobenius == pytest.approx(math.sqrt((matrix**2).sum()), rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (40, 300), (300, 40)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_spectral_norm_holds_for_every_shape_and_scale(shape, scale):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[0]
    assert spectral_norm(matrix) == pytest.approx(expected, rel=1e-12)


def test_spectral_norm_holds_where_singular_values_nearly_coincide_or_vanish():
    # Power iteration would stall between the first two; both cases have a closed form.
    left, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    values = torch.tensor([2.0, 2.0 - 1e-9, 1.0, 1e-9, 0.0, 0.0], dtype=torch.float64)
    assert spectral_norm(left * values) == pytest.approx(2.0, rel=1e-14)
    assert spectral_norm(torch.zeros(3, 4)) == 0.0
    assert math.isnan(spectral_norm(torch.tensor([[1.0, math.inf]])))


def test_norms_go_to_every_run_and_the_chart_beside_them(run, tmp_path, capsys):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    assert cli.main(["norms", str(run), str(other)]) == 0
    out = capsys.readouterr().out
    assert read_norms(run) == read_norms(other)
    (layer, *_) = read_norms(run)
    with safe_open(run / MODEL, "pt") as weights:
        expected = torch.linalg.svdvals(weights.get_tensor(layer.name).double())[0]
    assert layer.spectral == pytest.approx(float(expected), rel=1e-12)
    assert re.search(rf"{layer.name} +16x64( +{layer.spectral:.4g}){{2}}\n", out)
    for name in ("norms-frobenius", "norms-spectral"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 600
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
        assert f"chart: {tmp_path}/{name}.png, {tmp_path}/{name}.svg" in out


def test_a_model_file_has_norms_too_and_out_may_have_an_ending(run, tmp_path, capsys):
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(run / MODEL, lone / "net.safetensors")
    out = tmp_path / "new" / "chart.v2.png"
    assert cli.main(["norms", str(lone / "net.safetensors"), "--out", str(out)]) == 0
    assert {file.name for file in out.parent.iterdir()} == {
        *("chart.v2-frobenius.png", "chart.v2-frobenius.svg"),
        *("chart.v2-spectral.png", "chart.v2-spectral.svg"),
    }
    assert [file.name for file in lone.iterdir()] == ["net.safetensors"]
    assert cli.main(["norms", str(run)]) == 0
    assert (run / "norms-spectral.png").exists()


def scaled(run: Path, other: Path, factor: float) -> Path:
    """Copy a run, its weights multiplied."""
    shutil.copytree(run, other)
    with safe_open(run / MODEL, "pt") as opened:
        weights = {name: factor * opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        safetensors.torch.save_file(weights, other / MODEL, opened.metadata())
    return other


def test_bars_are_as_high_as_the_norms_and_the_same_norms_make_the_same_files(run, tmp_path):
    other = scaled(run, tmp_path / "two <&>", 1.5)
    assert cli.main(["norms", str(run), str(other)]) == 0
    files = [tmp_path / f"norms-{norm}.svg" for norm in ("frobenius", "spectral")]
    drawn = [file.read_text() for file in files]
    assert cli.main(["norms", str(run), str(other)]) == 0
    assert [file.read_text() for file in files] == drawn
    for svg, norm in zip(drawn, ("frobenius", "spectral"), strict=True):
        # Bars are the filled rectangles that the axes clip; heights are proportional to the norms.
        fills = "|".join(COLOURS[name][0].removeprefix("#") for name in ("c0", "c1"))
        paths = re.findall(rf'<path d="M ([^"]*)" clip-path="[^"]*" style="fill: #(?:{fills})', svg)
        heights = []
        for path in paths:
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", path)]
            ys = numbers[1::2]
            heights.append(max(ys) - min(ys))
        expected = [getattr(layer, norm) for of in (run, other) for layer in read_norms(of)]
        np.testing.assert_allclose(
            np.array(heights) / heights[0], np.array(expected) / expected[0], rtol=1e-3
        )


def test_runs_that_cannot_be_compared_or_read_get_one_line(complaint, run, small, tmp_path):
    other = tmp_path / "other"
    assert cli.main(["train", *small, "--width", "8", "--epochs", "1", "--out", str(other)]) == 0
    line = complaint("norms", run, other)
    assert f"{other} is mlp6 of width 8" in line and f"{run} is mlp6 of width 16" in line
    assert "one architecture at a time" in line
    assert "is named twice" in complaint("norms", run, f"{run}/.")
    assert "no such run" in complaint("norms", run, tmp_path / "absent")
    (other / MODEL).unlink()
    assert "no trained model in it yet" in complaint("norms", other)
    assert not (run / NORMS).exists() and not (tmp_path / "norms-frobenius.png").exists()


def test_weights_that_are_not_finite_are_named(complaint, run):
    with safe_open(run / MODEL, "pt") as opened:
        metadata = opened.metadata()
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    weights["head.weight"][0, 0] = math.nan
    safetensors.torch.save_file(weights, run / MODEL, metadata)
    line = complaint("norms", run)
    assert "head.weight" in line and "diverged" in line
    assert not (run / NORMS).exists()


def test_what_is_read_is_what_was_written(tmp_path):
    assert read_norms(tmp_path) == [] and read_diagnosis(tmp_path) == []
    findings = [
        Finding("a", "warn", {"eps": [0.1, 1.0], "error_percent": [5.0, 100.0], "n": 20}, "So."),
        Finding("b", "not done", {}, "Not."),
    ]
    write_rows(tmp_path / DIAGNOSIS, findings)
    assert read_diagnosis(tmp_path) == findings
    rows = json.loads((tmp_path / DIAGNOSIS).read_text())
    assert [sorted(row) for row in rows] == [["check", "figures", "sentence", "verdict"]] * 2


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '[{"check": "a"}]', '[{"check": "a", "verdict": "maybe"}]', "[[[", "[NaN]"],
)
def test_a_damaged_file_is_named(tmp_path, content):
    for name, read in ((DIAGNOSIS, read_diagnosis), (NORMS, read_norms)):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            read(tmp_path)
