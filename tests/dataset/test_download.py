"""下载：对着本机的真服务器，断了能续、内容不对不留、错误各有一句话。"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest

from minimind.dataset import download
from minimind.dataset.download import choose_files, main_download
from minimind.dataset.hub import RemoteFile
from minimind.errors import UserError, guard

CONTENT = json.dumps({"text": "春眠不觉晓"}, ensure_ascii=False).encode() * 20_000  # 约 0.6 MB
MS_REPO, HF_REPO = "gongjy/minimind_dataset", "jingyaogong/minimind_dataset"


class Hub(ThreadingHTTPServer):
    """同时扮演两个站的小服务器；可以在传到一半时断开、谎报哈希、不认 Range。"""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"pretrain_hq.jsonl": CONTENT, "dpo.jsonl": b'{"a": 1}\n', "README.md": b"hi"}
        self.wrong_hash = self.ignore_range = False
        self.break_after: list[int] = []  # 依次：这次下载传多少字节后断开
        self.statuses: list[int] = []  # 依次：先用这些状态码回答下载请求
        self.ranges: list[str | None] = []  # 收到的下载请求的 Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        url = urlparse(self.path)
        query = parse_qs(url.query)
        if url.path == f"/api/v1/datasets/{MS_REPO}/repo/tree":
            files = [
                {"Path": name, "Size": len(data), "Sha256": self.sha256(data), "Type": "blob"}
                for name, data in self.server.files.items()
            ]
            self.reply_json({"Code": 200, "Data": {"Files": [*files, {"Path": "images", "Type": "tree"}]}})
        elif url.path == f"/api/datasets/{HF_REPO}/tree/main":
            files = []
            for name, data in self.server.files.items():
                entry = {"type": "file", "path": name, "size": len(data), "oid": self.git_sha1(data)}
                if len(data) > 1000:
                    entry["lfs"] = {"oid": self.sha256(data), "size": len(data)}
                files.append(entry)
            self.reply_json([*files, {"type": "directory", "path": "images", "oid": "0"}])
        elif url.path == f"/api/v1/datasets/{MS_REPO}/repo":
            self.send_file(query["FilePath"][0])
        elif url.path.startswith(f"/datasets/{HF_REPO}/resolve/main/"):
            # 真的站会转到别的主机去取内容
            self.send_response(302)
            self.send_header("Location", "/cdn/" + url.path.rsplit("/", 1)[1])
            self.end_headers()
        elif url.path.startswith("/cdn/"):
            self.send_file(url.path[5:])
        else:
            self.send_error(404)

    def sha256(self, data: bytes) -> str:
        return hashlib.sha256(data + b"?" * self.server.wrong_hash).hexdigest()

    def git_sha1(self, data: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def reply_json(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, name: str):
        self.server.ranges.append(self.headers.get("Range"))
        if self.server.statuses:
            self.send_error(self.server.statuses.pop(0))
            return
        data = self.server.files[name]
        start = 0
        if self.headers.get("Range") and not self.server.ignore_range:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if self.server.break_after:
            body = body[: self.server.break_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(download, "RETRY_WAIT_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture(params=["modelscope", "huggingface"])
def fetch(request, hub, tmp_path):
    """``fetch(名字…)`` 运行命令，返回目标目录。"""

    def run(*names: str):
        folder = tmp_path / "dataset"
        code = main_download([*names, "--source", request.param, "--endpoint", hub.url, "--dir", str(folder)])
        assert code == 0
        return folder

    return run


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


def test_下载到位且不留半成品(fetch, hub):
    folder = fetch("pretrain_hq", "dpo.jsonl")  # 可省 .jsonl
    assert names_in(folder) == ["dpo.jsonl", "pretrain_hq.jsonl"]
    assert (folder / "pretrain_hq.jsonl").read_bytes() == CONTENT


def test_连接一再断开时从断点接着传(fetch, hub):
    hub.break_after = [100_000, 150_000, 1]
    folder = fetch("pretrain_hq.jsonl")
    assert (folder / "pretrain_hq.jsonl").read_bytes() == CONTENT
    assert hub.ranges == [None, "bytes=100000-", "bytes=250000-", "bytes=250001-"]


def test_程序中断后再运行从断点接着传(fetch, hub, monkeypatch, tmp_path):
    hub.break_after = [200_000]
    monkeypatch.setattr(download, "RETRIES", 0)
    with pytest.raises(UserError, match="从断点继续"):
        fetch("pretrain_hq.jsonl")
    folder = tmp_path / "dataset"
    assert not (folder / "pretrain_hq.jsonl").exists()
    fetch("pretrain_hq.jsonl")
    assert hub.ranges == [None, "bytes=200000-"]
    assert names_in(folder) == ["pretrain_hq.jsonl"]
    assert (folder / "pretrain_hq.jsonl").read_bytes() == CONTENT


def test_服务器不认断点时从头来而不是接坏(fetch, hub):
    hub.break_after, hub.ignore_range = [100_000], True
    assert (fetch("pretrain_hq.jsonl") / "pretrain_hq.jsonl").read_bytes() == CONTENT


def test_远端换了内容时不接旧的半截(fetch, hub, monkeypatch):
    hub.break_after = [200_000]
    monkeypatch.setattr(download, "RETRIES", 0)
    with pytest.raises(UserError):
        fetch("pretrain_hq.jsonl")
    hub.files["pretrain_hq.jsonl"] = CONTENT[::-1]
    folder = fetch("pretrain_hq.jsonl")
    assert (folder / "pretrain_hq.jsonl").read_bytes() == CONTENT[::-1]


def test_哈希不符时不留文件(fetch, hub, tmp_path):
    hub.wrong_hash = True
    with pytest.raises(UserError, match=r"哈希不符.*换一个 --source"):
        fetch("pretrain_hq.jsonl")
    assert names_in(tmp_path / "dataset") == []


def test_小文件核对git哈希(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "git_sha1", lambda self, data: "0" * 40)
    with pytest.raises(UserError, match="哈希不符"):
        main_download(["dpo", "--source", "huggingface", "--endpoint", hub.url, "--dir", str(tmp_path)])


def test_已有同样的文件不再下载而不同的不覆盖(fetch, hub, capsys):
    folder = fetch("dpo")
    fetch("dpo")
    assert len(hub.ranges) == 1
    assert "校验一致" in capsys.readouterr().err
    (folder / "dpo.jsonl").write_text("我自己的")
    with pytest.raises(UserError, match="--force"):
        fetch("dpo")
    assert (folder / "dpo.jsonl").read_text() == "我自己的"
    fetch("dpo", "--force")
    assert (folder / "dpo.jsonl").read_bytes() == hub.files["dpo.jsonl"]


def test_暂时的服务器错误会重试(fetch, hub):
    hub.statuses = [503, 429, 500]
    assert (fetch("dpo") / "dpo.jsonl").exists()


@pytest.mark.parametrize(("status", "word"), [(404, "--list"), (403, "没有权限"), (410, "410")])
def test_改不了的错误立刻说清(fetch, hub, status, word):
    hub.statuses = [status]
    with pytest.raises(UserError, match=word):
        fetch("dpo")
    assert len(hub.ranges) == 1


def test_没有这个仓库时一句话(hub, tmp_path, capsys):
    code = guard(main_download)(["--endpoint", hub.url, "--repo", "没有/这个", "--dir", str(tmp_path)])
    assert code == 2
    assert "404" in capsys.readouterr().err


def test_地址写错时一句话(tmp_path):
    with pytest.raises(UserError, match="--endpoint：不是网址：'modelscope'；期望：写成 https"):
        main_download(["--endpoint", "modelscope", "--dir", str(tmp_path)])


def test_地址答的不是清单时说清(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "reply_json", lambda self, value: original(self, {"Message": "不对"}))
    with pytest.raises(UserError, match="不是文件清单"):
        main_download(["--endpoint", hub.url, "--dir", str(tmp_path)])


original = Handler.reply_json


def test_连不上时一句话带修法(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RETRY_WAIT_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match=r"网络连续失败.*--endpoint"):
        main_download(["--endpoint", "http://127.0.0.1:9", "--dir", str(tmp_path)])


def test_磁盘不够时开始前就说(fetch, hub, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match="磁盘空间不足"):
        fetch("pretrain_hq")
    assert hub.ranges == []


def test_列出文件(hub, capsys):
    assert main_download(["--list", "--endpoint", hub.url]) == 0
    shown = capsys.readouterr().out
    assert "pretrain_hq.jsonl" in shown and "minimind pretrain" in shown


def test_说明里有两代公布的名字与大小(capsys):
    with pytest.raises(SystemExit):
        main_download(["--help"])
    lines = {
        words[0]: " ".join(words[1:3])
        for line in capsys.readouterr().out.splitlines()
        if (words := line.replace("✔", "").split())
    }
    published = {
        "pretrain_hq": "1.6 GB", "sft_mini_512": "1.2 GB", "sft_512": "7.5 GB", "sft_1024": "5.6 GB", "sft_2048": "9 GB",
        "r1_mix_1024": "340 MB", "rlaif-mini": "1 MB", "lora_identity": "22.8 KB", "lora_medical": "34 MB", "dpo": "53 MB",
        "pretrain_t2t": "10 GB", "pretrain_t2t_mini": "1.2 GB", "sft_t2t": "14 GB", "sft_t2t_mini": "1.6 GB",
        "rlaif": "24 MB", "agent_rl": "86 MB", "agent_rl_math": "18 MB",
    }  # fmt: skip
    assert {name: lines.get(name) for name in published} == published


def files_named(*names):
    return [RemoteFile(name, 1, "http://x") for name in names]


def test_名字写错时猜一个(hub):
    files = files_named("pretrain_hq.jsonl", "sft_mini_512.jsonl")
    with pytest.raises(UserError, match=r"是不是 pretrain_hq\.jsonl"):
        choose_files(files, ["pretrain_hp"])


def test_不写名字取推荐的一套():
    old = files_named("pretrain_hq.jsonl", "sft_mini_512.jsonl", "dpo.jsonl")
    assert [f.name for f in choose_files(old, [])] == ["pretrain_hq.jsonl", "sft_mini_512.jsonl"]
    new = files_named("pretrain_t2t_mini.jsonl", "sft_t2t_mini.jsonl")
    assert len(choose_files(new, [])) == 2
    assert [f.name for f in choose_files([*old, *new], [])] == [
        "pretrain_t2t_mini.jsonl",
        "sft_t2t_mini.jsonl",
    ]
    assert [f.name for f in choose_files([*old, *files_named("README.md")], ["all"])] == [
        "dpo.jsonl",
        "pretrain_hq.jsonl",
        "sft_mini_512.jsonl",
    ]


def test_清单里的路径写不到别的目录():
    files = files_named("../evil.jsonl", "/etc/evil.jsonl", "a/b.jsonl", ".hidden.jsonl", "ok.jsonl")
    assert [f.name for f in choose_files(files, ["all"])] == ["ok.jsonl"]
    with pytest.raises(UserError):
        choose_files(files, ["../evil.jsonl"])
