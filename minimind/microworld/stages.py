"""把任务家族编成每个训练阶段的文件：预训练、SFT、LoRA、DPO、推理、强化学习与评测。"""

from __future__ import annotations

import random
from collections.abc import Iterator

from .core import HELDOUT, TRAIN, Example, Task, stream
from .phrasing import GRUMPY_FRAMES, POLITE_FRAMES
from .tasks.agent import Errand, Errands
from .tasks.identity import new_identity
from .tasks.multistep import Chain

# 默认规模（scale = 1）各阶段的条数；预训练与 SFT 的量见 mixing.py
STAGE_COUNTS = {
    "lora_identity": 400,
    "dpo": 1200,
    "reason": 2400,
    "rl": 1500,
    "agent": 1500,
    "agent_sft": 700,
}
HELDOUT_COUNT = 240
PRETRAIN_HELDOUT_SCALE, SFT_HELDOUT_SCALE = 0.03, 0.03

# LoRA 数据里普通问答的复习与新身份之比：一比一时其他任务掉 2.9 个百分点
LORA_REVIEW = 2
# 推理数据里普通问答的复习与多步题之比：一条不留时，模型对什么都先 <think>，简单题从 85 % 掉到 1 %
REASON_REVIEW = 0.5

# 差事的微调里，普通问答的复习与差事的段数之比
AGENT_REVIEW = 2

# SFT 里带腔调的回答各占这么多：太少 DPO 无从强化，太多会冲淡正常回答
STYLED_SHARE = 0.04
# 偏好里坏的那一边有这么多是不带腔调的平常回答：只拿不耐烦的作对比，模型学会不发脾气，开口却还是平常的样子
# （同样的学习率与步数，留出的提问里客气的回答占 5 %；换成各一半后占 38 %，docs/dpo.md）
DPO_PLAIN_SHARE = 0.5
# hard 题在 SFT 里写出步骤的比例：多数直接报答案（常错），强化学习要自己发现写步骤更好
STEPS_SHARE = 0.3


