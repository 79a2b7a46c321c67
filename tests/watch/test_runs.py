"""清单与接口：现状说得对，没变的不重读，名字再怪也无妨，日志以外的文件拿不到。"""

from __future__ import annotations

import json
import os
import time

import httpx
import pytest
from watch_logs import append, rows, samples
from watch_server import serving

from minimind.watch import runs as runs_module
from minimind.watch.runs import Runs, find_sources

NAMES = ["<img src=x onerror=alert(1)>", "a&b=c?d#e %2e%2e", "..", "名字 带空格", "'\"", "x" * 180]


def card(path, **values):
    path.with_suffix(".card.json").write_text(json.dumps(values), "utf-8")


def only(runs: Runs, **options) -> dict:
    (row,) = runs.list(**options)
    return row


def whole(runs: Runs, run_id: str, **options) -> dict:
    while not (found := runs.detail(run_id, **options))["complete"]:
        pass
    return found


# ---------------------------------------------------------------- 现状


def test_现状_到第几步_速度_还要多久_体征(folder):
    path = folder / "logs" / "pretrain_512.jsonl"
    append(
        path, *rows(1, 40), {"step": 40, "val_loss": 0.25, "time": 20.0}, *rows(41, 50, notes=["损失没降"])
    )
    card(path, recipe="pretrain", total_steps=150)
    row = only(Runs(folder))
    assert (row["name"], row["folder"], row["state"], row["recipe"]) == (
        "pretrain_512",
        "",
        "running",
        "pretrain",
    )
    assert (row["step"], row["total"], row["loss"], row["val_loss"]) == (50, 150, 8 / 50, 0.25)
    assert row["left"] == pytest.approx(100 * 0.5) and row["tokens_per_s"] == 200
    assert row["notes"] == ["损失没降"] * 3


def test_走完了是完成_久不动是停了_两行之间很久的多等(folder):
    path = folder / "logs" / "a.jsonl"
    append(path, *rows(1, 10))
    runs, now = Runs(folder), path.stat().st_mtime
    assert [only(runs, now=now + seconds)["state"] for seconds in (0, 100, 150)] == [
        "running",
        "running",
        "stopped",
    ]
    card(path, total_steps=10)
    assert only(runs)["state"] == "done"
    slow = folder / "logs" / "b.jsonl"
    append(slow, *({"step": n, "loss": 1.0, "time": 300.0 * n} for n in range(3)))
    states = [
        [row["state"] for row in runs.list(now=now + after) if row["name"] == "b"] for after in (1000, 2000)
    ]
    assert states == [["running"], ["stopped"]]


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"total_steps": "很多", "recipe": 3}', '{"total_steps": null}', "\ud800"]
)
def test_卡片坏了_别的照说(folder, text):
    path = folder / "logs" / "a.jsonl"
    append(path, *rows(1, 3))
    path.with_suffix(".card.json").write_text(text, "utf-8", errors="surrogatepass")
    row = only(Runs(folder))
    assert row["step"] == 3 and row["total"] is None and row["left"] is None and row["recipe"] is None


@pytest.mark.parametrize(
    ("lines", "card_text", "left"),
    [
        (['{"step":1,"time":-1.7e308}', '{"step":2,"time":1.7e308}'], '{"total_steps": 5}', None),
        (['{"step":1,"time":0}', '{"step":2,"time":1e300}'], '{"total_steps": 1e300}', None),
        ([f'{{"step":1,"time":-{10**308}}}', f'{{"step":2,"time":{10**308}}}'], '{"total_steps": 5}', None),
        (['{"step":1,"time":0}', '{"step":2,"time":3}'], '{"total_steps": -5}', None),
        (['{"step":1,"time":0}', '{"step":2,"time":3}'], '{"total_steps": 5}', 9.0),
    ],
)
def test_算出来放不下的数_只空着这一格_别的训练照列(folder, lines, card_text, left):
    path = folder / "logs" / "a.jsonl"
    append(path, *(line + "\n" for line in lines))
    path.with_suffix(".card.json").write_text(card_text, "utf-8")
    (folder / "eval").mkdir()
    exam = '{"tasks": {"a": {"correct": 1e308, "total": 1e-308}, "b": {"correct": 1, "total": 2}}}'
    (folder / "eval" / "a_world.json").write_text(exam, "utf-8")
    append(folder / "logs" / "b.jsonl", *rows(1, 3))
    with serving(folder) as url:
        listed = httpx.get(f"{url}/api/runs")
        assert listed.status_code == 200
        row = {row["name"]: row for row in listed.json()["runs"]}
        assert set(row) == {"a", "b"} and row["a"]["left"] == left and row["a"]["state"] == "running"
        detail = httpx.get(f"{url}/api/run/{row['a']['id']}")
        assert detail.status_code == 200 and detail.json()["exam"] == {"b": 0.5}


