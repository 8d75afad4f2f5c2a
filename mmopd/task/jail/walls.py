"""What a program can see and change: namespaces with a root of their own, or Landlock where there are none."""

import contextlib
import os
import platform
import struct
import sys
from pathlib import Path

from mmopd.task.jail.calls import call, prctl

# What the interpreter loads while a program runs.
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
ROOM = "/room"  # the programs' directory, inside of the new root
NOBODY = 65534

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (1 << bit for bit in (17, 25, 26, 27, 28, 29, 30))
NOSUID, NODEV, BIND, DETACH, RECURSIVE, PRIVATE = 2, 4, 1 << 12, 2, 1 << 14, 1 << 18
DUMPABLE = 4
MOUNT_SETATTR = 442
NONE, EVERYTHING, CWD = None, 0x8000, -100

RULESET, RULE, RESTRICT = 444, 445, 446  # system calls of Landlock
READS = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, read a folder
RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # the rights on files that each version has added
SCOPES = {6: 0b11}  # abstract sockets and signals


def shut_in() -> None:
    """Enter new namespaces with a new root, as nobody; the next fork is process 1 of its own process namespace."""
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    if root := os.geteuid() == 0:
        try:
            call("unshare", NEWNS)
        except PermissionError:  # root of a container, with no more rights than other users
            root = False
    if not root:
        _own_users(proc, NEWUSER | NEWNS)
    _new_root(_python(), LIBRARIES)
    if root:  # mounts made so far cannot be unmounted from inside
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError:  # in a user namespace that has no such user, root is nobody
            pass
        _own_users(proc, NEWUSER | NEWNS)
    os.close(proc)
    call("unshare", NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP)


def mount_room(size: int) -> None:
    """Put an empty directory in memory, of this many bytes, at `ROOM`."""
    call("mount", b"room", ROOM.encode(), b"tmpfs", NOSUID | NODEV, f"mode=700,nr_inodes=1k,size={size}".encode())


def unmount_room() -> None:
    """Remove the directory with all that is in it."""
    call("umount2", ROOM.encode(), DETACH)


def stay_in(room: str) -> None:
    """Let this process write in its directory alone, and read the interpreter's libraries besides; see landlock(7).

    Without Landlock in the kernel nothing is changed.
    """
    try:
        version = call("syscall", RULESET, None, 0, 1)
    except OSError:
        return
    handled, scoped = (sum(rights for since, rights in table.items() if since <= version) for table in (RIGHTS, SCOPES))
    attributes = struct.pack("QQQ", handled, 0, scoped)[: 24 if scoped else 8]
    ruleset = call("syscall", RULESET, attributes, len(attributes), 0)
    for path, rights in [(room, handled), *((path, handled & READS) for path in (*_python(), *LIBRARIES))]:
        with contextlib.suppress(FileNotFoundError):
            folder = os.open(path, os.O_PATH | os.O_DIRECTORY)
            call("syscall", RULE, ruleset, 1, struct.pack("=Qi", rights, folder), 0)
            os.close(folder)
    call("syscall", RESTRICT, ruleset, 0)
    os.close(ruleset)


def _python() -> list[str]:
    """Return the folders of the interpreter."""
    return [path for path in (str(Path(os.__file__).parents[1]), *sys.path) if Path(path).is_dir()]


def _own_users(proc: int, flags: int) -> None:
    """Enter a new user namespace, in which only this user exists, under the name of nobody."""
    user = os.geteuid()
    group = os.getegid()
    prctl(DUMPABLE, 1)  # after a change of user, /proc/self would be root's
    call("unshare", flags)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(file, text.encode())
        os.close(file)


def _new_root(python: list[str], libraries: tuple[str, ...]) -> None:
    """Enter a root with the interpreter's own folders, and put the old root out of reach."""
    shown = {path: os.path.realpath(path) for path in python}
    call("mount", NONE, b"/", NONE, RECURSIVE | PRIVATE, NONE)
    call("mount", b"root", b"/tmp", b"tmpfs", NOSUID | NODEV, b"size=1m,mode=755")
    os.chdir("/tmp")
    Path("old").mkdir()
    call("syscall", {"x86_64": 155, "aarch64": 41}[platform.machine()], b".", b"old")  # pivot_root
    os.chdir("/")
    for path in libraries:
        _show(path)
    for path, real in shown.items():
        _show(real)
        if real != path and not os.path.lexists(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).symlink_to(real)
    Path(ROOM).mkdir(exist_ok=True)
    call("umount2", b"/old", DETACH)
    Path("/old").rmdir()
    attributes = struct.pack("QQQQ", 1 | NOSUID | NODEV, 0, 0, 0)  # 1: read-only
    call("syscall", MOUNT_SETATTR, CWD, b"/", EVERYTHING, attributes, len(attributes))


def _show(path: str) -> None:
    """Make a folder or a link of the old root visible under the new root."""
    old = Path(f"/old{path}")
    if os.path.lexists(path) or not (old.is_symlink() or old.is_dir()):
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if old.is_symlink():
        Path(path).symlink_to(old.readlink())
    else:
        Path(path).mkdir(exist_ok=True)
        call("mount", str(old).encode(), path.encode(), NONE, BIND | RECURSIVE, NONE)
