"""The commands, Python, names and numbers of README.md and docs/, as a reader would follow them."""

import pydoc
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import fastiat
from fastiat import api, cli, kernels
from fastiat.attack import PGD, pgd
from fastiat.engine import graphs
from fastiat.mix import MixPoints, draw
from fastiat.models import build
from fastiat.system.errors import InputError
from fastiat.system.settings import flag_of, hints_of
from fastiat.train import algorithm1

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if RESULTS not in file.parents
}
RUN = "runs/cifar10-preact18-pgd-manifold-s0"
SMALLER = {
    '"cifar10"': '"digits"',
    'build("preact18", width=8), 3': 'build("mlp6", width=8), 3',
    "(5, 3, 32, 32)": "(5, 1, 8, 8)",
    "steps=20": "steps=2",
    '"pgd-20"': '"pgd-2"',
    "epochs=1,": 'epochs=1, steps=1, device="cpu",',
}
"""The blocks show CIFAR-10, real networks and attacks of usual strength; the tests take seconds."""


def _blocks(page, *languages):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name in languages]


def _attacked(names):
    moved = (names["x_adv"] - names["x"]).abs().max()
    assert 0 < moved <= 8 / 255 + 1e-6 and names["x_adv"].shape == (100, 1, 8, 8)


def _attack_made_once_gives_what_pgd_gives(names):
    model, x, y = (names[name] for name in ("model", "x", "y"))
    again = PGD(model, **names["attack"].settings, precision="bf16", engine="eager")
    for attack in (again, names["attack"]):
        attack.settings["generator"] = torch.Generator().manual_seed(1)
    assert torch.equal(names["attack"](x, y), again(x, y))


def _kernels_do_what_their_comments_say(names):
    x, grad, x_adv, perm = (names[name] for name in ("x", "grad", "x_adv", "perm"))
    stepped = (x + 2 / 255 * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, stepped)
    torch.testing.assert_close(names["mixed"], 0.3 * x_adv + 0.7 * x_adv[perm])


def _own_network_is_trained_measured_and_loaded(names):
    assert names["run"].errors["none"].n == 16
    assert not names["model"].training


def _own_network_takes_images(names):
    assert names["make_net"](7, 1)(torch.rand(2, 1, 32, 32)).shape == (2, 7)


