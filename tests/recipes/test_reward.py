"""奖励模型：学得会好坏，写出的权重直接给强化学习打分，分数与训练时的渲染一致；它不会说话，拿去对话就说清。"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from recipe_cases import CASES, make_base

from minimind.dataset import DPODataset
from minimind.dataset.collate import collate_rows
from minimind.errors import UserError
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.recipes import reward
from minimind.rl.reward_model import load_reward_model
from minimind.rl.reward_net import RewardNet, score_rows
from minimind.rl.reward_rules import Sample
from minimind.rl.rewards import build_rewards
from minimind.runtime.weights import init_model, open_weights
from minimind.tokenizer import encode_chat, load_tokenizer

NAMES = ("云川", "小满", "石桥", "木舟", "青岚", "白露", "星门", "雨巷")


def pair(question, good, bad):
    ask = {"role": "user", "content": question}
    return {
        side: [ask, {"role": "assistant", "content": text}]
        for side, text in (("chosen", good), ("rejected", bad))
    }


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``(目录, 训练的结果)``：客气的好，不耐烦的坏。"""
    patch = pytest.MonkeyPatch()
    home = make_base(tmp_path_factory.mktemp("reward"))
    patch.setenv("MINIMIND_CACHE", str(home / "cache"))
    patch.chdir(home)
    questions = [f"{n}{i}在哪里？" for i, n in enumerate(NAMES * 2)]
    write_jsonl(
        home / "dpo.jsonl", [pair(q, f"您好，{q[:2]}在河边。", f"哼，{q[:2]}在河边。") for q in questions]
    )
    write_jsonl(home / "val.jsonl", [pair(f"{n}远吗？", f"您好，{n}不远。", f"哼，{n}不远。") for n in NAMES])
    result = reward.run(
        reward.RewardModelArguments(
            hidden_size=64, num_hidden_layers=2, data_path="dpo.jsonl", val_path="val.jsonl", max_seq_len=64,
            batch_size=4, epochs=10, learning_rate=2e-3, log_interval=1, device="cpu", dtype="float32",
        )
    )  # fmt: skip
    yield home, result
    patch.undo()


def log_of(result):
    return [json.loads(line) for line in result.log.read_text().splitlines()]


def test_学会好坏_留出的对也分得开_样例是打分(trained):
    _, result = trained
    steps = [line for line in log_of(result) if "lr" in line]
    # 头从零开始：第一步处处 0 分，损失 ln 2，打平算一半
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and steps[0]["accuracy"] == 0.5
    assert result.metrics["val_accuracy"] == 1 and result.metrics["val_margin"] > 0.5
    shown = next(line["samples"] for line in log_of(result) if "samples" in line)
    assert [one["prompt"] for one in shown] == [f"{n}远吗？" for n in NAMES[:3]]
    assert all("您好" in one["answer"].split("｜")[0] and "哼" in one["answer"] for one in shown)


def test_center把零点定在好坏之间():
    torch.manual_seed(0)
    scores = (torch.randn(20) + 5).requires_grad_()
    optimizer = torch.optim.SGD([scores], lr=1.0)
    for _ in range(500):
        optimizer.zero_grad()
        reward.reward_model_loss(scores, 0.1).losses.sum().backward()
        optimizer.step()
    chosen, rejected = scores.detach().chunk(2)
    torch.testing.assert_close(chosen, -rejected, atol=1e-3, rtol=0)


def sample(question, response):
    return Sample([{"role": "user", "content": question}], question, response, line=7)


def test_写出的权重直接当奖励_分数与现算一致(trained):
    _, result = trained
    assert result.weights.name == "reward_64.pth"
    rewards = build_rewards(reward_model_path=str(result.weights))
    samples = [sample("雨巷远吗？", text) for text in ("您好，雨巷不远。", "哼，雨巷不远。", "", "不远" * 9)]
    got = rewards(samples).total.tolist()
    assert got[0] > 0 > got[1] and rewards.bounds == (-3, 3)

    # 不经过我们的代码：逐条、没有补齐，在结束符处读分数
    state = torch.load(result.weights, weights_only=True)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2)).eval()
    trunk = {k.removeprefix("model."): v.float() for k, v in state.items() if k.startswith("model.")}
    model.model.load_state_dict(trunk)
    tokenizer = load_tokenizer()
    for one, score in zip(samples, got):
        chat = [*one.messages, {"role": "assistant", "content": one.response}]
        ids = torch.tensor(encode_chat(tokenizer, chat).ids)
        end = int((ids == tokenizer.eos_token_id).nonzero()[-1])
        with torch.no_grad():
            hidden, _ = model.model(input_ids=ids[None, : end + 1])
        want = float(hidden[0, -1] @ state["score_weight"].float() + state["score_bias"].float())
        assert score == pytest.approx(min(max(want, -3), 3), abs=1e-4)


