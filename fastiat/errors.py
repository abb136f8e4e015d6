"""The one exception that means "your input is wrong, and here is what would mend it"."""


class InputError(ValueError):
    """What was asked for cannot be done; the message says what is wrong and how to mend it.

    The command line prints it as one line and exits with status 2. It is a `ValueError`, so
    library users need not know it.
    """
