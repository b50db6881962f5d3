"""Controls and pictures that cannot be made are left out by name, with the reason, and the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backbone.errors import reason_of
from pipelines.run.progress import say


class Omissions(dict[str, str]):
    """Name of each part that is left out -> the reason."""

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Skip the rest of the block where its data allow no fit or no picture, and print the reason.

        Catches `ValueError`, which `InputError` and the failures of numpy's and scikit-learn's fits are. Every other
        exception is an error of the program and ends the run.

        Args:
            name: what the block makes, such as "the control 'task'".
        """
        try:
            yield
        except ValueError as error:
            self[name] = reason_of(error)
            say(f"  {name} is left out: {self[name]}", style="red")
