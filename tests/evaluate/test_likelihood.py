"""选项的对数似然：与 transformers 的 Llama 逐题逐选项独立算的一致，与怎么分批、怎么共用前缀无关。"""

import pytest
import torch
from eval_helpers import make_pair, naive_logprob
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.errors import UserError
from minimind.evaluate.likelihood import ChoiceRow, choice_logprobs
from minimind.model import MiniMindConfig, MiniMindForCausalLM

TOKENS = st.lists(st.integers(3, 6000), min_size=1, max_size=6).map(tuple)
OURS, LLAMA = make_pair(context=64)


@st.composite
def exams(draw):
    """几道题，前缀有空有重复，选项长短不一。"""
    prefixes = [(), *draw(st.lists(TOKENS, max_size=2))]
    count = draw(st.integers(1, 6))
    return [
        ChoiceRow(
            draw(st.sampled_from(prefixes)),
            draw(TOKENS),
            tuple(draw(st.lists(TOKENS, min_size=2, max_size=5))),
        )
        for _ in range(count)
    ]


def expected(rows, model=LLAMA):
    return [[naive_logprob(model, row.prefix + row.stem, choice) for choice in row.choices] for row in rows]


@given(exams(), st.sampled_from([1, 20, 4096]))
@settings(max_examples=25, deadline=None)
def test_与_llama_独立计算一致(rows, max_tokens):
    got = choice_logprobs(OURS, rows, max_tokens=max_tokens)
    for values, wanted in zip(got, expected(rows), strict=True):
        assert values == pytest.approx(wanted, abs=2e-4)


def test_外来结构的模型也算得一样():
    rows = [ChoiceRow((5, 6), (7, 8, 9), ((10,), (11, 12, 13))), ChoiceRow((), (4,), ((5, 6), (5, 7), (9,)))]
    for values, wanted in zip(choice_logprobs(LLAMA, rows), expected(rows)):
        assert values == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("options", [{"use_moe": True}, {"arch": "v3"}, {"flash_attn": False}])
def test_各种结构_与自己不用缓存时一致(options):
    torch.manual_seed(1)
    config = MiniMindConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3, **options
    )
    model = MiniMindForCausalLM(config).eval()
    rows = [
        ChoiceRow((5, 6, 7), (8, 9), ((10,), (11, 12), (13, 14, 15))),
        ChoiceRow((5, 6, 7), (4,), ((9, 9), (8,))),
    ]
    for values, wanted in zip(choice_logprobs(model, rows), expected(rows, model)):
        assert values == pytest.approx(wanted, abs=2e-4)


def test_整棵树放不进上下文就一枝一枝算():
    choices = tuple(tuple(range(10 + i, 30 + i)) for i in range(4))
    row = ChoiceRow((3,) * 10, (4,) * 20, choices)
    assert row.width + 10 > 64 >= row.longest
    (values,) = choice_logprobs(OURS, [row])
    assert values == pytest.approx(expected([row])[0], abs=5e-4)


def test_一枝也放不下_说出两个长度():
    with pytest.raises(UserError, match=r"有 66 个 token.*只有 64 个"):
        choice_logprobs(OURS, [ChoiceRow((), (3,) * 60, ((4,) * 6, (5,)))])


def test_进度按位置数走完_空卷也行():
    seen = []
    rows = [
        ChoiceRow((), (3, 4), ((5,), (6, 7))),
        ChoiceRow((), (3,) * 40, ((5,) * 20, (6,) * 20)),
        ChoiceRow((9,), (3,), ((5,), (6,))),
    ]
    choice_logprobs(OURS, rows, max_tokens=4, advance=seen.append)
    # 第二道拆成两枝，题干算了两遍
    assert sum(seen) == rows[0].width + 2 * (40 + 19) + rows[2].width
    assert choice_logprobs(OURS, []) == []
