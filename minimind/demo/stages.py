"""课表：每个阶段叫什么、做什么、从谁的权重开始、要花多少时间。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minimind.demo import base, errands, reinforce, tuning
from minimind.demo.arguments import ROW_LENGTH, ROWS
from minimind.demo.road import Road

# 考一道题的时间折合多少个训练词元（实测 40 到 60：逐词生成没有训练那样的大矩阵，但一题只写十几个词）
TOKENS_PER_ITEM = 60
# 途中的验证、作答、存盘与记录（实测）；预训练最长，一批批地走比测速时的几步慢
OVERHEAD, LONG_OVERHEAD = 1.1, 1.25


@dataclass(frozen=True)
class Lesson:
    """课表的一行。

    Args:
        title: 记分牌与进度里的名字；doing: 一句话说它做什么。
        run: 训练、考试、记分。
        training: 训练折合多少个预训练词元，即测速用的那种。
        papers: 考哪几份卷子，见 :class:`minimind.demo.exam.Papers`。
        needs: 从哪个阶段的权重开始；``None`` 从零开始。
    """

    title: str
    doing: str
    run: Callable[[Road], None]
    training: Callable[[Road], float]
    papers: tuple[str, ...]
    needs: str | None = "sft"

    def tokens(self, road: Road) -> float:
        """训练与考试一共折合多少个预训练词元。"""
        items = sum(len(getattr(road.papers, paper)) for paper in self.papers)
        return self.training(road) + items * TOKENS_PER_ITEM


def epochs_of(
    data: str, epochs: int, rows_per_step: int, paced: bool = False, overhead: float = OVERHEAD
) -> Callable[[Road], float]:
    """按轮数走完一份语料的阶段；``paced`` 的在慢的机器上少走几步。"""

    def tokens(road: Road) -> float:
        rows = road.rows[data] * epochs * (road.pace if paced else 1)
        most = road.args.max_steps * rows_per_step
        return (min(rows, most) if most else rows) * ROW_LENGTH * overhead

    return tokens


def steps_of(planned: int, positions: int, factor: float = 1.0) -> Callable[[Road], float]:
    """走固定步数的阶段：每步 ``positions`` 个位置，每个位置的代价是预训练的 ``factor`` 倍（实测）。"""
    return lambda road: road.steps(planned) * positions * factor


def student_tokens(road: Road) -> float:
    """学生的三次训练；它每个位置的代价约是 tiny 的六成（矩阵小，喂不满），有教师时再加教师的前向。"""
    begin = steps_of(tuning.STUDENT_PRETRAIN["max_steps"], ROWS * ROW_LENGTH, 0.6)
    dialogues = len((road.world / "sft.jsonl").read_text(encoding="utf-8").splitlines())
    few = road.rows["sft"] * min(tuning.DIALOGUES / dialogues, 1.0) * tuning.student_plan(road)["epochs"]
    most = road.args.max_steps * ROWS
    return begin(road) + (min(few, most) if most else few) * ROW_LENGTH * (0.6 + 1.0)


# 一条采样：约三十个词元的提示、十几到三十个词元的回答，逐词写出来，再前向反向一遍（PPO 另有价值网络与几轮更新）
ROLLOUTS = reinforce.PROMPTS * reinforce.GENERATIONS
# 开训前与途中只考一部分，合起来约一份；结束后考全
RL_EXAMS = ("multistep",) * 2

# 一段对话约 270 个词元，几回合写出来，再前向反向一遍
AGENT_ROLLOUTS = errands.PROMPTS * errands.LEARNING["num_generations"]


def errand_tokens(road: Road) -> float:
    """差事的微调与强化学习，总是走满。"""
    tuned = epochs_of("agent_sft", errands.TUNING["epochs"], 2 * errands.TUNING["batch_size"])
    steps = min(errands.STEPS, road.args.max_steps or errands.STEPS)
    return tuned(road) + steps * AGENT_ROLLOUTS * 375.0


STAGES: dict[str, Lesson] = {
    "pretrain": Lesson(
        "预训练",
        "读百科、算式和故事，学会接着往下写",
        base.run_pretrain,
        lambda road: epochs_of(
            "pretrain", road.args.pretrain_epochs, road.args.batch_size, True, LONG_OVERHEAD
        )(road),
        ("cloze", "chats"),
        needs=None,
    ),
    "sft": Lesson(
        "微调",
        "学会按问答的样子回答",
        base.run_sft,
        lambda road: epochs_of("sft", road.args.sft_epochs, road.args.batch_size, True)(road),
        ("chats", "multistep"),
        needs="pretrain",
    ),
    "lora": Lesson(
        "LoRA",
        "换一个身份，只训练几十分之一大的增量",
        tuning.run_lora,
        epochs_of("lora_identity", tuning.LORA["epochs"], tuning.LORA["batch_size"]),
        ("identity", "identity", "easy"),
    ),
    "dpo": Lesson(
        "DPO",
        "从一好一坏两个回答里学会客气",
        tuning.run_dpo,
        epochs_of("dpo", 1, tuning.DPO["batch_size"]),
        ("easy",),
    ),
    "distill": Lesson(
        "蒸馏",
        "四分之一大的学生，没有教师与有教师各学一遍",
        tuning.run_distill,
        student_tokens,
        (),
    ),
    "reason": Lesson(
        "推理",
        "先把步骤写在 <think> 里再答，与只报答案的对照",
        tuning.run_reason,
        steps_of(2 * tuning.REASON_STEPS, ROWS * ROW_LENGTH),
        ("multistep", "multistep"),
    ),
    "ppo": Lesson(
        "PPO",
        "价值网络估计写到一半能得几分，比估计的好就多写",
        reinforce.run_ppo,
        steps_of(reinforce.RL_STEPS, ROLLOUTS, 180.0),
        RL_EXAMS,
    ),
    "grpo": Lesson(
        "GRPO",
        "同一道题答八遍，比同组平均好的多写",
        reinforce.run_grpo,
        steps_of(reinforce.RL_STEPS, ROLLOUTS, 87.0),
        RL_EXAMS,
    ),
    "spo": Lesson(
        "SPO",
        "每题只答一遍，和它自己过去的成绩比",
        reinforce.run_spo,
        steps_of(reinforce.RL_STEPS, ROLLOUTS, 112.0),
        RL_EXAMS,
    ),
    "agent": Lesson(
        "差事",
        "自己调用工具，看结果再作答：先微调出样子，再只看对不对",
        errands.run_agent,
        errand_tokens,
        ("errands", "errands", "errands", "easy", "easy"),
    ),
}
