"""Models that ship with the package. Knows where they lie, nothing of what they are."""

from pathlib import Path

BUNDLED: dict[str, Path] = {"nano": Path(__file__).parent / "nano"}
"""Bundled models by name."""
