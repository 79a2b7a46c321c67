"""流式文字：任何切法都不出现半个字符，拼起来一字不差。"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minimind.inference.generate import TextStream


@pytest.fixture(scope="module")
def byte_tokenizer():
    """每个字节一个 token：汉字必定被拆开，是最坏的情况。"""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def stream(tokenizer, ids):
    writer = TextStream(tokenizer)
    return [*map(writer.push, ids), writer.finish()]


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_拼起来等于原文且没有替换符(byte_tokenizer, text):
    pieces = stream(byte_tokenizer, byte_tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=30))
def test_无效字节也不丢不重(byte_tokenizer, ids):
    assert "".join(stream(byte_tokenizer, ids)) == byte_tokenizer.decode(ids)


def test_一个汉字凑齐才显示(byte_tokenizer):
    assert stream(byte_tokenizer, byte_tokenizer.encode("a好b")) == ["a", "", "", "好", "b", ""]


def test_只写了半个字符就停_结尾交代清楚(byte_tokenizer):
    assert stream(byte_tokenizer, byte_tokenizer.encode("好")[:2]) == ["", "", "\ufffd"]