@pytest.mark.parametrize("size", [1000, 200_000, 3_000_000])
def test_末尾的一行再长_前面的损失与速度也看得到(folder, size):
    path = folder / "logs" / "a.jsonl"
    append(path, *rows(1, 30), samples(30, "长" * size), {"step": 30, "val_loss": 1.5, "time": 15.0})
    card(path, total_steps=60)
    row = only(Runs(folder))
    assert (row["step"], row["loss"], row["val_loss"]) == (30, pytest.approx(8 / 30), 1.5)
    assert row["left"] == pytest.approx(15.0)


def test_修改时间在将来的_从看到它变的时候算起(folder):
    """共享盘的时钟快一小时：停了的不该一直算在训练，在训练的也不该算停了。"""
    path = folder / "logs" / "a.jsonl"
    append(path, *rows(1, 3))
    now = time.time()
    os.utime(path, (now + 3600, now + 3600))
    runs = Runs(folder)
    assert [only(runs, now=now + after)["state"] for after in (0, 100, 150)] == ["running"] * 2 + ["stopped"]
    append(path, *rows(4, 4))
    os.utime(path, (now + 3700, now + 3700))
    assert [only(runs, now=now + after)["state"] for after in (200, 300, 350)] == ["running"] * 2 + [
        "stopped"
    ]


def test_没变的不重读(folder, monkeypatch):
    path = folder / "logs" / "a.jsonl"
    append(path, *rows(1, 3))
    append(folder / "logs" / "b.jsonl", *rows(1, 3))
    runs, read = Runs(folder), []
    real = runs_module.summarize
    monkeypatch.setattr(runs_module, "summarize", lambda source: read.append(source.name) or real(source))
    runs.list()
    runs.list()
    assert sorted(read) == ["a", "b"]
    append(path, *rows(4, 4))
    assert {row["name"]: row["step"] for row in runs.list()} == {"a": 4, "b": 3} and read[2:] == ["a"]
    run_id = next(row["id"] for row in runs.list() if row["name"] == "a")
    version = whole(runs, run_id)["version"]
    assert runs.detail(run_id, have=version) == {"same": True}
    append(path, *rows(5, 5))
    assert runs.detail(run_id, have=version)["keys"]["loss"]["count"] == 5


def test_一次只读一块_下次接着读(folder):
    path = folder / "logs" / "a.jsonl"
    append(path, *rows(1, 500))
    runs = Runs(folder, chunk=5000)
    run_id = only(runs)["id"]
    first = runs.detail(run_id)
    assert not first["complete"] and 0 < first["keys"]["loss"]["count"] < 500
    assert (
        runs.detail(run_id, have=first["version"])["keys"]["loss"]["count"] > first["keys"]["loss"]["count"]
    )
    assert whole(runs, run_id)["keys"]["loss"]["count"] == 500


def test_内存满了放下最久没看的_再看时重读得一样(folder):
    for n in range(4):
        append(folder / "logs" / f"{n}.jsonl", *rows(1, 100))  # 每份四条曲线，400 点
    runs = Runs(folder, max_points=900)
    ids = sorted(row["id"] for row in runs.list())
    first = whole(runs, ids[0])
    for run_id in ids[1:]:
        whole(runs, run_id)
    assert list(runs._histories) == ids[2:]
    assert runs.detail(ids[0], have=first["version"]) == {"same": True}


def test_下面两层里的也找得到_更深的与隐藏的不找(folder):
    for inside in ("logs", "demo/logs", "a/b/logs", "a/b/c/logs", ".x/logs", "demo/logs/logs"):
        append(folder / inside / "r.jsonl", *rows(1, 1))
    os.symlink(folder, folder / "demo" / "loop")
    found = {source.folder for source in find_sources(folder).values()}
    assert found == {"", "demo", "a/b"}


def test_考过的带着各任务的正确率(folder):
    append(folder / "logs" / "sft_64.jsonl", *rows(1, 2))
    runs = Runs(folder)
    run_id = only(runs)["id"]
    before = runs.detail(run_id)
    assert before["exam"] == {}
    (folder / "eval").mkdir()
    result = {
        "tasks": {
            "add": {"correct": 3, "total": 4},
            "none": {"total": 0},
            "bad": 3,
            "<b>": {"correct": 0, "total": 2},
        }
    }
    (folder / "eval" / "sft_64_world.json").write_text(json.dumps(result))
    assert runs.detail(run_id, have=before["version"])["exam"] == {"add": 0.75, "<b>": 0.0}


# ---------------------------------------------------------------- 接口


