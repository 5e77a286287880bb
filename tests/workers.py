"""One run of pytest on two cores: a fork of it takes over half of the files and reports home.

Both processes go through the same list of files, and a file belongs to the one that asks for it
first. So fixtures of a file are made once, and those of the session once in each process. The first
process shows all reports, as if it had run every test itself.
"""

import gc
import json
import os
import signal
import time
import traceback


def pytest_runtestloop(session):
    """A hook of pytest, in the place of its own loop where there is something to share out."""
    # The garbage collector, off since conftest.py, leaves out what is there by now. It also looks
    # less often than usual, since it finds little.
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()
    option = session.config.option
    files = by_file(session.items)
    alone = option.processes == 1 or len(files) == 1 or option.usepdb or option.collectonly
    if alone or session.testsfailed:
        return None  # pytest's own loop

    # The folder of temporary files must be there before the fork, for both to have the same one.
    folder = session.config._tmp_path_factory.mktemp("claims")
    reports = folder / "reports.jsonl"
    reports.touch()
    child = os.fork()
    if child == 0:
        work_for_another(session, files, folder, reports)
    try:
        while not (folder / "ready").exists():
            time.sleep(0.01)
        with open(reports, encoding="utf-8") as lines:
            mine = claim_files(files, folder)
            run_items(session, mine, lambda: show_reports(session.config, lines))
            _, status = os.waitpid(child, 0)
            child = None
            show_reports(session.config, lines)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
    finally:
        # After Ctrl-C or -x nobody waits for the other process.
        if child is not None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if status != 0:
        error = folder / "error.txt"
        reason = error.read_text() if error.exists() else status
        raise RuntimeError(f"the second process of tests ended: {reason}")
    return True


def by_file(items):
    """Tests in lists, one for each file."""
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    return list(files.values())


def claim_files(files, folder):
    """The tests of the files that this process is the first to ask for, one by one.

    A claim is a folder: where two processes call mkdir, only one succeeds.
    """
    for i, items in enumerate(files):
        try:
            os.mkdir(folder / str(i))
        except FileExistsError:
            continue
        yield from items


def run_items(session, items, after_each):
    """pytest's own loop over tests. A test is told the next one: fixtures of both are kept."""
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        after_each()
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following


def show_reports(config, lines):
    """What the other process has sent since the last time."""
    while True:
        start = lines.tell()
        line = lines.readline()
        # The line is still being written: read it next time.
        if not line.endswith("\n"):
            lines.seek(start)
            return
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        # JSON has no tuples, and the reason of a skipped test is one.
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)
        config.hook.pytest_runtest_logreport(report=report)


class Sender:
    """A plugin of the second process: reports go into a file, a line each."""

    def __init__(self, config, path):
        self.config = config
        self.file = open(path, "a", encoding="utf-8")

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data, default=str) + "\n")
        self.file.flush()


def work_for_another(session, files, folder, reports):
    """The life of the second process, from its fork to its end."""
    status = 1
    try:
        plugins = session.config.pluginmanager
        plugins.unregister(name="terminalreporter")
        plugins.register(Sender(session.config, reports))
        # The file that captures output is shared after a fork: this process takes one of its own,
        # before the first process goes on.
        capture = plugins.getplugin("capturemanager")
        capture.stop_global_capturing()
        capture.start_global_capturing()
        (folder / "ready").touch()
        run_items(session, claim_files(files, folder), lambda: None)
        status = 0
    except session.Failed:  # with -x; the first process has the report, and ends too
        status = 0
    except BaseException:
        (folder / "error.txt").write_text(traceback.format_exc())
        (folder / "ready").touch()
    finally:
        os._exit(status)
