"""A push to a stand-in for the hub, on this machine, gives it the folder byte by byte."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
import timm
import torch

from ldae.commands.export import export
from ldae.errors import InputError


def is_private(created: dict) -> bool:
    """Return whether the request for a repository wants a private one, in any version."""
    return created.get("private") is True or created.get("visibility") == "private"


class Hub(ThreadingHTTPServer):
    """The routes by which huggingface_hub creates a repository and commits to it."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Route)
        self.status = status
        self.private: bool | None = None  # whether there is a repository, and whom it is for
        self.refused = ""  # why the hub refuses cards
        self.created: list[dict] = []
        self.large: dict[str, bytes] = {}  # by their SHA-256
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]


class Route(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/api/models/user/digits":
            self.answer({"id": "user/digits", "private": self.server.private})
        else:
            self.answer({"error": f"no route {self.path}"}, 404)

    def do_PUT(self) -> None:
        self.server.large[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        hub, body, path = self.server, self.body(), self.path.partition("?")[0]
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.status != 200:
            self.answer({"error": "Invalid credentials"}, hub.status)
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            known = {"url": f"{hub.address}/user/digits", "name": "user/digits"}
            if hub.private is None:
                hub.private = is_private(hub.created[-1])
                self.answer(known)
            else:
                self.answer(known, 409)
        elif path == "/api/validate-yaml":
            errors = [{"message": hub.refused}] if hub.refused else []
            self.answer({"errors": errors, "warnings": []}, 400 if hub.refused else 200)
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                part | {"actions": {"upload": {"href": f"{hub.address}/large/{part['oid']}"}}}
                for part in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            hub.commit([json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{hub.address}/user/digits/commit/1", "commitOid": "1"})
        else:
            self.answer({"error": f"no route {path}"}, 404)


@pytest.fixture
def hub(monkeypatch):
    """hub(status): a stand-in that answers with this status, and the hub that is pushed to."""
    servers = []

    def make(status: int = 200) -> Hub:
        servers.append(Hub(status))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", servers[-1].address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_hub_gets_the_folder(hub, run, tmp_path, capsys):
    stand_in = hub()
    out = export(run(), tmp_path / "out", push="user/digits", private=True, license="mit")
    local = {path.name: path.read_bytes() for path in out.iterdir()}
    assert stand_in.files == local and len(stand_in.large) == 1
    (created,) = stand_in.created
    assert (created["organization"], created["name"]) == ("user", "digits")
    assert is_private(created)
    assert stand_in.tokens == {"Bearer hf_secret"}
    printed = capsys.readouterr().out
    assert f"pushed {out} to {stand_in.address}/user/digits" in printed and "secret" not in printed
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for name, content in stand_in.files.items():
        (pulled / name).write_bytes(content)
    one, other = (
        timm.create_model(f"local-dir:{f}", pretrained=True).eval() for f in (out, pulled)
    )
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(one(images), other(images))


def test_results_of_graders_and_unfinished_files_stay_here(hub, run, tmp_path):
    """Results name paths of this machine."""
    out = export(run(), tmp_path / "out")
    finished = {path.name for path in out.iterdir()}
    for name in ("evals/knn-images/results.json", "model.onnx.partial/model.onnx", "a.partial"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    stand_in = hub()
    export(out, out, push="user/digits")
    assert stand_in.files.keys() == finished


def test_a_refusal_is_a_sentence_and_loses_nothing(hub, run, tmp_path, monkeypatch):
    folder, out = run(), tmp_path / "out"
    hub(401)
    with pytest.raises(InputError, match="out is written, but not pushed to user/digits: .*401"):
        export(folder, out, push="user/digits")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="out is written, but not pushed to user/digits: "):
        export(folder, out, push="user/digits")
    stand_in = hub()
    export(folder, out, push="user/digits")  # the same command
    assert stand_in.files.keys() == {path.name for path in out.iterdir()}


def test_weights_do_not_go_to_a_public_repository_that_should_be_private(hub, run, tmp_path):
    stand_in, folder = hub(), run()
    stand_in.private = False
    with pytest.raises(InputError, match="^user/digits is there already, and public: make it priv"):
        export(folder, tmp_path / "out", push="user/digits", private=True)
    assert not stand_in.files and not stand_in.large
    export(folder, tmp_path / "out", push="user/digits")
    assert stand_in.files


def test_a_card_that_the_hub_refuses_is_refused_with_the_reason(hub, run, tmp_path):
    hub().refused = '"license" must be one of [apache-2.0, mit]'
    with pytest.raises(InputError, match=r'"license" must be one of .*; delete the folder and exp'):
        export(run(), tmp_path / "out", push="user/digits")
