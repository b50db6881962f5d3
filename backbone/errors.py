"""The root of all errors that are the input's fault."""


class InputError(ValueError):
    """Something given to layerbudget cannot be used. The message is one sentence: what was wrong, the value, what would
    be right. The command line prints it and ends with status 2."""
