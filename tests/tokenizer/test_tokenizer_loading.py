"""打开分词器：随包的承诺、外来的兼容、坏文件的报错。"""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from minimind.errors import UserError
from minimind.tokenizer import (
    encode_chat,
    encode_plain,
    encode_plain_batch,
    encode_pretrain,
    load_tokenizer,
    token_byte_lengths,
    tokenizer_fingerprint,
)
from minimind.tokenizer.loading import SHIPPED_DIR
from minimind.tokenizer.special import SPECIAL_TOKENS, TAGS

TOKENIZER = load_tokenizer()
CHAT = [
    {"role": "user", "content": "你好 <think>"},
    {"role": "assistant", "content": "<think>想</think>好"},
]


def test_控制token的id与总数():
    assert len(TOKENIZER) == TOKENIZER.vocab_size == 6400
    assert tuple(TOKENIZER.convert_ids_to_tokens(range(len(SPECIAL_TOKENS)))) == SPECIAL_TOKENS
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
    assert SPECIAL_TOKENS[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def test_跳过控制token的解码留下标签():
    ids = TOKENIZER.convert_tokens_to_ids([*TAGS, "<|im_end|>", "<|reserved_0|>"])
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "".join(TAGS)


def test_数字各是单个token():
    for token in TOKENIZER.get_vocab():
        if token not in SPECIAL_TOKENS and any(c.isdigit() and c.isascii() for c in token):
            assert len(token) == 1
    for text in ("1234567890", "a1b22", " 3.14", "第12章"):
        pieces = [TOKENIZER.decode([i]) for i in encode_plain(TOKENIZER, text)]
        assert all(len(p) == 1 for p in pieces if any(c.isdigit() for c in p))


def test_回合里常见的词是单个token():
    for word in ("system", "user", "assistant", "name", "arguments"):
        assert len(encode_plain(TOKENIZER, word)) == 1, word


wild = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(categories=("Mn", "Me", "Cc", "Cf", "Co", "So", "Zs", "Nd")), max_size=20),
    st.lists(
        st.sampled_from(
            [*SPECIAL_TOKENS, "\r\n", "\x00", "👩‍👩‍👧", "́", "\ufeff", "  ", "１", "𠮷", "e\u0301"]
        )
    ).map("".join),
)


@settings(max_examples=400, deadline=None)
@given(wild)
def test_任何文本原样往返_不产生控制token(text):
    ids = encode_plain(TOKENIZER, text)
    assert TOKENIZER.decode(ids) == text
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)
    assert token_byte_lengths_cached()[ids].sum() == len(text.encode("utf-8"))


_LENGTHS: list[np.ndarray] = []


def token_byte_lengths_cached() -> np.ndarray:
    if not _LENGTHS:
        _LENGTHS.append(token_byte_lengths(TOKENIZER))
    return _LENGTHS[0]


def test_字节长度的形状与控制token记零():
    lengths = token_byte_lengths(TOKENIZER)
    assert lengths.dtype == np.int64 and lengths.shape == (len(TOKENIZER),)
    assert not lengths[: len(SPECIAL_TOKENS)].any() and (lengths[len(SPECIAL_TOKENS) :] > 0).all()


def test_每个单字节都在词表里():
    for byte in pre_tokenizers.ByteLevel.alphabet():
        assert TOKENIZER.convert_tokens_to_ids(byte) is not None


def test_随包的分词器身份不变_以前训练的权重照样认得():
    first = "16baf947263ebc9b801c69942ba30890908247ed76360ff4d8b2d1ed4947e848"
    assert tokenizer_fingerprint(TOKENIZER) == first, "改了模板：确认布局没变，再改 SAME_IDENTITY"


def test_指纹不随调用状态变_随词表与模板变(tmp_path):
    before = tokenizer_fingerprint(TOKENIZER)
    other = copy.deepcopy(TOKENIZER)
    other(["长一点的文本", "短"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(other) == before
    other.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(other) != before
    TOKENIZER.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == before


@pytest.mark.compat
def test_存盘再打开与pickle后编码不变(tmp_path):
    expected = encode_chat(TOKENIZER, CHAT)
    TOKENIZER.save_pretrained(tmp_path)
    for other in (
        load_tokenizer(tmp_path),
        pickle.loads(pickle.dumps(TOKENIZER)),
        AutoTokenizer.from_pretrained(SHIPPED_DIR, local_files_only=True),
    ):
        assert encode_chat(other, CHAT) == expected
        assert other.chat_template == TOKENIZER.chat_template


def foreign(folder, specials: list[str], config: dict):
    """仿一个公共分词器：自己的控制 token、自己的模板。"""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = Tokenizer.from_file(str(SHIPPED_DIR / "tokenizer.json")).decoder
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(t, special=True) for t in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["你好，世界。hello world"] * 3, trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}), "utf-8"
    )
    return load_tokenizer(folder)


def test_外来分词器用它自己的id_没有的标签按文本编码(tmp_path):
    other = foreign(
        tmp_path,
        ["<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>"],
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            "chat_template": "{{ 1 }}",
        },
    )
    assert other.pad_token_id == 3  # 没有声明 pad 时用 <|endoftext|>
    encoded = encode_chat(other, CHAT)
    text = "<|im_start|>user\n你好 <think><|im_end|>\n<|im_start|>assistant\n<think>想</think>好<|im_end|>\n"
    assert other.decode(encoded.ids) == text
    assert encoded.ids.count(1) == encoded.ids.count(2) == 2
    assert encoded.ids.count(4) == 1  # 助手的 <think>；用户写的那个是普通字符
    assert (
        other.decode([i for i, t in zip(encoded.ids, encoded.target) if t]) == "<think>想</think>好<|im_end|>"
    )
    assert encode_pretrain(other, "你")[0] == 1
    assert token_byte_lengths(other)[encode_plain(other, "你好<think>")].sum() == len("你好<think>".encode())


def test_早期公共分词器用它的bos与eos分隔回合(tmp_path):
    other = foreign(tmp_path, ["<unk>", "<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"})
    assert other.pad_token_id == 2
    ids = encode_chat(other, [{"role": "user", "content": "你好</s>"}]).ids
    assert ids[0] == 1 and ids.count(2) == 1
    assert other.decode(ids) == "<s>user\n你好</s></s>\n"


def test_没有任何回合分隔符的分词器报错(tmp_path):
    with pytest.raises(UserError, match="bos"):
        foreign(tmp_path, ["<unk>"], {"unk_token": "<unk>"})


def test_坏路径与坏文件是一句带位置的错误(tmp_path):
    with pytest.raises(UserError, match="不存在"):
        load_tokenizer(tmp_path / "没有")
    with pytest.raises(UserError, match="没有 tokenizer"):
        load_tokenizer(tmp_path)
    shutil.copy(SHIPPED_DIR / "tokenizer_config.json", tmp_path)
    text = (SHIPPED_DIR / "tokenizer.json").read_text("utf-8")
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2], "utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json.*JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "没有这种"}}', "utf-8")
    with pytest.raises(UserError, match="打不开"):
        load_tokenizer(tmp_path)


def test_纯文本编码不受别处调用的影响():
    """transformers 的 padding 设置写在共用后端上，这里的后端是另一份。"""
    other = copy.deepcopy(TOKENIZER)
    expected = encode_plain_batch(other, ["你好", "一段更长的文字"])
    other(["你好", "一段更长的文字"], padding=True)
    assert encode_plain_batch(other, ["你好", "一段更长的文字"]) == expected
