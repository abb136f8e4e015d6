"""The parts of `bench/gpu/run.py`; each writes its JSON file after every measurement."""

import gc
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rivals
import steps
import timing
import torch
from timing import DEVICE, ON_GPU, ROOT

from fastiat.engine import graphs

BATCHES = (64, 128, 512)
ENGINES = ("eager", "compile", "graph") if ON_GPU else ("eager", "compile")
KINDS = {
    "attack, mixing, standardisation": r"pgd|standardi|_mix|mixed|crop|random_start",
    "BN and what is fused to it": r"norm|bn_|welford",
    # Inductor names a kernel after all ops that it fused, including convolutions before them.
    "other fused": r"^triton_",
    "convolution": r"conv|cudnn|xmma|implicit|gemm|cutlass|wgrad|dgrad|fprop|nvjet|sm90_|sm80_",
}
"""Kinds of kernels, with a pattern of their names; the first pattern that matches counts."""


class Part:
    """The JSON file of a part, its time limit and its sizes."""

    def __init__(self, name: str, out: Path, seconds: float, tiny: bool, warm: int | None) -> None:
        self.name, self.tiny, self.warm = name, tiny, warm
        self.file, self.result = out / f"{name}.json", {"part": name, "rows": []}
        self.deadline = time.monotonic() + seconds
        self.batches = (4,) if tiny else BATCHES
        # In the rehearsal it is enough to compile one of the two networks.
        self.engines = ENGINES[:1] if tiny and name == "wrn28_10" else ENGINES
        self.width = {"preact18": 2, "wrn28_10": 1} if tiny else {}
        self.budget = 0.05 if tiny else 2.0

    @property
    def left(self) -> float:
        """Seconds that are left until the part has to end."""
        return self.deadline - time.monotonic()

    def add(self, *rows: dict[str, Any], **facts: Any) -> None:
        """Add rows and facts to the JSON and write it."""
        if self.warm is not None:
            return
        self.result["rows"] += rows
        self.result |= facts
        beside = self.file.with_suffix(".part")
        beside.write_text(json.dumps(self.result, indent=1))
        os.replace(beside, self.file)

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Call `measure`; record an error as a row, so that the next measurements still run."""
        if self.left < 0:
            self.add({"what": what, "error": "no time left"})
            return
        try:
            measure()
        except Exception:
            lines = traceback.format_exc()
            print(lines, file=sys.stderr)
            self.add({"what": what, "error": lines[-3000:]})


def run(name: str, out: Path, *, seconds: float, tiny: bool, backend: str, warm: int | None) -> int:
    """Measure a part and return 0, or 1 if something in it failed.

    With `warm`, only compile what the part needs: for a network, for its batch size number `warm`.
    """
    graphs.BACKEND = backend
    part = Part(name, out, seconds, tiny, warm)
    if not ON_GPU:
        torch.set_num_threads(1)
    measures = {"ceilings": _ceilings, "tests": _tests, "kernels": _kernels, "profile": _profile}
    part.add()
    part.attempt(name, lambda: measures.get(name, _network)(part))
    return int(any("error" in row for row in part.result["rows"]))


def _ceilings(part: Part) -> None:
    size = 256 if part.tiny else None
    part.add(machine=timing.machine(), copy_bytes_per_s=timing.copy_bandwidth())
    for arithmetic in ("bf16", "tf32", "fp32") if ON_GPU else ("bf16", "fp32"):
        peak = timing.matrix_peak(arithmetic, size)
        part.add(**{f"{arithmetic}_flop_per_s": peak})


def _ceiling(part: Part, name: str, measure: Callable[[], float]) -> float:
    """Return a peak rate that the part `ceilings` has measured, or measure it now."""
    file = part.file.with_name("ceilings.json")
    known = json.loads(file.read_text()) if file.exists() else {}
    return known[name] if name in known else measure()


def _has_gpu_tests(file: Path) -> bool:
    return file.name.startswith("test_kernel_") or "mark.gpu" in file.read_text()


def _tests(part: Part) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-rfE", "--tb=short"]
    if ON_GPU:
        # Only files with GPU tests: the others import packages that may not be installed here.
        files = sorted((ROOT / "tests").rglob("test_*.py"))
        command += ["-m", "gpu", *(str(file) for file in files if _has_gpu_tests(file))]
        if importlib.util.find_spec("xdist"):
            command += ["-n", "4", "--dist", "loadfile"]
    else:
        (file,) = (ROOT / "tests").rglob("test_gpu_engine.py")
        command += ["-m", "not gpu", str(file), "-k", "random_starts"]
    log = part.file.with_suffix(".log")
    with log.open("w") as file:
        # The output goes to a file, because a pipe would lose that of a killed process.
        child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = child.wait(timeout=max(part.left, 1))
        except subprocess.TimeoutExpired:
            child.kill()
            status = None
    output = log.read_text()
    log.unlink()
    print(output[-6000:], flush=True)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|errors?)\b", output)}
    part.add(status=status, counts=counts, output=output[-20000:])
    if status != 0:
        part.add({"what": "tests", "error": "out of time" if status is None else output[-3000:]})


def _network(part: Part) -> None:
    """Measure training step and attack of the network that the part is named after."""
    arithmetic = timing.fast_arithmetic()
    peak = _ceiling(part, f"{arithmetic}_flop_per_s", lambda: timing.matrix_peak(arithmetic))
    width = part.width.get(part.name)
    batches = part.batches if part.warm is None else part.batches[part.warm : part.warm + 1]
    for batch in batches:
        part.attempt(f"step {batch}", lambda b=batch: _steps(part, width, b, peak))
        part.attempt("free memory", _forget)
        part.attempt(f"attack {batch}", lambda b=batch: _attacks(part, width, b, peak))
        part.attempt("free memory", _forget)


def _forget() -> None:
    """Free the memory of compiled and captured graphs."""
    torch.compiler.reset()
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def _steps(part: Part, width: int | None, batch: int, peak: float) -> None:
    chosen = part.engines if part.warm is None else ("compile",)
    calls = {}

    def make(engine: str, method: str) -> None:
        begun = time.monotonic()
        calls[engine, method] = steps.make(method, engine, part.name, batch, width=width)
        print(
            f"{part.name} {batch} {method} {engine}: {time.monotonic() - begun:.0f} s", flush=True
        )

    for engine in chosen:
        for method in ("IAT",) if part.tiny and part.warm is not None else ("plain", "IAT"):
            what = f"step {batch} {method} {engine}"
            part.attempt(what, lambda e=engine, m=method: make(e, m))
    if part.warm is not None:
        return
    rounds = timing.interleaved(calls, budget=part.budget * 2)
    needed = timing.flops(part.name, width)
    for (engine, method), seconds in rounds.items():
        middle = statistics.median(seconds)
        plain = statistics.median(rounds.get((engine, "plain"), [math.nan]))
        part.add(
            {
                "what": "step", "network": part.name, "width": width, "batch": batch,
                "engine": engine, "method": method, "seconds": middle, "rounds": seconds,
                "images_per_s": batch / middle,
                "of_peak": steps.flops(method, *needed) * batch / middle / peak,
                "epoch_s": steps.CIFAR10 // batch * middle,
                "over_plain": middle / plain,
            }
        )  # fmt: skip


def _attacks(part: Part, width: int | None, batch: int, peak: float) -> None:
    timing.pytorch_defaults()
    fast = timing.fast_arithmetic()
    names = [f"fastiat {engine} {fast}" for engine in part.engines] + ["loop, autograd.grad"]
    if part.warm is not None:
        names = [f"fastiat compile {fast}"]
    model = timing.build(part.name, width)
    x = torch.rand(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=DEVICE)
    calls = {}
    for name in names:
        part.attempt(
            f"attack {batch} {name}",
            lambda n=name: calls.update({n: rivals.prepare(n, model, x, y)}),
        )
    if part.warm is not None:
        return
    gains = rivals.check({name: call() for name, call in calls.items()}, x, y, model)
    rounds = timing.interleaved(calls, budget=part.budget)
    needed, _ = timing.flops(part.name, width)
    for name, seconds in rounds.items():
        middle = statistics.median(seconds)
        rate = needed * rivals.STEPS * batch / middle
        part.add(
            {
                "what": "attack", "network": part.name, "width": width, "batch": batch,
                "name": name, "seconds": middle, "rounds": seconds,
                "images_per_s": batch / middle, "loss_gain": gains[name],
                # Relative to the peak in fastiat's arithmetic, so that rows can be compared.
                "of_peak": rate / peak,
            }
        )  # fmt: skip


def _kernels(part: Part) -> None:
    import bench_kernels

    bandwidth = _ceiling(part, "copy_bytes_per_s", timing.copy_bandwidth)
    batches = (4,) if part.tiny else (4096, 64, 512, 128) if ON_GPU else bench_kernels.BATCHES
    runs = bench_kernels.RUNS[:2] if part.tiny else bench_kernels.RUNS
    for batch in batches:
        for name, direction in runs:
            what = f"{name} {direction} {batch}"
            part.attempt(
                what,
                lambda n=name, d=direction, b=batch: _kernel(part, n, d, b, bandwidth),
            )


def _kernel(part: Part, name: str, direction: str, batch: int, bandwidth: float) -> None:
    import bench_kernels

    case = bench_kernels.CASES[name]
    torch.compiler.reset()
    compiled = torch.compile(case.plain, fullgraph=True, dynamic=False, backend=graphs.BACKEND)
    tensors = case.inputs(batch)
    size = case.forward * batch

    def call(run: Callable[..., Any]) -> Callable[[], object]:
        if direction == "forward":
            return lambda: run(*tensors)
        x = tensors[0].requires_grad_()
        upstream = torch.randn_like(run(*tensors))
        return lambda: torch.autograd.grad(run(*tensors), x, upstream)

    if direction != "forward":
        size += (case.backward or 0) * batch
    calls = {"kernel": call(case.op), "eager": call(case.plain), "compile": call(compiled)}
    for warm in calls.values():
        for _ in range(3):
            warm()
    if part.warm is not None:
        return
    rows = {implementation: {} for implementation in calls}
    short: dict[str, Any] = {"budget": 0.1, "most": 5, "shortest": 0.01}
    for implementation, seconds in timing.interleaved(calls, **short).items():
        rows[implementation]["launched_s"] = statistics.median(seconds)
    if ON_GPU:
        # Replaying a graph of many calls measures the kernels without the time to launch them.
        replays = {name: _graph_of(call, 10) for name, call in calls.items()}
        captured = {name: graph.replay for name, graph in replays.items() if graph is not None}
        for implementation, seconds in timing.interleaved(captured, **short).items():
            rows[implementation]["replayed_s"] = statistics.median(seconds) / 10
    for implementation, row in rows.items():
        best = min(row.values())
        part.add(
            {"what": "kernel", "op": name, "direction": direction, "batch": batch}
            | {"implementation": implementation, "bytes": size, **row}
            | {"of_copy": size / best / bandwidth}
        )


def _graph_of(call: Callable[[], object], times: int) -> torch.cuda.CUDAGraph | None:
    """Capture `times` calls as one CUDA graph; return None if they cannot be captured."""
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    try:
        with torch.cuda.graph(graph, stream=aside):
            for _ in range(times):
                call()
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
        # A capture that fails at its end leaves its own stream as the current one.
        torch.cuda.set_stream(torch.cuda.default_stream())
        return None
    return graph


def _profile(part: Part) -> None:
    batch = part.batches[len(part.batches) // 2]
    networks = ("preact18",) if part.tiny else ("preact18", "wrn28_10")
    for engine in ENGINES[:1] if part.tiny else (ENGINES[-1], "eager"):
        for network in networks:
            part.attempt(
                f"profile {network} {engine}",
                lambda n=network, e=engine: _profile_step(part, n, e, batch),
            )
            part.attempt("free memory", _forget)


def _profile_step(part: Part, network: str, engine: str, batch: int) -> None:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call = steps.make("IAT", engine, network, batch, width=part.width.get(network))
    call()
    times = 1 if part.tiny else 5
    # Timed without the profiler, which slows launches and adds gaps between a graph's kernels.
    window = 1e6 * times * timing.timed(call, times)
    activities = [ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]
    with profile(activities=activities) as seen:
        for _ in range(times):
            call()
        timing.wait()
    busy: Counter[str] = Counter()
    if ON_GPU:
        # The profiler also lists its own annotations as device events; they contain kernels.
        kernels = [
            event
            for event in seen.events()
            if event.device_type == DeviceType.CUDA
            and not re.match(r"Profiler|Optimizer|#", event.name)
        ]
        for event in kernels:
            busy[event.name] += event.time_range.elapsed_us()
    else:
        for event in seen.events():
            busy[event.name] += event.self_cpu_time_total
    shares: Counter[str] = Counter()
    for name, spent in busy.items():
        shares[_kind(name)] += spent
    shares["gaps"] = max(window - sum(busy.values()), 0)
    part.add(
        {
            "what": "profile", "network": network, "engine": engine, "batch": batch,
            "step_us": window / times,
            "shares": {kind: spent / window for kind, spent in shares.most_common()},
            "kernels": [
                {"name": name[:120], "share": spent / window}
                for name, spent in busy.most_common(25)
            ],
        }
    )  # fmt: skip


def _kind(name: str) -> str:
    """Return the kind of a kernel: the first of `KINDS` whose pattern matches its name."""
    low = name.lower()
    return next((kind for kind, words in KINDS.items() if re.search(words, low)), "other")
