"""System calls that a program may not use, as a seccomp filter. It lists what is forbidden, not what is allowed."""

import ctypes
import os
import platform
import struct

from mmopd.task.jail.calls import prctl
from mmopd.task.jail.walls import NEWCGROUP, NEWIPC, NEWNET, NEWNS, NEWPID, NEWUSER, NEWUTS

Rule = tuple[int, int, int, int]  # operation, rules to skip if it is true and if it is false, number

SECCOMP = 22
CLONE_THREAD = 1 << 16

# Numbers on x86_64 and on aarch64.
FORBIDDEN = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),  # one process, this program
    "socket": (41, 198), "socketpair": (53, 199),  # vsock and netlink are in no network namespace
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),  # memory that no limit of a process counts, from here on
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "vmsplice": (278, 75), "splice": (275, 76), "tee": (276, 77),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "landlock_create_ruleset": (444, 444), "seccomp": (317, 277), "inotify_init": (253, None),
    "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_setup": (206, 0),
    "personality": (135, 92), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "sync": (162, 81),
    "syncfs": (306, 267), "syslog": (103, 116), "kexec_load": (246, 104), "init_module": (175, 105),
    "finit_module": (313, 273),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
ONLY_ON_ITSELF = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)}
PRLIMIT = (302, 261)
MMAP, FCNTL, IOCTL, PRCTL = (9, 222), (72, 25), (16, 29), (157, 167)
SHARED_ANONYMOUS = 0x21  # what is unmapped of such memory stays allocated, and is not counted
F_SETFL, O_ASYNC = 4, 0x2000  # a signal to the owner of a file, or to those in front of a terminal
FCNTLS = (8, 10, 15, 1024, 1026, 1031)  # SETOWN, SETSIG, SETOWN_EX, SETLEASE, NOTIFY, SETPIPE_SZ
# FIOASYNC, FIOSETOWN, SIOCSPGRP, TIOCSCTTY, TIOCSTI, TIOCLINUX
IOCTLS = (0x5452, 0x8901, 0x8902, 0x540E, 0x5412, 0x541C)
PRCTLS = (1, SECCOMP, 41)  # SET_PDEATHSIG, SET_SECCOMP, SET_THP_DISABLE
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW: Rule = (RETURN, 0, 0, 0x7FFF0000)
KILL: Rule = (RETURN, 0, 0, 0x80000000)
EPERM: Rule = (RETURN, 0, 0, 0x00050001)
ENOSYS: Rule = (RETURN, 0, 0, 0x00050026)


def forbid() -> None:
    """Put this process and its future threads under the filter, which cannot be removed; see seccomp(2)."""
    column, architecture = ARCHITECTURES[platform.machine()]
    rules: list[Rule] = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), KILL, (LOAD, 0, 0, 0)]
    if column == 0:
        rules += [(AT_LEAST, 0, 1, 0x40000000), EPERM]  # the second set of numbers of x86_64 (x32)
    for numbers in FORBIDDEN.values():
        rules += _where(numbers[column], [EPERM])
    rules += _where(CLONE3[column], [ENOSYS])  # its flags are in memory; the C library falls back to clone
    spaces = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
    thread: list[Rule] = [(AND, 0, 0, CLONE_THREAD | spaces), (EQUAL, 1, 0, CLONE_THREAD), EPERM]
    rules += _where(CLONE[column], [_argument(0), *thread, ALLOW])
    for numbers, who in [*((numbers, os.getpid()) for numbers in ONLY_ON_ITSELF.values()), (PRLIMIT, 0)]:
        rules += _where(numbers[column], [_argument(0), (EQUAL, 1, 0, who), EPERM, ALLOW])
    shared: list[Rule] = [(AND, 0, 0, SHARED_ANONYMOUS), (EQUAL, 0, 1, SHARED_ANONYMOUS), EPERM]
    rules += _where(MMAP[column], [_argument(3), *shared, ALLOW])
    signal: list[Rule] = [(EQUAL, 0, 4, F_SETFL), _argument(2), (AND, 0, 0, O_ASYNC), (EQUAL, 0, 1, O_ASYNC), EPERM]
    rules += _where(FCNTL[column], [_argument(1), *_none_of(FCNTLS), *signal, ALLOW])
    rules += _where(IOCTL[column], [_argument(1), *_none_of(IOCTLS), ALLOW])
    rules += _where(PRCTL[column], [_argument(0), *_none_of(PRCTLS), ALLOW])
    rules.append(ALLOW)
    code = b"".join(struct.pack("HBBI", operation, yes, no, k) for operation, yes, no, k in rules)
    memory = ctypes.create_string_buffer(code)
    prctl(SECCOMP, 2, struct.pack("HxxxxxxP", len(rules), ctypes.addressof(memory)))


def _where(number: int | None, rules: list[Rule]) -> list[Rule]:
    """Return rules for one system call; none if this architecture lacks it."""
    return [] if number is None else [(EQUAL, 0, len(rules), number), *rules]


def _argument(number: int) -> Rule:
    """Load the low half of an argument; the kernel reads no more of those that are asked for here."""
    return (LOAD, 0, 0, 16 + 8 * number)


def _none_of(values: tuple[int, ...]) -> list[Rule]:
    return [rule for value in values for rule in ((EQUAL, 0, 1, value), EPERM)]
