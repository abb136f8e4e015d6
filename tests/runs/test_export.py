"""Exports run where fastiat is not installed, for any batch, and give the network's logits."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastiat
from fastiat import cli, models
from fastiat.config import TrainConfig
from fastiat.runs import export as exporting
from fastiat.runs.directory import Run
from fastiat.runs.robustbench import definition

TORCH = str(Path(torch.__file__).parents[1])
CARDS = {
    "preact18": {"arch": "preact18", "width": 2},
    "wrn": {"arch": "wrn28_10", "width": 1, "variant": "authors"},
    "mlp6": {"arch": "mlp6", "width": 8, "normalise": ("none",)},
    "imagenet": {"arch": "preact18", "width": 2, "normalise": ("imagenet",)},
    "silu": {"arch": "preact18", "width": 2, "activation": "silu"},
    "torchvision": {"arch": "torchvision:mobilenet_v3_small"},
    "timm": {"arch": "timm:test_resnet"},
}


def _run(path: Path, name: str) -> Path:
    """Save an untrained network as a run, with running statistics that are not 0 and 1."""
    config = TrainConfig(**CARDS[name], out=str(path))
    card = models.card_of(config, ("cat", "dog", "eel"), (3, 16, 16))
    torch.manual_seed(0)
    model = card.build().train()
    for _ in range(2):
        model(torch.rand(4, 3, 16, 16))
    run = Run.create(path, config)
    run.save_model(model.state_dict(), card)
    run.unlock()
    return path


def _without_fastiat(code: str, folder: Path) -> str:
    """Run code in a process that cannot import fastiat; return what it prints."""
    head = f"import sys\nsys.path = [p for p in sys.path if p] + [{TORCH!r}]\n"
    head += (
        "try:\n    import fastiat\nexcept ImportError:\n    pass\nelse:\n    raise SystemExit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", head + textwrap.dedent(code)],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "suffix"),
    [("preact18", "onnx"), ("mlp6", "pt2"), ("imagenet", "pt2"), ("timm", "onnx"), ("wrn", "pt2")],
)
def test_an_export_gives_the_logits_of_the_network_without_fastiat(name, suffix, tmp_path, capsys):
    run = _run(tmp_path / "run", name)
    assert cli.main(["export", str(run), str(tmp_path / f"m.{suffix}")]) == 0
    assert "(B, 3, 16, 16) in [0, 1] to logits (B, 3)" in capsys.readouterr().out
    x = torch.rand(7, 3, 16, 16)
    np.save(tmp_path / "x.npy", x.numpy())
    if suffix == "onnx":
        code = """
            import numpy as np, onnxruntime
            session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
            (logits,) = session.run(["logits"], {"pixels": np.load("x.npy")})
            print(session.get_modelmeta().custom_metadata_map["classes"])
        """
    else:
        code = """
            import numpy as np, torch
            files = {"classes": ""}
            program = torch.export.load("m.pt2", extra_files=files).module()
            logits = program(torch.from_numpy(np.load("x.npy"))).detach().numpy()
            print(files["classes"])
        """
    code += "\n            np.save('logits.npy', logits)\n"
    assert json.loads(_without_fastiat(code, tmp_path)) == ["cat", "dog", "eel"]
    with torch.no_grad():
        expected = fastiat.load(run)(x)
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CARDS)
def test_the_code_for_robustbench_rebuilds_the_network_without_fastiat(name, tmp_path):
    run = _run(tmp_path / "run", name)
    model = fastiat.load(run)
    card = models.card_of(TrainConfig(**CARDS[name]), ("cat", "dog", "eel"), (3, 16, 16))
    x = torch.rand(5, 3, 16, 16)
    np.save(run / "x.npy", x.numpy())
    code = definition(card) + textwrap.dedent("""
        import numpy as np
        with torch.no_grad():
            np.save("logits.npy", model(torch.from_numpy(np.load("x.npy"))).numpy())
    """)
    _without_fastiat(code, run)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(np.load(run / "logits.npy")), model(x))


def test_force_replaces_a_file(run, tmp_path, complaint):
    out = tmp_path / "m.pt2"
    out.write_bytes(b"old")
    assert "exists already" in complaint("export", run, out) and out.read_bytes() == b"old"
    assert cli.main(["export", str(run), str(out), "--force"]) == 0
    assert len(out.read_bytes()) > 1000


def test_the_metadata_for_robustbench_has_the_measured_figures(run, capsys):
    assert cli.main(["evaluate", str(run), "--attacks", "none", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert cli.main(["robustbench", str(run)]) == 0
    out = capsys.readouterr().out
    metadata = json.loads(out[out.index("\n{") : out.rindex("}") + 1])
    errors = [row for row in Run.open(run).rows() if row["kind"] == "evaluation"][-1]["errors"]
    assert metadata["clean_acc"] == f"{100 * (1 - errors / 360):.2f}"
    assert (metadata["norm"], metadata["eps"], metadata["dataset"]) == ("Linf", "0.03", "digits")
    assert metadata["autoattack_acc"] is None and "--autoattack" in out
    assert "clean_acc is measured on 360 test images" in out
    assert metadata["additional_data"] is False


def test_the_metadata_for_robustbench_leave_open_whether_further_images_were_real(run, capsys):
    config = json.loads((run / "config.json").read_text()) | {"extra": "/data/1m.npz"}
    (run / "config.json").write_text(json.dumps(config))
    assert cli.main(["robustbench", str(run)]) == 0
    out = capsys.readouterr().out
    metadata = json.loads(out[out.index("\n{") : out.rindex("}") + 1])
    assert metadata["additional_data"] is None and "further images, 1m.npz." in metadata["footnote"]


def test_the_loaded_network_has_the_interface_that_robustbench_measures(run):
    # robustbench.eval.benchmark calls model.to(device), model.eval() and model(x) on pixels in
    # [0, 1] under no_grad, and AutoAttack differentiates model(x) with respect to x.
    model = fastiat.load(run).to("cpu").eval()
    x = torch.rand(3, 1, 8, 8, requires_grad=True)
    logits = model(x)
    assert isinstance(model, nn.Module) and logits.shape == (3, 10)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.shape == x.shape and gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "RUN", "m.bin"), "end it with .onnx or .pt2"),
        (("export", "RUN", "no/m.onnx"), "m.onnx"),
        (("export", "nothing", "m.onnx"), "nothing: no such run"),
        (("export", "RUN", "there.onnx"), "exists already: choose another name, or replace it"),
        (("robustbench", "RUN/model.safetensors"), "is a model without its run"),
        (("robustbench", "nothing"), "nothing: no such run"),
    ],
)
def test_wrong_exports_get_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    _run(tmp_path / "run", "mlp6")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").write_text("kept")
    assert cli.main([a.replace("RUN", "run") for a in arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert (tmp_path / "there.onnx").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "there.onnx"]


def test_a_program_that_differs_from_the_network_is_not_written(tmp_path, monkeypatch, capsys):
    run = _run(tmp_path / "run", "mlp6")
    monkeypatch.setattr(exporting, "_run_program", lambda content, x: torch.zeros(len(x), 3))
    assert cli.main(["export", str(run), str(tmp_path / "m.pt2")]) == 2
    assert "differs from the network by" in capsys.readouterr().err
    assert not (tmp_path / "m.pt2").exists()


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, capsys):
    run = _run(tmp_path / "run", "mlp6")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert cli.main(["export", str(run), str(tmp_path / "m.onnx")]) == 2
    assert "pip install 'fastiat[export]'" in capsys.readouterr().err
