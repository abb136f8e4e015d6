"""What every kernel has to pass without a GPU, found by itself: nobody registers a kernel here.

The interpreter: the kernels' tests, run again under TRITON_INTERPRET=1, must launch every kernel.
The compiler: each launch in LAUNCHES is recorded as a real one would specialise it and compiled for
sm_80 and sm_90, into machine code that must keep to registers and load 16 bytes at a time.
"""

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fastiat.kernels

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the gates start the interpreter themselves", allow_module_level=True)

TESTS = Path(__file__).parent
MODULES = {
    module.name: importlib.import_module(f"fastiat.kernels.{module.name}")
    for module in pkgutil.iter_modules(fastiat.kernels.__path__)
}


def jit_functions() -> dict[str, JITFunction]:
    """Every @triton.jit function that fastiat.kernels defines."""
    return {
        name: value
        for module in MODULES.values()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    }


def kernels() -> dict[str, JITFunction]:
    """Those that are launched: the ones that no other calls."""
    functions = jit_functions()
    called = {
        node.id
        for function in functions.values()
        for node in ast.walk(ast.parse(function.src))
        if isinstance(node, ast.Name)
    }
    return {name: function for name, function in functions.items() if name not in called}


class Launch(NamedTuple):
    """A call that launches kernels, the registers a thread may take, and whether it loads wide."""

    call: Callable[[], Any]
    registers: int
    wide: bool = True


def batch(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (128, 3, 32, 32)
) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def op(module: str, launcher: str, *args: Any) -> Callable[[], Any]:
    return lambda: getattr(MODULES[module], launcher)(*args)


PERM = torch.arange(128)
LAM, LAM64, LAMS = torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), torch.rand(128)
CLIP = (0.0, 1.0)
BF16, FP16, U8 = torch.bfloat16, torch.float16, torch.uint8


def step(module: str, launcher: str, dtype: torch.dtype) -> Callable[[], Any]:
    return op(module, launcher, batch(dtype), batch(dtype), batch(dtype), 0.03, 0.01, *CLIP)


def channel_step(
    module: str, launcher: str, dtype: torch.dtype, layout: torch.memory_format
) -> Callable[[], Any]:
    tensors = [batch(dtype).contiguous(memory_format=layout) for _ in range(3)]
    return op(module, launcher, *tensors, *torch.rand(4, 3))


def cross_entropy(
    launcher: str, dtype: torch.dtype, classes: int, lam: torch.Tensor, soft: bool = False
) -> Any:
    upstream = () if launcher == "_mixed_cross_entropy_triton" else (torch.tensor(1.0),)
    logits = batch(dtype, (128, classes))
    y = batch(shape=(128, classes)) if soft else PERM
    return op("mixed_cross_entropy", launcher, *upstream, logits, y, y, lam)


def crop(channels: int) -> Callable[[], Any]:
    images = batch(U8, (128, 32, 32, channels))
    return op("crop_flip", "_crop_flip_triton", images, PERM, PERM, PERM, PERM > 0, 4)


LAUNCHES = {
    "pgd_step fp32": Launch(step("pgd_step", "_pgd_step_triton", torch.float32), 48),
    "pgd_step bf16": Launch(step("pgd_step", "_pgd_step_triton", BF16), 48),
    "pgd_step_ fp16": Launch(step("pgd_step", "_pgd_step_inplace_triton", FP16), 48),
    "pgd_step_l2 fp32": Launch(step("pgd_step_l2", "_pgd_step_l2_triton", torch.float32), 72),
    "pgd_step_l2 bf16": Launch(step("pgd_step_l2", "_pgd_step_l2_triton", BF16), 72),
    "pgd_step channels": Launch(
        channel_step("pgd_step", "_pgd_step_triton", torch.float32, torch.contiguous_format), 48
    ),
    "pgd_step_ channels last": Launch(
        channel_step("pgd_step", "_pgd_step_inplace_triton", BF16, torch.channels_last), 48
    ),
    # Of 256 threads with 80 registers, as many are resident as of those with 72: three times 256.
    "pgd_step_l2 channels": Launch(
        channel_step("pgd_step_l2", "_pgd_step_l2_triton", BF16, torch.contiguous_format), 80
    ),
    "pgd_step_l2 channels last": Launch(
        channel_step("pgd_step_l2", "_pgd_step_l2_triton", torch.float32, torch.channels_last), 80
    ),
    "mix fp64 lam": Launch(op("mix", "_mix_triton", batch(), PERM, LAM64, False), 48),
    "mix per sample": Launch(op("mix", "_mix_triton", batch(BF16), PERM, LAMS, False), 48),
    "mix transposed": Launch(op("mix", "_mix_triton", batch(BF16), PERM, LAM, True), 48),
    "mix per sample transposed": Launch(op("mix", "_mix_triton", batch(), PERM, LAMS, True), 48),
    "standardize fp32": Launch(
        op("standardize", "_standardize_triton", batch(), torch.float32), 64
    ),
    "standardize uint8 to bf16": Launch(
        op("standardize", "_standardize_triton", batch(U8), BF16), 64
    ),
    "standardize backward fp32": Launch(
        op("standardize", "_standardize_backward_triton", batch(), batch()), 64
    ),
    "standardize backward bf16": Launch(
        op("standardize", "_standardize_backward_triton", batch(BF16), batch()), 64
    ),
    # Ten classes are 40 bytes a row and a crop starts anywhere: no 16-byte loads there.
    "cross-entropy 10": Launch(
        cross_entropy("_mixed_cross_entropy_triton", torch.float32, 10, LAM), 64, wide=False
    ),
    "cross-entropy 10 backward": Launch(
        cross_entropy("_backward_triton", BF16, 10, LAMS), 64, wide=False
    ),
    "cross-entropy 1024": Launch(
        cross_entropy("_mixed_cross_entropy_triton", BF16, 1024, LAMS), 64
    ),
    "cross-entropy 1024 backward": Launch(
        cross_entropy("_backward_triton", torch.float32, 1024, LAM), 64
    ),
    "cross-entropy soft 10": Launch(
        cross_entropy("_mixed_cross_entropy_triton", torch.float32, 10, LAM, soft=True),
        64,
        wide=False,
    ),
    "cross-entropy soft 1024 backward": Launch(
        cross_entropy("_backward_triton", BF16, 1024, LAMS, soft=True), 64
    ),
    "crop_flip": Launch(crop(3), 64, wide=False),
    "crop_flip grey": Launch(crop(1), 64, wide=False),
    "random_start fp32": Launch(
        op("random_start", "_random_start_triton", batch(), LAM.long(), 0.03, *CLIP), 64
    ),
    "random_start bf16": Launch(
        op("random_start", "_random_start_triton", batch(BF16), LAM.long(), 0.03, *CLIP), 64
    ),
}


