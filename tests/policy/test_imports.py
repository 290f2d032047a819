"""The policy is numbers only."""

import subprocess
import sys


def test_the_policy_imports_neither_torch_nor_transformers() -> None:
    """Any module of the package, in a fresh interpreter."""
    check = (
        "import importlib, pkgutil, sys, orthrus.policy as policy\n"
        "for module in pkgutil.iter_modules(policy.__path__, 'orthrus.policy.'): importlib.import_module(module.name)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
