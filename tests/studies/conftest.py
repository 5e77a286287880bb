"""A study that is run whole, on tiny models and in one process: what the tests of studies share."""

import contextlib
import io
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from support import ALL_SCRIPTS, parse_command, read_rows

from nanorlhf.runtime import cli
from nanorlhf.studies import common

PNG = b"\x89PNG\r\n\x1a\n"  # how a picture begins


@dataclass
class SmallStudy:
    """A study's module, its folder, its small flags, and the commands that it has run."""

    module: ModuleType
    folder: Path  # named as --quick names it, so that a quick study finds its runs there
    flags: list[str]
    ran: list[str]  # goes on to grow when the study is run again
    first: list[str] = field(default_factory=list)  # those of the first time

    def run(self, *more):
        """Run the study in its folder. -> what it printed"""
        return self.run_in(self.folder, *more)

    def run_quick(self):
        """The study with --quick, which takes the same folder from the one above it."""
        return self.run_in(self.folder.parent, "--quick")

    def run_in(self, folder, *more):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.module.main(["--output_dir", str(folder), *self.flags, *more])
        return printed.getvalue()

    def read(self, path):
        """A JSON file of the study's folder."""
        return json.loads((self.folder / path).read_text())

    def read_rows(self, path):
        return read_rows(self.folder / path)

    @property
    def summary(self):
        return self.read("summary.json")

    def settings(self, **changes):
        """The study's settings, with changes, as its functions take them."""
        return SimpleNamespace(**self.summary["settings"] | changes)

    def has_picture(self, name):
        return (self.folder / name).read_bytes().startswith(PNG)


@pytest.fixture(scope="module")
def run_small(tmp_path_factory):
    """A function: run a study, given its module and its small flags. -> SmallStudy

    Its commands run in this process, without pictures of single runs.
    """
    ran = []

    def run_here(command):
        main, config = parse_command(command)
        main(config)
        ran.append(command)

    def run(module, flags):
        folder = tmp_path_factory.mktemp("study") / "quick"
        study = SmallStudy(module, folder, shlex.split(flags), ran)
        study.run()
        study.first = list(ran)
        return study

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "run_command", run_here)
        for script in ALL_SCRIPTS.values():
            patch.setattr(script, "plot_run", lambda run: None, raising=False)
        yield run
    cli.distributed.shutdown()
