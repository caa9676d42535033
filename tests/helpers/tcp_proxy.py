"""A proxy on loopback between a client and a real server, whose faults are switched while it runs.

It relays TCP, one request a connection, and reads no more of HTTP than where a request ends and what it asks for, so
that a fault can be given to some requests and not to others. What asks to leave HTTP (a web socket) is relayed as it
is until the proxy goes down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

_CHUNK = 1 << 16
_PATIENCE = 120.0  # seconds that a test's request or answer may take
_Asked = Callable[[str], bool]  # of the request's first line, without its version: `POST /api/2.0/...`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a request and to its answer. The default is nothing."""

    wait: float = 0.0  # seconds before the server is asked
    hangs: bool = False  # never asked, never answered
    is_carried_out: bool = True  # the server is asked, whatever becomes of its answer
    says: bytes | None = None  # in place of the server's answer
    keeps: int | None = None  # of the answer's bytes; then the connection ends
    keeps_body: int | None = None  # the same, counted from the end of its head
    resets: bool = False  # it ends with RST instead of FIN
    bytes_per_second: float = 0.0  # of the answer; 0: no limit


def answer(status: str, body: bytes = b"", **headers: str) -> bytes:
    """A whole HTTP answer."""
    named = {"Content-Length": str(len(body)), "Connection": "close"}
    named |= {key.replace("_", "-"): value for key, value in headers.items()}
    lines = [f"HTTP/1.1 {status}", *(f"{key}: {value}" for key, value in named.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


PASSING = Fault()
LOST = Fault(keeps=0, resets=True)  # carried out, and nobody hears of it
DROPPED = Fault(is_carried_out=False, keeps=0, resets=True)
HANGING = Fault(hangs=True)
HTML = answer("200 OK", b"<html><body>Please sign in</body></html>", Content_Type="text/html")


def lying(says: bytes, *, is_carried_out: bool = False) -> Fault:
    return Fault(says=says, is_carried_out=is_carried_out)


class Proxy:
    """Use it in a `with`; `url` is its address, `passed` what was asked of it (first lines of requests, in order)."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        assert parts.hostname and parts.port
        self._target = (parts.hostname, parts.port)
        self._fault, self._rules = PASSING, list[tuple[_Asked, Fault, list[int]]]()
        self._guard = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.asked: list[str] = []
        self.met = 0  # requests that had a fault
        self.port = 0
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def set(self, fault: Fault) -> None:
        """The fault of every request from now on that no rule is about."""
        self._fault = fault

    def on(self, method_and_path: str, fault: Fault, times: int = 1) -> None:
        """A fault of the next `times` requests whose first line begins so; the server's API follows `/api/2.0`."""
        with self._guard:
            self._rules.append((lambda line: _plain(line).startswith(method_and_path), fault, [times]))

    def clear(self) -> None:
        """Nothing is wrong any more."""
        with self._guard:
            self._rules, self._fault = [], PASSING

    def up(self) -> None:
        """Listens, again on the same port."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        """Refuses connections, and resets those that are open."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
            self._listener.close()
            self._listener = None
        with self._guard:
            for connection in self._open:
                _end(connection, resets=True)
            self._open.clear()

    def count(self, method_and_path: str) -> int:
        """How many requests began so."""
        return sum(_plain(line).startswith(method_and_path) for line in self.asked)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            with self._guard:
                self._open.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        fault = PASSING
        with contextlib.suppress(OSError):
            client.settimeout(_PATIENCE)
            head, rest = _head(client)
            if not head:
                return
            line = head.split(b"\r\n", 1)[0].decode(errors="replace").rpartition(" ")[0]
            fault = self._fault_of(line)
            self._relay(client, head, rest, fault)
        with self._guard:
            self._open.discard(client)
        _end(client, resets=fault.resets)

    def _fault_of(self, line: str) -> Fault:
        with self._guard:
            self.asked.append(line)
            fault = self._fault
            for is_meant, wanted, left in self._rules:
                if left[0] > 0 and is_meant(line):
                    left[0] -= 1
                    fault = wanted
                    break
            self.met += fault != PASSING
            return fault

    def _relay(self, client: socket.socket, head: bytes, rest: bytes, fault: Fault) -> None:
        if fault.hangs:
            while client.recv(_CHUNK):
                pass
            return
        time.sleep(fault.wait)
        if not fault.is_carried_out:
            _whole(client, head, rest)  # read, or the answer would be lost with the connection
            _send(client, [fault.says or b""], fault)
            return
        with socket.create_connection(self._target, timeout=_PATIENCE) as server:
            if b"\r\nupgrade:" in head.lower():
                server.sendall(head + rest)
                self._both_ways(client, server)
                return
            server.sendall(_closing(head) + _whole(client, head, rest))
            real = _received(server)
            if fault.says is None and fault.keeps != 0:
                _send(client, real, fault)
            else:
                for _ in real:  # to its end: it was carried out
                    pass
                _send(client, [fault.says or b""], fault)

    def _both_ways(self, client: socket.socket, server: socket.socket) -> None:
        def back() -> None:
            with contextlib.suppress(OSError):
                for piece in _received(server):
                    client.sendall(piece)
            _end(client, resets=True)

        client.settimeout(None)
        server.settimeout(None)
        threading.Thread(target=back, daemon=True).start()
        for piece in _received(client):
            server.sendall(piece)


def _plain(line: str) -> str:
    """`GET mlflow/runs/search` of `GET /api/2.0/mlflow/runs/search?...`."""
    method, _, path = line.partition(" ")
    return f"{method} {urlsplit(path).path.removeprefix('/api/2.0/').removeprefix('/api/')}"


def _head(client: socket.socket) -> tuple[bytes, bytes]:
    """A request up to its empty line, and what came along of its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(_CHUNK)
        if not piece:
            return b"", b""
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _whole(client: socket.socket, head: bytes, rest: bytes) -> bytes:
    """The body of a request."""
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    headers = {name.strip().lower(): value.strip() for name, _, value in lines}
    is_chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
    length = int(headers.get(b"content-length", b"0"))
    while not rest.endswith(b"0\r\n\r\n") if is_chunked else len(rest) < length:
        piece = client.recv(_CHUNK)
        if not piece:
            raise ConnectionError("the client has gone")
        rest += piece
    return rest


def _closing(head: bytes) -> bytes:
    """The request, asking that the connection ends with its answer: nothing else need then be known of that."""
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([lines[0], b"Connection: close", *lines[1:]])


def _received(source: socket.socket) -> Iterator[bytes]:
    while piece := source.recv(_CHUNK):
        yield piece


def _send(client: socket.socket, pieces: Iterator[bytes] | list[bytes], fault: Fault) -> None:
    left = fault.keeps
    if fault.keeps_body is not None:
        whole = b"".join(pieces)
        left, pieces = whole.index(b"\r\n\r\n") + 4 + fault.keeps_body, [whole]
    for piece in pieces:
        part = piece if left is None else piece[:left]
        if fault.bytes_per_second:
            step = max(1, int(fault.bytes_per_second / 10))
            for start in range(0, len(part), step):
                client.sendall(part[start : start + step])
                time.sleep(step / fault.bytes_per_second)
        else:
            client.sendall(part)
        if left is not None:
            left -= len(part)
            if left <= 0:
                if fault.resets and part:
                    time.sleep(0.05)  # an RST overtakes what the client has not read yet
                return


def _end(connection: socket.socket, *, resets: bool) -> None:
    with contextlib.suppress(OSError):
        if resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            connection.shutdown(socket.SHUT_RDWR)
    connection.close()
