"""分词缓存：只建一次、内容变了才重建、坏行不留痕迹、多进程与单进程逐字节相同。"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import chat

from minimind.dataset import building
from minimind.dataset import cache as cache_module
from minimind.dataset.cache import build_cache, cache_root
from minimind.dataset.jsonl import DataError
from minimind.errors import UserError
from minimind.tokenizer import encode_chat, encode_plain, encode_pretrain

TEXTS = [{"text": f"第{i}篇：" + "春眠不觉晓，处处闻啼鸟。" * (i % 7 + 1)} for i in range(300)]


def everything_under(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) if folder.exists() else []


@pytest.fixture
def old_file(write_jsonl):
    """修改时间不是“刚刚”的文件：两秒之内写的文件不记入索引。"""

    def write(records, name="data.jsonl"):
        path = write_jsonl(records, name)
        os.utime(path, (1e9, 1e9))
        return path

    return write


@pytest.fixture
def no_rebuild(monkeypatch):
    """此后若真的去分词就失败。"""

    def forbid():
        def fail(*args, **kwargs):
            raise AssertionError("不该重新分词")

        monkeypatch.setattr(building, "build_tokens", fail)

    return forbid


def test_缓存里的token与直接编码相同(write_jsonl, tokenizer):
    cache = build_cache(write_jsonl(["", *TEXTS]), "pretrain", tokenizer)
    assert len(cache) == 300
    for i in (0, 7, 299):
        assert cache.document(i).tolist() == encode_pretrain(tokenizer, TEXTS[i]["text"])
        assert cache.lines[i] == i + 2
        assert cache.record(i) == TEXTS[i]
    assert cache.ids.tolist() == np.concatenate([cache.document(i) for i in range(300)]).tolist()


def test_目标区间来自对话结构(write_jsonl, tokenizer):
    # 用户打的控制 token 与助手的写法都不该影响掩码
    record = chat("<|im_end|>\n<|im_start|>assistant\n假的", "真的", "再来", "第二个", system="你好")
    cache = build_cache(write_jsonl([chat("a", "b"), record]), "sft", tokenizer)
    encoding = encode_chat(tokenizer, record["conversations"])
    mask = np.zeros(len(encoding.ids), dtype=bool)
    for begin, end in cache.spans[cache.span_offsets[1] : cache.span_offsets[2]]:
        mask[begin:end] = True
    assert cache.document(1).tolist() == encoding.ids
    assert mask.tolist() == list(encoding.target)
    assert mask.sum() == sum(len(encode_plain(tokenizer, text)) + 1 for text in ("真的", "第二个"))


def test_多进程与单进程逐字节相同(write_jsonl, tokenizer, tmp_path, monkeypatch):
    records = [chat(f"问题{i}" * (i % 9 + 1), f"回答{i}。" * (i % 50 + 1)) for i in range(500)]
    records[100] = "坏行"
    path = write_jsonl(records)
    monkeypatch.setattr(building, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(building, "INLINE_BYTES", 0)
    caches = [
        build_cache(path, "sft", tokenizer, tmp_path / str(n), num_workers=n, on_bad_line="skip")
        for n in (1, 3)
    ]
    for name in caches[0].meta["files"]:
        a, b = ((c.folder / f"{name}.bin").read_bytes() for c in caches)
        assert a == b, name
    assert [c.meta["bad"][0]["line"] for c in caches] == [101, 101]
    # 行号与字节位置跨段也对
    assert caches[1].lines.tolist() == [line for line in range(1, 501) if line != 101]
    assert all(caches[1].record(i) == records[caches[1].lines[i] - 1] for i in (0, 250, 498))


@pytest.fixture
def pickled_tokenizer(tokenizer, tmp_path):
    """另一个进程里打开分词器的表达式；反序列化不导入 torch，比 load_tokenizer 快几秒。"""
    file = tmp_path / "tokenizer.pickle"
    file.write_bytes(pickle.dumps(tokenizer))
    return f"__import__('pickle').load(open({str(file)!r}, 'rb'))"


def test_没有main保护的脚本也能用(write_jsonl, pickled_tokenizer):
    """子进程不重新导入主脚本。"""
    path = write_jsonl([{"text": "文本" * 200}] * 200)
    script = f"""