def test_打分时的渲染与训练时逐词元相同(trained):
    home, result = trained
    pairs = DPODataset(home / "val.jsonl", load_tokenizer(), 64)
    scorer = load_reward_model(result.weights, "cpu", clip=100)
    rows = [(item[side], item[f"{side}_labels"]) for item in pairs for side in ("chosen", "rejected")]
    want = score_rows(scorer.model, rows, 3, pairs.pad_id)
    samples = []
    for i in range(len(pairs)):
        question, good, bad = pairs.words(i)
        samples += [sample(question, good), sample(question, bad)]
    assert scorer(samples) == pytest.approx(want, abs=1e-5)


def test_分数与补齐无关_没写完的在最后一个词元读():
    torch.manual_seed(0)
    net = RewardNet(MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))).eval()
    torch.nn.init.normal_(net.score_weight)
    short, long = torch.arange(10, 16), torch.arange(20, 40)
    labels = short.clone()
    labels[:3] = -100
    with torch.no_grad():
        alone, _ = net(collate_rows([(short, labels)]))
        padded, _ = net(collate_rows([(short, labels), (long, long)]))
        hidden, _ = net.model(input_ids=short[None])
        expected = hidden[0, -1] @ net.score_weight
    assert float(alone[0]) == pytest.approx(float(padded[0]), abs=1e-5)
    assert float(alone[0]) == pytest.approx(float(expected), abs=1e-5)


def test_强化学习拿它当奖励_从命令行(trained, world, capsys):
    _, result = trained
    for recipe in ("grpo", "ppo", "spo"):
        case = CASES[recipe]
        changes = {"reward": None, "reward_model_path": result.weights, "max_steps": 2, "val_path": None}
        if recipe == "spo":
            changes |= {"reward_low": -3, "reward_high": 3}
        assert not case.main()(case.argv(world, **changes)), capsys.readouterr().err[-2000:]
        assert "奖励：model × 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["full_sft_64.pth", "nope.pth"])
def test_不是奖励模型的权重_说清(trained, name):
    home, _ = trained
    words = {"full_sft_64.pth": "是 full_sft 训练的语言模型，没有打分头", "nope.pth": "不存在"}[name]
    with pytest.raises(UserError, match=words) as caught:
        load_reward_model(home / "out" / name, "cpu")
    assert "--reward_model_path" in str(caught.value) and "修复办法" in str(caught.value)


def test_拿奖励模型去对话或当起点_说清它只会打分(trained):
    _, result = trained
    with pytest.raises(UserError, match="只会打分，不会说话"):
        open_weights(result.weights)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2)
    with pytest.raises(UserError, match="只会打分，不会说话"):
        init_model(config, "reward", save_dir="out", device="cpu")


def test_样例只能是个数(tmp_path):
    with pytest.raises(UserError, match=r"--sample_prompts.*奖励模型不作答"):
        reward.RewardModelArguments(sample_prompts="prompts.txt")


def test_没有旁注的与另一个分词器训练的_说的是奖励模型要怎样(trained, tmp_path):
    source = trained[1].weights
    alone = tmp_path / source.name
    shutil.copy(source, alone)
    with pytest.raises(UserError, match=rf"没有旁注 {alone.stem}\.json.*一起拿来"):
        load_reward_model(alone, "cpu")
    sidecar = json.loads(source.with_suffix(".json").read_text("utf-8")) | {"tokenizer_hash": "另一个"}
    alone.with_suffix(".json").write_text(json.dumps(sidecar), "utf-8")
    with pytest.raises(UserError, match="与要练的模型的不同") as caught:
        load_reward_model(alone, "cpu")
    assert "--tokenizer_path" not in str(caught.value)
