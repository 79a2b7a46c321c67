"""偏好损失：对手算的值，对 TRL 的值与梯度；一批里填充、别的对都不改变一条回答的对数概率。"""

from __future__ import annotations

import json
import math

import pytest
import torch
from trainer_helpers import tiny_model

from minimind.dataset import collate_dpo
from minimind.dataset.collate import collate_kto, collate_rows, rows_between
from minimind.objectives.preference import (
    kto_loss,
    log_odds,
    preference_loss,
    reward_model_loss,
    sequence_logprobs,
)


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


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# 一对：好的长 2、和 −1，每词元 −0.5；坏的长 4、和 −6，每词元 −1.5
PAIR, PAIR_LENGTHS = [-1.0, -6.0], [2.0, 4.0]


def test_orpo_手算的值与梯度():
    """odds(p) = e^p/(1 − e^p)：好的 0.6065/0.3935，坏的 0.2231/0.7769；λ = 0.5。不看参考模型。"""
    odds = [math.exp(p) / (1 - math.exp(p)) for p in (-0.5, -1.5)]
    z = math.log(odds[0] / odds[1])
    policy = torch.tensor(PAIR, requires_grad=True)
    got = preference_loss(policy, None, torch.tensor(PAIR_LENGTHS), beta=0.5, loss_type="orpo")
    assert got.losses.item() == pytest.approx(0.5 - 0.5 * math.log(sigmoid(z)), abs=1e-6)
    assert (float(got.chosen_rewards), float(got.rejected_rewards)) == pytest.approx((-0.25, -0.75))
    got.losses.sum().backward()
    # d log odds / dp = 1/(1 − e^p)；p 是和除以长度
    push = 0.5 * (1 - sigmoid(z))
    expected = [(-1 - push / (1 - math.exp(-0.5))) / 2, push / (1 - math.exp(-1.5)) / 4]
    assert policy.grad.tolist() == pytest.approx(expected, abs=1e-6)


def test_simpo_手算的值与梯度():
    """β·(p_w − p_l) − γ = 2·1 − 0.5 = 1.5；不看参考模型。"""
    policy = torch.tensor(PAIR, requires_grad=True)
    options = {"beta": 2.0, "gamma": 0.5, "loss_type": "simpo"}
    got = preference_loss(policy, None, torch.tensor(PAIR_LENGTHS), **options)
    assert got.losses.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-6)
    got.losses.sum().backward()
    push = 2 * sigmoid(-1.5)
    assert policy.grad.tolist() == pytest.approx([-push / 2, push / 4], abs=1e-6)
    smoothed = preference_loss(policy, None, torch.tensor(PAIR_LENGTHS), label_smoothing=0.25, **options)
    expected = 0.75 * math.log1p(math.exp(-1.5)) + 0.25 * math.log1p(math.exp(1.5))
    assert smoothed.losses.item() == pytest.approx(expected, abs=1e-6)


def test_概率贴近一时对数赔率是有限的数():
    logps = torch.tensor([0.0, -1e-9, -1e-3, -50.0], requires_grad=True)
    value = log_odds(logps)
    value.sum().backward()
    assert value.isfinite().all() and logps.grad.isfinite().all()
    assert value[3].item() == pytest.approx(-50, abs=1e-5)


