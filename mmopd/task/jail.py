"""The process in which model-written programs run.

`mmopd.task.sandbox` starts this file by its path; it needs the standard library only. It confines itself once, and then
forks for each program: a fork of a small, warm interpreter takes a few milliseconds, a new interpreter takes tens.

All programs share user, mount, process, network, IPC, host-name and cgroup namespaces, and a read-only root with the
interpreter's libraries and nothing else (no /proc, /dev, /sys, /home). Each program has an empty memory-backed
directory, limits, no capability, and a seccomp filter under which it cannot fork, execute, signal another process or
open a socket. Its inputs are sealed files in memory that are read after the fork, so nothing of one program is in the
memory of the next. Expected outputs never reach this process.
"""

import atexit
import builtins
import contextlib
import ctypes
import decimal
import fractions
import functools
import gc
import io
import json
import os
import platform
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any

Request = dict[str, Any]

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")  # needed for what the interpreter loads while a program runs
PRELOADED = ("cmath", "dataclasses", "queue", "threading")  # imported once instead of in each program, as STARRED is
STARRED = (  # in the order of LiveCodeBench; the modules hide functions of the same names
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json")  # fmt: skip
DEPTH = 50_000  # of recursion, as LiveCodeBench has it
DEVICES = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2, "/dev/fd/0": 0, "/dev/fd/1": 1, "/dev/fd/2": 2}
ROOM = "/room"  # the programs' directory, inside of the new root
NOBODY = 65534
JOB, INPUT, OUTPUT, ERRORS, RESULT = range(5)  # the files of a request, in this order

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (1 << bit for bit in (17, 25, 26, 27, 28, 29, 30))
NOSUID, NODEV, BIND, DETACH, RECURSIVE, PRIVATE = 2, 4, 1 << 12, 2, 1 << 14, 1 << 18
CLONE_THREAD = 1 << 16
PDEATHSIG, DUMPABLE, SECCOMP, NO_NEW_PRIVS = 1, 4, 22, 38
MOUNT_SETATTR = 442
NONE, EVERYTHING, CWD = None, 0x8000, -100

_given: Request = {}  # names that every program finds defined
_builtin_open = open
_libc = ctypes.CDLL(None, use_errno=True)


def check(name: str, *arguments: object) -> None:
    """Call a function of the C library; raise OSError with its name if it fails."""
    if getattr(_libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def shut_in() -> None:
    """Enter new namespaces with a new root, as nobody; the next fork is process 1 of its own process namespace."""
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    if root := os.geteuid() == 0:
        try:
            check("unshare", NEWNS)
        except PermissionError:  # root of a container, with no more rights than other users
            root = False
    if not root:
        _own_users(proc, NEWUSER | NEWNS)
    _new_root([str(Path(os.__file__).parents[1]), *sys.path], LIBRARIES)
    if root:  # mounts made so far cannot be unmounted from inside
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError:  # in a user namespace that has no such user, root is nobody
            pass
        _own_users(proc, NEWUSER | NEWNS)
    os.close(proc)
    check("unshare", NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP)


def _own_users(proc: int, flags: int) -> None:
    """Enter a new user namespace, in which only this user exists, under the name of nobody."""
    user = os.geteuid()
    group = os.getegid()
    check("prctl", DUMPABLE, 1, 0, 0, 0)  # after a change of user, /proc/self would be root's
    check("unshare", flags)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(file, text.encode())
        os.close(file)


def _new_root(python: list[str], libraries: tuple[str, ...]) -> None:
    """Enter a root with the interpreter's own folders, and put the old root out of reach."""
    shown = {path: os.path.realpath(path) for path in python if Path(path).is_dir()}
    check("mount", NONE, b"/", NONE, RECURSIVE | PRIVATE, NONE)
    check("mount", b"root", b"/tmp", b"tmpfs", NOSUID | NODEV, b"size=1m,mode=755")
    os.chdir("/tmp")
    Path("old").mkdir()
    check("syscall", {"x86_64": 155, "aarch64": 41}[platform.machine()], b".", b"old")  # pivot_root
    os.chdir("/")
    for path in libraries:
        _show(path)
    for path, real in shown.items():
        _show(real)
        if real != path and not os.path.lexists(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).symlink_to(real)
    Path(ROOM).mkdir(exist_ok=True)
    check("umount2", b"/old", DETACH)
    Path("/old").rmdir()
    attributes = struct.pack("QQQQ", 1 | NOSUID | NODEV, 0, 0, 0)  # 1: read-only
    check("syscall", MOUNT_SETATTR, CWD, b"/", EVERYTHING, attributes, len(attributes))


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
        check("mount", str(old).encode(), path.encode(), NONE, BIND | RECURSIVE, NONE)


# System calls that a program may not use: numbers on x86_64 and on aarch64.
FORBIDDEN = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),  # one process, this program
    "socket": (41, 198), "socketpair": (53, 199),  # vsock and netlink are in no network namespace
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180),  # memory that is counted by no limit of a process
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_setup": (206, 0),
    "personality": (135, 92), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsmount": (432, 432), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "fanotify_init": (300, 262), "inotify_init1": (294, 26), "sync": (162, 81),
    "syncfs": (306, 267), "syslog": (103, 116), "kexec_load": (246, 104), "init_module": (175, 105),
    "finit_module": (313, 273),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
