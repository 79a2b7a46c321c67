"""``minimind data convert | mix | dedup`` 与 ``data check`` 的长度分布：真的命令，真的文件。"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from data_helpers import SHELLS, chat, lines_of, write_shell

from minimind.cli import main
from minimind.dataset import mix as mix_module
from minimind.dataset.dedup import Near, shingles


def run(capsys, *argv) -> tuple[int, str]:
    code = main(["data", *map(str, argv)]) or 0
    return code, "".join(capsys.readouterr())


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---------------------------------------------------------------- convert


@pytest.mark.parametrize("shell", SHELLS)
def test_convert把各种外壳与写法写成jsonl(shell, tmp_path, capsys):
    alpaca = [{"instruction": f"问{i}", "input": "", "output": f"答{i}"} for i in range(12)]
    source, out = write_shell(tmp_path / f"a.{shell}", alpaca), tmp_path / "新" / "out.jsonl"
    code, said = run(capsys, "convert", source, out)
    assert code == 0 and read(out) == [chat(f"问{i}", f"答{i}") for i in range(12)]
    assert f"a.{shell}：12 条 sft 数据；Alpaca 的 instruction / input / output 当作对话 12 条。" in said
    # 再来一次：不覆盖；加 --force 写出同样的字节
    before = out.read_bytes()
    code, said = run(capsys, "convert", source, out)
    assert code == 2 and "文件已存在" in said and "--force" in said
    assert run(capsys, "convert", source, out, "--force")[0] == 0 and out.read_bytes() == before


def test_convert几个文件接起来_坏行报错或跳过(tmp_path, capsys):
    write_shell(tmp_path / "a.jsonl", [chat("问", "答")])
    (tmp_path / "b.jsonl").write_bytes(lines_of([chat("问二", "答二")]) + b"{}\n")
    spec, out = f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", tmp_path / "out.jsonl"
    code, said = run(capsys, "convert", spec, out)
    assert code == 2 and "b.jsonl:2 字段 conversations" in said and not list(tmp_path.glob("*out*"))
    code, said = run(capsys, "convert", spec, out, "--on_bad_line", "skip")
    assert code == 0 and len(read(out)) == 2 and "跳过坏行 1 条" in said and "b.jsonl:2" in said


@pytest.mark.parametrize("command", ["convert", "dedup"])
def test_只有mix认权重_别的命令写了就是错误(command, tmp_path, capsys):
    write_shell(tmp_path / "a.jsonl", [chat("问", "答")])
    write_shell(tmp_path / "b.jsonl", [chat("问二", "答二")])
    spec = f"{tmp_path}/a.jsonl:0.5,{tmp_path}/b.jsonl:0.5"
    code, said = run(capsys, command, spec, tmp_path / "out.jsonl")
    assert (
        code == 2 and "写着权重 0.5" in said and "data mix" in said and not (tmp_path / "out.jsonl").exists()
    )
    assert run(capsys, "mix", spec, tmp_path / "out.jsonl")[0] == 0


def test_一行也读不懂_说第一行坏在哪里(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"{'text': 1}\n{broken\n")
    code, said = run(capsys, "convert", tmp_path / "a.jsonl", tmp_path / "out.jsonl")
    assert code == 2 and "a.jsonl:1" in said and "看不出是哪种数据" not in said


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 400 + ".5", '{"深处": [1, NaN]}'])
@pytest.mark.parametrize("command", ["convert", "mix", "dedup"])
def test_写出的总是合法的JSON_用不到的字段里的NaN也要指出来(command, number, tmp_path, capsys):
    good = {**chat("问", "答"), "分": 0.5, "注": "NaN 与 1e999 只是文字"}
    bad = json.dumps(chat("问二", "答二"), ensure_ascii=False)[:-1] + f', "质量": {number}}}'
    source, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of([good]) + bad.encode() + b"\n")
    code, said = run(capsys, command, source, out)
    assert code == 2 and "a.jsonl:2 字段 质量" in said and "null" in said and not list(tmp_path.glob("*out*"))
    code, said = run(capsys, command, source, out, "--on_bad_line", "skip")
    assert code == 0 and read(out) == [good]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("a.jsonl", "输出就是输入之一"),
        ("out.parquet", "写成 out.jsonl"),
        ("out.jsonl.gz", "写成 out.jsonl"),
        ("夹.jsonl", "是一个目录"),
        ("a.jsonl/夹/out.jsonl", "a.jsonl 是文件，不是文件夹"),
    ],
)
def test_输出不对就不动手(out, words, tmp_path, capsys):
    source = write_shell(tmp_path / "a.jsonl", [chat("问", "答")])
    (tmp_path / "夹.jsonl").mkdir()
    before = source.read_bytes()
    for command in ("convert", "mix", "dedup"):
        code, said = run(capsys, command, source, tmp_path / out, "--force")
        assert code == 2 and words in said and source.read_bytes() == before
    code, said = run(capsys, "dedup", source, tmp_path / "o.jsonl", "--removed", source / "r.jsonl")
    assert code == 2 and "是文件，不是文件夹" in said and not (tmp_path / "o.jsonl").exists()


def test_不是同一种数据不能合在一起(tmp_path, capsys):
    write_shell(tmp_path / "a.jsonl", [chat("问", "答")])
    write_shell(tmp_path / "b.jsonl", [{"text": "一段"}])
    code, said = run(capsys, "convert", f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", tmp_path / "o.jsonl")
    assert code == 2 and "a.jsonl 是 sft、b.jsonl 是 pretrain" in said


# ---------------------------------------------------------------- mix


@pytest.fixture
def three(tmp_path) -> str:
    """三个文件，带权重的写法。"""
    weights = {"a.jsonl": (40, 0.5), "b.jsonl.gz": (15, 0.3), "c.json": (6, 0.2)}
    for name, (size, _) in weights.items():
        write_shell(tmp_path / name, [{"text": f"{name}:{i}"} for i in range(size)])
    return ",".join(f"{tmp_path / name}:{weight}" for name, (_, weight) in weights.items())


def by_file(records: list[dict]) -> Counter:
    return Counter(record["text"].split(":")[0] for record in records)


def test_mix每一轮精确到条_同一组轮流用到_种子决定次序(three, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    code, said = run(capsys, "mix", three, out, "--epochs", 4)
    assert code == 0 and "a.jsonl 31 条（50.82%，取自 40 条）" in said
    records = read(out)
    assert len(records) == 4 * 61
    for epoch in range(4):  # 30.5、18.3、12.2 → 31、18、12
        assert by_file(records[61 * epoch :][:61]) == {"a.jsonl": 31, "b.jsonl.gz": 18, "c.json": 12}
    times = Counter(record["text"] for record in records)
    for name in ("a.jsonl", "b.jsonl.gz", "c.json"):
        own = [n for text, n in times.items() if text.startswith(name)]
        assert max(own) - min(own) <= 1
    assert records[:61] != sorted(records[:61], key=lambda r: r["text"])
    again, other = tmp_path / "again.jsonl", tmp_path / "other.jsonl"
    run(capsys, "mix", three, again, "--epochs", 4)
    run(capsys, "mix", three, other, "--epochs", 4, "--seed", 7)
    assert again.read_bytes() == out.read_bytes() != other.read_bytes()
    assert not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob(".*"))


def test_mix指定一轮的条数_没有权重按条数的比例(three, tmp_path, capsys):
    run(capsys, "mix", three, tmp_path / "o.jsonl", "--rows", 100)
    assert by_file(read(tmp_path / "o.jsonl")) == {"a.jsonl": 50, "b.jsonl.gz": 30, "c.json": 20}
    plain = ",".join(item.rpartition(":")[0] for item in three.split(","))
    run(capsys, "mix", plain, tmp_path / "p.jsonl")
    assert Counter(r["text"] for r in read(tmp_path / "p.jsonl")).most_common(1)[0][1] == 1
    assert by_file(read(tmp_path / "p.jsonl")) == {"a.jsonl": 40, "b.jsonl.gz": 15, "c.json": 6}


@pytest.mark.parametrize("rows_before", [0, 1, 60, 61, 100, 121])
@pytest.mark.parametrize("tail", [b"", b'{"text": "a.jso'])
def test_mix中断后接着写_逐字节相同(rows_before, tail, three, tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(capsys, "mix", three, whole, "--epochs", 2)
    original, written = mix_module.dump, 0

    def dump(record):
        nonlocal written
        if written == rows_before:
            raise KeyboardInterrupt
        written += 1
        return original(record)

    monkeypatch.setattr(mix_module, "dump", dump)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        mix_module.main_mix([three, str(out), "--epochs", "2"])
    monkeypatch.setattr(mix_module, "dump", original)
    part = tmp_path / "out.jsonl.part"
    assert part.exists() and not out.exists()
    part.write_bytes(part.read_bytes() + tail)  # 写到一半的一行
    code, said = run(capsys, "mix", three, out, "--epochs", 2)
    assert code == 0 and out.read_bytes() == whole.read_bytes()
    assert (f"已有 {rows_before} 条" in said) == bool(rows_before)


def test_mix设置或内容变了_不接着写(three, tmp_path, capsys):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(capsys, "mix", three, whole)
    (tmp_path / "out.jsonl.part").write_text('{"text": "别处来的"}\n')
    (tmp_path / "out.jsonl.part.json").write_text('{"files": []}')
    code, said = run(capsys, "mix", three, out)
    assert code == 0 and "从头写" in said and out.read_bytes() == whole.read_bytes()


def test_mix跳过的坏行不占份额(tmp_path, capsys):
    write_shell(tmp_path / "a.jsonl", [{"text": f"a:{i}"} for i in range(5)] + [{"text": ""}] * 5)
    write_shell(tmp_path / "b.jsonl", [{"text": f"b:{i}"} for i in range(5)])
    spec, out = f"{tmp_path}/a.jsonl:0.5,{tmp_path}/b.jsonl:0.5", tmp_path / "o.jsonl"
    code, said = run(capsys, "mix", spec, out)
    assert code == 2 and "a.jsonl:6 字段 text" in said and not out.exists()
    assert run(capsys, "mix", spec, out, "--on_bad_line", "skip")[0] == 0
    assert by_file(read(out)) == {"a": 5, "b": 5}


# ---------------------------------------------------------------- dedup


def test_dedup完全重复的只留第一条_说出与哪一条重复(tmp_path, capsys):
    write_shell(
        tmp_path / "a.jsonl", [chat("问", "答"), chat("问", "另一个答"), {**chat("问", "答"), "id": 3}]
    )
    write_shell(tmp_path / "b.json", [{"instruction": "问", "output": "答"}, chat("新问", "答")])
    out, removed = tmp_path / "out.jsonl", tmp_path / "removed.jsonl"
    code, said = run(
        capsys, "dedup", f"{tmp_path}/a.jsonl,{tmp_path}/b.json", out, "--near", 0, "--removed", removed
    )
    assert code == 0 and "5 条里去掉完全重复 2 条（40.0%）；留下 3 条" in said
    assert read(out) == [chat("问", "答"), chat("问", "另一个答"), chat("新问", "答")]
    assert [(r["file"], r["same_as"], r["how"]) for r in read(removed)] == [
        (f"{tmp_path}/a.jsonl:3", f"{tmp_path}/a.jsonl:1", "exact"),
        (f"{tmp_path}/b.json:1", f"{tmp_path}/a.jsonl:1", "exact"),
    ]


def test_dedup近似重复按片段的相似度(tmp_path, capsys):
    pytest.importorskip("datasketch")
    words = [
        "春江潮水连海平海上明月共潮生",
        "滟滟随波千万里何处春江无月明",
        "江流宛转绕芳甸月照花林皆似霰",
        "空里流霜不觉飞汀上白沙看不见",
    ]
    base = "，".join(f"第{i}句{word}" for i, word in enumerate(words * 3))
    near, far = (
        base.replace("第5句", "第五句"),
        "，".join(reversed(base.split("，")[:3])) + "完全是另外的一段话" * 6,
    )
    exact = {name: shingles(text) for name, text in (("base", base), ("near", near), ("far", far))}

    def similarity(a: str, b: str) -> float:
        return len(exact[a] & exact[b]) / len(exact[a] | exact[b])

    assert similarity("base", "near") > 0.9 and similarity("base", "far") < 0.5
    path = write_shell(
        tmp_path / "a.jsonl", [{"text": t} for t in (base, near, far, base.upper() + " ", near)]
    )
    out, removed = tmp_path / "out.jsonl", tmp_path / "removed.jsonl"
    code, said = run(capsys, "dedup", path, out, "--removed", removed)
    assert code == 0 and "完全重复 1 条" in said and "近似重复（相似度不低于 0.8）2 条" in said
    assert [r["text"] for r in read(out)] == [base, far]
    found = [r for r in read(removed) if r["how"] == "near"]
    assert [r["same_as"] for r in found] == [f"{path}:1"] * 2
    assert abs(found[0]["similarity"] - similarity("base", "near")) < 0.1


def test_dedup没有装datasketch_给出安装的命令(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasketch", None)
    path = write_shell(tmp_path / "a.jsonl", [{"text": "一段"}])
    code, said = run(capsys, "dedup", path, tmp_path / "o.jsonl")
    assert code == 2 and "datasketch" in said and "[data]" in said and not (tmp_path / "o.jsonl").exists()


# ---------------------------------------------------------------- check


def test_check几个文件_各自认出什么_配成什么样_画出长度分布(tmp_path, capsys):
    write_shell(tmp_path / "a.json", [{"instruction": f"问{i}", "output": "答" * (i + 1)} for i in range(30)])
    write_shell(tmp_path / "b.jsonl.gz", [chat(f"另问{i}", "答") for i in range(10)])
    picture = tmp_path / "图" / "长度.png"
    code, said = run(
        capsys,
        "check",
        f"{tmp_path}/a.json:0.25,{tmp_path}/b.jsonl.gz:0.75",
        "--histogram",
        picture,
        "--max_seq_len",
        64,
    )
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    for words in (
        "a.json（sft）",
        "JSON 数组",
        "b.jsonl.gz（sft）",
        "gzip 压缩",
        "合起来 2 个文件",
        "长度分布",
        "█",
    ):
        assert words in said, words
    assert "a.json 第 30 行" in said
    rows = [line for line in said.splitlines() if "一轮里" in line]
    assert "10 条（30 条可用，占 25.00%）" in rows[0] and "30 条（10 条可用，占 75.00%）" in rows[1]


def test_check的坏行说出是哪个文件(tmp_path, capsys):
    write_shell(tmp_path / "a.jsonl", [{"text": "好"}])
    write_shell(tmp_path / "b.jsonl.gz", [{"text": "好"}, {"text": ""}])
    code, said = run(capsys, "check", f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl.gz")
    assert code == 1 and "a.jsonl：没有坏行" in said and f"{tmp_path}/b.jsonl.gz:2 字段 text" in said


def test_check的图要以png结尾(tmp_path, capsys):
    path = write_shell(tmp_path / "a.jsonl", [{"text": "好"}])
    code, said = run(capsys, "check", path, "--histogram", tmp_path / "a.jpg")
    assert code == 2 and "--histogram" in said and ".png" in said


def ask(text: str, **more) -> dict:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    return {"conversations": turns, **more}


def test_dedup文字相同而答案资料好坏不同的都留下(tmp_path, capsys):
    pytest.importorskip("datasketch")
    question, path, out = (
        "张宁的笔名是什么？请查一查资料再回答我。",
        tmp_path / "a.jsonl",
        tmp_path / "b.jsonl",
    )
    rows = [
        ask(question, gt=["月土"], lookup={"张宁": {"笔名": "月土"}}),
        ask(question, gt=["布树"], lookup={"张宁": {"笔名": "布树"}}),
        ask(question, gt=["布树"], lookup={"张宁": {"笔名": "布树"}}, id=7),  # 只有编号不同：重复
        ask(f"{question}？", gt=["布树"], lookup={"张宁": {"笔名": "布树"}}),  # 多一个问号：近似重复
    ]
    path.write_bytes(lines_of(rows))
    code, said = run(capsys, "dedup", path, out)
    assert code == 0 and "完全重复 1 条" in said and "1 条（25.0%）；留下 2 条" in said
    assert [row["gt"] for row in read(out)] == [["月土"], ["布树"]]
    answer = {"prompt": "今天天气怎么样啊朋友", "completion": "今天天气不错适合出门走走"}
    path.write_bytes(lines_of([{**answer, "label": label} for label in (True, False, True)]))
    code, said = run(capsys, "dedup", path, out, "--force")
    assert code == 0 and [row["label"] for row in read(out)] == [True, False]


@pytest.mark.parametrize(("near", "kept"), [("1", 2), ("0.99", 2), ("0.5", 1)])
def test_dedup门槛高到一也行(near, kept, tmp_path, capsys):
    pytest.importorskip("datasketch")
    base = "云川的春天来得早，三月初桃花就开了，河边的柳树也绿了，孩子们在堤上放风筝。"
    rows = [{"text": base}, {"text": base.replace("三月", "二月")}, {"text": f"{base} "}]
    (tmp_path / "a.jsonl").write_bytes(lines_of(rows))
    code, said = run(capsys, "dedup", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--near", near)
    assert code == 0 and len(read(tmp_path / "b.jsonl")) == kept, said


def test_dedup相似度够的几乎都找得到():
    """片段相似度 0.86 的两百对：候选找得不全的话，其中四分之一会漏掉。"""
    pytest.importorskip("datasketch")
    rng, near, found = random.Random(0), Near(0.8), 0
    for i in range(200):
        text = "".join(rng.choices("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往", k=66))
        other = text[:61] + "".join(rng.choices("秋收冬藏", k=5))
        ours, theirs = shingles(text), shingles(other)
        assert 0.83 < len(ours & theirs) / len(ours | theirs) < 0.88
        near.keep(i, near.find(text)[2])
        found += i in near.index.query(near.find(other)[2])
    assert found >= 196
