"""What is captured as CUDA graphs: legality and number of kernels, on a CUDA that computes nothing.

Every group of cases is a process of its own on the library of `tests/tools/drycuda`. The kernels of
compiled networks are compared with drycuda.json, by torch's version. After a change that is meant
to alter them, `python tests/engine/test_drycuda.py` writes the counts of the installed version.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import drycuda  # noqa: E402

BUDGET = Path(__file__).with_name("drycuda.json")
VERSION = ".".join(torch.__version__.split(".")[:2])

pytestmark = [pytest.mark.drycuda, pytest.mark.slow]

Case = dict[str, Any]
AWP = {"awp": 0.01}
LAYER = {"mix": "manifold", "mix_at": ["1"]}
"""Manifold mixup at one layer, so that both updates draw the same one."""

CASES: dict[str, dict[str, Case]] = {
    "methods": {
        "plain": {"adv": "none"},
        "fgsm, mixup": {"adv": "fgsm", "mix": "mixup"},
        "pgd, manifold, AWP": {**LAYER, **AWP},
        "n-fgsm, cutmix": {"adv": "n-fgsm", "mix": "cutmix"},
        "trades": {"objective": "trades"},
        "trades, manifold, AWP": {"objective": "trades", **LAYER, **AWP},
        "mart, cutmix": {"objective": "mart", "mix": "cutmix"},
        "mart, AWP": {"objective": "mart", **AWP},
        "mixed, mixup": {"attack_mixed": True, "mix": "mixup"},
        "mixed, cutmix, AWP": {"attack_mixed": True, "mix": "cutmix", **AWP},
    },
    "settings": {
        "bn batch": {"bn": "batch"},
        "bn update, n-fgsm": {"bn": "update", "adv": "n-fgsm"},
        "l2, margin": {"norm": "l2", "eps": 0.5, "alpha": 0.1, "attack_loss": "margin"},
        "bce, EMA, fp32": {"loss": "bce", "ema": 0.99, "precision": "fp32"},
        "skip, lambda of each image": {"on_nan": "skip", "mix": "mixup", "lam_per_sample": True},
        "deterministic": {"deterministic": True, "loss": "bce", "mix": "mixup"},
        "wrn28_10": {"arch": "wrn28_10", "width": 1, **LAYER},
        "torchvision": {
            **{"arch": "torchvision:resnet18", "width": None},
            **{"mix": "manifold", "mix_at": ["layer1"]},
        },
    },
}
METHODS = {
    **{f"at, {adv}": {"adv": adv} for adv in ("none", "fgsm", "pgd", "n-fgsm")},
    **{method: {"objective": method} for method in ("trades", "mart")},
    "mixed": {"attack_mixed": True},
}
MIXES = {"none": {"mix": "none"}, "mixup": {"mix": "mixup"}, "manifold": LAYER}
MIXES |= {"cutmix": {"mix": "cutmix"}}
ATTACKED = {"awp": AWP, "batch": {"bn": "batch"}, "update": {"bn": "update"}}
ATTACKED |= {"l2": {"norm": "l2", "eps": 0.5, "alpha": 0.1}}
ALL = {
    f"{method}, {mix}, {more}": METHODS[method] | MIXES[mix] | ATTACKED.get(more, {})
    for method, mix, more in itertools.product(METHODS, MIXES, ("", *ATTACKED))
    # Without an attack there is nothing to set. An attack on mixed batches mixes at the input.
    if (method != "at, none" or not more) and (method != "mixed" or mix in ("mixup", "cutmix"))
}
"""The product of the methods, the mixes and the settings of an attack."""
COMPILED: dict[str, Case] = {
    "preact18": {"width": 64, **LAYER},
    "wrn28_10": {"arch": "wrn28_10", "width": 4, **LAYER},
}
COMPILED_LONG: dict[str, Case] = {
    "trades, AWP": {"objective": "trades", "mix": "mixup", **AWP},
    "mart, cutmix": {"objective": "mart", "mix": "cutmix", "bn": "batch"},
    "mixed, cutmix, AWP": {"attack_mixed": True, "mix": "cutmix", "lam_per_sample": True, **AWP},
    "n-fgsm, bn update": {"adv": "n-fgsm", "bn": "update", "mix": "mixup", "precision": "fp32"},
}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process on the dry CUDA."""
    return drycuda.make(tmp_path_factory.mktemp("drycuda"))


def capture(dry: dict[str, str], cases: dict[str, Case], *, compiled: bool) -> dict[str, Any]:
    """Run the cases in one process; return what `drycuda.captures` found, by their names."""
    given = [{"settings": case, "compiled": compiled} for case in cases.values()]
    done = python(dry, "-m", "drycuda.captures", given=json.dumps(given))
    return dict(zip(cases, json.loads(done.stdout), strict=True))


