"""偏好损失：对手算的值，对 TRL 的值与梯度；一批里填充、别的对都不改变一条回答的对数概率。"""

from __future__ import annotations

import json
import math

import pytest
import torch
from trainer_helpers import tiny_model

from minimind.dataset import collate_dpo
from minimind.objectives.preference import preference_loss, sequence_logprobs


def test_手算的值():
    """一对：Δ_w = 2 − 1 = 1，Δ_l = −1 − 2 = −3，h = 4；长度 2 与 6。"""
    policy, reference = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 2.0])
    lengths = torch.tensor([2.0, 6.0])
    got = preference_loss(policy, reference, lengths, beta=0.1)
    assert float(got.losses) == pytest.approx(math.log1p(math.exp(-0.4)), abs=1e-6)
    assert (float(got.chosen_rewards), float(got.rejected_rewards)) == pytest.approx((0.1, -0.3))
    # 每词元：1/2 与 −3/6，h = 1
    got = preference_loss(policy, reference, lengths, beta=2.0, loss_type="sigmoid_norm")
    assert float(got.losses) == pytest.approx(math.log1p(math.exp(-2.0)), abs=1e-6)
    got = preference_loss(policy, reference, lengths, beta=0.1, loss_type="ipo")
    assert float(got.losses) == pytest.approx((1 - 5) ** 2)
    got = preference_loss(policy, reference, lengths, beta=0.1, label_smoothing=0.25)
    expected = 0.75 * math.log1p(math.exp(-0.4)) + 0.25 * math.log1p(math.exp(0.4))
    assert float(got.losses) == pytest.approx(expected, abs=1e-6)


def test_手算的梯度():
    """dL/dlogπ(y_w) = −β·σ(−β·h)，对坏的那个反号：推高好的、压低坏的，分得越开推得越轻。"""
    policy = torch.tensor([2.0, -1.0], requires_grad=True)
    preference_loss(policy, torch.tensor([1.0, 2.0]), torch.ones(2), beta=0.5).losses.sum().backward()
    push = 0.5 / (1 + math.exp(0.5 * 4))
    assert policy.grad.tolist() == pytest.approx([-push, push], abs=1e-6)


def test_策略等于参考时损失是二的对数_打平算一半():
    logps = torch.randn(6)
    got = preference_loss(logps, logps, torch.ones(6))
    assert got.losses.tolist() == pytest.approx([math.log(2)] * 3)
    assert float(got.metrics()["accuracy"]) == 1.5


def test_不认识的损失():
    with pytest.raises(ValueError, match="sigmoid_norm"):
        preference_loss(torch.zeros(2), torch.zeros(2), torch.ones(2), loss_type="hinge")


HISTORY = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "您好，有什么可以帮您？"},
    {"role": "user", "content": "云川在哪里？"},
    {"role": "assistant", "content": "云川在河的东边。"},
    {"role": "user", "content": "远吗？"},
]
GOOD, BAD = "您好，不远。", "哼，自己走走看，又不是没有长腿。"


def multi_turn(tmp_path):
    """一对有共同历史的偏好：``(批, 提示的 id, 好的回答的 id, 坏的回答的 id)``，后三样不经过数据集。"""
    from minimind.dataset import DPODataset
    from minimind.tokenizer import encode_chat, encode_plain, load_tokenizer

    tokenizer = load_tokenizer()
    sides = {
        name: [*HISTORY, {"role": "assistant", "content": text}]
        for name, text in (("chosen", GOOD), ("rejected", BAD))
    }
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(sides, ensure_ascii=False) + "\n", encoding="utf-8")
    pairs = DPODataset(path, tokenizer, 256, cache_dir=tmp_path / "cache")
    prompt = encode_chat(tokenizer, HISTORY, add_generation_prompt=True).ids
    answers = [[*encode_plain(tokenizer, text), tokenizer.eos_token_id] for text in (GOOD, BAD)]
    return collate_dpo([pairs[0]]), prompt, *answers


def test_多回合的对_和与个数都只算最后的回答(tmp_path):
    batch, prompt, *answers = multi_turn(tmp_path)
    policy, base = tiny_model(vocab_size=6400).eval(), tiny_model(seed=8, vocab_size=6400).eval()
    with torch.no_grad():
        scores, reference = sequence_logprobs(policy, batch), sequence_logprobs(base, batch)

    def alone(model, answer):
        """逐个词元现算：提示接上回答，只加回答的那一段。"""
        with torch.no_grad():
            table = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return sum(float(table[len(prompt) + k - 1, token]) for k, token in enumerate(answer))

    ratios = [alone(policy, a) - alone(base, a) for a in answers]
    lengths = [len(a) for a in answers]
    assert scores.lengths.tolist() == lengths
    assert (scores.logps - reference.logps).tolist() == pytest.approx(ratios, abs=1e-3)
    mean = ratios[0] / lengths[0] - ratios[1] / lengths[1]
    expected = {
        "sigmoid": math.log1p(math.exp(-0.1 * (ratios[0] - ratios[1]))),
        "sigmoid_norm": math.log1p(math.exp(-0.1 * mean)),
        "ipo": (mean - 5) ** 2,
    }
    for loss_type, value in expected.items():
        got = preference_loss(scores.logps, reference.logps, scores.lengths, beta=0.1, loss_type=loss_type)
        assert float(got.losses) == pytest.approx(value, abs=1e-3), loss_type
        assert got.chosen_rewards.item() == pytest.approx(0.1 * ratios[0], abs=1e-3)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo"])
