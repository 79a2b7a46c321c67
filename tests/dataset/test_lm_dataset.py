"""四个数据集：不丢字、只学该学的、目标不跨文档、能送进 DataLoader 的子进程。"""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from data_helpers import chat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from minimind.dataset import packed
from minimind.dataset.lm_dataset import DPODataset, PretrainDataset, RLAIFDataset, SFTDataset
from minimind.dataset.packed import collate_packed
from minimind.errors import UserError
from minimind.tokenizer import encode_chat, encode_plain, encode_pretrain

PER_TEST = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def segments_of(row):
    """一行 → 各段的 (ids, labels, position_ids)，含末尾的填充段。"""
    at = 0
    for length in row["seg_lens"]:
        yield tuple(row[name][at : at + length] for name in ("input_ids", "labels", "position_ids"))
        at += length


def transitions(ids, labels):
    """段里的每个 (上一个 token, 目标)。"""
    return [(int(ids[k - 1]), int(labels[k])) for k in range(1, len(ids)) if labels[k] != -100]


# ---- 预训练 ----


@PER_TEST
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200), min_size=1, max_size=20
    ),
    max_length=st.integers(2, 40),
)
def test_预训练每个token恰好当一次目标(texts, max_length, write_jsonl, tokenizer, tmp_path):
    texts = [text for text in texts if text.strip()] or ["文"]
    path = write_jsonl([{"text": text} for text in texts])
    dataset = PretrainDataset(path, tokenizer, max_length)
    documents = [encode_pretrain(tokenizer, text) for text in texts]
    expected = sorted(pair for ids in documents for pair in itertools.pairwise(ids))
    seen = []
    for i in range(len(dataset)):
        for ids, labels, _ in segments_of(dataset[i]):
            seen += transitions(ids, labels)
    assert sorted(seen) == expected
    assert dataset.stats["targets"] == len(expected)


def test_预训练的块首尾相接还原全文(write_jsonl, tokenizer):
    text = "床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 30
    dataset = PretrainDataset(write_jsonl([{"text": text}]), tokenizer, 64)
    pieces = sorted(
        zip(dataset.packing.begin.tolist(), dataset.packing.length.tolist()), key=lambda piece: piece[0]
    )
    whole: list[int] = []
    for begin, length in pieces:
        assert begin == max(len(whole) - 1, 0)  # 与前一块重叠一个 token
        whole += dataset.cache.document(0)[begin : begin + length].tolist()[1 if whole else 0 :]
    assert tokenizer.decode(whole, skip_special_tokens=True) == text
    assert dataset.stats["split_documents"] == 1


# ---- 监督微调 ----


def test_微调只学助手的回合与结束符(write_jsonl, tokenizer):
    record = chat("问一", "答一", "<|im_start|>assistant\n不学我", "答二", system="规矩")
    dataset = SFTDataset(write_jsonl([record]), tokenizer, 128)
    targets = [ids[labels != -100].tolist() for ids, labels, _ in segments_of(dataset[0])]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = [*encode_plain(tokenizer, "答一"), end, *encode_plain(tokenizer, "答二"), end]
    assert targets[0] == expected
    assert dataset.stats["targets"] == len(expected)


def test_超长对话留下完整的前几回合(write_jsonl, tokenizer):
    record = chat("问一", "答一", "问二", "很长的回答" * 50)
    dataset = SFTDataset(write_jsonl([record]), tokenizer, 40)
    kept = dataset[0]["input_ids"][: dataset[0]["num_tokens"]]
    assert tokenizer.decode(kept).endswith("答一<|im_end|>")
    assert dataset.stats["truncated"] == 1


def test_放不下的回答被截断而不学结束符(write_jsonl, tokenizer):
    dataset = SFTDataset(write_jsonl([chat("问", "很长的回答" * 50)]), tokenizer, 40)
    row = dataset[0]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row["num_tokens"] == 40
    assert (row["labels"] != -100).sum() > 20
    assert end not in row["labels"].tolist()


def test_目标全被截掉的对话丢弃并计数(write_jsonl, tokenizer):
    path = write_jsonl([chat("很长的问题" * 50, "答"), chat("问", "答")])
    dataset = SFTDataset(path, tokenizer, 32)
    assert (dataset.num_documents, dataset.stats["dropped"]) == (1, 1)
    assert "丢弃 1 条" in dataset.summary()
    with pytest.raises(UserError, match="调大 --max_seq_len"):
        SFTDataset(write_jsonl([chat("很长的问题" * 50, "答")] * 2, "long.jsonl"), tokenizer, 32)


