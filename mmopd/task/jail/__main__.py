"""Confines itself, and forks for each program that it is asked to run."""

import contextlib
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[3]))
from mmopd.task.jail import filter, program, walls
from mmopd.task.jail.calls import call, prctl

Request = dict[str, Any]

CHANNEL = 0  # the file through which requests come
JOB, INPUT, OUTPUT, ERRORS, RESULT = range(5)  # the files of a request, in this order
PDEATHSIG, NO_NEW_PRIVS, THP_DISABLE = 1, 38, 41
STACK = 64 << 20  # bytes, of the main thread


def serve(channel: socket.socket, apart: bool) -> Request | None:
    """Run the requested programs until the channel ends.

    Returns in two kinds of process: None in this one, and its job in the process of each program.
    """
    while True:
        message, files, _, _ = socket.recv_fds(channel, 1 << 16, 8)
        if not message:
            return None
        request = json.loads(message)
        if apart:
            walls.mount_room(request["disk"])
        room = walls.ROOM if apart else tempfile.mkdtemp(prefix="mmopd-room-")
        begin = time.monotonic()
        if (child := os.fork()) == 0:
            channel.detach()  # the program's input takes its number
            return confine(request, files, room, apart)
        for file in files:
            os.close(file)
        ready = _wait(child, channel, request["wall"])
        _, status, usage = os.wait4(child, 0)
        if apart:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all in this process namespace except process 1; there should be none
            walls.unmount_room()
        else:
            _remove(room)
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
    ready, _, _ = select.select(watched, [], [], seconds)  # this process has few files: their numbers are small
    os.close(ended)
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    return set(ready)


def _remove(room: str) -> None:
    """Remove a program's directory, folders that the program has closed to itself included."""
    Path(room).chmod(0o700)
    for folder, names, _ in os.walk(room):
        for name in names:
            if not (inner := Path(folder, name)).is_symlink():
                inner.chmod(0o700)
    shutil.rmtree(room, ignore_errors=True)


def confine(request: Request, files: list[int], room: str, apart: bool) -> Request:
    """Set up this process for the program: its files, its directory, its limits. Return the job."""
    moved = [os.dup2(file, 20 + i) for i, file in enumerate(files)]
    job: Request = json.loads(_contents(moved[JOB]))
    os.dup2(2, program.NULL)  # this process' standard error is /dev/null
    for target, source in enumerate(moved[1:]):
        os.dup2(source, target)
    os.closerange(program.NULL + 1, 1 << 30)
    os.setsid()
    os.chdir(room)
    limits = {
        resource.RLIMIT_AS: request["memory"],
        resource.RLIMIT_CPU: request["cpu"],
        resource.RLIMIT_FSIZE: request["output"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    if apart:  # only in a user namespace of its own; elsewhere all processes of the user would count
        limits[resource.RLIMIT_NPROC] = request["threads"]
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        spare = which == resource.RLIMIT_CPU  # a second between SIGXCPU and the signal that kills
        both = (value, value + spare)
        resource.setrlimit(which, both if hard == resource.RLIM_INFINITY else (min(both[0], hard), min(both[1], hard)))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]  # many programs raise it; address space includes the stack
    resource.setrlimit(resource.RLIMIT_STACK, (STACK if hard == resource.RLIM_INFINITY else min(STACK, hard), hard))
    prctl(NO_NEW_PRIVS, 1)
    prctl(THP_DISABLE, 1)  # of 2 MiB of which one page is mapped, all stay allocated
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capability
    if not apart:
        walls.stay_in(room)
    prctl(PDEATHSIG, signal.SIGKILL)
    filter.forbid()
    return job


def _contents(file: int) -> bytes:
    with open(file, "rb", closefd=False) as stream:
        stream.seek(0)
        return stream.read()


def main(apart: bool) -> Request | None:
    """Confine this process, report it, and serve.

    If `apart` is false, there are limits and the filter, but no namespaces.
    """
    channel = socket.socket(fileno=CHANNEL)
    try:
        program.prepare()
        if apart:
            walls.shut_in()
    except OSError as error:
        channel.send(json.dumps({"refused": str(error).partition("] ")[2] or str(error)}).encode())
        return None
    if apart and (first := os.fork()):
        channel.close()
        os.waitpid(first, 0)
        return None
    if apart:
        prctl(PDEATHSIG, signal.SIGKILL)
    gc.freeze()
    channel.send(b"{}")
    return serve(channel, apart)


if __name__ == "__main__":
    sys.path.pop()  # of mmopd, which programs do not find
    for _name in [name for name in sys.modules if name.partition(".")[0] == "mmopd"]:
        del sys.modules[_name]
    if (_job := main(sys.argv[1] == "apart")) is not None:
        program.end(_job)