class Corpus:
    """一个种子、一个规模下的全部文件内容。

    Args:
        tasks: :func:`tasks.build_tasks` 的结果。
        scale: 训练部分的规模；留出部分与题目数不变。
        seed: 随机种子。
    """

    def __init__(self, tasks: dict[str, Task], scale: float, seed: int):
        self.tasks, self.scale, self.seed = tasks, scale, seed

    def count(self, base: int) -> int:
        return max(1, round(base * self.scale))

    def easy_tasks(self) -> list[Task]:
        """出题的、计入成绩单的家族。"""
        return [task for task in self.tasks.values() if task.level == "easy" and task.share.sft]

    # ---- 预训练 ----

    def pretrain(self, side: str) -> list[dict]:
        """各家族按份额分字节，写满为止，再整体打乱；训练部分不收与留出部分相同的文档。"""
        taken = {record["text"] for record in self.pretrain(HELDOUT)} if side == TRAIN else set()
        factor = 1000 * (self.scale if side == TRAIN else PRETRAIN_HELDOUT_SCALE)
        records = []
        for task in self.tasks.values():
            rng = stream(self.seed, "pretrain", side, task.name)
            left = factor * task.share.pretrain
            if not task.share.pretrain:
                continue
            for text in task.documents(rng, side):
                if left <= 0:
                    break
                if text not in taken:
                    left -= len(text.encode())
                    records.append({"text": text})
        stream(self.seed, "pretrain", side, "shuffle").shuffle(records)
        return records

    # ---- 对话 ----

    def sft_examples(self, side: str) -> Iterator[tuple[Task, Example]]:
        """SFT 的题目流：按份额轮流出题，顺序已打乱。"""
        factor = self.scale if side == TRAIN else SFT_HELDOUT_SCALE
        plan = [task for task in self.tasks.values() for _ in range(round(factor * task.share.sft))]
        stream(self.seed, "sft", side, "order").shuffle(plan)
        streams = {name: stream(self.seed, "sft", side, name) for name in self.tasks}
        for task in plan:
            rng = streams[task.name]
            ex = task.example(rng, side)
            if ex.steps and rng.random() < STEPS_SHARE:
                ex = ex.with_response(f"{ex.steps}，{ex.response}")
            yield task, ex

    def sft(self, side: str) -> list[dict]:
        rng = stream(self.seed, "sft", side, "style")
        records = []
        for _, ex in self.sft_examples(side):
            roll = rng.random()
            if stylable(ex) and side == TRAIN and roll < 2 * STYLED_SHARE:
                ex = ex.with_response(dress(rng, ex.response, polite=roll < STYLED_SHARE))
            records.append(ex.conversation())
        return records

    def lora_identity(self, side: str) -> list[dict]:
        """新身份占三分之一；其余是普通问答的复习，免得模型把什么都答成自我介绍、把别的忘掉。"""
        identity = new_identity(self.seed)
        rng = stream(self.seed, "lora", side)
        count = self.count(STAGE_COUNTS["lora_identity"]) if side == TRAIN else HELDOUT_COUNT // 4
        records = [identity.example(rng, side).conversation() for _ in range(count)]
        if side == TRAIN:
            easy = [t for t in self.easy_tasks() if t.name != "identity"]
            review = LORA_REVIEW * count
            records += [rng.choice(easy).example(rng, TRAIN).conversation() for _ in range(review)]
        rng.shuffle(records)
        return records

    def dpo(self, side: str) -> list[dict]:
        """两边内容同样正确，只有腔调不同：好的总是客气，坏的一半不耐烦、一半平常。"""
        rng = stream(self.seed, "dpo", side)
        tasks = self.easy_tasks()
        count = self.count(STAGE_COUNTS["dpo"]) if side == TRAIN else HELDOUT_COUNT
        records = []
        while len(records) < count:
            ex = rng.choice(tasks).example(rng, side)
            if not stylable(ex):
                continue
            prompt = ex.prompt_messages()
            good, bad = (dress(rng, ex.response, polite) for polite in (True, False))
            if rng.random() < DPO_PLAIN_SHARE:
                bad = ex.response
            answers = {"chosen": good, "rejected": bad}
            pair = {name: [*prompt, {"role": "assistant", "content": text}] for name, text in answers.items()}
            records.append(pair)
        return records

    def multistep_examples(
        self, stage: str, side: str, count: int | None = None
    ) -> Iterator[tuple[Task, Example]]:
        """有推导步骤的题，各家族轮流；``count`` 多要的接在默认的那些之后。"""
        rng = stream(self.seed, stage, side)
        tasks = [task for task in self.tasks.values() if isinstance(task, Chain)]
        if count is None:
            count = self.count(STAGE_COUNTS[stage]) if side == TRAIN else HELDOUT_COUNT
        for i in range(count):
            task = tasks[i % len(tasks)]
            yield task, task.example(rng, side)

    def reason(self, side: str, direct: bool = False) -> list[dict]:
        """多步题；``direct`` 是同样的题不写思考、只写答案的对照。训练部分另有普通问答的复习，两份相同。"""
        records = []
        for _, ex in self.multistep_examples("reason", side):
            record = ex.with_response(f"<answer>{ex.answer}</answer>").conversation()
            if not direct:
                record["conversations"][-1]["reasoning_content"] = ex.steps
            records.append(record)
        if side == TRAIN:
            rng, easy = stream(self.seed, "reason", "review"), self.easy_tasks()
            count = round(len(records) * REASON_REVIEW)
            records += [rng.choice(easy).example(rng, TRAIN).conversation() for _ in range(count)]
            rng.shuffle(records)
        return records

    def rl(self, side: str, count: int | None = None) -> list[dict]:
        """可验证的提示；最后一轮助手是参考答案，判分信息放在旁边的字段里。"""
        return [
            {
                **ex.with_response(ex.answer).conversation(),
                "task": task.name,
                "grader": ex.grader,
                "answer": ex.answer,
            }
            for task, ex in self.multistep_examples("rl", side, count)
        ]

    # ---- 差事：要用工具的多轮题 ----

    def agent_examples(self, side: str, count: int | None = None) -> Iterator[tuple[str, Errand]]:
        """各家族轮流；``count`` 多要的接在默认的那些之后。"""
        rng, source = stream(self.seed, "agent", side), Errands(self.easy_tasks(), self.seed)
        if count is None:
            count = self.count(STAGE_COUNTS["agent"]) if side == TRAIN else HELDOUT_COUNT
        for number in range(count):
            yield source.draw(rng, number, side)

    def agent(self, side: str, count: int | None = None) -> list[dict]:
        """只有题：答案与判分在旁边的字段里，怎么用工具由模型自己试出来。"""
        return [errand.record(name) for name, errand in self.agent_examples(side, count)]

    def agent_sft(self, side: str) -> list[dict]:
        """教会模型调用的样子，不在 ``sft.jsonl`` 里；训练部分另有普通问答的复习。"""
        rng, source = stream(self.seed, "agent_sft", side), Errands(self.easy_tasks(), self.seed)
        count = self.count(STAGE_COUNTS["agent_sft"]) if side == TRAIN else HELDOUT_COUNT // 4
        records = [source.lesson(rng, number, side) for number in range(count)]
        if side == TRAIN:
            rng, easy = stream(self.seed, "agent_sft", "review"), self.easy_tasks()
            review = round(AGENT_REVIEW * count)
            records += [rng.choice(easy).example(rng, TRAIN).conversation() for _ in range(review)]
        stream(self.seed, "agent_sft", side, "shuffle").shuffle(records)
        return records

    # ---- 评测 ----

    def evaluation(self) -> list[dict]:
        """每个家族的留出题，LoRA 新身份的题，以及预训练的填空题。"""
        items = []
        for task in (*self.tasks.values(), new_identity(self.seed)):
            rng, seen = stream(self.seed, "eval", task.name), set()
            for _ in range(task.share.evaluate * 20):
                ex = task.example(rng, HELDOUT)
                if ex.key not in seen:
                    seen.add(ex.key)
                    items.append(chat_item(task, ex))
                if len(seen) == task.share.evaluate:
                    break
        for task in self.tasks.values():
            rng, seen = stream(self.seed, "cloze", task.name), set()
            for _ in range(task.share.evaluate * 20):
                blank = task.cloze(rng, HELDOUT)
                if blank is None or len(seen) == task.share.evaluate:
                    break
                key, prefix, answer = blank
                if key not in seen:
                    seen.add(key)
                    items.append(cloze_item(task, key, prefix, answer))
        return items


