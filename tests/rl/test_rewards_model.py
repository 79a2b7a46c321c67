"""奖励模型：真的小分类器、带 get_score 的模型、截断与错误的种类。"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from minimind.errors import UserError
from minimind.rl.reward_model import load_reward_model
from minimind.rl.rewards import Sample, build_rewards
from minimind.tokenizer import load_tokenizer

SIZES = {
    "vocab_size": 6400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def sample(response: str, question: str = "48+23 等于多少？") -> Sample:
    messages = [{"role": "user", "content": question}]
    return Sample(messages, question, response, line=7)


def save_model(folder, cls=LlamaForSequenceClassification, config=LlamaConfig, tokenizer=True, **changes):
    torch.manual_seed(0)
    options = {**SIZES, "num_labels": 1, "pad_token_id": 0, **changes}
    model = cls(config(**options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("score", "classifier")) and weight.dim() == 2:
                weight.mul_(20)  # 分数拉开，截断才看得出
    model.save_pretrained(folder)
    if tokenizer:
        load_tokenizer().save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_model")
    return folder, save_model(folder)


def expected_score(model, chat) -> float:
    """不经过我们的代码：单条、没有补齐。"""
    tokenizer = load_tokenizer()
    ids = tokenizer(
        tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        return model(ids["input_ids"]).logits.item()


def test_分类器的分数_长短不一成批也等于逐条(classifier):
    folder, model = classifier
    samples = [sample(text) for text in ("71", "是七十一，因为 40+20=60，8+3=11", "", "不知道" * 5)]
    rewards = build_rewards(reward_model_path=str(folder))
    assert rewards.weights == {"model": 1} and rewards.bounds == (-3, 3)
    raw = [
        expected_score(model, [*s.messages, {"role": "assistant", "content": s.response}]) for s in samples
    ]
    want = torch.tensor(raw).clamp(-3, 3)
    assert torch.allclose(rewards(samples).total, want, atol=1e-5)
    assert len(set(want.tolist())) > 1


def test_分数截到正负三(classifier):
    folder, _ = classifier
    scorer = load_reward_model(folder, "cpu", clip=0.01)
    scores = scorer([sample(text) for text in ("71", "不知道", "好的")])
    assert set(map(abs, scores)) == {0.01}


def test_带思考时四成整体六成答案(classifier):
    folder, _ = classifier
    plain = load_reward_model(folder, "cpu")
    thinking = load_reward_model(folder, "cpu", reasoning=True)
    tagged = sample("<think>40+20=60</think><answer> 71 </answer>")
    untagged = sample("71")
    (whole, answer), untagged_score = plain([tagged, untagged]), plain([untagged])[0]
    unclosed = sample("<think>40+20=60<answer> 71 </answer>")  # 没想完，里面的不算答案
    assert thinking([unclosed])[0] == pytest.approx(plain([unclosed])[0], abs=1e-6)
    got = thinking([untagged, tagged])
    assert got[0] == pytest.approx(untagged_score, abs=1e-6)  # 没有 <answer> 就只有整体
    assert got[1] == pytest.approx(0.4 * whole + 0.6 * answer, abs=1e-5)
    assert build_rewards(reward_model_path=str(folder), reasoning=1).weights == {"model": 1, "format": 0.5}


def test_与规则组合(classifier):
    folder, _ = classifier
    rewards = build_rewards("exact:2,model:0.5", reward_model_path=str(folder))
    s = Sample([{"role": "user", "content": "问"}], "问", "71", "71")
    result = rewards([s])
    assert result.total.item() == pytest.approx(2 + 0.5 * result.parts["model"].item())
    added = build_rewards("exact:2", reward_model_path=str(folder))
    assert added.weights == {"exact": 2, "model": 1}


def test_超长的对话从左边截_仍能打分(classifier, capsys):
    folder, _ = classifier
    scorer = load_reward_model(folder, "cpu", clip=100)
    long = [sample("71", "很长的问题" * 100), sample("71" * 3, "很长的问题" * 100)]
    scores = scorer(long)
    assert scores[0] != scores[1]  # 截的是问题，回答还在
    assert capsys.readouterr().err.count("超过奖励模型的 64 个 token") == 1


def test_编码器一类的分类器收句对(tmp_path):
    folder = tmp_path / "bert"
    save_model(folder, BertForSequenceClassification, BertConfig, tokenizer=False)
    tokenizer = load_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    scores = load_reward_model(folder, "cpu", clip=100)([sample("71"), sample("不知道")])
    assert scores[0] != scores[1]


SCORER = '''
import torch
from transformers import PretrainedConfig, PreTrainedModel


class LengthConfig(PretrainedConfig):
    model_type = "length_reward"


class LengthReward(PreTrainedModel):
    """分数是回答的字数减 4。"""

    config_class = LengthConfig

    def __init__(self, config):
        super().__init__(config)
        self.bias = torch.nn.Parameter(torch.tensor(-4.0))
        self.post_init()

    {method}


'''
GET_SCORE = "def get_score(self, tokenizer, messages):\n        return len(messages[-1]['content']) + self.bias.item()"


def save_remote(folder, method: str) -> str:
    import json

    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "modeling_length.py").write_text(SCORER.replace("{method}", method), encoding="utf-8")
    auto = {"AutoConfig": "modeling_length.LengthConfig", "AutoModel": "modeling_length.LengthReward"}
    config = {"model_type": "length_reward", "architectures": ["LengthReward"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"bias": torch.tensor(-4.0)}, folder / "model.safetensors", metadata={"format": "pt"})
    load_tokenizer().save_pretrained(folder)
    return str(folder)


def test_带_get_score_的模型_要明说才执行它的代码(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_remote(tmp_path / "scorer", GET_SCORE)
    with pytest.raises(UserError, match=r"自带代码，默认不执行.*--trust_remote_code 1"):
        build_rewards(reward_model_path=folder)
    rewards = build_rewards(reward_model_path=folder, trust_remote_code=True)
    assert rewards([sample("12345"), sample("1"), sample("1" * 30)]).total.tolist() == [1, -3, 3]


def test_不是数的分数指出样本(tmp_path, classifier):
    folder, _ = classifier
    scorer = load_reward_model(folder, "cpu")
    scorer.model.score.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"奖励模型给出 nan；第 7 行.*48\+23"):
        scorer([sample("71")])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda f: None, "目录不存在"),
        (lambda f: f.mkdir(), "读不出 config.json"),
        (lambda f: save_model(f, LlamaForCausalLM), "这不是奖励模型.*LlamaForCausalLM.*num_labels = 1"),
        (lambda f: save_model(f, num_labels=3), "分类器有 3 个输出"),
        (lambda f: save_model(f, tokenizer=False), "分词器打不开"),
    ],
)
def test_错的种类说清是什么(tmp_path, make, words):
    folder = tmp_path / "model"
    make(folder)
    with pytest.raises(UserError, match=words) as caught:
        build_rewards(reward_model_path=str(folder))
    assert str(folder) in str(caught.value) and "修复办法" in str(caught.value)


def test_没有训练过的打分头(tmp_path):
    """拿语言模型的权重冒充分类器：transformers 会随机造一个头，分数毫无意义。"""
    import json

    folder = tmp_path / "model"
    save_model(folder, LlamaForCausalLM)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]})
    )
    with pytest.raises(UserError, match=r"缺 score\.weight"):
        build_rewards(reward_model_path=str(folder))
