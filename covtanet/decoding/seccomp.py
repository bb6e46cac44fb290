"""A seccomp filter: a process may compute, and use the pipes that it has.

A system call that the filter does not name fails with EPERM, as opening a file does: libraries
expect that a file may be missing. A call that an attacker would make, and a decoder never does,
ends the process. The filter can only be tightened, and needs no privilege once ``no_new_privs`` is
set.

Choice: written here by ctypes. The packages that install a filter need ``libseccomp.so``
(pyseccomp), ship a build of it for one architecture (mephi42-seccomp) or are months old (seccompy);
this is one page over a stable interface of the kernel.
"""

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass

from covtanet.errors import ConfigError

PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE = 38, 4
SET_MODE_FILTER, TSYNC = 1, 1
# Return values of a filter, and instructions of its machine (linux/seccomp.h, linux/bpf_common.h).
KILL_PROCESS, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
LOAD_WORD, AND, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16
X32_BIT = 0x40000000
CLONE_THREAD, PROT_EXEC = 0x00010000, 0x4


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A machine: its audit code, its column in the tables below, and the number of seccomp(2)."""

    audit: int
    column: int
    seccomp: int


ARCHITECTURES = {
    "x86_64": Architecture(audit=0xC000003E, column=0, seccomp=317),
    "aarch64": Architecture(audit=0xC00000B7, column=1, seccomp=277),
}
# System calls by name: number on x86_64, on aarch64; -1 if missing. The most frequent first.
ALLOWED = {
    "read": (0, 63),  # requests come in
    "write": (1, 64),  # answers go out
    "futex": (202, 98),  # locks of threads
    "munmap": (11, 215),  # memory, from here
    "brk": (12, 214),
    "madvise": (28, 233),
    "mremap": (25, 216),
    "clock_gettime": (228, 113),  # clocks, mostly without a call
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),  # how much of its CPU time is left
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),  # number of threads
    "rt_sigaction": (13, 134),  # Python's handlers of signals, and the kernel's return from them
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),  # after a stop
    "set_robust_list": (273, 99),  # start of a thread
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "getrandom": (318, 278),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "poll": (7, -1),  # descriptors that are open
    "ppoll": (271, 73),
    "close": (3, 57),
    "exit": (60, 93),  # end of a thread
    "exit_group": (231, 94),
}
# Name: numbers, index of an argument, the bits of it that are compared, and their required value.
ALLOWED_IF = {
    "mmap": ((9, 222), 2, PROT_EXEC, 0),  # memory, but no new code
    "mprotect": ((10, 226), 2, PROT_EXEC, 0),
}
ENDS_UNLESS = {
    "clone": ((56, 220), 0, CLONE_THREAD, CLONE_THREAD),  # a thread, but no process
}
# The flags of clone3 lie in memory, which a filter cannot read: glibc takes clone instead if the
# kernel does not know clone3.
UNKNOWN = {"clone3": (435, 435)}
# Calls that end the process: programs, other processes, sockets, the kernel, other users.
ENDS = {
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, -1), "vfork": (58, -1),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104),
    "open_by_handle_at": (304, 265), "personality": (135, 92), "seccomp": (317, 277),
    "setuid": (105, 146), "setresuid": (117, 147), "setresgid": (119, 149),
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = [("num_instructions", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def hide_memory() -> None:
    """Keep processes of the same user from tracing this one and from reading its memory."""
    _prctl(PR_SET_DUMPABLE, 0)


def forbid_new_privileges() -> None:
    """Keep programs that this process might start from having more rights than it has."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def install() -> None:
    """Install the filter on all threads of this process.

    Raises:
        ConfigError: the architecture is unsupported.
        OSError: the kernel has no filters or does not allow them.
    """
    machine = ARCHITECTURES.get(platform.machine())
    if machine is None:
        expected = " or ".join(ARCHITECTURES)
        raise ConfigError(
            f"no filter of system calls for {platform.machine()}, expected {expected}"
        )
    code = instructions(machine)
    program = _Program(len(code) // 8, code)
    if _libc.syscall(machine.seccomp, SET_MODE_FILTER, TSYNC, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "the kernel refuses a filter of system calls")


def instructions(machine: Architecture) -> bytes:
    """Return the filter as the kernel reads it: 8 bytes an instruction (code, 2 jumps, value)."""
    kill = (RETURN, 0, 0, KILL_PROCESS)
    # A call of another architecture or of x32 has other numbers than the tables.
    code = [(LOAD_WORD, 0, 0, ARCHITECTURE_AT), (JUMP_IF_EQUAL, 1, 0, machine.audit), kill]
    code += [(LOAD_WORD, 0, 0, NUMBER_AT), (JUMP_IF_AT_LEAST, 0, 1, X32_BIT), kill]
    for answer, calls in (
        (ALLOW, ALLOWED),
        (ERRNO | errno.ENOSYS, UNKNOWN),
        (KILL_PROCESS, ENDS),
    ):
        for numbers in calls.values():
            if numbers[machine.column] >= 0:
                code += [(JUMP_IF_EQUAL, 0, 1, numbers[machine.column]), (RETURN, 0, 0, answer)]
    for otherwise, conditions in ((ERRNO | errno.EPERM, ALLOWED_IF), (KILL_PROCESS, ENDS_UNLESS)):
        for numbers, argument, mask, value in conditions.values():
            code += [
                (JUMP_IF_EQUAL, 0, 5, numbers[machine.column]),
                (LOAD_WORD, 0, 0, ARGUMENTS_AT + 8 * argument),  # the lower half, little-endian
                (AND, 0, 0, mask),
                (JUMP_IF_EQUAL, 0, 1, value),
                (RETURN, 0, 0, ALLOW),
                (RETURN, 0, 0, otherwise),
            ]
    code.append((RETURN, 0, 0, ERRNO | errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
