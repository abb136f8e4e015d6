"""Images per second of PGD-7 (eps 8/255, alpha 2/255, random start): fastiat and other libraries.

    python -m pytest bench/bench_attack.py --benchmark-only

Every implementation attacks the same images with the same weights; their rounds are interleaved in
one process. `TFLOP/s` counts only the FLOP that the attack needs, forward and input gradient, not
those that an implementation adds; `of peak` divides it by the rate of a large matrix product in
the same arithmetic.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rivals
import timing
import torch
from conftest import describe, replay, selected
from timing import DEVICE, ON_GPU

NETWORKS = ("preact18", "wrn28_10") if ON_GPU else ("preact18",)
BATCHES = (64, 128, 512) if ON_GPU else (64,)
SECONDS = 6 if ON_GPU else 340
"""Time limit of the rounds of one network and batch size."""
Contest = dict[str, list[float] | str]


CASES = [(arch, batch) for arch in NETWORKS for batch in BATCHES]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


@pytest.fixture(scope="module")
def contest(request: pytest.FixtureRequest, case: tuple[str, int]) -> Iterator[Contest]:
    """Return the seconds of every implementation's rounds, or the reason why it cannot run."""
    timing.pytorch_defaults()
    names = [item.callspec.params["name"] for item in selected(request, case=case)]
    arch, batch = case
    model = timing.build(arch)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, 32, 32, generator=generator).to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), generator=generator).to(DEVICE)
    results: Contest = {}
    calls, last = {}, {}
    for name in names:
        try:
            call = rivals.prepare(name, model, x, y)
        except rivals.AbsentError as reason:
            results[name] = str(reason)
            continue
        calls[name] = lambda name=name, call=call: last.update({name: call()})
    once = request.config.getoption("benchmark_disable")
    results |= timing.interleaved(
        calls, budget=SECONDS, least=1 if once else 2, most=1 if once else 15
    )
    rivals.check(last, x, y, model)
    yield results
    torch.compiler.reset()


@pytest.fixture(scope="module")
def needed() -> Callable[[str], int]:
    """FLOP of one PGD step on one image."""
    known = {arch: timing.flops(arch)[0] for arch in NETWORKS}
    return known.__getitem__


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("name", rivals.implementations())
def test_pgd7(
    name: str, case: tuple[str, int], contest: Contest, needed: Any, peak: Any, record: Any,
    benchmark: Any,
) -> None:  # fmt: skip
    seconds = contest[name]
    if isinstance(seconds, str):
        pytest.skip(seconds)
    arch, batch = case
    benchmark.group = f"PGD-7, {arch}, batch {batch}, {describe()}"
    arithmetic = rivals.arithmetic(name)
    middle = statistics.median(seconds)
    rate = needed(arch) * rivals.STEPS * batch / middle
    peer = contest.get("torchattacks")
    gain = statistics.median(peer) / middle if isinstance(peer, list) else None
    record(
        name,
        seconds,
        batch,
        arithmetic=arithmetic,
        **{
            "TFLOP/s": rate / 1e12,
            "of peak": rate / peak(arithmetic),
            "x torchattacks": gain,
            "rounds": len(seconds),
        },
    )
