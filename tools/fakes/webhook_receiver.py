"""Somebody's own server, which the service calls when a request is done; it refuses the first calls if told to."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer


class Listener(HTTPServer):
    """A webhook's receiver; it refuses the first calls."""

    def __init__(self, refusals):
        self.calls, self.refusals = [], refusals
        super().__init__(("127.0.0.1", 0), Receiver)


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.calls.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(503 if len(self.server.calls) <= self.server.refusals else 204)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def listening(refusals=0):
    with Listener(refusals) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,))
        thread.start()
        yield listener
        listener.shutdown()
        thread.join()
