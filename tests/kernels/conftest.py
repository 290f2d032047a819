"""Operators in C++, compiled once for all tests and for runs to come."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from torch import Tensor

from orthrus import memory
from orthrus.kernels import compiled
from orthrus.kernels.compiled import command, instructions, loaded

Operator = Callable[..., Tensor]

HERE = [name for name in dict.fromkeys((instructions(), "avx2")) if name is not None]


@pytest.fixture(scope="session", params=HERE)
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Operator]:
    """A set of instructions that this CPU has, and the int8 product compiled for it, like the others of its library.

    Processes of pytest that share a run wait for whichever compiles first. The next run takes the library as it is,
    from pytest's cache, by the product's own key: other sources, options or torch are compiled anew.
    """
    name: str = request.param
    assert request.config.cache is not None
    cache = Path(request.config.cache.mkdir("operators"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(memory.FOLDER, str(cache))
        file = compiled._file(name)
    assert file is not None
    with FileLock(cache / f"{name}.lock"):
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            for older in file.parent.glob(f"operators-{name}-*.so"):
                older.unlink()
            made = tmp_path_factory.mktemp("compiled") / file.name
            scratch = made.with_name("scratch")
            scratch.mkdir()
            subprocess.run(["sh", "-c", command(name, made, scratch)], check=True)
            assert [path.name for path in made.parent.iterdir()] == [file.name], "nothing else is left there"
            shutil.move(made, file)
    operator = loaded(f"linear_int8_{name}", file)
    assert operator is not None
    return name, operator
