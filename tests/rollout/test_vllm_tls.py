"""https: a real TLS server whose certificate comes from an authority made here, with openssl."""

import shutil
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from vllm_server import END, FakeVllm, listening

from jgrpo.errors import RunError
from jgrpo.rollout.vllm import VllmSampler

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(not OPENSSL, reason="there is no openssl to make certificates with")


def openssl(cwd: Path, line: str) -> str:
    done = subprocess.run([OPENSSL, *line.split()], cwd=cwd, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """ca.pem vouches for good.pem, of localhost; other.pem is an authority that does not. hashed/
    holds ca.pem under the name by which OpenSSL looks for it."""
    folder = tmp_path_factory.mktemp("tls")
    new = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -batch"
    for name in ("ca", "other"):
        openssl(folder, f"{new} -x509 -days 2 -keyout {name}.key -out {name}.pem -subj /CN={name}")
    openssl(folder, f"{new} -keyout good.key -out good.csr -subj /CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost\n")
    openssl(folder, "x509 -req -in good.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 "
            "-extfile names -out good.pem")  # fmt: skip
    (folder / "hashed").mkdir()
    name = openssl(folder, "x509 -in ca.pem -noout -hash")
    shutil.copy(folder / "ca.pem", folder / "hashed" / f"{name}.0")
    (folder / "empty").mkdir()
    (folder / "no.pem").write_text("not a certificate\n")
    return folder


@pytest.fixture
def fake() -> FakeVllm:
    return FakeVllm()


@pytest.fixture
def url(certificates, fake):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "good.pem", certificates / "good.key")
    with listening(fake, context) as url:
        yield url


@pytest.fixture
def names(certificates, monkeypatch):
    """names(SSL_CERT_FILE="ca.pem"): of the files and folders in `certificates`."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)

    def name_them(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value and str(certificates / value))

    return name_them


def open_sampler(url: str) -> VllmSampler:
    return VllmSampler(
        [url], run_id="1", max_tokens=5, max_model_len=64, vocab_size=2**31,
        stop_token_ids=[END], timeout_s=60, start_command="start",
    )  # fmt: skip


def refused_at_once(url: str) -> str:
    """What is said, within a moment, though a server that is away would have a minute."""
    start_s = time.monotonic()
    with pytest.raises(RunError) as refusal:
        open_sampler(url)
    assert time.monotonic() - start_s < 5
    return str(refusal.value)


@pytest.mark.parametrize(
    "given",
    [
        {"SSL_CERT_FILE": "ca.pem"},
        {"SSL_CERT_DIR": "hashed"},
        {"SSL_CERT_FILE": "other.pem", "SSL_CERT_DIR": "hashed"},
        {"SSL_CERT_FILE": "ca.pem", "SSL_CERT_DIR": ""},
    ],
    ids=str,
)
def test_a_run_goes_through_a_server_whose_authority_is_named(given, names, url, fake, tmp_path):
    names(**given)
    sampler = open_sampler(url)
    sampler.load(tmp_path / "step_000001")
    [[completion]] = sampler.sample([[20]], seeds=[3], group_size=1, progress=lambda *_: None)
    sampler.close()
    assert completion.token_ids == [20, 103, END]
    assert [path for path, _ in fake.calls] == [
        "/v1/models", "/v1/load_lora_adapter", "/v1/models", "/v1/completions",
        "/v1/unload_lora_adapter",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"SSL_CERT_FILE": "other.pem"},
        {"SSL_CERT_DIR": "empty"},
        {"SSL_CERT_FILE": ""},
    ],
    ids=str,
)
def test_an_authority_that_is_not_named_is_asked_for_by_name_at_once(given, names, url, fake):
    names(**given)
    said = refused_at_once(url)
    assert url in said
    assert "CERTIFICATE_VERIFY_FAILED" in said
    assert "SSL_CERT_FILE=ca.pem" in said
    assert "SSL_CERT_DIR" in said
    assert not fake.calls  # nothing was sent to who it may be


def test_a_certificate_for_another_name_is_no_matter_of_authorities(names, url, fake):
    names(SSL_CERT_FILE="ca.pem")
    said = refused_at_once(url.replace("localhost", "127.0.0.1"))
    assert "not valid for '127.0.0.1'" in said
    assert "SSL_CERT_FILE" not in said
    assert not fake.calls


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"SSL_CERT_FILE": "nowhere.pem"}, "No such file"),
        ({"SSL_CERT_FILE": "no.pem"}, "no certificate"),
        ({"SSL_CERT_DIR": "nowhere"}, "no such folder"),
        ({"SSL_CERT_DIR": "ca.pem"}, "no such folder"),
    ],
    ids=str,
)
def test_authorities_that_cannot_be_read_are_named(given, reason, names, url, certificates):
    names(**given)
    said = refused_at_once(url)
    [(name, value)] = given.items()
    assert f"{name}={certificates / value}" in said
    assert reason.lower() in said.lower()


def test_https_to_a_server_that_speaks_plain_http_ends_at_once(names, fake):
    names()
    with listening(fake) as plain:
        said = refused_at_once(plain.replace("http:", "https:"))
    assert "take http://" in said
