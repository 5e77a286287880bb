"""The one exception that means 'your input', not 'our bug': scripts print it in one line and exit with code 2."""


class InputError(ValueError):
    pass


def first_line(error):
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
