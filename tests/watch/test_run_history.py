"""一份日志：坏行不妨碍别的行，抽稀不丢尖峰，沿着步数回看。"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watch_logs import append, rows, samples

from minimind.watch import history as history_module
from minimind.watch.history import History, downsample


def read(path) -> History:
    history = History(path)
    while not history.complete:
        history.refresh(1 << 20)
    return history


BAD_LINES = (
    "", "null", "[]", "1", '"x"', "{}", "{", '{"step"', '{"step": null, "loss": 1}', '{"step": "3", "loss": 1}', '{"step": true, "loss": 1}',
    '{"step": NaN, "loss": 1}', '{"step": Infinity, "loss": 1}', "[" * 100_000, '{"step": ' + "9" * 5000 + "}", '{"step": ' + "9" * 400 + "}", "\x00\x01",
)  # fmt: skip


def test_坏行都跳过_好行一行不少(tmp_path):
    path = tmp_path / "a.jsonl"
    for line, good in zip(BAD_LINES, rows(1, len(BAD_LINES))):
        append(path, f"{line}\n", good)
    with open(path, "ab") as file:
        file.write(b'{"step": 999, "loss": "\xff\xfe"}\n')
    append(path, '{"step": 1000, "loss": 1')
    assert read(path).curve("loss", "step", 1000)["x"] == list(range(1, len(BAD_LINES) + 1))


def test_空值与NaN不画_不认识的键照画_不是数的不画(tmp_path):
    path = tmp_path / "a.jsonl"
    append(
        path,
        '{"step": 1, "loss": null, "x<y>": 2, "flag": true, "words": "好", "nested": {"a": 1}, "list": [1]}\n',
        '{"step": 2, "loss": NaN, "x<y>": -Infinity}\n',
        f'{{"step": 3, "loss": 0.5, "x<y>": {"9" * 400}}}\n',
    )
    history = read(path)
    assert set(history.columns) == {"loss", "x<y>"}
    assert history.curve("loss", "step", 9) == {"count": 1, "last": 0.5, "x": [3.0], "y": [0.5]}
    assert history.curve("x<y>", "step", 9)["y"] == [2.0]


def test_键太多时内存有限(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_KEYS", 3)
    path = tmp_path / "a.jsonl"
    append(path, *({"step": n, f"k{n}": n, "loss": 1.0} for n in range(1, 9)))
    history = read(path)
    assert set(history.columns) == {"k1", "loss", "k2"} and history.curve("loss", "step", 99)["count"] == 8


def test_横轴_验证的行没有词元数_用到那时为止的(tmp_path):
    path = tmp_path / "a.jsonl"
    append(
        path,
        *rows(1, 4),
        {"step": 4, "val_loss": 2.5, "time": 2.0},
        *rows(5, 6),
        {"step": 6, "val_loss": 2.0},
    )
    history = read(path)
    assert history.curve("val_loss", "tokens", 9)["x"] == [400.0, 600.0]
    assert history.curve("val_loss", "time", 9)["x"] == [2.0, 3.0]
    assert history.curve("loss", "time", 9)["x"] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_边写边读_与写完再读相同_续训截掉的也截掉(tmp_path):
    path = tmp_path / "a.jsonl"
    live = History(path)
    for start in range(1, 100, 7):
        append(path, *rows(start, start + 6), samples(start + 6, "答"))
        live.refresh(1 << 20)
    whole = read(path)
    assert live.columns == whole.columns and live.marks == whole.marks and live.axes == whole.axes
    text = "".join(path.read_text("utf-8").splitlines(keepends=True)[:50])
    path.with_suffix(".tmp").write_text(text, "utf-8")
    path.with_suffix(".tmp").replace(path)
    append(path, *rows(900, 901))
    version = live.version
    live.refresh(1 << 20)
    assert live.version != version
    whole = read(path)
    assert live.columns == whole.columns and live.curve("loss", "step", 999)["x"][-1] == 901


def test_体征的话按步收好_混进来的别的不收(tmp_path):
    path = tmp_path / "a.jsonl"
    append(path, {"step": 5, "loss": 1.0, "notes": ["损失没降", 3, None]}, {"step": 6, "notes": "不是列表"})
    assert list(read(path).notes) == [(5.0, "损失没降")]


def test_回看_取那一步之前最近的_再没有就最早的(tmp_path):
    path = tmp_path / "a.jsonl"
    append(path, *rows(1, 9), samples(10, "一"), *rows(11, 19), samples(20, "二", "<b>"))
    history = read(path)
    assert history.record("samples", 20) == (20.0, samples(20, "二", "<b>")["samples"])
    assert history.record("samples", 19.5)[0] == 10.0
    assert history.record("samples", 1)[0] == 10.0
    assert history.record("rollouts", 20) is None
    path.write_text("换过了\n" * 30, "utf-8")
    assert history.record("samples", 20) is None


def test_回看_没有截就接着写的日志_要哪一步就是哪一步(tmp_path):
    """别的程序重新开始时接着旧的写：步数往回走，同一步有两份的取后写的。"""
    path = tmp_path / "a.jsonl"
    append(path, samples(100, "旧一"), samples(200, "旧二"), samples(50, "新零"), samples(100, "新一"))
    history = read(path)
    answers = {step: history.record("samples", step)[1][0]["answer"] for step in (200, 199, 100, 99, 50, 10)}
    assert answers == {200: "旧二", 199: "新一", 100: "新一", 99: "新零", 50: "新零", 10: "新零"}


def test_回看_次数太多时隔一份丢一份_最早与最新的都在(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_MARKS", 16)
    path = tmp_path / "a.jsonl"
    append(path, *(samples(step, str(step)) for step in range(1, 101)))
    history = read(path)
    assert len(history.marks["samples"]) <= 16
    assert history.record("samples", 100)[0] == 100 and history.record("samples", 0)[0] == 1


# ---------------------------------------------------------------- 抽稀


def test_点少就原样():
    x, y = np.arange(5.0), np.arange(5.0) ** 2
    assert downsample(x, y, 5) == {"x": x.tolist(), "y": y.tolist()}


def test_十万点抽成五百_一步的尖峰还在():
    x, y = np.arange(100_000.0), np.ones(100_000)
    y[73_211], y[5] = 50.0, -3.0
    thin = downsample(x, y, 500)
    assert {len(values) for values in thin.values()} == {500}
    assert max(thin["hi"]) == 50.0 and min(thin["lo"]) == -3.0
    assert thin["y"][10] == 1.0 and thin["y"][366] == pytest.approx(1 + 49 / 200, abs=1e-6)  # 一段 200 步


def test_放大一段_点又够少就原样():
    x = np.arange(100_000.0)
    assert downsample(x, x, 500, 1000, 1100)["x"] == list(range(1000, 1101))
    assert downsample(x, x, 500, 5e5, 6e5) == {"x": [], "y": []}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e300, 1e300)), min_size=1, max_size=400),
    st.integers(2, 40),
)
def test_随便什么曲线_不超过点数_平均在高低之间_极值都在(pairs, points):
    x, y = (np.array(values) for values in zip(*pairs))
    thin = downsample(x, y, points)
    assert len(thin["x"]) <= points and thin["x"] == sorted(thin["x"])
    if len(pairs) > points:
        assert max(thin["hi"]) == pytest.approx(y.max()) and min(thin["lo"]) == pytest.approx(y.min())
        for low, middle, high in zip(thin["lo"], thin["y"], thin["hi"]):
            slack = 1e-6 * max(abs(low), abs(high))
            assert middle is None or low - slack <= middle <= high + slack
