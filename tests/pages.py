"""A server on loopback that answers as the pages do that a test stands in for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Pages:
    """Answers by path; a path that is not there is 404."""

    def __init__(self) -> None:
        self.answers: dict[str, object] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        pages = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                pages.asked.append((self.command, self.path, dict(self.headers)))
                found = pages.answers.get(self.path)
                content = found if isinstance(found, str) else json.dumps(found)
                self.send_response(404 if found is None else 200)
                self.end_headers()
                self.wfile.write(content.encode())

            do_GET = do_PUT = answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def serving() -> Iterator[Pages]:
    """Serve pages until the end of the block."""
    pages = Pages()
    threading.Thread(target=pages.server.serve_forever, daemon=True).start()
    try:
        yield pages
    finally:
        pages.server.shutdown()
        pages.server.server_close()
