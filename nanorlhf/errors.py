"""The one exception that means 'your input', not 'our bug': scripts print it in one line and exit with code 2."""


class InputError(ValueError):
    pass