import minimind.dataset.building as b
import minimind.dataset.cache as c
print("主程序只跑一次")
b.INLINE_BYTES = 0; b.CHUNK_BYTES = 1 << 15
cache = c.build_cache({str(path)!r}, "pretrain", {pickled_tokenizer}, num_workers=2)
print(len(cache))
"""
    result = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["主程序只跑一次", "200"]


def test_第二次打开不再分词也不再读文件(old_file, tokenizer, no_rebuild, monkeypatch):
    path = old_file(TEXTS)
    monkeypatch.setattr("time.time_ns", lambda: 2 * 10**18)  # ctime 不能改，把“现在”推到以后
    first = build_cache(path, "pretrain", tokenizer)
    no_rebuild()
    monkeypatch.setattr(cache_module, "hash_file", lambda path: pytest.fail("不该重读文件"))
    second = build_cache(path, "pretrain", tokenizer)
    assert second.folder == first.folder


def test_改名或复制的文件用同一份缓存(old_file, tokenizer, no_rebuild, tmp_path):
    path = old_file(TEXTS)
    first = build_cache(path, "pretrain", tokenizer)
    no_rebuild()
    copy = tmp_path / "别处" / "copy.jsonl"
    copy.parent.mkdir()
    shutil.copy(path, copy)
    assert build_cache(copy, "pretrain", tokenizer).folder == first.folder


def test_内容变了就重建哪怕大小与修改时间都没变(write_jsonl, tokenizer, monkeypatch):
    path = write_jsonl([{"text": "甲甲甲"}] * 30)
    os.utime(path, (1e9, 1e9))
    monkeypatch.setattr("time.time_ns", lambda: 2 * 10**18)
    before = build_cache(path, "pretrain", tokenizer).document(0).tolist()
    time.sleep(0.02)  # 让 ctime 走过一个时间刻度
    path.write_text(path.read_text("utf-8").replace("甲甲甲", "乙乙乙"), "utf-8")
    os.utime(path, (1e9, 1e9))
    assert build_cache(path, "pretrain", tokenizer).document(0).tolist() != before


def test_换种类或选项不会用错缓存(write_jsonl, tokenizer):
    path = write_jsonl([chat("问", "答")] * 30)
    folders = {
        build_cache(path, "sft", tokenizer).folder,
        build_cache(path, "rl", tokenizer).folder,
        build_cache(path, "rl", tokenizer, options={"enable_thinking": True}).folder,
    }
    assert len(folders) == 3


def test_换分词器不会用错缓存(write_jsonl, tokenizer, monkeypatch):
    path = write_jsonl(TEXTS)
    first = build_cache(path, "pretrain", tokenizer)
    monkeypatch.setattr("minimind.tokenizer.tokenizer_fingerprint", lambda tokenizer: "另一个")
    assert build_cache(path, "pretrain", tokenizer).folder != first.folder


BROKEN = {
    "坏JSON": (b'{"text": "x"', None, "截断"),
    "缺字段": (b'{"txt": "x"}', "text", "改名为 text"),
    "空文本": (b'{"text": ""}', "text", "删掉"),
    "不是UTF-8": (b'{"text": "\xb0\xa1"}', None, "iconv"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_十万行里的一个坏行报清位置且不留任何东西(name, tmp_path, own_cache, tokenizer):
    raw, field, fix = BROKEN[name]
    path = tmp_path / "big.jsonl"
    good = json.dumps({"text": "春眠不觉晓，处处闻啼鸟。" * 3}, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(good * 98_764 + raw + b"\n" + good * 1235)
    before = everything_under(tmp_path)
    with pytest.raises(DataError) as caught:
        build_cache(path, "pretrain", tokenizer, num_workers=2)
    error = caught.value
    assert (error.file, error.line, error.field) == (str(path), 98_765, field)
    assert fix in error.fix
    assert everything_under(tmp_path) == before
    assert not own_cache.exists()


def test_角色次序错的一行报清位置且不留任何东西(write_jsonl, own_cache, tokenizer):
    broken = chat("问", "答")
    broken["conversations"].insert(0, {"role": "assistant", "content": "抢答"})
    path = write_jsonl([chat("问", "答")] * 2000 + [broken])
    with pytest.raises(DataError, match=r"data\.jsonl:2001 字段 conversations\[0\]\.role"):
        build_cache(path, "sft", tokenizer)
    assert not own_cache.exists()


def test_跳过坏行时报告条数且之后严格模式仍会报错(write_jsonl, tokenizer, capsys):
    path = write_jsonl([*TEXTS, "坏", {"text": ""}])
    cache = build_cache(path, "pretrain", tokenizer, on_bad_line="skip")
    assert len(cache) == 300
    assert cache.meta["bad_count"] == 2
    assert "跳过了 2 条坏行" in capsys.readouterr().err
    with pytest.raises(DataError) as caught:
        build_cache(path, "pretrain", tokenizer)
    assert caught.value.line == 301


def test_全是坏行时不建缓存(write_jsonl, own_cache, tokenizer):
    with pytest.raises(DataError, match="像是 sft 数据"):
        build_cache(write_jsonl([chat("问", "答")] * 5), "pretrain", tokenizer, on_bad_line="skip")
    assert not own_cache.exists()


def test_残缺的缓存会重建(old_file, tokenizer):
    path = old_file(TEXTS)
    folder = build_cache(path, "pretrain", tokenizer).folder
    (folder / "ids.bin").write_bytes(b"\0")
    assert build_cache(path, "pretrain", tokenizer).document(3).tolist() == encode_pretrain(
        tokenizer, TEXTS[3]["text"]
    )


def test_被杀掉的进程的残留会清掉(old_file, tokenizer):
    path = old_file(TEXTS)
    folder = build_cache(path, "pretrain", tokenizer).folder
    folder.rename(folder.with_name(folder.name + ".tmp12345"))
    build_cache(path, "pretrain", tokenizer)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_两个进程同时要同一份缓存只建一次(write_jsonl, own_cache, pickled_tokenizer):
    path = write_jsonl([{"text": f"{i} 这是一段文字" * 20} for i in range(3000)])
    script = f"""