@PER_TEST
@given(
    turns=st.lists(
        st.lists(st.text("你好吗，abc", min_size=1, max_size=40), min_size=2, max_size=6).filter(
            lambda t: len(t) % 2 == 0
        ),
        min_size=1,
        max_size=15,
    )
)
def test_放得下的对话目标与渲染结构一致(turns, write_jsonl, tokenizer):
    records = [chat(*texts) for texts in turns]
    dataset = SFTDataset(write_jsonl(records), tokenizer, 512)
    expected = []
    for record in records:
        ids, target = encode_chat(tokenizer, record["conversations"])
        expected += [(ids[k - 1], ids[k]) for k in range(1, len(ids)) if target[k]]
    seen = []
    for i in range(len(dataset)):
        for ids, labels, _ in segments_of(dataset[i]):
            seen += transitions(ids, labels)
    assert sorted(seen) == sorted(expected)


# ---- 行与批 ----


@pytest.fixture
def sft_rows(write_jsonl, tokenizer):
    records = [chat(f"第{i}问" * (i % 5 + 1), f"第{i}答，" * (i % 13 + 1)) for i in range(300)]
    return SFTDataset(write_jsonl(records), tokenizer, 128)


@pytest.fixture
def pretrain_rows(write_jsonl, tokenizer):
    texts = [{"text": f"第{i}篇，" + "一段文字。" * (i % 40 + 1)} for i in range(200)]
    return PretrainDataset(write_jsonl(texts, "pretrain.jsonl"), tokenizer, 128)


@pytest.mark.parametrize("name", ["sft_rows", "pretrain_rows"])
def test_每段位置从零起且第一个token不是目标(name, request):
    rows = request.getfixturevalue(name)
    for i in range(len(rows)):
        row = rows[i]
        assert sum(row["seg_lens"]) == 128
        for ids, labels, positions in segments_of(row):
            assert positions.tolist() == list(range(len(ids)))
            assert labels[0] == -100
            assert ((labels == -100) | (labels == ids)).all()
        tail = slice(row["num_tokens"], 128)
        assert (row["labels"][tail] == -100).all()
        assert (row["input_ids"][tail] == rows.pad_id).all()


@pytest.mark.compat
def test_批的边界与各段一致(sft_rows):
    rows = [sft_rows[i] for i in range(4)]
    batch = collate_packed(rows)
    assert batch["input_ids"].shape == (4, 128)
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids"))
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens"][0] == 0
    assert batch["cu_seqlens"][-1] == 4 * 128
    lengths = torch.diff(batch["cu_seqlens"])
    assert batch["max_seqlen"] == int(lengths.max())
    assert lengths.tolist() == [n for row in rows for n in row["seg_lens"]]
    # 位置归零处正是各段的开头
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
    assert starts.tolist() == batch["cu_seqlens"][:-1].tolist()
    assert batch["num_tokens"] == sum(row["num_tokens"] for row in rows)


def test_几倍的行长只改排法不改目标(write_jsonl, tokenizer):
    # 每段都略过半行：两段拼不进一行
    path = write_jsonl([chat(f"{i}", "一二三四五" * 6 + "六" * (i % 9)) for i in range(200)])
    short, long = SFTDataset(path, tokenizer, 64), SFTDataset(path, tokenizer, 64, row_length=256)
    assert short.stats["targets"] == long.stats["targets"]
    assert max(max(long[i]["seg_lens"][:-1], default=0) for i in range(len(long))) <= 64
    assert long[0]["input_ids"].shape == (256,)
    assert short.stats["padding_share"] > 0.2 > 0.1 > long.stats["padding_share"]
    with pytest.raises(UserError, match="行长"):
        SFTDataset(path, tokenizer, 64, row_length=32)


@pytest.mark.compat
def test_数据集能送进DataLoader的子进程(sft_rows):
    copy = pickle.loads(pickle.dumps(sft_rows))
    assert torch.equal(copy[3]["input_ids"], sft_rows[3]["input_ids"])
    loader = DataLoader(sft_rows, batch_size=4, num_workers=2, collate_fn=collate_packed)
    expected = DataLoader(sft_rows, batch_size=4, collate_fn=collate_packed)
    batches = list(zip(loader, expected, strict=True))
    assert len(batches) > 3
    for a, b in batches:
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["cu_seqlens"], b["cu_seqlens"])