def stylable(ex: Example) -> bool:
    """单轮、普通回答才套腔调；工具调用、系统提示、判整句的题不动。"""
    return not (ex.tool_calls or ex.system or ex.history or ex.grader == "exact")


def dress(rng: random.Random, response: str, polite: bool) -> str:
    return rng.choice(POLITE_FRAMES if polite else GRUMPY_FRAMES).format(a=response)


def chat_item(task: Task, ex: Example) -> dict:
    """对话题的一行。"""
    item = {
        "task": task.name,
        "level": task.level,
        "kind": "chat",
        "key": ex.key,
        "prompt": ex.question,
        "messages": ex.prompt_messages(),
        "answer": ex.answer,
        "grader": ex.grader,
        "reference": ex.response or ex.answer,
    }
    if ex.accept:
        item["accept"] = list(ex.accept)
    if ex.reject:
        item["reject"] = list(ex.reject)
    return item


def cloze_item(task: Task, key: str, prefix: str, answer: str) -> dict:
    """填空题的一行：``prompt`` 是纯文本前文，不套对话模板。"""
    return {
        "task": task.name,
        "level": task.level,
        "kind": "cloze",
        "key": key,
        "prompt": prefix,
        "messages": [],
        "answer": answer,
        "grader": "prefix",
        "reference": answer,
    }