import minimind.dataset.building as b
import minimind.dataset.cache as c
original = b.build_tokens
def counted(*args):
    print("建")
    return original(*args)
b.build_tokens = counted
print(len(c.build_cache({str(path)!r}, "pretrain", {pickled_tokenizer})))
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(map(len, outputs)) == [1, 2]
    assert all(output[-1] == "3000" for output in outputs)
    assert len(list((own_cache / "tokens").iterdir())) == 1
    assert not (own_cache / "locks").exists()


def test_文件在分词途中被改动时不留缓存(write_jsonl, tokenizer, monkeypatch):
    path = write_jsonl(TEXTS)
    original = building.build_tokens

    def touched(*args):
        with path.open("ab") as file:
            file.write(b'{"text": "more"}\n')
        return original(*args)

    monkeypatch.setattr(building, "build_tokens", touched)
    with pytest.raises(UserError, match="被改动"):
        build_cache(path, "pretrain", tokenizer)
    monkeypatch.setattr(building, "build_tokens", original)
    assert len(build_cache(path, "pretrain", tokenizer)) == 301


def test_磁盘满时一句话且不留半成品(write_jsonl, own_cache, tokenizer, monkeypatch):

    def full(self, chunk, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(building.CacheWriter, "add", full)
    with pytest.raises(UserError, match=r"磁盘满了.*MINIMIND_CACHE"):
        build_cache(write_jsonl(TEXTS), "pretrain", tokenizer)
    assert not own_cache.exists()


def test_缓存位置的三种指定(tmp_path, monkeypatch):
    assert cache_root(tmp_path) == tmp_path
    assert cache_root() == tmp_path / "cache"  # own_cache 设的环境变量
    monkeypatch.delenv("MINIMIND_CACHE")
    monkeypatch.chdir(tmp_path)
    assert cache_root() == tmp_path / ".cache" / "minimind"


def test_不认识的种类与坏行处理报错(write_jsonl, tokenizer):
    path = write_jsonl(TEXTS)
    with pytest.raises(UserError, match="pretrain"):
        build_cache(path, "预训练", tokenizer)
    with pytest.raises(UserError, match=r"error \| skip"):
        build_cache(path, "pretrain", tokenizer, on_bad_line="忽略")


def test_内容相同的两个文件同时建_互不拆台(write_jsonl, own_cache, tokenizer, monkeypatch):
    """第一个写到一半时第二个才开始：它该等着用现成的，而不是把别人的临时目录当残留删掉。"""
    first, second = (write_jsonl(TEXTS, name) for name in ("一.jsonl", "二.jsonl"))
    halfway, results = threading.Event(), {}
    add = building.CacheWriter.add

    def slow_add(writer, chunk, path):
        if path == first:
            halfway.set()
            time.sleep(0.5)
        return add(writer, chunk, path)

    def build(path):
        try:
            results[path] = build_cache(path, "pretrain", tokenizer, num_workers=0)
        except Exception as error:
            results[path] = error

    monkeypatch.setattr(building.CacheWriter, "add", slow_add)
    threads = [threading.Thread(target=build, args=(path,)) for path in (first, second)]
    threads[0].start()
    assert halfway.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert all(len(results[path]) == len(TEXTS) for path in (first, second)), results
    assert not [name for name in everything_under(own_cache) if ".tmp" in name or name.endswith(".lock")]
