"""One writer to a folder: the process that holds the lock (flock) on the file .lock in it.

A lock ends with the function or block that unlock_afterwards() stands around, or with its process,
in whatever way that dies. A lock file without a holder means nothing: the one that a kill leaves
behind is taken by whoever comes next.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import InputError
from .files import check_name, make_file, remove_empty

LOCK_FILE = ".lock"
# What flock says on a file system that has no locks, as some network file systems do.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class Lock(NamedTuple):
    descriptor: int  # of the lock file, which stays open
    file: str
    made: list[str]  # the folders that were made to put the file in, the innermost first


held: dict[str, Lock] = {}  # {real path of a folder: the lock that this process has on it}


def lock(folder: str) -> None:
    """Let no other process lock the folder. The folder is made if it is missing.

    What this process has locked already stays so. InputError: another process has locked the
    folder, or it cannot be made.
    """
    check_name(folder)
    place = os.path.realpath(folder)
    file = os.path.join(place, LOCK_FILE)
    # The last holder may remove the file between make_file() and take(). Then the next turn makes a
    # new one.
    while place not in held:
        descriptor, made = make_file(file, f"the folder {folder}")
        take(descriptor, folder)
        if is_in_place(descriptor, file):
            held[place] = Lock(descriptor, file, made)
        else:
            # Nobody would see a lock on a file that has lost its name.
            os.close(descriptor)


def take(descriptor: int, folder: str) -> None:
    """Lock an open lock file, or close it and raise an InputError."""
    # LOCK_NB: raise instead of waiting. A run that waits for another looks as if it hung.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        remedy = "wait until it has ended, or choose another folder"
        raise InputError(f"another process is working in {folder}; {remedy}") from None
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        print(f"{folder}: a file system without locks; let no other process work here", flush=True)


def is_in_place(descriptor: int, file: str) -> bool:
    """Whether the file that was opened is the one that has its name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def unlock_afterwards() -> Iterator[None]:
    """A context or decorator: what is locked inside of it is unlocked at its end, also by an error.

    The lock file goes, and so do the folders that were made for it, where nothing else is in them.
    """
    # What was locked before stays locked, so contexts can be nested.
    before = set(held)
    try:
        yield
    finally:
        for place in set(held) - before:
            unlock(place)


def unlock(place: str) -> None:
    """Give back the lock on a folder, by its real path."""
    held_lock = held.pop(place)
    # The file is removed while the lock holds: afterwards it might be another process's.
    if is_in_place(held_lock.descriptor, held_lock.file):
        os.unlink(held_lock.file)
    os.close(held_lock.descriptor)
    remove_empty(held_lock.made)


def forget() -> None:
    """In a forked child: leave the locks to the parent.

    A copy of the descriptor would keep the lock after the parent's death. It is closed, since
    LOCK_UN would take the lock from the parent.
    """
    for held_lock in held.values():
        os.close(held_lock.descriptor)
    held.clear()


os.register_at_fork(after_in_child=forget)
