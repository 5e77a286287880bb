"""The one exception that means 'your input', not 'our bug': scripts print it in one line and exit with code 2."""

import argparse
import contextlib


class InputError(ValueError):
    pass


@contextlib.contextmanager
def user_code(what):
    """A context for code that a user wrote: whatever it raises becomes an InputError.

    The message is `what`, then the error's name and text. sys.exit(), quit() and argparse would end
    the run with an exit code of their own, so they count too. Ctrl-C passes.
    """

    def exit_without_usage(parser, message):
        raise SystemExit(message)

    # argparse prints its usage to stderr before it exits; here its message alone is enough.
    argparse_error = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = exit_without_usage
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        raise InputError(f"{what} {type(e).__name__}: {first_line(e)}") from e
    finally:
        argparse.ArgumentParser.error = argparse_error


@contextlib.contextmanager
def library_call(what):
    """A context for one call of a library on files that a user brought, and for nothing of ours.

    Broken files make libraries raise errors of any kind: KeyError, ZeroDivisionError, bare
    Exception. Each becomes an InputError: `what`, then the error's name and first line.
    """
    try:
        yield
    except Exception as e:
        raise InputError(f"{what} ({type(e).__name__}: {first_line(e)})") from None


def first_line(error):
    """What an error says, in one line; its type's name where it says nothing or fails to."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a class of the user's, whose __str__ is wrong
        lines = []
    return lines[0] if lines else type(error).__name__


def require(condition, message):
    if not condition:
        raise InputError(message)


def at_least(config, low, *names):
    for name in names:
        require(getattr(config, name) >= low, f"--{name} must be at least {low}, not {getattr(config, name)}")


def one_of(config, name, *choices):
    require(getattr(config, name) in choices, f"--{name} must be one of {', '.join(map(str, choices))}, not {getattr(config, name)!r}")


def divides(config, name, divisor, what):
    require(getattr(config, name) % divisor == 0, f"--{name} {getattr(config, name)} is not a multiple of {what} ({divisor})")