def test_kto_手算的值与梯度():
    """β = 0.5，z0 = 1，λ_D = 2，λ_U = 0.5；好的 Δ = 3，坏的 Δ = −1、2。"""
    ratios = torch.tensor([3.0, -1.0, 2.0], requires_grad=True)
    desirable = torch.tensor([True, False, False])
    got = kto_loss(ratios, desirable, 1.0, beta=0.5, desirable_weight=2.0, undesirable_weight=0.5)
    inside = [sigmoid(1.0), sigmoid(1.0), sigmoid(-0.5)]
    expected = [2 * (1 - inside[0]), 0.5 * (1 - inside[1]), 0.5 * (1 - inside[2])]
    assert got.losses.tolist() == pytest.approx(expected, abs=1e-6)
    assert got.rewards.tolist() == pytest.approx([1.5, -0.5, 1.0])
    got.losses.sum().backward()
    slopes = [s * (1 - s) for s in inside]
    expected = [-2 * 0.5 * slopes[0], 0.5 * 0.5 * slopes[1], 0.5 * 0.5 * slopes[2]]
    assert ratios.grad.tolist() == pytest.approx(expected, abs=1e-6)
    metrics = got.metrics(desirable, 0.5 * 1.0)
    assert int(metrics["accuracy"]) == 2  # 最后一条标着坏，却比参考点高
    assert float(metrics["reward_chosen"][0]) == 1.5 and metrics["reward_chosen"][1] == 1
    assert float(metrics["reward_rejected"][0]) == 0.5 and metrics["reward_rejected"][1] == 2


def test_奖励模型_手算的值与梯度():
    """r_w = 2、r_l = 0.5：差 1.5，和 2.5，center = 0.1。"""
    scores = torch.tensor([2.0, 0.5], requires_grad=True)
    got = reward_model_loss(scores, 0.1)
    assert got.losses.item() == pytest.approx(math.log1p(math.exp(-1.5)) + 0.625, abs=1e-6)
    assert float(got.metrics()["margin"]) == 1.5
    got.losses.sum().backward()
    assert scores.grad.tolist() == pytest.approx([-sigmoid(-1.5) + 0.5, sigmoid(-1.5) + 0.5], abs=1e-6)


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
    means = [alone(policy, a) / len(a) for a in answers]
    free = {
        "simpo": math.log1p(math.exp(0.3 - 0.1 * (means[0] - means[1]))),
        "orpo": -means[0] - 0.1 * math.log(sigmoid(float(log_odds(torch.tensor(means)).diff().neg()))),
    }
    for loss_type, value in free.items():
        options = {"beta": 0.1, "loss_type": loss_type, "gamma": 0.3}
        got = preference_loss(scores.logps, None, scores.lengths, **options)
        assert float(got.losses) == pytest.approx(value, abs=1e-3), loss_type
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


def unpaired_items(count: int = 4) -> list[dict]:
    """KTO 的样本：各自的提问与回答，不配对的是下一条的回答。"""
    generator = torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(3, 97, (n,), generator=generator)

    prompts = [ids(4 + i) for i in range(count)]
    answers = [ids(int(torch.randint(2, 9, (), generator=generator))) for _ in range(count)]
    items = []
    for i in range(count):
        item = {"desirable": i != 2}
        for name, answer in (("answer", answers[i]), ("mismatched", answers[(i + 1) % count])):
            item[name] = torch.cat([prompts[i], answer])
            item[f"{name}_labels"] = torch.cat([torch.full_like(prompts[i], -100), answer])
        items.append(item)
    return items


def test_取出的几行与单独拼的一批相同():
    items = unpaired_items()
    whole = collate_kto(items)
    assert whole["desirable"].tolist() == [True, True, False, True]
    model = tiny_model().eval()
    for begin, name in ((0, "answer"), (4, "mismatched")):
        alone = collate_rows([(item[name], item[f"{name}_labels"]) for item in items])
        part = rows_between(whole, begin, begin + 4)
        with torch.no_grad():
            got, want = sequence_logprobs(model, part), sequence_logprobs(model, alone)
        torch.testing.assert_close(got.logps, want.logps, atol=1e-5, rtol=0)
        assert got.lengths.tolist() == want.lengths.tolist()
        assert int(part["cu_seqlens"][-1]) == part["input_ids"].numel()


