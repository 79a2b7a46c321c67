"""目标词元的对数概率：打包、填充、逐条单独算三种算法必须一致。"""

from __future__ import annotations

import pytest
import torch

from minimind.dataset import collate_dpo
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.objectives.logprobs import entropy_of, selected_logprobs, sequence_sums, target_logits


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MiniMindConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    return MiniMindForCausalLM(config).eval()


def alone(model, ids, first):
    """不用任何批处理：整段前向，逐位置取对数概率。"""
    logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return [float(logp[t - 1, ids[t]]) for t in range(first, len(ids))]


def items():
    torch.manual_seed(1)
    made = []
    for n, m in ((7, 5), (9, 9), (4, 12)):
        item = {}
        for side, length in (("chosen", n), ("rejected", m)):
            ids = torch.randint(3, 50, (length,))
            labels = ids.clone()
            labels[:2] = -100
            item[side], item[f"{side}_labels"] = ids, labels
        made.append(item)
    return made


def test_填充的批与逐条单独算一致(model):
    pairs = items()
    got = target_logits(model, collate_dpo(pairs))
    logp = selected_logprobs(got.logits, got.targets)
    sequences = [pair[side].tolist() for side in ("chosen", "rejected") for pair in pairs]
    expected = [value for ids in sequences for value in alone(model, ids, 2)]
    torch.testing.assert_close(logp, torch.tensor(expected), atol=1e-5, rtol=0)
    assert got.targets.tolist() == [token for ids in sequences for token in ids[2:]]


def test_段号能把和还给各条(model):
    batch = collate_dpo(items())
    got = target_logits(model, batch)
    sums = sequence_sums(
        torch.ones_like(got.targets, dtype=torch.float), got.rows, len(batch["cu_seqlens"]) - 1
    )
    # 填充也占一段：有目标的段依次是 6 条的目标数
    assert sums[sums > 0].tolist() == [5, 7, 2, 3, 7, 10]


def test_左填充不改变对数概率(model):
    ids = torch.randint(3, 50, (6,))
    padded = torch.cat([torch.zeros(4, dtype=torch.long), ids])[None]
    labels = padded.clone()
    labels[:, :6] = -100
    batch = {"input_ids": padded, "labels": labels, "attention_mask": (torch.arange(10) >= 4).long()[None]}
    got = target_logits(model, batch)
    logp = selected_logprobs(got.logits, got.targets)
    torch.testing.assert_close(logp, torch.tensor(alone(model, ids.tolist(), 2)), atol=1e-5, rtol=0)
    assert got.rows.tolist() == [0] * 4


def test_温度进到概率里():
    logits = torch.tensor([[0.0, 2.0]])
    logp = selected_logprobs(logits, torch.tensor([1]), temperature=2.0)
    assert float(logp) == pytest.approx(-0.3132617)  # ln(e/(1+e))
    assert float(entropy_of(torch.zeros(1, 4))) == pytest.approx(1.3862944)