def test_行说得出来自源文件的哪几行(write_jsonl, tokenizer):
    path = write_jsonl(["", {"text": "甲"}, {"text": "乙"}])
    dataset = PretrainDataset(path, tokenizer, 32)
    assert sorted(dataset.source_lines(0)) == [2, 3]
    assert dataset.source_lines(-1) == dataset.source_lines(len(dataset) - 1)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_方案存下来再读回完全相同(write_jsonl, tokenizer, monkeypatch):
    path = write_jsonl([{"text": f"{i} 文本" * (i % 30 + 1)} for i in range(300)])
    fresh = PretrainDataset(path, tokenizer, 64, split="train")
    monkeypatch.setattr(packed, "STORED_DOCUMENTS", 0)
    PretrainDataset(path, tokenizer, 64, split="train")  # 存下
    monkeypatch.setattr(PretrainDataset, "_make_plan", lambda self: pytest.fail("不该重算"))
    stored = PretrainDataset(path, tokenizer, 64, split="train")
    assert stored.stats == fresh.stats
    for i in (0, len(fresh) - 1):
        assert torch.equal(stored[i]["input_ids"], fresh[i]["input_ids"])


def test_训练与验证的文档不重叠(write_jsonl, tokenizer):
    path = write_jsonl([{"text": f"第 {i} 篇文章的内容"} for i in range(500)])
    lines = {}
    for split in ("train", "val", "all"):
        dataset = PretrainDataset(path, tokenizer, 64, split=split, val_ratio=0.1)
        lines[split] = {line for i in range(len(dataset)) for line in dataset.source_lines(i)}
    assert lines["train"] | lines["val"] == lines["all"] == set(range(1, 501))
    assert not lines["train"] & lines["val"]
    assert 20 < len(lines["val"]) <= 50


def test_公共写法的构造仍然可用(write_jsonl, tokenizer):
    dataset = PretrainDataset(str(write_jsonl([{"text": "文本"}])), tokenizer, max_length=512)
    assert dataset[0]["input_ids"].shape == (512,)
    with pytest.raises(UserError, match="max_seq_len"):
        PretrainDataset(str(write_jsonl([{"text": "文本"}])), tokenizer, max_length=1)


@pytest.mark.parametrize("max_length", [340, 512, 1024])
def test_参考数据的填充小于百分之二(max_length, shared_dir, tokenizer):
    """切出一小部分真实数据；全量见 docs。"""
    for name, cls in (("pretrain_zh.heldout.jsonl", PretrainDataset), ("sft.heldout.jsonl", SFTDataset)):
        dataset = cls(shared_dir / "data" / "heldout" / name, tokenizer, max_length)
        assert dataset.stats["padding_share"] < 0.02, (name, dataset.summary())


# ---- 偏好 ----


def pair(prompt, good, bad):
    return {"chosen": chat(prompt, good)["conversations"], "rejected": chat(prompt, bad)["conversations"]}


@PER_TEST
@given(
    prompt=st.text("你好abc <|im_end|>", max_size=30),
    good=st.text("好坏ab", max_size=9),
    bad=st.text("坏好ba", max_size=9),
)
def test_偏好两边到分歧处为止逐token相同(prompt, good, bad, write_jsonl, tokenizer):
    prompt, good, bad = f"问{prompt}", f"甲{good}", f"乙{bad}"
    item = DPODataset(write_jsonl([pair(prompt, good, bad)] * 2), tokenizer, 512)[0]
    header = encode_chat(tokenizer, chat(prompt)["conversations"], add_generation_prompt=True).ids
    for side, text in (("chosen", good), ("rejected", bad)):
        assert item[side][: len(header)].tolist() == header
        answer = [*encode_plain(tokenizer, text), tokenizer.convert_tokens_to_ids("<|im_end|>")]
        labels = item[f"{side}_labels"]
        assert labels[labels != -100].tolist() == answer
        assert (labels[: len(header)] == -100).all()


