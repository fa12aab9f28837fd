"""What no relay that encrypts in user space can be cheaper than: the cipher and the copies, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .results import Limits

CIPHER: Final = "AES-256-GCM"
BLOCK_BYTES: Final = 1 << 18
FAR_BYTES: Final = 1 << 22


def measure(seconds: float = 1.0) -> Limits:
    """Bytes per CPU second of the cipher that relays use, and of a copy out of the last level of cache."""
    source, block = memoryview(bytearray(b"x") * FAR_BYTES), bytearray(BLOCK_BYTES)
    cipher, nonce, clear = AESGCM(bytes(32)), bytes(12), bytes(BLOCK_BYTES)

    def copy() -> None:
        for at in range(0, FAR_BYTES, BLOCK_BYTES):
            block[:] = source[at : at + BLOCK_BYTES]

    return Limits(
        cipher=CIPHER,
        cipher_bytes_per_s=BLOCK_BYTES / _cpu_s(lambda: cipher.encrypt(nonce, clear, None), seconds),
        copy_bytes_per_s=FAR_BYTES / _cpu_s(copy, seconds),
    )


def _cpu_s(what: Callable[[], object], seconds: float) -> float:
    """CPU seconds of one call."""
    count, end, used = 0, time.monotonic() + seconds, time.process_time()
    while time.monotonic() < end:
        what()
        count += 1
    return (time.process_time() - used) / count