def test_只在共同的历史上漂移_损失不动(tmp_path, loss_type):
    """历史上每个目标词元的对数概率都加 0.5：那不是偏好，哪种损失都不该看见。"""
    batch, prompt, *_ = multi_turn(tmp_path)
    mask = batch["labels"] != -100
    drift = torch.zeros(mask.shape)
    drift[:, : len(prompt)] = 0.5
    reference = -torch.ones(mask.shape)
    losses = [
        float(
            preference_loss(
                (values * mask).sum(1), (reference * mask).sum(1), mask.sum(1).float(), loss_type=loss_type
            ).losses
        )
        for values in (reference, reference + drift)
    ]
    assert losses[0] == losses[1] == pytest.approx({"ipo": 25.0}.get(loss_type, math.log(2)))


def random_pairs(count: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for _ in range(count):
        pair = {}
        prompt = torch.randint(3, 97, (4,), generator=generator)
        for side in ("chosen", "rejected"):
            n = int(torch.randint(2, 9, (), generator=generator))
            ids = torch.cat([prompt, torch.randint(3, 97, (n,), generator=generator)])
            labels = ids.clone()
            labels[:4] = -100
            pair[side], pair[f"{side}_labels"] = ids, labels
        pairs.append(pair)
    return pairs


def test_对数概率与逐条单独算一致():
    model, pairs = tiny_model().eval(), random_pairs()
    got = sequence_logprobs(model, collate_dpo(pairs))
    sequences = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    for ids, logp, length in zip(sequences, got.logps, got.lengths):
        with torch.no_grad():
            table = torch.log_softmax(model(ids[None]).logits[0], -1)
        expected = sum(float(table[t - 1, ids[t]]) for t in range(4, len(ids)))
        assert logp.item() == pytest.approx(expected, abs=1e-4)
        assert int(length) == len(ids) - 4


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """TRL 的 DPOTrainer，策略与参考都是装着我们权重的 HF Llama（稠密 v2 与它同构）。"""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from minimind.export.twin import transformers_twin
    from minimind.tokenizer import load_tokenizer

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # 已经是词元

    options = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, report_to=[], bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    return Trainer(
        model=transformers_twin(tiny_model(), pad_token_id=0),
        ref_model=transformers_twin(tiny_model(seed=8), pad_token_id=0),
        args=options,
        train_dataset=datasets.Dataset.from_list(
            [{"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]}]
        ),
        processing_class=load_tokenizer(),
    )


@pytest.mark.parametrize("loss_type, beta", [("sigmoid", 0.1), ("sigmoid_norm", 2.0), ("ipo", 0.1)])
def test_与TRL的DPOTrainer一致(trl_trainer, loss_type, beta):
    """同样的权重、同一批：损失、四项指标与每个参数的梯度都一致。"""
    model, pairs = tiny_model(), random_pairs()
    batch = collate_dpo(pairs)
    with torch.no_grad():
        reference = sequence_logprobs(tiny_model(seed=8).eval(), batch).logps
    scores = sequence_logprobs(model, batch)
    ours = preference_loss(scores.logps, reference, scores.lengths, beta=beta, loss_type=loss_type)
    ours.losses.mean().backward()

    trainer, theirs_model = trl_trainer, trl_trainer.model
    theirs_model.zero_grad()
    trainer.loss_types, trainer.beta = [loss_type], beta
    trainer._metrics["train"].clear()
    lengths = torch.tensor([len(pair[side]) for side in ("chosen", "rejected") for pair in pairs])
    real = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": real.long(),
        "completion_mask": (batch["labels"] != -100).long(),
    }
    theirs = trainer.compute_loss(theirs_model, inputs)
    theirs.backward()

    assert float(ours.losses.mean()) == pytest.approx(float(theirs), abs=1e-5)
    logged, metrics = trainer._metrics["train"], ours.metrics()
    for name, key in (("accuracy", "accuracies"), ("margin", "margins"), ("reward_chosen", "chosen"),
                      ("reward_rejected", "rejected")):  # fmt: skip
        assert float(metrics[name]) / len(pairs) == pytest.approx(logged[f"rewards/{key}"][0], abs=1e-5)
    theirs_grads = dict(theirs_model.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs_grads[name].grad, atol=1e-5, rtol=0)
