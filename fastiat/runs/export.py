"""Write a trained network for use without fastiat: as ONNX or as a PyTorch program (.pt2)."""

import io
import json
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from fastiat.config import ExportConfig
from fastiat.engine.device import own_defaults
from fastiat.runs.directory import load_with_card
from fastiat.system.errors import InputError, one_line, optional
from fastiat.system.files import check_new, check_writable, write

TRACED, CHECKED = 2, 5
"""Batch sizes that the network is traced with and that the written program is checked with."""
TOLERANCE = 1e-3
"""Largest difference of a logit from the network's, relative to the largest logit."""
INPUT, OUTPUT = "pixels", "logits"


@own_defaults()
def export(config: ExportConfig) -> Path:
    """Write the network of `config.run` to `config.out`, check the file, and return its path.

    The program takes fp32 pixels in [0, 1], (B, C, H, W) for any B, and returns logits, (B, K). The
    normalisation is inside, as plain operators. The names of the classes are in its metadata, under
    "classes". Raises `InputError` for a run that cannot be loaded, an OUT that cannot be written, a
    network that cannot be exported, and a program whose logits differ from the network's.
    """
    config.check()
    out = Path(config.out).absolute()
    check_new(out, config.force)
    check_writable(out.parent)
    as_onnx = out.suffix == ".onnx"
    if as_onnx:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            optional(package, "export")
    model, card = load_with_card(config.run, arch=config.arch)
    model = model.to(memory_format=torch.contiguous_format)
    metadata = {
        "arch": card.arch,
        "classes": json.dumps(card.classes),
        "input": "fp32 pixels in [0, 1], (B, C, H, W)",
    }
    shape = (card.in_channels, card.image_size, card.image_size)
    example = torch.rand(TRACED, *shape, generator=torch.Generator().manual_seed(0))
    try:
        content = (_onnx if as_onnx else _program)(model, example, metadata)
    except InputError:
        raise
    except Exception as error:
        # The exporters raise errors of many types for an operation that they do not know.
        raise InputError(
            f"{config.run}: this network cannot be exported: {type(error).__name__}: "
            f"{one_line(error)[:200]}"
        ) from error
    pixels = torch.rand(CHECKED, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(pixels)
    found = (_run_onnx if as_onnx else _run_program)(content, pixels)
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise InputError(
            f"{config.run}: the exported program differs from the network by {difference:.3g} in a "
            f"logit, so it is not written"
        )
    write(out, content)
    print(
        f"{out}: {INPUT} (B, {', '.join(map(str, shape))}) in [0, 1] to {OUTPUT} (B, "
        f"{card.num_classes}), {len(content) / 2**20:,.1f} MiB; checked on {CHECKED} random "
        f"images: the largest difference of a logit is {difference:.2g}"
    )
    return out


def _exported(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


def _program(model: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
    """Return the content of a .pt2 file, which `torch.export.load` reads."""
    buffer = io.BytesIO()
    torch.export.save(_exported(model, example), buffer, extra_files=metadata)
    return buffer.getvalue()


def _run_program(content: bytes, pixels: Tensor) -> Tensor:
    logits: Tensor = torch.export.load(io.BytesIO(content)).module()(pixels)
    return logits.detach()


def _onnx(model: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
    """Return the content of an ONNX file."""
    # The exporter logs every optimisation that does not apply.
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    program = torch.onnx.export(
        _exported(model, example), (example,), input_names=[INPUT], output_names=[OUTPUT],
        dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    content: bytes = proto.SerializeToString()
    return content


def _run_onnx(content: bytes, pixels: Tensor) -> Tensor:
    runtime = optional("onnxruntime", "export")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run([OUTPUT], {INPUT: pixels.numpy()})
    return torch.from_numpy(logits)
