"""The page's server, over real HTTP: this machine alone, read only, fixed routes."""

import http.client
import json
import threading

import pytest
from page_runs import HOSTILE, a_run, completion

from jgrpo.errors import InputError
from jgrpo.page.data import Runs
from jgrpo.page.server import SCRIPTS, Server, to_json
from jgrpo.run.rundir import write_rollouts
from jgrpo.view import serve


@pytest.fixture
def server(tmp_path):
    run = a_run(tmp_path / "a")
    write_rollouts(run, 9, [completion(HOSTILE, HOSTILE, right=False, advantage=0.0)])
    with Server(Runs([run]), 0) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers=headers)
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply.status, dict(reply.headers), body


def test_it_listens_on_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("path", ["/", "/page.css", "/plotly.js", *(f"/{s}" for s in SCRIPTS)])
def test_every_part_of_the_page_is_there_with_its_policy(server, path):
    status, headers, body = ask(server, path)
    assert (status, len(body) > 300) == (200, True)
    assert "default-src 'none'; script-src 'self';" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1", "", "127.0.0.1.evil"]
)
def test_another_name_gets_nothing(server, host):
    status, _, body = ask(server, "/api/runs", Host=host)
    assert (status, b"accuracy" in body) == (403, False)


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/config.json",
        "/page.py", "/assets/page.js", "/api", "/api/", "/page.css/", "/a/metrics.jsonl",
    ],
)  # fmt: skip
def test_no_path_is_opened(server, path):
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize(
    "query",
    [
        "run=0&step=../../1", "run=0", "run=-1&step=1", "run=99&step=1", "run=0&step=77",
        "run=%00&step=1", "run=0&step=1e3", "run=0&step=99999999999999999999", "run=²&step=1",
        "run=0&step=1%2F..%2F..",
    ],
)  # fmt: skip
def test_a_query_that_names_nothing_is_told_so(server, query):
    status, _, body = ask(server, f"/api/step?{query.replace('²', '%C2%B2')}")
    assert status == 404
    assert json.loads(body)["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_changed(server, method):
    assert ask(server, "/api/runs", method)[0] == 501


def test_a_hostile_completion_arrives_as_it_is(server):
    status, headers, body = ask(server, "/api/completion?run=0&step=9&row=0")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body)["completion"] == HOSTILE
    assert body.isascii()


def test_numbers_that_json_has_not_are_null():
    assert json.loads(to_json({"a": [1.0, float("nan")], "b": float("inf")})) == {
        "a": [1.0, None], "b": None}  # fmt: skip


def test_a_port_that_is_taken_is_told(server, tmp_path):
    with pytest.raises(InputError, match="give another, or 0"):
        serve(Runs([]), server.server_port)
