"""A TCP relay in front of a server that damages chosen bytes on their way back."""

import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager


@contextmanager
def damaging(address: str, offsets: Collection[int]) -> Iterator[str]:
    """Relay one connection to `address`, flipping the bytes at `offsets` of what the server sends; gives host:port."""
    host, port = address.rsplit(":", 1)
    listener = socket.create_server(("127.0.0.1", 0))
    sockets: list[socket.socket] = []

    def relay() -> None:
        client, _ = listener.accept()
        server = socket.create_connection((host, int(port)))
        sockets.extend((client, server))
        forward = threading.Thread(target=_pump, args=(client, server, ()), daemon=True)
        forward.start()
        _pump(server, client, offsets)
        forward.join(5)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for sock in sockets:
            sock.close()
        listener.close()
        thread.join(5)


def _pump(source: socket.socket, dest: socket.socket, offsets: Collection[int]) -> None:
    at = 0
    try:
        while data := bytearray(source.recv(65536)):
            for offset in offsets:
                if at <= offset < at + len(data):
                    data[offset - at] ^= 0xFF
            at += len(data)
            dest.sendall(data)
        dest.shutdown(socket.SHUT_WR)
    except OSError:
        return
