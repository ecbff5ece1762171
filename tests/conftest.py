"""Fixtures for what lies outside the repository: real checkpoints and official data files, named by environment."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from runtime import config


@pytest.fixture(scope="session", autouse=True)
def on_a_cpu() -> Iterator[None]:
    """What names no device, also where there is a GPU: tests/test_gpu.py and a few others ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "best_device", lambda: "cpu")
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors this small gain nothing from a second thread; on a busy machine waiting for it took 6 times longer."""
    torch.set_num_threads(1)


def _under(variable: str) -> Callable[[str], Path]:
    def find(name: str) -> Path:
        root = os.environ.get(variable)
        if not root:
            pytest.skip(f"{variable} is not set; it names the folder that holds {name}")
        path = Path(root) / name
        if not path.exists():
            pytest.skip(f"{variable}={root} has no {name}")
        return path

    return find


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """real_model("zollama-28m") -> its directory under $QUZO_MODELS; skips the test where there is none."""
    return _under("QUZO_MODELS")


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """real_data("SST-2") -> its directory under $QUZO_DATA; skips the test where there is none."""
    return _under("QUZO_DATA")


@pytest.fixture(scope="session")
def smollm2_directory() -> Path:
    """What `python -m benchmarks.smollm2 $QUZO_SMOLLM2` made; skips the test where the variable is not set."""
    directory = os.environ.get("QUZO_SMOLLM2")
    if not directory:
        pytest.skip("QUZO_SMOLLM2 is not set; it names the directory that benchmarks/smollm2.py makes")
    return Path(directory)
