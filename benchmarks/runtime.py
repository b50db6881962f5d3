"""`python benchmarks/runtime.py`: generation end to end, see end_to_end.py and `--help`."""

from pathlib import Path

if __name__ == "__main__":
    from end_to_end import main

    main()
else:  # a script of this folder looked for the package `runtime` and found this file; so it leads on to the package
    __path__ = [str(Path(__file__).parents[1] / "runtime")]