def _loop_is_algorithm1(names):
    torch.manual_seed(0)
    model = build("preact18", width=8)
    points = MixPoints(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    loader = [(torch.rand(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(2)]
    attack = partial(pgd, model, eps=8 / 255, alpha=2 / 255, steps=7)
    for x, y in loader:
        optimizer.zero_grad()
        algorithm1(model, x, y, attack, lambda: draw("manifold", 4), points)
        optimizer.step()
    for found, expected in zip(names["model"].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def _export_gives_the_logits_of_the_run(names):
    model, x = fastiat.load(RUN), torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(names["network"](x), model(x))
    assert names["logits"].shape == (5, 10)


def _images_of_a_data_set(names):
    images, x = names["dataset"].test.images[:100], names["x"]
    assert names["images"].dtype == torch.uint8 and len(names["images"]) == len(names["labels"])
    assert torch.equal(x, images.permute(0, 3, 1, 2) / 255)


def _a_published_update_stays_in_its_ball(names):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y, before = torch.rand(4, 3, 4, 4), torch.arange(4), model[1].weight.clone()
    if "fast_update" in names:
        x = (x - names["mean"]) / names["std"]
        x_adv = names["fast_update"](model, optimizer, x, y, x, 2 / 255 / names["std"])
        assert ((x_adv - x).abs() <= names["eps"] + 1e-6).all() and not torch.equal(x_adv, x)
    else:
        perm, eps = torch.tensor([1, 0, 3, 2]), 8 / 255
        x_adv = names["mixup_update"](
            model, optimizer, x, y, perm, 0.3, torch.zeros_like(x), eps, 2 / 255
        )
        far = (x_adv - (0.3 * x + 0.7 * x[perm])).abs().max()
        assert 2 / 255 < far <= eps + 1e-6
    assert not torch.equal(model[1].weight, before)


def _normalised_attack_is_that_of_the_pixels(names):
    mean, std = (torch.tensor(names[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels, x_adv = (names[name] * std + mean for name in ("x", "x_adv"))
    assert 4 / 255 < (x_adv - pixels).abs().max() <= 8 / 255 + 1e-6
    assert x_adv.min() >= -1e-6 and x_adv.max() <= 1 + 1e-6


CHECKS = {
    "def fast_update": _a_published_update_stays_in_its_ball,
    "def mixup_update": _a_published_update_stays_in_its_ball,
    "normalise=(mean, std)": _normalised_attack_is_that_of_the_pixels,
    "import fastiat, torchattacks": _attacked,
    "attack = PGD(": _attack_made_once_gives_what_pgd_gives,
    "from fastiat.kernels import": _kernels_do_what_their_comments_say,
    "fastiat.fit(": _own_network_is_trained_measured_and_loaded,
    "def make_net": _own_network_takes_images,
    "MixPoints(": _loop_is_algorithm1,
    "torch.export.load": _export_gives_the_logits_of_the_run,
    "fastiat.data.load(": _images_of_a_data_set,
}
"""What holds after a block of Python that contains the text; the first text that fits counts."""

PYTHON = {code: page for page in PAGES for code in _blocks(page, "python")}


@pytest.mark.parametrize(
    "code", PYTHON, ids=[f"{page}-{i}" for i, page in enumerate(PYTHON.values())]
)
def test_python_runs_alone_and_does_what_its_text_says(code, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")
    monkeypatch.setattr(api, "ATTACKS", ("none", "pgd-2"))
    shutil.copytree(trained, RUN)
    if "model.pt2" in code:
        assert cli.main(["export", RUN, "model.pt2"]) == 0
    check = next(CHECKS[text] for text in CHECKS if text in code)
    for usual, smaller in SMALLER.items():
        code = code.replace(usual, smaller)
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    check(names)


def _commands(page):
    """Yield the words of every `fastiat ...` and `-m fastiat ...` in the page's blocks."""
    for block in _blocks(page, "console", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if "fastiat" in words:
                at = words.index("fastiat")
                if at == 0 or words[at - 1] == "-m":
                    yield words[at + 1 :]


@pytest.mark.parametrize("page", [page for page in PAGES if any(_commands(page))])
def test_every_command_line_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in _commands(page):
        if "--resume" in words:
            with pytest.raises(InputError, match="holds no run"):
                cli.parse(words)
        else:
            assert cli.parse(words)[0] == words[0]


def test_every_command_is_shown():
    assert {words[0] for page in PAGES for words in _commands(page)} == set(cli.COMMANDS)


FLAGS = {"--help"} | {
    flag
    for kind, _, _ in cli.COMMANDS.values()
    for name in hints_of(kind)
    for flag in (flag_of(name), f"--no-{flag_of(name)[2:]}")
}


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_names_in_the_text_exist(page):
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", text)
    flags = {word for span in spans if span.startswith("--") for word in span.split()}
    assert {flag for flag in flags if flag.startswith("--")} <= FLAGS
    for name in re.findall(r"\bfastiat(?:\.\w+)+", "\n".join(spans)):
        assert pydoc.locate(name) is not None, name


def test_the_reference_has_every_public_function():
    listed = set(re.findall(r"^::: fastiat\.(?:.*\.)?(\w+)$", PAGES["docs/reference.md"], re.M))
    assert {*fastiat.__all__, *kernels.__all__} - {"__version__"} <= listed


def test_figures_in_tables_are_those_of_the_records():
    records = set(re.findall(r"\d[\d.,:]*\d|\d", (ROOT / "RECORDS.md").read_text()))
    cells = re.findall(r"(?<=\| )(\d[\d.,]*)(?= \|)", PAGES["docs/performance.md"])
    assert len(cells) > 50 and set(cells) <= records


def test_the_file_tree_names_every_stage_and_package_and_nothing_else():
    (tree,) = _blocks("README.md", "")
    named = re.findall(r"^(\S+)  ", tree, re.MULTILINE)
    parts = {file.name for file in (ROOT / "fastiat").glob("[!_]*.py")}
    parts |= {f"{file.parent.name}/" for file in (ROOT / "fastiat").glob("*/__init__.py")}
    assert {name.removeprefix("fastiat/") for name in named if name.startswith("fastiat/")} == (
        parts - {"kernels/"}
    )
    assert all((ROOT / name).exists() for name in named) and len(set(named)) == len(named)
