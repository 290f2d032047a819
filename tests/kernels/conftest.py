"""Operators in C++, compiled once for all tests."""

import os
import subprocess
from collections.abc import Callable

import pytest
from filelock import FileLock
from torch import Tensor

from orthrus.kernels.compiled import command, instructions, loaded

Operator = Callable[..., Tensor]

HERE = [name for name in dict.fromkeys((instructions(), "avx2")) if name is not None]


@pytest.fixture(scope="session", params=HERE)
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Operator]:
    """A set of instructions that this CPU has, and the int8 product compiled for it, like the others of its library.

    Processes of pytest that share a run wait for whichever compiles first.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    file = shared / f"compiled-{request.param}" / "operators.so"
    with FileLock(f"{file.parent}.lock"):
        if not file.exists():
            scratch = file.with_name("scratch")
            scratch.mkdir(parents=True)
            subprocess.run(["sh", "-c", command(request.param, file, scratch)], check=True)
        assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing else is left there"
    operator = loaded(f"linear_int8_{request.param}", file)
    assert operator is not None
    return request.param, operator