def python(dry: dict[str, str], *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *words], env=dry, input=given, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return done


def pieces(case: Case) -> set[str]:
    """Return the names of the pieces of an update."""
    attacked = case.get("adv") != "none"
    awp = {"ascent"} if case.get("awp") else set()
    if case.get("attack_mixed"):
        return {"prepare", "attack", "adversarial", "optimizer"} | awp
    if case.get("objective", "at") != "at":
        return {"prepare", "attack", "joint", "optimizer"} | awp
    return {"clean", "optimizer"} | ({"attack", "adversarial"} | awp if attacked else set())


def assert_legal(case: Case, found: dict[str, Any]) -> None:
    assert found["faults"] == []
    # With --on-nan skip, memory that no kernel has written decides whether the optimizer runs.
    wanted = pieces(case) - ({"optimizer"} if case.get("on_nan") == "skip" else set())
    assert wanted == found["graphs"].keys() & (wanted | {"ascent", "joint", "prepare"})
    assert all(found["graphs"].values())
    if case.get("on_nan") != "skip":
        assert found["replays"] == 2 * len(wanted)
    assert found["pool"] > 0, "the graphs have no memory pool"
    assert found["kept"] == 0, "a memory pool outlives its graphs"


@pytest.mark.parametrize("group", CASES)
def test_every_update_is_captured_without_a_forbidden_call(dry, group):
    results = capture(dry, CASES[group], compiled=False)
    for name, found in results.items():
        print(name)
        assert_legal(CASES[group][name], found)


@pytest.mark.long
def test_the_product_of_all_methods_is_captured_without_a_forbidden_call(dry):
    for name, found in capture(dry, ALL, compiled=False).items():
        print(name)
        assert_legal(ALL[name], found)


@pytest.fixture(scope="module", params=COMPILED)
def compiled(request: pytest.FixtureRequest, dry: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The name of a case and its captures, compiled."""
    name = request.param
    return name, capture(dry, {name: COMPILED[name]}, compiled=True)[name]


def test_compiled_network_is_captured_without_compiling_or_searching(compiled):
    name, found = compiled
    assert_legal(COMPILED[name], found)


def test_graphs_have_no_more_nodes_than_their_budget(compiled):
    assert_within_budget(*compiled)


@pytest.mark.long
@pytest.mark.parametrize("name", COMPILED_LONG)
def test_later_methods_compiled_are_legal_and_within_their_budget(dry, name):
    found = capture(dry, {name: COMPILED_LONG[name]}, compiled=True)[name]
    assert_legal(COMPILED_LONG[name], found)
    assert_within_budget(name, found)


def assert_within_budget(name: str, found: dict[str, Any]) -> None:
    budgets = json.loads(BUDGET.read_text())
    if VERSION not in budgets:
        pytest.skip(f"no counts for torch {VERSION}, only for {', '.join(budgets)}: legality only")
    budget = budgets[VERSION][name]
    assert found["graphs"].keys() == budget.keys()
    for piece, nodes in found["graphs"].items():
        now, before = Counter(nodes), Counter(budget[piece])
        assert now.total() <= before.total(), (
            f"{name}: {piece} has {now.total()} nodes, its budget is {before.total()}; "
            f"new: {dict(now - before)}; gone: {dict(before - now)}"
        )


FORBIDDEN = """
import torch
from drycuda import inside

x = torch.zeros(8, device="cuda")

def fault(function):
    inside.clear()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
    except RuntimeError as error:
        torch.cuda.set_stream(torch.cuda.default_stream())
    (captured,) = inside.graphs(inside.log())
    print(captured.faults[:1])

convolution = torch.nn.Conv2d(8, 8, 3, device="cuda")
images = torch.zeros(2, 8, 8, 8, device="cuda")
fault(lambda: x.add_(1))
fault(lambda: x.sum().item())
fault(lambda: torch.cuda.synchronize())
fault(lambda: convolution(images))
fault(lambda: torch.compile(lambda x: x + 1)(x))
"""


def test_a_call_that_a_capture_forbids_is_found(dry):
    lines = python(dry, "-c", FORBIDDEN).stdout.splitlines()
    assert lines[0] == "[]"
    assert "illegal: cudaStreamSynchronize" in lines[1]
    assert "illegal: cudaDeviceSynchronize" in lines[2]
    assert "search: a cuDNN plan" in lines[3]
    assert "compile: the function <lambda>" in lines[4]


def write_budget() -> None:
    """Write the counts of the installed torch to the budget file."""
    budgets = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        dry = drycuda.make(Path(folder))
        found = capture(dry, COMPILED | COMPILED_LONG, compiled=True)
    budgets[VERSION] = {name: result["graphs"] for name, result in found.items()}
    BUDGET.write_text(json.dumps(dict(sorted(budgets.items())), indent=1) + "\n")


if __name__ == "__main__":
    write_budget()
