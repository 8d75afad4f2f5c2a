"""The process in which model-written programs run: `python mmopd/task/jail NUMBER`, which `mmopd.task.sandbox` starts.

It needs the standard library only. It confines itself once, and then forks for each program: a fork of a small, warm
interpreter takes a few milliseconds, a new interpreter takes tens.

All programs share user, mount, process, network, IPC, host-name and cgroup namespaces, and a read-only root with the
interpreter's libraries and nothing else (no /proc, /dev, /sys, /home). Each program has an empty memory-backed
directory, limits, no capability, and a seccomp filter under which it cannot fork, execute, signal another process or
open a socket. Its inputs are sealed files in memory that are read after the fork, so nothing of one program is in the
memory of the next. Expected outputs never reach this process.
"""
