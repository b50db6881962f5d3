"""The entry point of `layerbudget` and of `python -m layerbudget`: takes Ctrl-C over before anything slow."""

import sys

from layerbudget import check_not_shadowed

try:
    check_not_shadowed()
except ImportError as error:
    sys.exit(f"error: {error}")

from backbone import interrupts

interrupts.install()

from layerbudget.cli import main as main  # noqa: E402

if __name__ == "__main__":
    main()
