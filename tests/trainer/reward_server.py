"""A reward server in this process, whose responses each test can choose."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from star_trainer.rewards.remote import RemoteReward


class Server:
    """Sends the chosen responses and records the requests."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.methods: list[str] = []
        self.paths: list[str] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, bytes]] = lambda body: ok([0.5] * len(body["images"]))
        self.location: str | None = None
        self.drop = 0  # number of connections that are closed without a response
        self.hold: threading.Event | None = None  # delays the response
        self.headers_back: dict[str, str] = {}  # additional headers of responses
        self.instead: list[
            Callable[[BaseHTTPRequestHandler], None]
        ] = []  # handlers of the next requests, instead of ``answer``
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.methods.append("POST")
                outer.paths.append(self.path)
                outer.headers.append({key.lower(): value for key, value in self.headers.items()})
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                if outer.drop:
                    outer.drop -= 1
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if outer.instead:
                    self.close_connection = True
                    outer.instead.pop(0)(self)
                    return
                if outer.hold:
                    outer.hold.wait()
                status, answer = outer.answer(body)
                self.send_response(status)
                if outer.location:
                    self.send_header("Location", outer.location)
                for name, value in outer.headers_back.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def do_GET(self) -> None:
                outer.methods.append("GET")
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/score"


def ok(scores: object) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": scores}).encode()


def breaks_off(
    status: int, *headers: tuple[str, str], body: bytes = b"half"
) -> Callable[[BaseHTTPRequestHandler], None]:
    """A response with these headers and only a part of the body that they announce."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers:
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def resets(request: BaseHTTPRequestHandler) -> None:
    """Resets the connection."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.rfile.close()  # the last reference but one
    request.connection.close()


def in_turn(*answers: tuple[int, bytes]) -> Callable[[dict[str, Any]], tuple[int, bytes]]:
    left = list(answers)
    return lambda body: left.pop(0)


def remote(server: Server, **options: Any) -> RemoteReward:
    """The reward of a server, without waits between attempts."""
    return RemoteReward(server.url, **{"backoff": 0.0, "timeout": 30.0, **options})