class Recorded(NamedTuple):
    kernel: JITFunction
    args: dict[str, Any]
    options: dict[str, Any]


def record(call: Callable[[], Any]) -> list[Recorded]:
    """The launches that `call` would make, without making them."""
    launches = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        names = kernel.arg_names
        options = {k: v for k, v in keywords.items() if k not in names}
        named = {k: v for k, v in keywords.items() if k in names}
        launches.append(
            Recorded(kernel, {**dict(zip(names, args, strict=False)), **named}, options)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        call()
    return launches


POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def compile_as_launched(launch: Recorded, capability: int) -> Any:
    """Compile for sm_<capability>, specialised on values and alignment as a launch is."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.args[name]
        if name in constexprs or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name], aligned = "i32" if value < 2**31 else "i64", value % 16 == 0
        else:
            signature[name], aligned = "fp32", False
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, GPUTarget("cuda", capability, 32), launch.options)


def cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("label", LAUNCHES)
def test_machine_code_keeps_to_registers_and_loads_wide(label, capability, tmp_path):
    expected = LAUNCHES[label]
    for launch in record(expected.call):
        name = launch.kernel.fn.__name__
        cubin = tmp_path / f"{name}.cubin"
        cubin.write_bytes(compile_as_launched(launch, capability).asm["cubin"])
        usage = cuobjdump("--dump-resource-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
        assert found, usage
        registers, stack, local = map(int, found.groups())
        assert (stack, local) == (0, 0), f"{name} spills: {usage}"
        assert registers <= expected.registers, f"{name} takes {registers} registers"
        if expected.wide:
            code = cuobjdump("--dump-sass", cubin)
            assert re.search(r"LDG\.E\S*\.128", code), f"{name} has no 16-byte load"


def test_every_kernel_is_compiled_by_a_launch_above():
    compiled = {
        launch.kernel.fn.__name__ for entry in LAUNCHES.values() for launch in record(entry.call)
    }
    assert compiled == set(kernels())


@pytest.fixture(scope="module", autouse=True)
def interpreter(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[str] | None, Path]]:
    """The kernels' tests in a process of their own, beside the compiler's if they are wanted.

    Triton decides at its import whether it interprets, so this process cannot.
    """
    folder = tmp_path_factory.mktemp("interpreter")
    if not any("in_the_interpreter" in item.name for item in request.session.items):
        yield None, folder
        return
    files = sorted(path for path in TESTS.glob("test_kernel_*.py") if path != Path(__file__))
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "KERNEL_LAUNCH_LOG": str(folder / "launched"),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "tools"), *sys.path]),
    }
    options = ["-q", "-p", "kernel_launch_log", "-p", "no:cacheprovider", "-W", "ignore"]
    with (
        (folder / "output").open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *map(str, files)],
            env=environment,
            cwd=TESTS.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        yield process, folder
        process.kill()


@pytest.mark.slow
def test_kernels_pass_their_tests_in_the_interpreter(interpreter):
    process, folder = interpreter
    status = process.wait(timeout=600)
    output = (folder / "output").read_text()
    assert status == 0, output[-10000:]
    assert re.search(r"\d{3} passed", output), output[-1000:]


@pytest.mark.slow
def test_every_kernel_is_launched_by_its_tests_in_the_interpreter(interpreter):
    process, folder = interpreter
    process.wait(timeout=600)
    assert set(kernels()) - set((folder / "launched").read_text().split()) == set()
