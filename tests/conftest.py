"""What all tests share: the gpu marker, and poisoned memory for the kernels' tests."""

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and not INTERPRETED:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in set(gpu)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel test runs; "cpu" is Triton's interpreter under TRITON_INTERPRET=1."""
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In kernel tests fresh memory is NaN (ints: 0x55...), so that what is never written shows."""
    if not request.module.__name__.startswith("test_kernel_"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


def _poisoning(allocate):  # type: ignore[no-untyped-def]
    def poisoned(*args, **kwargs):  # type: ignore[no-untyped-def]
        x = allocate(*args, **kwargs)
        if type(x) is not torch.Tensor or x.requires_grad:  # torch's own, while it traces
            return x
        return x.fill_(float("nan") if x.is_floating_point() else 0x55)

    return poisoned
