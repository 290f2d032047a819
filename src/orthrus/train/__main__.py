"""`python -m orthrus.train RECIPE [--set section.key=value …] [--no-resume]`: train from a shell."""

import argparse
import sys

from orthrus.errors import OrthrusError
from orthrus.train.config import load_recipe
from orthrus.train.run import run


def main() -> int:
    """Run a recipe; 0 when it is finished, 1 on an error, 3 when it was stopped before its end."""
    parser = argparse.ArgumentParser(prog="python -m orthrus.train", description="Train by a recipe.")
    parser.add_argument("recipe")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--no-resume", dest="resume", action="store_false")
    options = parser.parse_args()
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        result = run(recipe, resume=options.resume)
    except OrthrusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if result.finished else 3


if __name__ == "__main__":
    sys.exit(main())
