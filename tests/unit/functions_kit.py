"""The clouds' callers on loopback: Lambda's Runtime API, which the real awslambdaric asks for its events; and how the
functions are started."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support import CHECKOUT

FUNCTION = "snapshotter-tick"


class Lambda:
    """Hands out events, and keeps what the function answers: ("response" or "error", its content)."""

    def __init__(self) -> None:
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.seconds = 900.0
        self.process: subprocess.Popen[bytes] | None = None
        self.log = Path()

    def __call__(self, event: dict[str, Any]) -> tuple[str, Any]:
        self.events.put(event)
        return self.answer()

    def answer(self, patience_s: float = 200) -> tuple[str, Any]:
        """The next. Longer than an image in the making holds its slot up."""
        try:
            return self.answers.get(timeout=patience_s)
        except queue.Empty:
            assert self.process is not None
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGABRT)  # Python says where it was
                self.process.wait(10)
            raise AssertionError(f"no answer, exit {self.process.returncode}: {self.log.read_text()}") from None

    def handler(self) -> type[BaseHTTPRequestHandler]:
        cloud = self

        class Runtime(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = json.dumps(cloud.events.get()).encode()
                self.send_response(200)
                self.send_header("Lambda-Runtime-Aws-Request-Id", str(uuid.uuid4()))
                self.send_header("Lambda-Runtime-Deadline-Ms", str(round((time.time() + cloud.seconds) * 1000)))
                self.send_header("Lambda-Runtime-Invoked-Function-Arn", f"arn:aws:lambda:x:1:function:{FUNCTION}")
                self.send_header("Content-Type", "application/json")  # without it the native client crashes
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                cloud.answers.put((self.path.rpartition("/")[2], json.loads(body)))
                self.send_response(202)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        return Runtime


@contextmanager
def lambda_function(environment: dict[str, str], log: Path) -> Iterator[Lambda]:
    """awslambdaric with our handler, as Lambda starts it."""
    cloud = Lambda()
    server = ThreadingHTTPServer(("127.0.0.1", 0), cloud.handler())
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    given = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(CHECKOUT),
        "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{server.server_port}",
        "AWS_LAMBDA_FUNCTION_NAME": FUNCTION,
        "AWS_LAMBDA_FUNCTION_VERSION": "1",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "256",
        "AWS_REGION": "eu-central-1",
        "PYTHONFAULTHANDLER": "1",
        **environment,
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "awslambdaric", "snapshotter.functions.lambda_handler"],
            env=given,
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    cloud.process, cloud.log = process, log
    try:
        yield cloud
    finally:
        process.kill()
        process.wait(10)
        server.shutdown()
        server.server_close()


@contextmanager
def google_function(environment: dict[str, str], kind: str, log: Path) -> Iterator[str]:
    """functions-framework with our handler, by `http` or `cloudevent`; gives its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as free:
        port = free.server_port
    given = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / '.venv' / 'functions'}",
        "K_SERVICE": FUNCTION,
        **environment,
    }
    words = ["--target", "gcf_handler", "--signature-type", kind, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "functions_framework", "--source", "snapshotter/functions.py", *words],
            env=given,
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(process.pid, 9)  # gunicorn's workers too: a group of its own
        process.wait(10)