ONLY_ON_ITSELF = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)}
PRLIMIT = (302, 261)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def forbid() -> None:
    """Put this process and its future threads under the filter, which cannot be removed; see seccomp(2)."""
    column, architecture = ARCHITECTURES[platform.machine()]
    rules = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if column == 0:
        rules += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, EPERM)]  # the second set of numbers of x86_64 (x32)
    for numbers in FORBIDDEN.values():
        if (number := numbers[column]) is not None:
            rules += [(EQUAL, 0, 1, number), (RETURN, 0, 0, EPERM)]
    rules += [
        (EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, ENOSYS),
    ]  # its flags are in memory; the C library falls back to clone
    spaces = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
    thread = [
        (LOAD, 0, 0, 16), (AND, 0, 0, CLONE_THREAD | spaces), (EQUAL, 1, 0, CLONE_THREAD), (RETURN, 0, 0, EPERM),
        (RETURN, 0, 0, ALLOW),
    ]  # fmt: skip
    rules += [(EQUAL, 0, len(thread), CLONE[column]), *thread]
    for numbers, who in [*((numbers, os.getpid()) for numbers in ONLY_ON_ITSELF.values()), (PRLIMIT, 0)]:
        same = [(LOAD, 0, 0, 16), (EQUAL, 1, 0, who), (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]
        rules += [(EQUAL, 0, len(same), numbers[column]), *same]
    rules.append((RETURN, 0, 0, ALLOW))
    code = b"".join(struct.pack("HBBI", operation, yes, no, k) for operation, yes, no, k in rules)
    memory = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(memory))
    check("prctl", SECCOMP, 2, program, 0, 0)


def serve(channel: socket.socket, room: str, apart: bool) -> Request | None:
    """Run the requested programs until the channel ends.

    Returns in two kinds of process: None in this one, and its job in the process of each program.
    """
    while True:
        message, files, _, _ = socket.recv_fds(channel, 1 << 16, 8)
        if not message:
            return None
        request = json.loads(message)
        if apart:
            options = f"mode=700,nr_inodes=1k,size={request['disk']}".encode()
            check("mount", b"room", room.encode(), b"tmpfs", NOSUID | NODEV, options)
        else:
            Path(room).mkdir(mode=0o700, exist_ok=True)
        begin = time.monotonic()
        if (child := os.fork()) == 0:
            return confine(request, files, room)
        for file in files:
            os.close(file)
        ready = _wait(child, channel, request["wall"])
        _, status, usage = os.wait4(child, 0)
        if apart:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all in this process namespace except process 1; there should be none
            check("umount2", room.encode(), DETACH)
        else:
            shutil.rmtree(room, ignore_errors=True)
        if channel in ready:  # nobody waits for the reply any more
            return None
        spent = {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.monotonic() - begin}
        channel.send(json.dumps({"status": os.waitstatus_to_exitcode(status), "late": not ready, **spent}).encode())


def _wait(child: int, channel: socket.socket, seconds: float) -> set[int | socket.socket]:
    """Wait for the end of the program or of the channel, and return what came first; nothing if the time ran out.

    A program that has not ended is killed.
    """
    ended = os.pidfd_open(child)
    watched: list[int | socket.socket] = [ended, channel]
    ready, _, _ = select.select(watched, [], [], seconds)
    os.close(ended)
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    return set(ready)


