"""The one exception that means 'your input', not 'our bug', and checks that raise it.

Scripts print an InputError in one line, without a traceback, and exit with code 2.
"""

import argparse
import contextlib
import os
import sys


class InputError(ValueError):
    """Something that a user gave is wrong: a flag, a file, a model, a function."""


# ------------------------------------------------------------------- errors of other people's code


@contextlib.contextmanager
def user_code(what: str):
    """A context for code that a user wrote: whatever it raises becomes an InputError.

    The message is `what`, then the error's name and text. sys.exit(), quit() and argparse would end
    the run with an exit code of their own, so they count too. Ctrl-C passes. What the code has set
    for the whole process is set back (keep_settings).
    """

    def exit_without_usage(parser, message):
        raise SystemExit(message)

    # argparse prints its usage to stderr before it exits; here its message alone is enough.
    argparse_error = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = exit_without_usage
    try:
        with keep_settings():
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        raise InputError(f"{what} {type(e).__name__}: {first_line(e)}") from e
    finally:
        argparse.ArgumentParser.error = argparse_error


@contextlib.contextmanager
def keep_settings():
    """A context for code that a user wrote: at its end the process is set as it was before.

    Rewards with a model of their own often begin with torch.set_grad_enabled(False), with which
    nothing could be trained any more. Those that run programs may leave the folder that the run's
    own names start from.
    """
    folder = os.getcwd()
    torch = sys.modules.get("torch")  # commands that only draw do without it
    if torch is not None:
        with_gradients = torch.is_grad_enabled()
        dtype = torch.get_default_dtype()
        device = torch.get_default_device()
    try:
        yield
    finally:
        os.chdir(folder)
        if torch is not None:
            torch.set_grad_enabled(with_gradients)
            torch.set_default_dtype(dtype)
            # None is the CPU too, and unlike a device that was set it costs no look at each call.
            if torch.get_default_device() != device:
                torch.set_default_device(None)


@contextlib.contextmanager
def library_call(what: str):
    """A context for one call of a library on files that a user brought, and for nothing of ours.

    Broken files make libraries raise errors of any kind: KeyError, ZeroDivisionError, bare
    Exception. Each becomes an InputError: `what`, then the error's name and first line.
    """
    try:
        yield
    except Exception as e:
        raise InputError(f"{what} ({type(e).__name__}: {first_line(e)})") from None


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its type where it says nothing.

    A line that is longer than a page is cut: some errors quote all that they were given.
    """
    try:
        lines = str(error).strip().splitlines()
    # The error may be of a user's class, whose __str__ is wrong.
    except Exception:
        lines = []
    if not lines:
        return type(error).__name__
    return lines[0][:2000]


# ------------------------------------------------------------------------------------------ checks


def require(condition, message: str):
    """InputError, with this message, unless the condition holds."""
    if not condition:
        raise InputError(message)


def at_least(config, low, *names: str):
    """InputError unless each of these flags has the value `low` or more."""
    for name in names:
        value = getattr(config, name)
        require(value >= low, f"--{name} must be at least {low}, not {value}")


def divides(config, name: str, divisor: int, what: str):
    """InputError unless the flag's value is a multiple of the divisor, which is called `what`."""
    value = getattr(config, name)
    require(value % divisor == 0, f"--{name} {value} is not a multiple of {what} ({divisor})")
