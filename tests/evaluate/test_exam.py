"""微世界考试：编码方式、判分与汇总。"""

import pytest
import torch

from minimind.errors import UserError
from minimind.evaluate.microworld import Answered, accuracy, by_task, encode_items, evaluate_items, read_items
from minimind.inference.sampling import SamplingParams
from minimind.microworld import ensure_microworld
from minimind.model import MiniMindConfig
from minimind.tokenizer import load_tokenizer

CHAT = {
    "task": "add",
    "prompt": "1+1=？",
    "messages": [{"role": "user", "content": "1+1=？"}],
    "answer": "2",
    "grader": "numeric",
}
CLOZE = {"task": "antonym", "prompt": "甜的反义词：", "messages": [], "answer": "苦", "grader": "prefix"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_对话题走模板_填空题续写原文(tokenizer):
    chat, cloze = encode_items(tokenizer, [CHAT, CLOZE])
    assert tokenizer.decode(chat).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(cloze) == "<|im_start|>甜的反义词："


class Parrot(torch.nn.Module):
    """不看题，总是接着说出同一串 token 再结束；用来验证考试流程而不必训练。"""

    def __init__(self, ids):
        super().__init__()
        self.config = MiniMindConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ids = ids

    def forward(self, input_ids, past_key_values=None, **kwargs):
        """缓存就是写到了第几个。"""
        step = 0 if past_key_values is None else past_key_values + 1
        logits = torch.zeros(input_ids.size(0), 1, self.config.vocab_size)
        logits[..., self.ids[min(step, len(self.ids) - 1)]] = 9
        return type("Output", (), {"logits": logits, "past_key_values": step})


def test_按内容判分_与题目同序(tokenizer):
    model = Parrot([*tokenizer.encode("1+1=2。"), tokenizer.eos_token_id])
    model.train()
    wrong = {**CHAT, "answer": "3"}
    results = evaluate_items(model, tokenizer, [wrong, CLOZE, CHAT])
    assert [answered.score for answered in results] == [0, 0, 1]
    assert [answered.item for answered in results] == [wrong, CLOZE, CHAT]
    assert results[2].response == "1+1=2。" and results[2].finished
    assert model.training
    assert accuracy(results) == pytest.approx(1 / 3)
    assert {task: len(group) for task, group in by_task(results).items()} == {"add": 2, "antonym": 1}


def test_没停下来要看得出(tokenizer):
    (answered,) = evaluate_items(Parrot(tokenizer.encode("啊")), tokenizer, [CHAT], max_new_tokens=5)
    assert not answered.finished


def test_可以不贪心_种子定了就定了(tokenizer):
    """鹦鹉把一个字说得极可能；温度高到分布几乎是平的，抽到的就不再是它。"""
    parrot, items = Parrot(tokenizer.encode("啊")), [CHAT, CHAT]
    flat = [SamplingParams(temperature=1000.0, seed=seed) for seed in (1, 1, 2)]
    first, same, other = (
        [one.response for one in evaluate_items(parrot, tokenizer, items, max_new_tokens=5, params=params)]
        for params in flat
    )
    assert first == same != other
    assert first[0] != first[1], "同一道题的两份各有自己的随机数"


def test_部分得分不算答对():
    assert accuracy([Answered({}, "", 0.5, True)]) == 0
    assert accuracy([]) == 0


def test_真实考题都能编码_且装得进演示的上下文(tokenizer, tmp_path):
    items = read_items(ensure_microworld(0.01, 42, tmp_path / "world") / "eval.jsonl")
    lengths = [len(ids) for ids in encode_items(tokenizer, items)]
    assert len(items) > 500 and max(lengths) < 256


def test_没有考题文件_说出怎么得到(tmp_path):
    with pytest.raises(UserError, match="make-microworld"):
        read_items(tmp_path / "eval.jsonl")
