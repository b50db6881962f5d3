"""The root of all errors that are the input's fault."""


class InputError(ValueError):
    """Something given to layerbudget cannot be used. The message is one sentence: what was wrong, the value, what would
    be right. The command line prints it and ends with status 2."""


def reason_of(error: BaseException) -> str:
    """The first line of what an exception of a library says, or the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
