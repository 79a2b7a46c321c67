"""训练与评测命令：可复现、配比、许可取舍、压缩率承诺。"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.errors import UserError
from minimind.tokenizer import encode_plain, encode_plain_batch, load_tokenizer
from minimind.tokenizer.corpus import EXCLUDED_TAGS, parse_mix, read_texts, record_text, weighted
from minimind.tokenizer.eval import compare, main_eval
from minimind.tokenizer.special import SPECIAL_TOKENS
from minimind.tokenizer.train import main_train, train_bpe

# 目标：留出部分与没训练过的文件上，每个 token 至少这么多字节
TARGETS = {
    "pretrain_zh": 3.71,
    "pretrain_en": 3.09,
    "sft": 3.93,
    "mc_eval": 2.99,
    "lora_medical": 3.35,
    "lora_law": 4.57,
    "gsm8k_test": 2.42,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """一个小语料文件夹：中英两份 jsonl，英文带来源标签。"""
    folder = tmp_path_factory.mktemp("corpus")
    zh = [
        {"text": f"第{i}章，小镇的早晨总是从面包店开始，{'阳光' * (i % 5)}洒在石板路上。\n"}
        for i in range(300)
    ]
    en = [
        {
            "conversations": [
                {"role": "user", "content": f"Where is house {i}?"},
                {"role": "assistant", "content": "Here."},
            ]
        }
        for i in range(200)
    ]
    for name, rows in (("zh", zh), ("en", en)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    (folder / "meta").mkdir()
    tags = ["good" if i % 2 else EXCLUDED_TAGS[0] for i in range(200)]
    (folder / "meta/en.jsonl.src.txt").write_text("\n".join(tags) + "\n", "utf-8")
    return folder


def run_train(corpus, folder, **flags) -> int:
    flags = {"data_dir": corpus, "mix": "zh=1,en=1.5", "vocab_size": 360, "save_dir": folder} | flags
    return main_train([f"--{name}={value}" for name, value in flags.items()])


def test_两次训练的文件逐字节相同(corpus, tmp_path):
    """第二次换一个进程：哈希种子与线程数都不同。"""
    assert run_train(corpus, tmp_path / "a") == 0
    command = [sys.executable, "trainer/train_tokenizer.py", f"--data_dir={corpus}", "--mix=zh=1,en=1.5"]
    subprocess.run(
        [*command, "--vocab_size=360", f"--save_dir={tmp_path / 'b'}"], check=True, capture_output=True
    )
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.compat
def test_训练出来的文件夹可以直接打开(corpus, tmp_path):
    assert run_train(corpus, tmp_path) == 0
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 360
    assert tuple(tokenizer.convert_ids_to_tokens(range(len(SPECIAL_TOKENS)))) == SPECIAL_TOKENS
    assert tokenizer.decode(encode_plain(tokenizer, "小镇 <think> 12\r\n")) == "小镇 <think> 12\r\n"
    assert tokenizer.chat_template == load_tokenizer().chat_template


def test_按来源标签跳过不许用的行(corpus):
    kept = list(read_texts(corpus / "en.jsonl", EXCLUDED_TAGS))
    assert len(kept) == 100 and kept[0] == "Where is house 1?\nHere."
    assert len(list(read_texts(corpus / "en.jsonl"))) == 200


def test_标签与语料行数不同时报错而不是错位(corpus, tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "en.jsonl").write_text((corpus / "en.jsonl").read_text("utf-8"), "utf-8")
    (tmp_path / "meta/en.jsonl.src.txt").write_text("good\n" * 199, "utf-8")
    with pytest.raises(UserError, match="199"):
        list(read_texts(tmp_path / "en.jsonl", EXCLUDED_TAGS))


def test_不许用的来源都在说明里标明(shared_dir):
    """许可说明里每个标成 NC 或 research-only 的 sft 来源都在默认的跳过名单里。"""
    text = (shared_dir / "data/SOURCES.md").read_text("utf-8")
    section = text.split("## sft")[1].split("\n## ")[0]
    flagged = {
        line.split("|")[1].strip()
        for line in section.splitlines()
        if "**NC**" in line or "**research-only**" in line
    }
    assert flagged and flagged <= set(EXCLUDED_TAGS)


@given(st.lists(st.integers(), max_size=40), st.floats(0.1, 5))
def test_权重是平均重复次数(items, weight):
    out = list(weighted(iter(items), weight))
    assert abs(len(out) - weight * len(items)) <= 1
    if weight >= 1:
        assert set(out) == set(items)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "一"}, "一"),
        ({"question": "问", "answer": "答"}, "问\n答"),
        ({"subject": "x", "question": "问", "choices": ["甲", "乙"], "answer": 1}, "问\n甲\n乙"),
        ({"conversations": [{"content": "问"}, {"content": "答", "reasoning_content": "想"}]}, "问\n想\n答"),
        ({"chosen": [{"content": "好"}], "rejected": [{"content": "坏"}]}, "好\n坏"),
    ],
)
def test_取出全部文本字段(record, text):
    assert record_text(record) == text


@pytest.mark.parametrize("mix", ["zh=0", "zh=x", "没有这个文件", "", "zh=nan"])
def test_配比写错是一句错误(corpus, mix):
    with pytest.raises(UserError):
        parse_mix(mix, corpus)


def test_语料太少或词表太小是一句错误():
    with pytest.raises(UserError, match="语料太少"):
        train_bpe(["短"], 6400)
    with pytest.raises(UserError, match="词表太小"):
        train_bpe(["短"], 200)


def test_坏行的错误带文件与行号(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": "a"}\n{bad\n')
    with pytest.raises(UserError, match=r"x\.jsonl:2"):
        list(read_texts(file))
    file.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:1"):
        list(read_texts(file))


def test_压缩率达到目标(shared_dir):
    data = shared_dir / "data"
    files = [
        data / f"heldout/{name}.heldout.jsonl"
        if name in ("pretrain_zh", "pretrain_en", "sft")
        else data / f"{name}.jsonl"
        for name in TARGETS
    ]
    measured = {row.file: row.bytes_per_token for row in compare(files, ["随包"])}
    short = {name: (measured[name], target) for name, target in TARGETS.items() if measured[name] < target}
    assert not short


def test_评测命令打印每个文件每个分词器一行(corpus, tmp_path, capsys):
    run_train(corpus, tmp_path / "own")
    files = [str(corpus / "zh.jsonl"), str(corpus / "en.jsonl")]
    assert (
        main_eval([*files, "--tokenizer", "随包", str(tmp_path / "own"), "--json", str(tmp_path / "r.json")])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 and lines[2].startswith("| zh | 随包 |")
    rows = json.loads((tmp_path / "r.json").read_text("utf-8"))
    texts = list(read_texts(corpus / "zh.jsonl"))
    tokens = sum(map(len, encode_plain_batch(load_tokenizer(), texts)))
    assert rows[0]["bytes_per_token"] == pytest.approx(sum(len(t.encode()) for t in texts) / tokens)


def test_评测的坏输入是一句错误(tmp_path, capsys):
    assert main_eval([str(tmp_path / "没有.jsonl")]) == 2
    assert "文件不存在" in capsys.readouterr().err


def write_bytes(folder, data: bytes):
    path = folder / "mine.jsonl"
    path.write_bytes(data)
    return path


GOOD = json.dumps({"text": "面包店的早晨，阳光洒在石板路上。"}, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (rb'{"text": "\ud800"}', "字段 text：第 1 个字符 \\ud800 是孤立的代理符"),
        (rb'{"conversations": [{"role": "user", "content": "a\udc00"}]}', "字段 conversations[0].content"),
        (b'{"text": "\xff"}', "不是合法的 UTF-8"),
        (b"{", "不是合法的 JSON"),
        (b"[1]", "每行一个 JSON 对象"),
        (b'{"conversations": ["hi"]}', "conversations 里的一条消息是 'hi'"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "content 读不懂"),
    ],
)
def test_语料的坏行_指出行号_或者跳过(tmp_path, capsys, line, words):
    path = write_bytes(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(UserError) as caught:
        list(read_texts(path))
    assert f"{path}:2" in str(caught.value) and words in str(caught.value)
    bad = []
    assert len(list(read_texts(path, bad=bad))) == 2 and len(bad) == 1
    flags = {"mix": str(path), "vocab_size": 320, "save_dir": tmp_path / "out"}
    assert run_train(tmp_path, tmp_path / "out", **flags) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_跳过坏行照样训练出来_并说跳过了几行(corpus, tmp_path, capsys):
    lines = (corpus / "zh.jsonl").read_bytes() + b'{"text": "\\ud800"}\n'
    path = write_bytes(tmp_path, lines)
    assert run_train(corpus, tmp_path / "out", mix=path, on_bad_line="skip") == 0
    assert "跳过 1 个坏行" in capsys.readouterr().err
    assert load_tokenizer(tmp_path / "out").vocab_size


def test_BOM_空行与CRLF和训练数据一样读(tmp_path):
    path = write_bytes(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + GOOD + b"\n")
    assert list(read_texts(path)) == [json.loads(GOOD)["text"]] * 2


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("mine.jsonl", b"\x1f\x8b\x08\x00abc", "gzip 压缩文件"),
        ("mine.jsonl", b"", "是空的"),
        ("mien.jsonl", b"{}", "语料文件不存在；同一目录里有 mien.jsonl"),
    ],
)
def test_语料文件不是文本时说出是什么(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        list(read_texts(parse_mix("mine", tmp_path)[0].path))
