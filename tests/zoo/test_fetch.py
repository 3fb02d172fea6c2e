"""Weights over HTTP, from a real server: whole and verified, or not at all."""

import concurrent.futures
import dataclasses
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch

from restpoint.zoo import CardError, CheckpointError, Weights, create_model, list_models
from restpoint.zoo.fetch import fetch_weights
from restpoint.zoo.sources import to_url
from restpoint.zoo.weights import find_weights, pack_weights


class Shop(http.server.BaseHTTPRequestHandler):
    """Serves `content`; the path says how badly."""

    content = b""
    ranges = []

    def do_GET(self):
        how, start = self.path.split("/")[1], self.headers.get("Range")
        Shop.ranges.append(start)
        if how == "absent":
            self.send_error(404)
            return
        if how == "away":
            self.send_response(302)
            self.send_header("Location", "http://example.org/w.safetensors")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first = int(start.removeprefix("bytes=").removesuffix("-")) if start and how != "rangeless" else 0
        body = self.content[first:]
        if how == "moved":
            self.send_response(302)
            self.send_header("Location", "/good/w.safetensors")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(self.content) - 1}/{len(self.content)}")
        if how != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        third = len(self.content) // 3
        if how in ("breaks", "rangeless") and len(Shop.ranges) < 3:
            body = body[:third]
        elif how == "stingy":
            body = b"" if first else body[:third]
        elif how == "endless":
            body = body * 3
        elif how == "hangs":
            self.wfile.write(body[:third])
            Shop.waiting.set()
            Shop.closing.wait()
            return
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def shop(monkeypatch):
    """The address of a server, and the entry of what it sells on a card."""
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("RESTPOINT_OFFLINE", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    Shop.content, weights = pack_weights(torch.nn.Linear(300, 300), "w.safetensors")
    Shop.ranges, Shop.waiting, Shop.closing = [], threading.Event(), threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield lambda how: dataclasses.replace(weights, source=f"http://127.0.0.1:{server.server_port}/{how}/w.safetensors")
    Shop.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("how", ["good", "moved", "breaks", "rangeless"])
def test_a_file_arrives_whole(shop, tmp_path, how):
    path = fetch_weights(shop(how), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "w.safetensors"
    assert path.read_bytes() == Shop.content
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]
    if how == "breaks":
        third = len(Shop.content) // 3
        assert Shop.ranges == [None, f"bytes={third}-", f"bytes={2 * third}-"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("absent", "answers 404"),
        ("away", "by https only, and not from 'http://example.org"),
        ("stingy", "only .* of .* bytes came: the stream ended early"),
        ("endless", "more bytes than"),
    ],
)
def test_what_does_not_arrive_leaves_nothing_behind(shop, tmp_path, how, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch_weights(shop(how), tmp_path)
    assert f"Or put the file into {tmp_path} by hand: http://127.0.0.1" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_another_file_under_the_same_name_is_thrown_away(shop, tmp_path):
    with pytest.raises(CheckpointError, match="sha256 .* thrown away"):
        fetch_weights(dataclasses.replace(shop("good"), sha256="0" * 64), tmp_path)
    with pytest.raises(CheckpointError, match="and its card says 77"):
        fetch_weights(dataclasses.replace(shop("good"), size=77), tmp_path)
    assert not list(tmp_path.iterdir())


def test_whoever_interrupts_a_transfer_leaves_no_litter(shop, tmp_path):
    weights = shop("hangs")
    code = "from pathlib import Path; from restpoint.zoo import Weights; from restpoint.zoo.fetch import *; "
    # What runs in the background inherits that interrupts are ignored.
    code += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"fetch_weights({weights!r}, Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert Shop.waiting.wait(timeout=60)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err
    assert not list(tmp_path.iterdir())


def test_several_may_fetch_the_same_file(shop, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch_weights(shop("breaks"), tmp_path), range(4)))
    assert {path.read_bytes() for path in paths} == {Shop.content}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_refused_connection_says_so_at_once(shop, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        source = f"http://127.0.0.1:{closed.getsockname()[1]}/w.safetensors"
        with pytest.raises(CheckpointError, match="no connection .*refused") as caught:
            fetch_weights(dataclasses.replace(shop("good"), source=source), tmp_path)
    assert "w.safetensors" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("switch", ["RESTPOINT_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nothing_is_tried(shop, tmp_path, monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    with pytest.raises(CheckpointError, match=rf"{switch} forbids.* put the file into {tmp_path}"):
        fetch_weights(shop("good"), tmp_path)
    assert Shop.ranges == []
    monkeypatch.setenv(switch, "0")
    assert fetch_weights(shop("good"), tmp_path).is_file()


def test_what_is_here_is_not_fetched(shop, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"mine")
    assert find_weights(shop("good"), [tmp_path, tmp_path / "cache"]) == tmp_path / "w.safetensors"
    assert Shop.ranges == []
    assert find_weights(shop("good"), [tmp_path / "other", tmp_path / "cache"]).parent == tmp_path / "cache"


def test_a_repository_of_the_hub_is_an_address(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert to_url("hf:me/models", "w.safetensors") == "https://huggingface.co/me/models/resolve/main/w.safetensors"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example.org")
    assert to_url("hf:me/a.b@v1.0", "w").startswith("https://mirror.example.org/me/a.b/resolve/v1.0/")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example.org")
    weights = Weights("w.safetensors", "0" * 64, 5, source="hf:me/models")
    with pytest.raises(CheckpointError, match="by https only"):
        fetch_weights(weights, tmp_path)


def test_a_file_name_cannot_leave_its_folder(shop):
    with pytest.raises(CardError, match="bare file name"):
        dataclasses.replace(shop("good"), file="../w.safetensors")


def test_a_model_whose_weights_are_elsewhere_loads_by_name(shop, tiny, home):
    path, card = home / "checkpoints" / "trial_tiny.ones.safetensors", home / "checkpoints" / "trial_tiny.ones.json"
    Shop.content = path.read_bytes()
    path.unlink()
    assert "trial_tiny.ones" not in list_models(pretrained=True)
    plain = json.loads(card.read_text())
    plain["weights"]["source"] = shop("good").source
    card.write_text(json.dumps(plain))
    assert "trial_tiny.ones" in list_models(pretrained=True)
    model = create_model("trial_tiny.ones", pretrained=True)
    assert torch.equal(model.stem.weight, tiny.stem.weight)
    assert path.is_file()
    create_model("trial_tiny.ones", pretrained=True)
    assert len(Shop.ranges) == 1
