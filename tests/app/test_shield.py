"""What the demo page's server answers and what it refuses, over HTTP on this machine."""

import http.client
import json
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import pytest

from tests.helpers import tiny_model
from tests.inspection.test_trace import Letters
from thoughtbubbles.app import shield
from thoughtbubbles.app.exhibit import Exhibit
from thoughtbubbles.app.shield import MOST_BYTES, refuse

HERE = "localhost:7860"
JOIN = "/gradio_api/queue/join"


def status(method: str, path: str, **headers: str) -> int:
    """The refusal's status, 200 for none; `sec_fetch_site` is Sec-Fetch-Site, a Host is added."""
    given = {"host": HERE, **{name.replace("_", "-"): value for name, value in headers.items()}}
    found = refuse(method, path, [(name.encode(), value.encode()) for name, value in given.items()])
    return 200 if found is None else found.status


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/theme.css",
        "/favicon.ico",
        "/manifest.json",
        "/assets/index-Ab_1.2.js",
        "/static/img/logo.svg",
        "/gradio_api/queue/data",
        "/gradio_api/heartbeat/4s3tn2rib64",
        "/gradio_api/app_id",
    ],
)
def test_what_the_page_reads_can_only_be_read(path: str) -> None:
    assert [status(method, path) for method in ("GET", "HEAD")] == [200, 200]
    assert [status(m, path, origin=f"http://{HERE}") for m in ("POST", "PUT", "DELETE", "OPTIONS", "get")] == [405] * 5


def test_what_the_page_writes_needs_its_origin() -> None:
    assert status("POST", JOIN, origin=f"http://{HERE}") == 200
    assert status("GET", JOIN) == 405
    assert status("POST", JOIN) == 403


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
        "//gradio_api//file/etc/passwd",
        "/gradio_api/queue/join/",
        "/gradio_api/queue/join\n",
        "/gradio_api/Queue/join",
        "//gradio_api/queue/join",
        "/assets/../../routes.py",
        "/assets/.git/config",
        "/assets//etc/passwd",
        "/gradio_api/cancel",
        "/gradio_api/reset",
        "/static/ffmpeg/ffmpeg-core.js",
        "/theme.css/",
        "",
    ],
)
def test_other_paths_are_refused(path: str, method: str) -> None:
    assert status(method, path, origin=f"http://{HERE}") == 403


def test_every_other_route_of_gradios_is_refused() -> None:
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks() as page:
        pass
    found = {
        (method, route.path)
        for router in _routers(gradio.routes.App.create_app(page))
        for route in router
        for method in getattr(route, "methods", None) or ()
    }
    assert len(found) > 60
    allowed = {
        (method, path)
        for method, path in found
        if status(method, path.replace("{session_hash}", "a1").replace("{path:path}", "a"), origin=f"http://{HERE}")
        == 200
    }
    names = {path.removeprefix("/gradio_api") for _, path in allowed}
    assert names == {
        "/",
        "/theme.css",
        "/favicon.ico",
        "/manifest.json",
        "/assets/{path:path}",
        "/app_id",
        "/queue/data",
        "/heartbeat/{session_hash}",
        "/queue/join",
    }


def _routers(app: Any) -> Iterator[list[Any]]:
    """The routes of an app, and those of the routers that it includes."""
    yield app.routes
    for route in app.routes:
        if (inner := getattr(route, "original_router", None)) is not None:
            yield inner.routes


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1:7860", True),
        ("localhost", True),
        ("LocalHost:7860", True),
        ("localhost.:7860", True),
        ("localhost:8888", True),  # forwarded from another machine
        ("[::1]:7860", True),
        ("127.0.0.2", True),
        ("evil.example", False),
        ("evil.example:7860", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:7860", False),
        ("127.0.0.1.nip.io", False),
        ("evil.example.", False),
        ("localhost..", False),
        ("0.0.0.0:7860", False),
        ("192.168.0.7:7860", False),
        ("[::]:7860", False),
        ("[::ffff:10.0.0.1]", False),
        ("::1", False),
        ("[127.0.0.1]", False),
        ("[::1%lo]", False),
        ("user@localhost", False),
        ("localhost, evil.example", False),
        ("localhost:", False),
        ("localhost:0", False),
        ("localhost:65536", False),
        ("localhost:78x", False),
        ("localhost/x", False),
        ("lo\u0441alhost", False),
        ("", False),
    ],
)
def test_the_host_is_a_name_of_this_machine(host: str, own: bool) -> None:
    assert status("GET", "/", host=host) == (200 if own else 403)


def test_there_is_one_host() -> None:
    assert refuse("GET", "/", []) is not None
    assert refuse("GET", "/", [(b"host", b"localhost"), (b"host", b"localhost")]) is not None


@pytest.mark.parametrize(
    ("host", "origin", "same"),
    [
        (HERE, f"http://{HERE}", True),
        (HERE, "http://LOCALHOST:7860", True),
        ("[::1]:7860", "http://[::1]:7860", True),
        ("localhost", "http://localhost", True),
        (HERE, "http://localhost:3000", False),
        (HERE, "http://localhost", False),
        (HERE, "http://127.0.0.1:7860", False),
        (HERE, f"https://{HERE}", False),
        (HERE, "http://evil.example:7860", False),
        (HERE, f"http://{HERE}.evil.example", False),
        (HERE, f"http://{HERE}/", False),
        (HERE, "null", False),
        (HERE, "", False),
        ("localhost:80", "http://localhost:443", False),
    ],
)
def test_the_origin_is_the_page_itself(host: str, origin: str, same: bool) -> None:
    assert status("POST", JOIN, host=host, origin=origin) == (200 if same else 403)
    assert status("GET", "/gradio_api/queue/data", host=host, origin=origin) == (200 if same else 403)