@pytest.mark.parametrize("loss_type", ["orpo", "simpo"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_与TRL的ORPO和SimPO一致(loss_type, beta):
    """同一批对数概率：值与对每条对数概率的梯度。ORPO 另有好回答的交叉熵，TRL 在损失函数之外加。"""
    pytest.importorskip("trl")
    from types import SimpleNamespace

    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    torch.manual_seed(0)
    lengths = torch.randint(2, 9, (8,)).float()
    policy = (-(torch.rand(8) * 3 + 0.05) * lengths).requires_grad_()
    ours = preference_loss(policy, None, lengths, beta=beta, loss_type=loss_type, gamma=0.7).losses.mean()
    (grad,) = torch.autograd.grad(ours, policy)
    settings = {"beta": beta, "simpo_gamma": 0.7, "label_smoothing": 0.0, "alpha": 0.0, "loss_type": "simpo"}
    stub = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **settings)
    chosen, rejected = (policy / lengths).chunk(2)
    if loss_type == "simpo":
        theirs = cpo.cpo_loss(stub, chosen, rejected)[0].mean()
    else:
        theirs = (-chosen - orpo.odds_ratio_loss(stub, chosen, rejected)[0]).mean()
    (expected,) = torch.autograd.grad(theirs, policy)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("seed", "other"), [(7, 8), (8, 7)])
def test_与TRL的KTOTrainer一致(tmp_path, seed, other):
    """同样的权重、同一批：z0、损失与每个参数的梯度都一致；两个模型对调，z0 从正的变成截在零的。"""
    from types import SimpleNamespace

    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from minimind.export.twin import transformers_twin
    from minimind.recipes.unpaired import mean_at_least_zero, mismatched_ratios, unpaired_loss
    from minimind.tokenizer import load_tokenizer

    class Trainer(trl.KTOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # 已经是词元

    weights = {"beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    trainer = Trainer(
        model=transformers_twin(tiny_model(seed=seed), pad_token_id=0),
        ref_model=transformers_twin(tiny_model(seed=other), pad_token_id=0),
        args=trl.KTOConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=4, **weights,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt_ids": [3], "completion_ids": [4], "KL_completion_ids": [5], "label": True}] * 4
        ),
        processing_class=load_tokenizer(),
    )  # fmt: skip
    items, model, reference = unpaired_items(), tiny_model(seed=seed), tiny_model(seed=other).eval()
    batch = collate_kto(items)
    loss, _ = unpaired_loss(model, batch, SimpleNamespace(**weights), reference)
    (loss / 4).backward()

    inputs = {"label": batch["desirable"]}
    for prefix, name in (("", "answer"), ("KL_", "mismatched")):
        rows = collate_rows([(item[name], item[f"{name}_labels"]) for item in items])
        real = torch.arange(rows["labels"].shape[1]) < torch.tensor([len(i[name]) for i in items])[:, None]
        inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"] = rows["input_ids"], real.long()
        inputs[f"{prefix}completion_mask"] = (rows["labels"] != -100).long()
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()

    kl = mean_at_least_zero(mismatched_ratios(model, batch, reference))
    assert (kl > 0.1) == (seed == 7) and (kl > 0 or seed == 8)
    assert trainer._metrics["train"]["kl"][0] == pytest.approx(kl, abs=1e-5)
    assert loss.item() / 4 == pytest.approx(theirs.item(), abs=1e-5)
    expected = dict(trainer.model.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, atol=1e-5, rtol=0)


def test_奖励模型的损失与TRL一致():
    """TRL 的 RewardTrainer.compute_loss，只把它的前向换成现成的分数。"""
    from types import SimpleNamespace
    from unittest.mock import MagicMock

    trainer_module = pytest.importorskip("trl.trainer.reward_trainer")
    torch.manual_seed(0)
    scores = torch.randn(8).requires_grad_()
    ours = reward_model_loss(scores, 0.05).losses.mean()
    (grad,) = torch.autograd.grad(ours, scores)
    stub = MagicMock()
    stub.args = SimpleNamespace(center_rewards_coefficient=0.05)
    stub.model.training = False  # 训练时另数词元
    theirs = trainer_module.RewardTrainer.compute_loss(
        stub, lambda **inputs: SimpleNamespace(logits=scores[:, None]), {"input_ids": torch.zeros(8, 2)}
    )
    (expected,) = torch.autograd.grad(theirs, scores)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=0)
