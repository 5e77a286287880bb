"""Command lines: a Config dataclass read by transformers' HfArgumentParser; wrong input is one line
on stderr and exit code 2."""

import contextlib
import errno
import inspect
import os
import re
import signal
import sys
import time
import typing
from dataclasses import fields

from transformers import HfArgumentParser

from ..errors import InputError, first_line, require
from . import distributed
from .files import is_inside, is_of_type, read_object, shorten
from .fingerprints import code_file
from .help import help_text


class Parser(HfArgumentParser):
    """HfArgumentParser, with errors in one line and --help in groups."""

    def __init__(self, command, description, config_class):
        self.command = command
        self.about = description
        self.config_class = config_class
        super().__init__(config_class, prog=command)

    def add_argument(self, *names, choices=None, may_be_infinite=False, **settings):
        # What a flag's metadata say of its values a Config checks by itself (flags.check_value).
        return super().add_argument(*names, **settings)

    def format_help(self):
        return help_text(self.command, self.about, self.config_class)

    def error(self, message):
        raise InputError(message)


def script():
    """The name of the script that runs: its errors begin with it."""
    return os.path.basename(sys.argv[0])


def parse(config_class, args, command="", description=None):
    """Command line -> config. With --resume, what the run in --output_dir was given is the default.

    command: the sub-command's name, if it is one. description: what --help says first, by default
    the docstring of the config's file.
    """
    description = description or sys.modules[config_class.__module__].__doc__
    parser = Parser(f"{script()} {command}".strip(), description, config_class)
    # First the command line alone: it says in which folder the run to resume lies.
    parsed = vars(parser.parse_args(args))
    if parsed.get("resume"):
        use_stored_settings(parser, parsed)
        parsed = vars(parser.parse_args(args))
    return config_class(**parsed)


def use_stored_settings(parser, parsed):
    """Make the settings of the run that is resumed the defaults of the command line.

    parsed: what the command line says without them.
    """
    # Without --output_dir a Config chooses its folder, perhaps by other flags.
    folder = parsed["output_dir"]
    with contextlib.suppress(InputError):
        folder = parser.config_class(**parsed).output_dir
    folder = folder.replace("{seed}", str(parsed["seed"]))
    stored = os.path.join(folder, "config.json")

    # A flag that is given with its default value counts as not given: argparse cannot tell.
    given = {name for name, value in parsed.items() if value != parser.get_default(name)}
    if not os.path.isfile(stored):
        # A slip of the pen should not start another run.
        require(given != {"resume", "output_dir"}, f"{folder}: no run to resume here")
        return
    settings = read_settings(stored, parser.config_class)
    only_stored = {name: value for name, value in settings.items() if name not in given}
    check_stored_code(folder, only_stored)
    parser.set_defaults(**settings)


def check_stored_code(folder, settings):
    """Python code that --resume would run only because a run's config.json names it.

    A file inside the run folder may have come with it from elsewhere: it is refused unless the
    command itself names it. Of any other file the path is printed.
    """
    for name, value in settings.items():
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str) or not code_file(text):
                continue
            file = code_file(text)
            require(
                not is_inside(file, folder),
                f"--resume does not run {file}, which lies in the run folder itself; "
                f"if you trust it, name it in the command: --{name} {text}",
            )
            if os.environ.get("RANK", "0") == "0":
                print(f"--resume runs the code in {file}, as {folder}/config.json says")


def read_settings(path: str, config_class) -> dict:
    """The settings in a run's config.json that config_class has too, but for the folder's name.

    Each must be of its field's type.
    """
    # Settings whose flag no longer exists are passed over. output_dir is left out, since the folder
    # may have been moved.
    stored = read_object(path, finite=False)
    hints = typing.get_type_hints(config_class)
    settings = {}
    for name, value in stored.items():
        if name in hints and name != "output_dir":
            require(is_of_type(value, hints[name]), f"{path}: {name} cannot be {shorten(value)}")
            settings[name] = value
    return settings