def test_a_link_opens_the_page_and_nothing_else() -> None:
    for site in ("cross-site", "same-site"):
        assert status("GET", "/", sec_fetch_site=site) == 200
        assert status("GET", "/gradio_api/heartbeat/a1", sec_fetch_site=site) == 403
    assert status("GET", "/gradio_api/heartbeat/a1", sec_fetch_site="same-origin") == 200


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    """The page of an untrained model: the host and port it listens on."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'thoughtbubbles[demo]'")
    from thoughtbubbles.app.page import serve

    server = serve([Exhibit("tiny", tiny_model(), Letters())])
    yield server.address.removeprefix("http://").rstrip("/")
    server.close()


def ask(
    host: str,
    method: str,
    path: str,
    body: bytes | Iterable[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of one answer; a body that is no bytes goes in chunks, without its length."""
    connection = http.client.HTTPConnection(host, timeout=30)
    given = {"Origin": f"http://{host}", "Content-Type": "application/json", **(headers or {})}
    try:
        connection.request(method, path, body, given, encode_chunked=not isinstance(body, bytes | None))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
    finally:
        connection.close()


def test_recordings_and_uploads_are_refused(host: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="video"; filename="a.mp4"\r\n\r\n0\r\n--x--\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for path in ("/gradio_api/process_recording", "/gradio_api/upload", "/%67radio_api/process%5Frecording"):
        code, headers, text = ask(host, "POST", path, body, form)
        assert (code, json.loads(text)) == (403, {"detail": "not part of this page"})
        assert headers["connection"] == "close"


def test_the_host_is_checked_before_all_else(host: str) -> None:
    evil = {"Host": "evil.example", "Origin": "http://evil.example"}
    for method, path in (("GET", "/"), ("POST", JOIN), ("GET", "/assets/x.js")):
        code, headers, text = ask(host, method, path, headers=evil)
        assert (code, "access-control-allow-origin" in headers) == (403, False)
        assert "Host: expected" in text


def test_no_other_origin_is_let_in_by_a_preflight(host: str) -> None:
    for origin in (f"http://{host}", "http://localhost:3000", "http://evil.example", "null"):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        code, headers, _ = ask(host, "OPTIONS", JOIN, headers=asked)
        assert code in (403, 405)
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_has_a_limit(host: str, chunked: bool) -> None:
    def asked(size: int) -> int:
        whole = json.dumps({"data": ["x" * size], "fn_index": 0}).encode()
        body = (whole[i : i + 65536] for i in range(0, len(whole), 65536)) if chunked else whole
        return ask(host, "POST", JOIN, body)[0]

    # Within the limit it is gradio that answers: there is no session.
    assert asked(MOST_BYTES - 100) == 400
    assert asked(MOST_BYTES) == 413
    assert asked(8 * MOST_BYTES) == 413


def test_a_body_without_end_is_not_read_to_it(host: str) -> None:
    address, _, port = host.partition(":")
    head = f"POST {JOIN} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nTransfer-Encoding: chunked\r\n\r\n"
    sent, chunk = 0, b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with socket.create_connection((address, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        with suppress(ConnectionError):
            while sent < 2**28:
                connection.sendall(chunk)
                sent += len(chunk)
    assert sent < 2**28


def test_a_body_that_does_not_come_is_not_waited_for(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shield, "MOST_SECONDS", 0.3)
    address, _, port = host.partition(":")
    head = f"POST {JOIN} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nContent-Length: 9\r\n\r\n{{"
    with socket.create_connection((address, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(4096).partition(b"\r\n")[0]


def test_there_are_no_websockets(host: str) -> None:
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    for path in ("/gradio_api/queue/join", "/gradio_api/stream/a", "/ws"):
        assert ask(host, "GET", path, headers=upgrade)[0] in (403, 405)


def test_the_page_is_served_with_its_policy(host: str) -> None:
    for name in (host, f"LOCALHOST:{host.rpartition(':')[2]}"):
        code, headers, text = ask(host, "GET", "/", headers={"Host": name, "Origin": f"http://{name}"})
        assert code == 200
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "Thoughtbubbles" in text


def test_a_proxy_is_not_believed(host: str) -> None:
    asked = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"}
    _, _, text = ask(host, "GET", "/", headers=asked)
    assert "evil.example" not in text


def test_the_server_closes_with_a_connection_open() -> None:
    pytest.importorskip("gradio", reason="needs gradio: pip install 'thoughtbubbles[demo]'")
    from thoughtbubbles.app.page import serve

    server = serve([Exhibit("tiny", tiny_model(), Letters())])
    host = server.address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request("GET", "/gradio_api/heartbeat/a1")
    assert connection.getresponse().status == 200
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host.partition(":")[0], int(host.partition(":")[2])))
