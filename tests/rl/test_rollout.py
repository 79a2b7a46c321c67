"""采样：训练的 id 就是抽到的 id；采样的对数概率等于训练时前向算出的；种子定结果。"""

import pytest
import torch

from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.objectives.logprobs import selected_logprobs, target_logits
from minimind.rl.rollout import LocalRollout, response_batch


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [
        tokenizer.encode(text, add_special_tokens=False) for text in ("你好", "一加一等于几？算一算", "好")
    ]


def sampler(model, tokenizer, **options):
    return LocalRollout(model.train(), tokenizer, **{"max_new_tokens": 24, "temperature": 0.8, **options})


def test_次序与形状(model, tokenizer, prompts):
    rollout = sampler(model, tokenizer).generate(prompts, 4, seed=1)
    assert len(rollout) == 12
    assert rollout.group == [0] * 4 + [1] * 4 + [2] * 4
    assert rollout.prompts == [prompts[g] for g in rollout.group]
    assert [len(x) for x in rollout.logprobs] == [len(ids) for ids in rollout.responses]
    eos = tokenizer.eos_token_id
    for ids, truncated, text in zip(rollout.responses, rollout.truncated, rollout.texts):
        assert truncated == (eos not in ids) and (not truncated or len(ids) == 24)
        assert eos not in ids[:-1], "结束符只能在末尾"
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert len({len(ids) for ids in rollout.responses}) > 2 and not all(rollout.truncated)
    assert len({tuple(ids) for ids in rollout.responses}) > 6, "同组的几条不该都一样"


def test_采样的对数概率等于训练时的前向(model, tokenizer, prompts):
    rollout = sampler(model, tokenizer).generate(prompts, 4, seed=2)
    model.eval()
    for rows in (slice(None), slice(3, 9), [11, 0]):
        batch = response_batch(rollout, rows)
        out = target_logits(model, batch)
        chosen = list(range(12))[rows] if isinstance(rows, slice) else rows
        assert out.targets.tolist() == [token for i in chosen for token in rollout.responses[i]]
        expected_rows = [k for k, i in enumerate(chosen) for _ in rollout.responses[i]]
        assert out.rows.tolist() == expected_rows
        logp = selected_logprobs(out.logits, out.targets, temperature=0.8)
        torch.testing.assert_close(logp, batch["old_logps"], atol=1e-4, rtol=0)


def test_左填充的前向给出同样的对数概率(model, tokenizer, prompts):
    """整批左填充（公开做法的排列）也必须与采样一致：填充不改变任何一个对数概率。"""
    rollout = sampler(model, tokenizer).generate(prompts, 2, seed=3)
    rows = [p + r for p, r in zip(rollout.prompts, rollout.responses)]
    width = max(map(len, rows))
    labels = [[-100] * len(p) + r for p, r in zip(rollout.prompts, rollout.responses)]
    batch = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "labels": torch.tensor([[-100] * (width - len(row)) + row for row in labels]),
    }
    out = target_logits(model.eval(), batch)
    logp = selected_logprobs(out.logits, out.targets, temperature=0.8)
    torch.testing.assert_close(logp, torch.cat(rollout.logprobs), atol=1e-4, rtol=0)


def test_种子定结果_与槽位数无关(model, tokenizer, prompts):
    first = sampler(model, tokenizer).generate(prompts, 4, seed=5)
    again = sampler(model, tokenizer, max_slots=3).generate(prompts, 4, seed=5)
    assert first.responses == again.responses and first.texts == again.texts
    assert sampler(model, tokenizer).generate(prompts, 4, seed=6).responses != first.responses


def test_每次都用此刻的权重(tokenizer, prompts):
    torch.manual_seed(1)
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=6400)
    model = MiniMindForCausalLM(config)
    rollout = sampler(model, tokenizer)
    before = rollout.generate(prompts, 2, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    after = rollout.generate(prompts, 2, seed=1)
    fresh = sampler(model, tokenizer).generate(prompts, 2, seed=1)
    assert before.responses != after.responses
    assert after.responses == fresh.responses


def test_空批没有目标():
    from minimind.rl.rollout import Rollout

    batch = response_batch(Rollout([], [], [], [], [], []), [])
    assert (batch["labels"] == -100).all() and len(batch["old_logps"]) == 0 and batch["num_tokens"] == 0
