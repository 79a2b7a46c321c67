"""记分牌的每一行是什么意思：一两句话，``minimind demo --explain`` 打印，报告里也有。

键是记分牌那一行的短名（:attr:`minimind.report.report.Metric.english`）；添一行就在这里添一句，测试数着。
"""

from __future__ import annotations

import json
from pathlib import Path

from minimind.console import console, say
from minimind.errors import UserError
from minimind.paths import resolve_path

RL = (
    "和推理同一份多步题。训练里只有题目和答得对不对的分数，没有人写步骤给它看；"
    "涨了多少，就是它自己试着试着学会的。"
)
EXPLANATIONS = {
    "pretrain: bits per byte": "把没读过的文本一个字节一个字节地猜，平均每个字节还要几比特才说得准：8 是瞎猜，越小说明越会接着往下写。"
    "与分词器无关，所以不同的模型也能比。",
    "pretrain: cloze": "给一句话的前半截，看它接出来的词对不对（例如某个镇的特产）。考的是预训练记住了多少，不要求会对话。",
    "sft: easy dialogue": "没见过的问题，整句答对才算。“之前”是只预训练过的模型：它会续写而不会答，所以低；“之后”是学过问答的样子之后。",
    "sft: hard dialogue": "要算几步或位数多的题，微调后也多半答不对；后面的推理与强化学习就是来提高它的。",
    "lora: new identity": "问“你是谁”之类，答成新的名字才算。只训练了几十分之一大的增量，底座一个数也没动。",
    "lora: other dialogue": "换了身份以后，别的题还会不会答。两边差不多，说明新本事没有冲掉旧本事。",
    "dpo: preference accuracy": "给一好一坏两个回答，模型觉得好的那个更可能，就算分得清。这是训练的目标本身，所以应当接近满分。",
    "dpo: polite answers": "自己写回答时，开口就客气的比例。训练只说了两个回答里哪个更好，没有教它怎么写；这一行看偏好有没有变成行为。",
    "dpo: dialogue": "变客气以后还答不答得对。降几个点是常见的代价，降得多就是学过了头。",
    "distill: cross-entropy": "留出的对话，平均每个词差多少才猜中，越低越好。“之前”是自己学的学生，“之后”是同样的数据、步数而跟着教师的；教师告诉它哪些词也说得通，"
    "所以它不背答案，没见过的话也猜得更准。",
    "reason: multi-step": "要分几步算的题，先把步骤写在 <think> 里再答。“之前”是微调模型直接报答案。",
    "reason: direct, with thinking": "训练量完全相同的两个模型：“之前”只学报答案，“之后”学先写步骤。差的这些，是“先想”本身带来的，不是多训练带来的。",
    "reason: well-formed": "标签成对、写完自己停下的比例。停不下来的回答再对也没法用。",
    "ppo: multi-step": RL + "PPO 另有一个价值网络，估计写到一半能得几分。",
    "grpo: multi-step": RL + "GRPO 同一题答八遍，比同组平均好的多写。",
    "spo: multi-step": RL + "SPO 每题只答一遍，和这道题自己过去的成绩比。",
    "agent: errands with tools": "事情每道题现编，答案只在工具后面，要自己决定调用什么、看了结果再接着查。“之前”只学过调用的样子；"
    "“之后”只凭最后答得对不对，自己试出来的。",
    "agent: dialogue": "不给工具的普通问答还答不答得对，看学会用工具有没有冲掉旧本事。",
}


def explain(english: str) -> str:
    """这一行的解释；没有的为空串。"""
    return EXPLANATIONS.get(english, "")


def show_explanations(metrics: list[dict]) -> None:
    """逐行打印：哪一行，前后的数，是什么意思。

    Args:
        metrics: report.json 里的 ``metrics``，或各行的 ``asdict``。
    """
    from minimind.report.report import Metric

    console.print()
    for one in metrics:
        metric = Metric(**one)
        say(f"{metric.stage}｜{metric.name}：{metric.show(metric.before)} → {metric.show(metric.after)}")
        say(f"　　{metric.explanation or '（没有解释）'}")


def explain_last(report_dir: str) -> None:
    """解释上一次演示的记分牌，什么也不训练。

    Raises:
        UserError: 还没有走过，或那份报告不是演示写的。
    """
    path = Path(resolve_path(report_dir)) / "report.json"
    try:
        metrics = json.loads(path.read_text("utf-8"))["metrics"]
        if not metrics:
            raise KeyError("metrics")
        show_explanations([{**one, "explanation": explain(one["english"])} for one in metrics])
    except FileNotFoundError as error:
        raise UserError(
            "还没有成绩单",
            where=str(path),
            fix="先走一遍 minimind demo，或用 --report_dir 指向走过的",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "读不了这份成绩单", where=str(path), expected="minimind demo 写的 report.json", fix="重新走一遍"
        ) from error