def test_偏好只比第一个不同的回合起的回答_共同的历史是上文(write_jsonl, tokenizer):
    history = ["问一", "共同的答一", "问二", "共同的答二"]
    records = [
        {
            "chosen": chat(*history, "问三", "甲一样的开头", system="系")["conversations"],
            "rejected": chat(*history, "问三", "甲一样的开头不同", system="系")["conversations"],
        },
        {
            "chosen": chat(*history, "问三", "好", "问四", "后来的")["conversations"],
            "rejected": chat(*history, "问三", "差", "问四", "后来的")["conversations"],
        },
        {
            "chosen": chat("问", "共同")["conversations"]
            + [
                {"role": "user", "content": "再"},
                {"role": "assistant", "content": "好", "reasoning_content": ""},
            ],
            "rejected": chat("问", "共同", "再", "差")["conversations"],
        },
    ]
    dataset = DPODataset(write_jsonl(records), tokenizer, 256)
    end = "<|im_end|>"
    expected = [
        (f"甲一样的开头{end}", f"甲一样的开头不同{end}"),  # 不同的回合整个都算，开头相同的几个词也在内
        (f"好{end}后来的{end}", f"差{end}后来的{end}"),  # 分歧之后的回合都算
        (f"好{end}", f"差{end}"),  # 空的思考块照旧不学
    ]
    for i, sides in enumerate(expected):
        for side, text in zip(("chosen", "rejected"), sides, strict=True):
            labels = dataset[i][f"{side}_labels"]
            assert tokenizer.decode(labels[labels != -100]) == text
    # 历史占满了长度，要比的回答一个词也不剩：丢弃并计数
    short = DPODataset(write_jsonl([*records, pair("问", "甲", "乙")]), tokenizer, 24)
    assert (len(short), short.stats["dropped"]) == (1, 3)


def test_看不出分歧的偏好对丢弃并计数(write_jsonl, tokenizer):
    same = "一样的开头，" * 40
    records = [
        pair("问", "甲", "乙"),
        pair("问二", same + "甲", same + "乙"),
        pair("问三", "甲" + same, "乙"),
    ]
    dataset = DPODataset(write_jsonl(records), tokenizer, 64)
    assert dataset.stats == {"pairs": 2, "truncated": 1, "truncated_share": 1 / 3, "dropped": 1}
    assert [dataset.source_lines(i) for i in range(2)] == [[1], [3]]
    assert len(dataset[1]["chosen"]) == 64


def test_偏好的批前一半好后一半差(write_jsonl, tokenizer):
    dataset = DPODataset(write_jsonl([pair("问", "很好的回答" * i, "差") for i in (1, 3)]), tokenizer, 64)
    items = [dataset[0], dataset[1]]
    batch = dataset.collate(items)
    sides = [items[0]["chosen"], items[1]["chosen"], items[0]["rejected"], items[1]["rejected"]]
    assert batch["num_pairs"] == 2
    assert batch["input_ids"].shape == (4, max(map(len, sides)))
    for row, ids in zip(batch["input_ids"], sides):
        assert row[: len(ids)].tolist() == ids.tolist()
        assert (row[len(ids) :] == dataset.pad_id).all()
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
    assert starts.tolist() == batch["cu_seqlens"][:-1].tolist()


# ---- 强化学习 ----


def test_提示以助手的开头结尾并带上参考答案(write_jsonl, tokenizer):
    records = [
        {**chat("一加一？", "二", system="数学"), "gt": ["2"]},
        chat("没有答案", "空"),
        {"conversations": [{"role": "user", "content": "只有提问"}]},
    ]
    dataset = RLAIFDataset(write_jsonl(records), tokenizer, 64)
    item = dataset[0]
    assert tokenizer.decode(item["prompt_ids"]).endswith("一加一？<|im_end|>\n<|im_start|>assistant\n")
    assert [turn["role"] for turn in item["messages"]] == ["system", "user"]
    assert item["reference"] == "二"
    assert item["record"]["gt"] == ["2"]
    assert [dataset[i]["reference"] for i in (1, 2)] == ["", ""]
    assert dataset[2]["line"] == 3


def test_思考开关改变提示(write_jsonl, tokenizer):
    path = write_jsonl([chat("问", "答")])
    ids = {
        flag: RLAIFDataset(path, tokenizer, 64, enable_thinking=flag)[0]["prompt_ids"].tolist()
        for flag in (None, True, False)
    }
    assert len({tuple(v) for v in ids.values()}) == 3
    assert tokenizer.decode(ids[True]).endswith("<think>\n")


def test_过长的提示丢弃而不是截断(write_jsonl, tokenizer):
    path = write_jsonl([chat("很长的提问" * 30, "答"), chat("短", "答")])
    dataset = RLAIFDataset(path, tokenizer, 32)
    assert dataset.stats == {"prompts": 1, "dropped": 1}
    with pytest.raises(UserError, match="--max_seq_len"):
        RLAIFDataset(path, tokenizer, 4)


def test_提示的批只有打分要的几列_不填充(write_jsonl, tokenizer):
    dataset = RLAIFDataset(write_jsonl([chat("短", "甲"), chat("长一些的提问", "乙")]), tokenizer, 64)
    batch = dataset.collate([dataset[0], dataset[1]])
    assert set(batch) == {"messages", "references", "records", "lines", "sources"}
    assert batch["references"] == ["甲", "乙"]
    assert np.array_equal(batch["lines"], [1, 2])
