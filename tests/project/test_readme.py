"""The README's commands, Python and file tree, as a reader would follow them."""

import re
from pathlib import Path

import pytest
import torch

from fastiat import cli
from fastiat.attack import PGD
from fastiat.engine import graphs
from fastiat.system.errors import InputError

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def _blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def test_python_runs_on_a_trained_run(trained):
    code, _, _, _ = _blocks("python")
    code = re.sub('"runs/[^"]*"', repr(str(trained)), code).replace('"cifar10"', '"digits"')
    names = {}
    exec(code.replace("steps=20", "steps=2"), names)
    moved = (names["x_adv"] - names["x"]).abs().max()
    assert 0 < moved <= 8 / 255 + 1e-6 and names["x_adv"].shape == (100, 1, 8, 8)


def test_an_attack_made_once_gives_what_pgd_gives(monkeypatch):
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")
    _, code, _, _ = _blocks("python")
    names = {}
    torch.manual_seed(0)
    exec(code, names)
    model, x, y = (names[name] for name in ("model", "x", "y"))
    again = PGD(model, **names["attack"].settings, precision="bf16", engine="eager")
    for attack in (again, names["attack"]):
        attack.settings["generator"] = torch.Generator().manual_seed(1)
    assert torch.equal(names["attack"](x, y), again(x, y))


def test_kernels_alone_do_what_their_comments_say():
    _, _, code, _ = _blocks("python")
    names = {}
    exec(code, names)
    x, grad, x_adv, perm = (names[name] for name in ("x", "grad", "x_adv", "perm"))
    stepped = (x + 2 / 255 * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, stepped)
    torch.testing.assert_close(names["mixed"], 0.3 * x_adv + 0.7 * x_adv[perm])


def test_a_network_of_the_reader_is_trained_measured_and_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *_, code = _blocks("python")
    names = {}
    exec(code.replace("epochs=1", 'epochs=1, steps=1, device="cpu"'), names)
    assert names["run"].errors["none"].n == 16
    assert not names["model"].training


def test_every_command_line_parses():
    lines = "\n".join(_blocks("console")).splitlines()
    commands = [line.removeprefix("$ ").split("#")[0].split() for line in lines]
    commands = [words[1:] for words in commands if words and words[0] == "fastiat"]
    assert {words[0] for words in commands} == {
        *("train", "evaluate", "compare", "sweep", "transfer", "diagnose", "norms"),
        *("reproduce", "report", "convert", "export", "robustbench"),
    }
    for words in commands:
        if "--resume" in words:
            with pytest.raises(InputError, match="holds no run"):
                cli.parse(words)
        else:
            assert cli.parse(words)[0] == words[0]


def test_the_file_tree_names_every_stage_and_package_and_nothing_else():
    (tree,) = _blocks("")
    named = re.findall(r"^(\S+)  ", tree, re.MULTILINE)
    fastiat = {file.name for file in (ROOT / "fastiat").glob("[!_]*.py")}
    fastiat |= {f"{file.parent.name}/" for file in (ROOT / "fastiat").glob("*/__init__.py")}
    assert {name.removeprefix("fastiat/") for name in named if name.startswith("fastiat/")} == (
        fastiat - {"kernels/"}
    )
    assert all((ROOT / name).exists() for name in named) and len(set(named)) == len(named)