def confine(request: Request, files: list[int], room: str) -> Request:
    """Set up this process for the program: its files, its directory, its limits. Return the job."""
    moved = [os.dup2(file, 20 + i) for i, file in enumerate(files)]
    job: Request = json.loads(_contents(moved[JOB]))
    for target, source in enumerate(moved[1:]):
        os.dup2(source, target)
    os.closerange(4, 4096)
    os.setsid()
    os.chdir(room)
    limits = {
        resource.RLIMIT_AS: request["memory"],
        resource.RLIMIT_CPU: request["cpu"],
        resource.RLIMIT_FSIZE: request["output"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_STACK: 64 << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if room == ROOM:  # only in a user namespace of its own; elsewhere all processes of the user would count
        limits[resource.RLIMIT_NPROC] = request["threads"]
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        spare = which == resource.RLIMIT_CPU  # a second between SIGXCPU and the signal that kills
        both = (value, value + spare)
        resource.setrlimit(which, both if hard == resource.RLIM_INFINITY else (min(both[0], hard), min(both[1], hard)))
    check("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    check("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capability
    forbid()
    return job


def _contents(file: int) -> bytes:
    with open(file, "rb", closefd=False) as stream:
        stream.seek(0)
        return stream.read()


def execute(job: Request) -> None:
    """Run the program as a script; then call its function, if one is named, and write the result to file 3 as JSON."""
    module = types.ModuleType("__main__" if job["function"] is None else "program")
    sys.modules["__main__"] = sys.modules[module.__name__] = module
    sys.argv = ["program.py"]
    sys.path.insert(0, "")
    space = module.__dict__
    space.update(_given, __file__="program.py")
    exec(compile(job["program"], "program.py", "exec"), space)
    if (name := job["function"]) is not None:
        own = {name: value for name, value in space.items() if value is not _given.get(name, space)}
        function = getattr(own["Solution"](), name) if hasattr(own.get("Solution"), name) else own[name]
        text = json.dumps(function(*job["arguments"]), default=_plain).encode()
        while text:
            text = text[os.write(3, text) :]


def _plain(value: Any) -> Any:
    """Return what JSON knows for a result that it does not: a number for a fraction, a list for another iterable."""
    if isinstance(value, decimal.Decimal | fractions.Fraction):
        return int(value) if value == value // 1 else float(value)
    return list(value)


def _judges_names() -> dict[str, Any]:
    """Return the names that the judges of TACO, LiveCodeBench and LeetCode import before a program, such as `List`."""
    space: dict[str, Any] = {}
    for name in [*STARRED, "builtins", "typing"]:
        exec(f"from {name} import *", space)
    for name in STARRED:
        exec(f"import {name}", space)
    return {name: value for name, value in space.items() if not name.startswith("__")}


def _open(file: Any, *arguments: Any, **settings: Any) -> Any:
    """Open a file; the standard streams are also found by their names, though there is no /dev."""
    number = DEVICES.get(os.fspath(file)) if isinstance(file, str | os.PathLike) else None
    return _builtin_open(file if number is None else os.dup(number), *arguments, **settings)


def _pair(*_: object) -> tuple[Any, ...]:
    """Return a pipe instead of two sockets, which programs may not have; asyncio wakes its own loop through it."""
    names: Any = {"fileno": int, "setblocking": os.set_blocking, "recv": os.read, "send": os.write, "close": os.close}
    return tuple(
        types.SimpleNamespace(**{name: functools.partial(call, file) for name, call in names.items()})
        for file in os.pipe()
    )


def end(job: Request) -> None:
    """Run a program and exit as an interpreter does, but without tearing the interpreter down.

    The teardown would take most of the time of a short program.
    """
    status: object = 0
    try:
        try:
            execute(job)
        except SystemExit as error:
            if (status := error.code or 0) and not isinstance(status, int):
                sys.stderr.write(f"{status}\n")
        except BaseException:
            status = 1
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]  # waits for the program's threads
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):  # they may be the program's own, and need its names
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        sys.modules["__main__"].__dict__.clear()  # closes the files that the program left open
        if sys.__stdout__ is not None and not sys.__stdout__.closed:
            sys.__stdout__.flush()
    except BaseException:
        status = 120
    os._exit(status & 255 if isinstance(status, int) else 1)


def main(file: int, apart: bool) -> Request | None:
    """Confine this process, report it, and serve.

    If `apart` is false, there are limits and the filter, but no namespaces.
    """
    channel = socket.socket(fileno=file)
    try:
        for name in PRELOADED:
            __import__(name)
        builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # `site` is not loaded, which defines them
        builtins.open = io.open = _open
        _given.update(_judges_names())
        socket.socketpair = _pair  # type: ignore[assignment]
        sys.set_int_max_str_digits(0)
        sys.setrecursionlimit(DEPTH)
        if apart:
            shut_in()
        room = ROOM if apart else tempfile.mkdtemp(prefix="mmopd-room-")
    except OSError as error:
        channel.send(json.dumps({"refused": str(error).partition("] ")[2] or str(error)}).encode())
        return None
    if apart and (first := os.fork()):
        channel.close()
        os.waitpid(first, 0)
        return None
    if apart:
        check("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    gc.freeze()
    channel.send(b"{}")
    job = serve(channel, room, apart)
    if job is None and not apart:
        shutil.rmtree(room, ignore_errors=True)
    return job


if __name__ == "__main__":
    if (_job := main(int(sys.argv[1]), sys.argv[2] == "apart")) is not None:
        end(_job)
