"""Runs a program for which something of the kernel fails: `without.py splice|keepalive ERRNO PROGRAM [ARGUMENT…]`."""

import ctypes
import os
import platform
import socket
import struct
import sys

SPLICE, SETSOCKOPT = {"x86_64": (275, 54), "aarch64": (76, 208)}[platform.machine()]
NUMBER, ARGUMENTS = 0, (16, 24, 32)  # where struct seccomp_data has them
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000


class Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


CONDITIONS = {
    "splice": [(NUMBER, SPLICE)],
    "keepalive": [
        (NUMBER, SETSOCKOPT),
        (ARGUMENTS[1], socket.SOL_SOCKET),
        (ARGUMENTS[2], socket.SO_KEEPALIVE),
    ],
}


def forbid(what: str, errno: int) -> None:
    """Lets `what` fail with `errno` in this process and all that it starts."""
    steps = []
    conditions = CONDITIONS[what]
    for number, (offset, value) in enumerate(conditions):
        to_the_end = 2 * (len(conditions) - number) - 1
        steps += [(LOAD_WORD, 0, 0, offset), (JUMP_IF_EQUAL, 0, to_the_end, value)]
    steps += [(RETURN, 0, 0, ERRNO | errno), (RETURN, 0, 0, ALLOW)]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(steps), code)
    no = ctypes.c_ulong(0)
    for call in (
        (PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), no, no, no),
        (PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(program), no, no),
    ):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid(sys.argv[1], int(sys.argv[2]))
    os.execv(sys.argv[3], sys.argv[3:])  # noqa: S606 - that is its purpose