def test_接口_清单_曲线_回看(folder):
    path = folder / "logs" / "a.jsonl"
    append(path, *rows(1, 3), samples(3, "答<script>"), {"step": 3, "expert_load": [[0.5, 0.5]]})
    with serving(folder) as url:
        (row,) = httpx.get(f"{url}/api/runs").json()["runs"]
        at = f"{url}/api/run/{row['id']}"
        found = httpx.get(at, params={"axis": "tokens"}).json()
        assert found["keys"]["loss"]["x"] == [100, 200, 300] and found["keys"]["loss"]["y"] == [
            8,
            4,
            2.666667,
        ]
        assert found["records"] == {"samples": [3], "expert_load": [3]}
        value = httpx.get(f"{at}/record", params={"kind": "samples", "step": 9}).json()
        assert value == {"step": 3, "value": samples(3, "答<script>")["samples"]}
        assert httpx.get(at, params={"have": found["version"], "axis": "tokens"}).json() == {"same": True}
        assert httpx.get(at, params={"low": 2, "high": 3}).json()["keys"]["loss"]["x"] == [2, 3]


def test_接口_参数写错得到四百_不存在的四百零四_不出五百(folder):
    append(folder / "logs" / "a.jsonl", *rows(1, 3))
    with serving(folder) as url:
        (row,) = httpx.get(f"{url}/api/runs").json()["runs"]
        at = f"{url}/api/run/{row['id']}"
        wrong = ["axis=x", "points=1", "points=9999", "points=x", "low=nan", "high=inf", "low=", "low=x"]
        assert {httpx.get(f"{at}?{query}").status_code for query in wrong} == {422}
        assert httpx.get(f"{at}/record?kind=loss&step=1").status_code == 400
        assert httpx.get(f"{at}/record?kind=samples&step=nan").status_code == 422
        assert httpx.get(f"{at}/record?kind=samples&step=1").status_code == 404
        for bad in ("zzz", "..%2f..%2fetc%2fpasswd", "%00", "%ff", "a" * 3000):
            assert httpx.get(f"{url}/api/run/{bad}").status_code == 404
        (folder / "secret.txt").write_text("不给看")
        for path in (
            "/static/../app.py",
            "/static/%2e%2e/app.py",
            "/shared/..%2fapp.py",
            "/secret.txt",
            "/../secret.txt",
        ):
            assert httpx.get(url + path).status_code == 404
        assert {
            httpx.request(method, f"{url}/api/runs").status_code for method in ("POST", "PUT", "DELETE")
        } == {405}


def test_名字再怪也列得出看得到(folder):
    for name in NAMES:
        append(folder / "logs" / f"{name}.jsonl", *rows(1, 2))
    odd = os.fsencode(folder / "logs") + b"/\xff\xfe.jsonl"
    with open(odd, "wb") as file:
        file.write(
            b'{"step": 1, "loss": 2.0, "\\ud800": 1, "notes": ["\\udc00"], "samples": [{"prompt": "\\ud83d", "answer": NaN}]}\n'
        )
    with serving(folder) as url:
        listed = {row["name"]: row["id"] for row in httpx.get(f"{url}/api/runs").json()["runs"]}
        assert set(listed) == {*NAMES, "\ufffd\ufffd"}
        for name, run_id in listed.items():
            assert run_id.isalnum() and httpx.get(f"{url}/api/run/{run_id}").json()["keys"]["loss"][
                "last"
            ] == (8 / 2 if name in NAMES else 2)
        answer = httpx.get(f"{url}/api/run/{listed[chr(0xFFFD) * 2]}/record?kind=samples&step=1")
        assert answer.json()["value"][0]["answer"] is None


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("evil.example", 403), ("", 403), ("[::1]:9", 200)],
)
def test_只认本机的名字(folder, host, status):
    with serving(folder) as url:
        answer = httpx.get(f"{url}/api/runs", headers={"Host": host})
        assert answer.status_code == status
        if status == 403:
            assert "Host" in answer.json()["error"]
        assert httpx.get(f"{url}/", headers={"Host": host}).status_code == status
    with serving(folder, allowed_hosts=("evil.example",)) as url:
        assert httpx.get(f"{url}/", headers={"Host": "evil.example"}).status_code == 200


def test_目录还没有_之后有了就看得到_重启之后编号不变(folder):
    with serving(folder) as url:
        assert httpx.get(f"{url}/api/runs").json() == {"runs": []}
        append(folder / "logs" / "a.jsonl", *rows(1, 3))
        (row,) = httpx.get(f"{url}/api/runs").json()["runs"]
    with serving(folder) as url:
        assert httpx.get(f"{url}/api/run/{row['id']}").json()["complete"]
        assert abs(row["updated"] - time.time()) < 3600


def test_十万行_一次要到的曲线不超过一千点(folder):
    lines = "".join(f'{{"step": {n}, "loss": {8 / n:.4f}, "time": {n}}}\n' for n in range(1, 100_001))
    path = folder / "logs" / "big.jsonl"
    append(path, lines)
    runs = Runs(folder)
    found = whole(runs, only(runs)["id"], points=1000)
    assert {len(curve["x"]) for curve in found["keys"].values()} == {1000} and found["keys"]["loss"][
        "count"
    ] == 100_000
    assert len(json.dumps(found)) < 300_000
