"""The page over HTTP, for one person on this machine: 127.0.0.1, read only, fixed routes.

A request's path is looked up in a table and never opened. The Host header is checked, so that no
other site can read it by pointing its own name here (DNS rebinding); the page itself may load
nothing from elsewhere (Content-Security-Policy).
"""

import json
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from jgrpo.errors import InputError
from jgrpo.page.data import Runs

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("page.js", "curves.js", "completions.js", "problem.js", "health.js", "start.js")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)  # plotly writes styles of its own
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LARGEST_NUMBER = 10**9


def plotly_js() -> str:
    """plotly's own bundle, from its package."""
    import plotly

    file = Path(plotly.__file__).with_name("package_data") / "plotly.min.js"
    return file.read_text("utf-8")


def page_html() -> str:
    """The page as the server gives it: style and scripts as files beside it."""
    names = ("plotly.js", *SCRIPTS)
    tags = "".join(f'<script src="/{name}" defer></script>\n' for name in names)
    style = '<link rel="stylesheet" href="/page.css">'
    return asset("page.html").replace("<!--style-->", style).replace("<!--scripts-->", tags)


def asset(name: str) -> str:
    return (ASSETS / name).read_text("utf-8")


def to_json(content: Any) -> str:
    """JSON in ASCII, so that no character of a completion can break a reader; NaN as null."""
    try:
        return json.dumps(content, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


Files = Mapping[str, tuple[str, Callable[[], str]]]
"""Path -> content type, and what makes the content."""


def files() -> Files:
    script = "text/javascript; charset=utf-8"
    return {
        "/": ("text/html; charset=utf-8", page_html),
        "/page.css": ("text/css; charset=utf-8", lambda: asset("page.css")),
        "/plotly.js": (script, plotly_js),
        **{f"/{name}": (script, lambda name=name: asset(name)) for name in SCRIPTS},  # type: ignore[misc]
    }


def answers(runs: Runs) -> Mapping[str, Callable[[Mapping[str, str]], Any]]:
    """Path -> what answers it, given the query."""

    def number(query: Mapping[str, str], name: str) -> int:
        text = query.get(name, "")
        if not (text.isascii() and text.isdecimal() and len(text) < len(str(LARGEST_NUMBER))):
            raise InputError(f"{name}={text!r:.40}: needs a number")
        return int(text)

    return {
        "/api/runs": lambda q: runs.overview(),
        "/api/step": lambda q: runs.step(number(q, "run"), number(q, "step")),
        "/api/completion": lambda q: runs.completion(*(number(q, n) for n in
                                                       ("run", "step", "row"))),
        "/api/problems": lambda q: runs.problems(),
        "/api/problem": lambda q: runs.problem(q.get("key", "")),
        "/api/report": lambda q: runs.report(number(q, "n")),
    }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """One request. GET and HEAD alone are answered."""

    server: "Server"
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "jgrpo", ""
    timeout = 30.0

    def do_GET(self) -> None:
        """A part of the page, or an answer; 403 to another Host, 404 to what is not there."""
        if self.headers.get("Host") not in self.server.hosts:
            return self._say(HTTPStatus.FORBIDDEN, "text/plain", "not asked for by its own name")
        url = urlsplit(self.path)
        if made := self.server.files.get(url.path):
            return self._say(HTTPStatus.OK, made[0], made[1]())
        if answer := self.server.answers.get(url.path):
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            try:
                content, status = answer(query), HTTPStatus.OK
            except (InputError, OSError) as error:
                content, status = {"error": str(error)}, HTTPStatus.NOT_FOUND
            return self._say(status, "application/json", to_json(content))
        self._say(HTTPStatus.NOT_FOUND, "text/plain", "no such page")

    do_HEAD = do_GET

    def _say(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8", "backslashreplace")
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the terminal is for the address."""


class Server(ThreadingHTTPServer):
    """Serves the page of `runs` on 127.0.0.1; port 0 takes a free one. OSError if it is taken."""

    daemon_threads = True

    def __init__(self, runs: Runs, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.files, self.answers = files(), answers(runs)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error; anything else is ours, and told."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)