# ------------------------------------------------------------------------------ how a command ends

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a user's share of it, ulimit -f
# Another user's file; a disk that fails, can only be read since, or whose machine is gone.
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EIO, errno.EROFS, errno.ESTALE)
INTERRUPTED = 128 + signal.SIGINT  # what a shell reports of a process that Ctrl-C ended


@contextlib.contextmanager
def errors_in_one_line(resumable=False):
    """A context that ends as a user wants to see it: one line on stderr, and an exit code.

    2: wrong input. 1: it could not go on (a gradient that is not finite, a disk that is full or
    fails, a folder or another process that is gone). 130: Ctrl-C; `resumable`: --resume would go
    on. A bug has a traceback.
    """
    # The outer try is for Ctrl-C, which may come while an error is being reported.
    try:
        try:
            yield
        except Exception as e:
            ending = explain(e)
            if ending is None:
                raise
            line, code = ending
            # The rank comes from torchrun's environment, since there may be no process group yet.
            rank = os.environ.get("RANK", "0")
            who = script()
            if rank != "0":
                who += f" [rank {rank}]"
            in_one_line = " ".join(line.split())
            print(f"{who}: error: {in_one_line}", file=sys.stderr)
            if "RANK" in os.environ:
                time.sleep(1)  # the other processes may still be reading what this one sent
            sys.exit(code)
        finally:
            distributed.shutdown()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end the ending
        if os.environ.get("RANK", "0") == "0":
            kept = ""
            if resumable:
                kept = "; the last checkpoint is kept: --resume continues"
            print(f"{script()}: interrupted{kept}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def explain(error: Exception) -> tuple[str, int] | None:
    """What to tell a user of an error, and the exit code; None for a bug, which has a traceback."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, FloatingPointError):
        return str(error), 1
    kept = "what was saved before, such as the last checkpoint, is kept"
    if errno_of(error) in NO_ROOM:
        advice = "make room, and give the same command again"
        return f"no room to write ({first_line(error)}); {kept}: {advice}", 1
    if errno_of(error) in NO_ACCESS:
        return f"a file cannot be read or written ({first_line(error)}); {kept}", 1
    # Somebody removed the run's folder, or the one that the command was given in.
    if errno_of(error) == errno.ENOENT:
        return f"a file or folder that is needed is gone ({first_line(error)})", 1
    if distributed.out_of_memory(error):
        return f"not enough memory ({first_line(error)})", 1
    if distributed.lost_a_process(error):
        return "another process of this run has stopped; so does this one", 1
    return None


def errno_of(error: Exception) -> int | None:
    """The number of the operating system's error behind an exception, or None.

    safetensors and tokenizers, which are written in Rust, have it in their text alone.
    """
    if isinstance(error, OSError):
        return error.errno
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    if in_text is None:
        return None
    return int(in_text[1])


def run(config_class, main, args=None):
    """What a script does when it is run: parse, then main(config)."""
    resumable = any(f.name == "resume" for f in fields(config_class))
    with errors_in_one_line(resumable):
        main(parse(config_class, args))


def run_command(commands, args=None):
    """run() for a script with sub-commands, {name: (config class, function)}.

    Without one, or with --help, it lists them.
    """
    if args is None:
        args = sys.argv[1:]
    name, *rest = args or ["--help"]
    with errors_in_one_line():
        if name in ("-h", "--help"):
            print(sys.modules["__main__"].__doc__ or "")
            print("Commands:")
            for name, (_, function) in commands.items():
                about = inspect.getdoc(function).splitlines()[0]
                print(f"  {name:17s}{about}")
            print(f"\n{script()} COMMAND --help lists the flags of a command")
            return
        require(name in commands, f"no command {name!r}; there are {', '.join(commands)}")
        config_class, function = commands[name]
        function(parse(config_class, rest, name, inspect.getdoc(function)))
