"""Checks and conversions of settings that no command line shows."""

import pytest

from fastiat import cli
from fastiat.config import DiagnoseConfig, TrainConfig
from fastiat.system.settings import ARCHS, DATASETS, closest, did_you_mean


@pytest.mark.parametrize(
    ("given", "known", "meant"),
    [
        ("--epoch", ["--epochs", "--eps"], "--epochs"),
        ("--EPOCHS", ["--epochs", "--eps"], "--epochs"),
        ("fgms", ["none", "fgsm"], "fgsm"),
        ("preact", ARCHS, "preact18"),
        ("CIFAR-10", DATASETS, "cifar10"),
        # Two different networks, which differ in three of eight letters.
        ("resnet18", ARCHS, None),
        # The dashes of two flags do not make them similar.
        ("--gpu", ["--pad", "--eps"], None),
        ("mnist", DATASETS, None),
        ("--output", ["--out"], None),
        (7, ["width"], None),
    ],
)
def test_only_a_name_that_is_close_is_suggested(given, known, meant):
    assert did_you_mean(given, known) == ("" if meant is None else f", did you mean {meant}?")


def test_the_closest_names_come_first():
    assert closest("layer1", ["layer", "layer1.0", "fc", "layer12"], 2) == ["layer12", "layer"]


@pytest.mark.parametrize(
    ("spelling", "norm"),
    [("Linf", "linf"), ("LINF", "linf"), ("l_inf", "linf"), ("L-inf", "linf"), ("L2", "l2")],
)
def test_other_spellings_of_a_norm_mean_it(spelling, norm):
    # Not only the name: the defaults of eps and alpha are those of the norm.
    assert TrainConfig(norm=spelling) == TrainConfig(norm=norm)
    for argv in (["train"], ["evaluate", "x"], ["sweep", "x"], ["transfer", "x", "y"]):
        assert cli.parse([*argv, "--norm", spelling])[1].norm == norm
    assert DiagnoseConfig(run="x", norm=spelling).norm == norm


@pytest.mark.parametrize("wrong", ["l1", "inf", "L", "2", None, 2])
def test_another_norm_is_refused(wrong):
    with pytest.raises(ValueError, match=r"--norm is .*: choose from 'linf', 'l2'"):
        TrainConfig(norm=wrong).check()
