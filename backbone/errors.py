"""All exceptions for bad input to backbone and runtime.

Each message is one sentence: what was wrong, the value, what would be right.
"""


class InputError(ValueError):
    """Something given to layerbudget cannot be used. The command line prints the message and ends with status 2."""


class PlanError(InputError):
    """A plan or menu that cannot be, or that does not fit the model, the batch or the cache it is used with."""


class UnsupportedModelError(InputError):
    """A model whose layers cannot be skipped, or changed, exactly; the message names the reason."""


class LoadError(InputError):
    """A model that cannot be loaded as asked."""


class WrongModelError(InputError):
    """An allocator or healing parts, used with a model that they were not made for."""


class ArtefactError(InputError):
    """A saved file or folder that is damaged, holds something else, or belongs to somebody else."""


class UnsupportedGenerationError(InputError):
    """A way of generating that cannot be combined with an allocator; the message names it."""


def reason_of(error: BaseException) -> str:
    """The first line of what an exception of a library says, or the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
