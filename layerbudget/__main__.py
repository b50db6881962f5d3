"""`python -m layerbudget` is the `layerbudget` command."""

from layerbudget.cli import main

main()
