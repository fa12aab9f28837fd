"""A wire of some length: copies frames between two interfaces, each so many seconds after it came.

Not every kernel has netem; every one that has veth pairs has packet sockets. Frames travel with their offload header,
so that segments the kernel has put together are copied as one.

    python delay_line.py INTERFACE INTERFACE SECONDS
"""

import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
BUFFER_BYTES = 1 << 26
LONGEST_FRAME_BYTES = 1 << 17


def attach(interface: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
        port.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    port.bind((interface, ETH_P_ALL))
    port.settimeout(0)
    return port


def main(one: str, other: str, seconds: float) -> None:
    ports = [attach(one), attach(other)]
    across = {ports[0]: ports[1], ports[1]: ports[0]}
    under_way: deque[tuple[float, socket.socket, bytes]] = deque()
    print("ready", flush=True)
    while True:
        pause = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for port in select.select(ports, [], [], pause)[0]:
            with suppress(BlockingIOError):
                while True:
                    frame = port.recv(LONGEST_FRAME_BYTES)
                    under_way.append((time.monotonic() + seconds, across[port], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, port, frame = under_way.popleft()
            with suppress(OSError):  # a full queue behind this port drops
                port.send(frame)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
