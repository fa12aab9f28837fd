"""How often something may happen for each of many keys, in bounded memory: for whoever is not worth a line on disk."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import Final

from scistream_flows.policy import paced

MOST_KEYS: Final = 4096


class Allowance:
    """So often per minute for each key, in this process. Any number of threads may use it.

    Beyond `most` keys the one that was quiet longest is forgotten, which is to its advantage.

    Args:
        per_min: How often per minute.
        burst: How often at once.
        most: Keys to remember.
    """

    def __init__(self, *, per_min: float, burst: int, most: int = MOST_KEYS) -> None:
        self._per_min = per_min
        self._burst = burst
        self._most = most
        self._mutex = threading.Lock()
        self._busy_until_s: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._busy_until_s)

    def take(self, key: str) -> float:
        """Count one, if there is one left; else answer after how many seconds there will be."""
        with self._mutex:
            after_s, wait_s = self._paced(key)
            self._busy_until_s[key] = after_s
            self._busy_until_s.move_to_end(key)
            if len(self._busy_until_s) > self._most:
                self._busy_until_s.popitem(last=False)
            return wait_s

    def wait_s(self, key: str) -> float:
        """After how many seconds there will be one left, 0 if there is; nothing is counted."""
        with self._mutex:
            return self._paced(key)[1]

    def _paced(self, key: str) -> tuple[float, float]:
        busy_until_s = self._busy_until_s.get(key, 0.0)
        return paced(busy_until_s, time.monotonic(), per_min=self._per_min, burst=self._burst)
