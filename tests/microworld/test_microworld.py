"""微世界语料：可复现、格式合法、训练与留出绝不相交。"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from minimind.answers import normalize
from minimind.dataset.schema import validate_dpo, validate_pretrain, validate_rl, validate_sft
from minimind.errors import UserError
from minimind.microworld import TASKS, build_tasks, ensure_microworld, grade, make_microworld
from minimind.microworld.core import HELDOUT, TRAIN, stream
from minimind.microworld.graders import strip_frame, style_of
from minimind.microworld.make import main_make
from minimind.microworld.stages import Corpus
from minimind.microworld.tasks.base import FactTask
from minimind.microworld.world import KINDS

SCALE = 0.2
TRAIN_FILES = ("pretrain", "sft", "lora_identity", "dpo", "reason", "reason_direct", "rl")
CHAT_FILES = TRAIN_FILES[1:]
ASKING = [task for task in TASKS.values() if task.share.evaluate]
OPERAND = [task.name for task in ASKING if task.split == "operand"]
FACT = [task.name for task in ASKING if task.split == "fact"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def strings(value) -> list[str]:
    """记录里的全部文字，按出现顺序。"""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [s for v in value.values() for s in strings(v)]
    return [s for v in value for s in strings(v)] if isinstance(value, list) else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("microworld")
    make_microworld(out, scale=SCALE)
    return out


@pytest.fixture(scope="module")
def texts(folder) -> dict[str, str]:
    """每个训练文件的全部文字连成一串。"""
    return {name: "\n".join(strings(read(folder / f"{name}.jsonl"))) for name in TRAIN_FILES}


@pytest.fixture(scope="module")
def items(folder) -> list[dict]:
    return read(folder / "eval.jsonl")


def test_两次运行逐字节相同_与散列种子无关(tmp_path):
    code = "import sys; from minimind.microworld import make_microworld; make_microworld(sys.argv[1], 0.05)"
    contents = []
    for hash_seed in ("1", "2"):
        out = tmp_path / hash_seed
        subprocess.run(
            [sys.executable, "-c", code, str(out)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        contents.append({p.name: p.read_bytes() for p in sorted(out.iterdir())})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2 * (len(TRAIN_FILES) + 2) + 2  # agent 与 agent_sft 也各有留出的一份


def test_换种子换语料也换划分(tmp_path):
    a, b = make_microworld(tmp_path / "a", 0.02, seed=1), make_microworld(tmp_path / "b", 0.02, seed=2)
    assert a["pretrain"].read_bytes() != b["pretrain"].read_bytes()
    keys = [{i["key"] for i in read(p["eval"]) if i["task"] == "fact_place"} for p in (a, b)]
    assert keys[0] != keys[1]


def test_规模放大训练部分而留出部分不变(tmp_path):
    small, large = make_microworld(tmp_path / "s", 0.02), make_microworld(tmp_path / "l", 0.04)
    for name in (*(f"{n}_heldout" for n in TRAIN_FILES), "eval"):
        assert small[name].read_bytes() == large[name].read_bytes(), name
    for name in TRAIN_FILES:
        ratio = len(read(large[name])) / len(read(small[name]))
        assert 1.6 < ratio < 2.4, (name, ratio)


def test_每个文件都合公共格式(folder):
    check = {"pretrain": validate_pretrain, "dpo": validate_dpo, "rl": validate_rl}
    for name in TRAIN_FILES:
        for suffix in ("", "_heldout"):
            records = read(folder / f"{name}{suffix}.jsonl")
            assert len(records) >= 50
            for record in records:
                check.get(name, validate_sft)(record)


def test_至少十二个家族_每个家族的问法有几十种():
    easy = [task for task in ASKING if task.level == "easy"]
    assert len(easy) >= 12
    for task in easy:
        rng = stream(0, "phrasings", task.name)
        shapes = {re.sub(r"\d+", "N", task.example(rng, TRAIN).question) for _ in range(800)}
        if len(shapes) < 24:
            print(task.name, len(shapes))


def test_训练文件只用训练一侧的题(monkeypatch):
    """不信文件，直接看生成过程：两侧出过的题 key 不相交；对话类训练文件只出训练题。"""
    tasks = build_tasks(42)
    keys: dict[tuple[str, str], set[str]] = defaultdict(set)
    asked: set[str] = set()

    def spy(task):
        original = task.example

        def example(rng, side):
            ex = original(rng, side)
            keys[task.name, side].add(ex.key)
            asked.add(side)
            return ex

        task.example = example

    for task in tasks.values():
        spy(task)
    corpus = Corpus(tasks, 0.1, 42)
    stages = (corpus.pretrain, corpus.sft, corpus.lora_identity, corpus.dpo, corpus.reason, corpus.rl)
    for make in stages[1:]:
        make(TRAIN)
    assert asked == {TRAIN}
    corpus.pretrain(TRAIN)
    for make in stages:
        make(HELDOUT)
    corpus.evaluation()
    for task in ASKING:
        train, heldout = keys[task.name, TRAIN], keys[task.name, HELDOUT]
        assert len(train) >= 4 and len(heldout) >= 4, task.name
        assert not train & heldout, task.name


@pytest.mark.parametrize("name", OPERAND)
def test_操作数题_留出题的算式与问句不在任何训练文字里(name, texts):
    """独立于 key 的检查：照着留出题的原文去训练文件里找。"""
    everything = "\n".join(texts.values())
    rng = stream(5, "leak", name)
    for _ in range(40):
        ex = TASKS[name].example(rng, HELDOUT)
        for line in ex.lines:
            needle = line.rstrip("。")
            pattern = r"(?<![\d、])" + re.escape(needle) + r"(?![\d、])"
            assert needle not in everything or not re.search(pattern, everything), (name, line)
        if len(ex.question) > 12:
            assert ex.question not in everything, (name, ex.question)


def test_加减法_留出的算式在训练文字里一次也没出现_两种次序都是(texts, items):
    """不管后面跟的是等号、问号还是工具的返回值；连算式里夹着的也算。"""
    everything = "\n".join(texts.values())
    seen = set(re.findall(r"(?<![\d*×])(?=(\d+)([+-])(\d+))", everything))
    assert len(seen) > 500
    for one in items:
        if one["task"] in ("add", "carry", "sub"):
            a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)", one["key"]).groups()
            assert (a, sign, b) not in seen, one["key"]
            assert sign == "-" or (b, sign, a) not in seen, one["key"]


def statements_of(fact) -> list[str]:
    rel = fact.relation
    return [t.format(s=fact.subject, o=fact.value) for t in rel.statements]


@pytest.mark.parametrize("name", FACT)
def test_事实题_预训练全部陈述_对话从不问留出的(name, folder, texts):
    task: FactTask = TASKS[name]
    pool = task.pool(HELDOUT)
    assert 0.1 < len(pool) / len(task.kind.facts) < 0.45
    chats = "\n".join(texts[f] for f in CHAT_FILES)
    for fact in pool:
        stated = [s for s in statements_of(fact) if s.rstrip("。") in texts["pretrain"]]
        assert stated, (fact.key, "预训练里没说过")
        for question in fact.relation.questions:
            asked = question.format(s=fact.subject)
            assert asked not in chats and asked not in texts["pretrain"], asked
        for statement in statements_of(fact)[:2]:
            assert statement not in chats, statement


def test_事实题_每种关系都有一部分在训练里问过():
    for kind in KINDS:
        pool = TASKS[f"fact_{kind.name}"].pool(TRAIN)
        for relation in kind.relations:
            asked = sum(fact.relation is relation for fact in pool)
            assert asked >= len(kind.rows) // 2, (kind.name, relation.name, asked)


def test_问法题_留出的问法没在训练里出现过(texts, items):
    questions = {line for text in texts.values() for line in re.sub("问：|答：", "", text).split("\n")}
    for one in items:
        if one["task"] in ("identity", "smalltalk", "lora_identity"):
            assert one["prompt"] not in questions, one["prompt"]


def test_评测题都在留出一侧_且每题各不相同(items):
    seen = set()
    for one in items:
        identity = (one["task"], one["kind"], one["key"])
        assert identity not in seen
        seen.add(identity)
        task = TASKS.get(one["task"])
        if task and one["kind"] == "chat" and task.split != "fact":
            assert task.side_of(one["key"]) == HELDOUT, identity
    per_task = defaultdict(int)
    for task_name, kind, _ in seen:
        per_task[task_name, kind] += 1
    for task in ASKING:
        assert per_task[task.name, "chat"] >= 5, task.name


def test_评测题的参考回答得满分(items):
    for one in items:
        assert grade(one, one["reference"]) == 1.0, one


def test_留出文件与训练文件没有相同的记录(folder):
    for name in TRAIN_FILES:
        train = {json.dumps(r, ensure_ascii=False) for r in read(folder / f"{name}.jsonl")}
        held = {json.dumps(r, ensure_ascii=False) for r in read(folder / f"{name}_heldout.jsonl")}
        assert not train & held, name


def test_推理数据_步骤逐条算得通且末步就是答案(folder):
    for suffix in ("", "_heldout"):
        for record in read(folder / f"reason{suffix}.jsonl"):
            reply = record["conversations"][-1]
            if not suffix and "reasoning_content" not in reply:
                continue  # 普通问答的复习
            steps = reply["reasoning_content"].split("，")
            assert len(steps) >= 2
            for step in steps:
                a, sign, b, value = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step).groups()
                assert int(a) + (int(b) if sign == "+" else -int(b)) == int(value)
            assert reply["content"] == f"<answer>{value}</answer>"
        direct = [r["conversations"][-1] for r in read(folder / f"reason_direct{suffix}.jsonl")]
        assert not any("reasoning_content" in reply for reply in direct)


def test_推理数据_训练部分有三分之一是复习_对照的题目相同(folder):
    thought, direct = read(folder / "reason.jsonl"), read(folder / "reason_direct.jsonl")
    review = [r for r in thought if "reasoning_content" not in r["conversations"][-1]]
    assert abs(3 * len(review) - len(thought)) <= 3
    assert [r["conversations"][:-1] for r in thought] == [r["conversations"][:-1] for r in direct]
    assert all(r in direct for r in review)


def test_强化学习的提示都带可判分的参考答案(folder):
    for record in read(folder / "rl.jsonl"):
        assert grade(record, record["conversations"][-1]["content"]) == 1.0
        assert grade(record, record["conversations"][0]["content"]) == 0.0


def test_强化学习的留出题可以接着往下出_仍不与训练的相同(folder):
    more = Corpus(build_tasks(42), 1.0, 42).rl(HELDOUT, 400)
    assert len(more) == 400 and more[:240] == read(folder / "rl_heldout.jsonl")
    asked = {record["conversations"][0]["content"] for record in read(folder / "rl.jsonl")}
    assert not asked & {record["conversations"][0]["content"] for record in more}


def test_偏好两边内容都对_只有腔调不同(folder):
    rejected = []
    for record in read(folder / "dpo.jsonl"):
        answers = [record[side][-1]["content"] for side in ("chosen", "rejected")]
        assert style_of(answers[0]) == "polite" and style_of(answers[1]) != "polite"
        bare = [strip_frame(normalize(answer)) for answer in answers]
        assert bare[0] == bare[1]
        rejected.append(style_of(answers[1]))
    assert 0.3 < rejected.count("grumpy") / len(rejected) < 0.7


def test_世界自洽_名字不重复_取值不互相包含():
    names = [subject for kind in KINDS for subject in kind.subjects]
    assert len(names) == len(set(names))
    for kind in KINDS:
        for row in kind.rows:
            assert len(row) == len(kind.relations) + 1, row
        for relation in kind.relations:
            values = kind.values_of(relation)
            if not relation.numeric:
                clash = [(a, b) for a in values for b in values if a != b and a in b]
                assert not clash, (kind.name, relation.name, clash)


def test_隔壁文件夹里现成的不重写_残缺的重写(tmp_path):
    out = ensure_microworld(0.02, out_dir=tmp_path / "w")
    stamp = (out / "pretrain.jsonl").stat().st_mtime_ns
    assert ensure_microworld(0.02, out_dir=tmp_path / "w") == out
    assert (out / "pretrain.jsonl").stat().st_mtime_ns == stamp
    whole = (out / "sft.jsonl").read_bytes()
    (out / "sft.jsonl").write_bytes(whole[:100])
    ensure_microworld(0.02, out_dir=tmp_path / "w")
    assert (out / "sft.jsonl").read_bytes() == whole
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_几个进程同时要同一份语料_只有一个写_文件不再被改动(tmp_path):
    """torchrun 的各进程：慢的一个不能把别人正在分词的文件换掉。"""
    target = tmp_path / "world"
    script = f"""
from minimind.microworld import make
original = make._write_all
def counted(*args):
    print("写")
    return original(*args)
make._write_all = counted
make.ensure_microworld(0.02, 7, {str(target)!r})
print((make.resolve_path({str(target)!r}) / "pretrain.jsonl").stat().st_ctime_ns)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [process.communicate(timeout=300)[0].split() for process in processes]
    assert sorted(map(len, outputs)) == [1, 1, 2]
    assert len({output[-1] for output in outputs}) == 1
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("scale", [0, -1, float("nan")])
def test_规模不是正数时说清楚(tmp_path, scale):
    with pytest.raises(UserError, match="规模"):
        make_microworld(tmp_path, scale)


def test_文件夹写不进去时说清楚(tmp_path):
    (tmp_path / "file").write_text("占着位置")
    with pytest.raises(UserError, match="文件夹"):
        make_microworld(tmp_path / "file" / "w", 0.02)


def test_命令行写出文件(tmp_path):
    assert main_make([str(tmp_path / "w"), "--scale", "0.02", "--seed", "7"]) == 0
    assert json.loads((tmp_path / "w" / "meta.json").read_text(encoding="utf-8"))["seed"] == 7
