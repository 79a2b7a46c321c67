"""偏好、蒸馏与强化学习的体征：由一行日志看出的毛病，说成中文句子。

一段里没有一次正常的更新（float16 的缩放还在找位置）时没有指标，不说什么。
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# 阈值都宁松勿紧：说出来的应当真是毛病
NO_SPREAD = 0.9  # 这么多的组全组同分，几乎没有可学的
KL_HIGH = 0.5  # 与参考模型（或采样时的策略）的平均 KL，nat / 词元；正常训练在 0.1 以下
NEVER_ENDS = 0.5  # 这么多的回答写到上限还没结束
ENTROPY_DROP = 0.1  # 熵跌到开始时的这个比例以下
ENTROPY_FLOOR = 0.01  # 或者绝对值低于它（nat / 词元）：基本只会一种写法
CLIPPED = 0.4  # 这么多的词元被截断，一步走得太大
BAD_CRITIC = -0.5  # 解释方差低于它：价值网络远不如报平均数
BAD_TRACKER = -1.0  # 记分牌同理；它从 0.5 起步，开头几步到 −0.5 是正常的


def ranking_health(record: dict[str, float]) -> list[str]:
    """奖励模型，也是 DPO 一族的第一条：没学到。"""
    if record.get("accuracy", 1.0) >= 0.55 or record["step"] < 50:
        return []
    return [
        "准确率还在 50 % 上下，模型没学到偏好：学习率太小，或 chosen 与 rejected 的差别不一致（标反了？）。"
    ]


def preference_health(record: dict[str, float]) -> list[str]:
    """与参考模型比的 DPO 一族：没学到、在走样、该停了。

    不要参考模型的不看：它们的准确率可以从一半以下起步，回报本来就是负的。kto 没有优势一项。
    """
    found = ranking_health(record)
    if record.get("reward_chosen", 0.0) < -1 and record.get("reward_rejected", 0.0) < -1:
        found.append(
            "好坏两个回答的概率都在大跌，模型正在走样：加大 --beta、减小 --learning_rate 或少训几步。"
        )
    if record.get("margin", 0.0) > 10:
        found.append("优势已经很大，偏好早就分开了，再训下去只会离参考模型越来越远：可以停了。")
    return found


def distillation_health(record: dict[str, float]) -> list[str]:
    """蒸馏：教师不合数据，或教师就是学生。"""
    found = []
    if "divergence" not in record:
        return found
    if record["step"] >= 50 and record["divergence"] > record.get("ce", math.inf) + 1:
        found.append("与教师的距离比交叉熵还大：教师与数据说的不是一回事，检查教师是不是这份数据上训练的。")
    if record["divergence"] < 1e-4:
        found.append("与教师的距离几乎是零：学生已经和教师一样，或两者就是同一个权重。")
    return found


@dataclass
class RLHealth:
    """看每行日志的记录，返回中文句子；熵要和开头比，所以记住第一次的值。

    Args:
        max_gen_len: 生成长度的上限，写进建议里。
    """

    max_gen_len: int
    first_entropy: float | None = None

    def __call__(self, record: dict[str, float]) -> list[str]:
        """认得的键：``reward reward_std zero_spread kl approx_kl truncated kept entropy clip_share
        explained_variance tracker_explained tracker_bias``，缺的不看。"""
        entropy = record.get("entropy")
        if self.first_entropy is None:
            self.first_entropy = entropy
        sentences = [*self._reward(record), *self._drift(record), *self._length(record)]
        if entropy is not None and (
            entropy < ENTROPY_FLOOR or entropy < ENTROPY_DROP * (self.first_entropy or 0.0)
        ):
            sentences.append(
                f"熵只剩 {entropy:.3f}（开始时 {self.first_entropy:.3f}），采样几乎都是同一种写法，学不到新东西："
                "降低 --learning_rate 或提高 --temperature"
            )
        return sentences

    def _reward(self, record: dict[str, float]) -> list[str]:
        reward = f"（平均 {record['reward']:.2f}）" if "reward" in record else ""
        if record.get("zero_spread", 0.0) >= NO_SPREAD:
            return [
                f"{record['zero_spread']:.0%} 的组全组同分{reward}，没有可学的："
                "题太难或太易，换题、加大 --num_generations，或换更细的 --reward"
            ]
        if record.get("reward_std", 1.0) < 1e-6:
            return [f"所有回答得分相同{reward}，优势全是 0：检查 --reward 是否合用，题目是否太难或太易"]
        return []

    def _drift(self, record: dict[str, float]) -> list[str]:
        sentences = []
        if record.get("kl", 0.0) > KL_HIGH:
            sentences.append(
                f"与参考模型的 KL 已到 {record['kl']:.2f}，模型正在忘掉原来会的："
                "加大 --beta（ppo 是 --kl_coef）或降低 --learning_rate"
            )
        if record.get("approx_kl", 0.0) > KL_HIGH:
            sentences.append(
                f"一次采样内策略已走出 KL {record['approx_kl']:.2f}：降低 --learning_rate 或减少 --ppo_epochs"
            )
        if record.get("clip_share", 0.0) > CLIPPED:
            sentences.append(f"{record['clip_share']:.0%} 的词元被截断，每步走得太大：降低 --learning_rate")
        if record.get("explained_variance", 0.0) < BAD_CRITIC:
            sentences.append(
                f"价值网络的解释方差是 {record['explained_variance']:.2f}，不如报平均数："
                "多训几步再看，或调 --critic_learning_rate"
            )
        if record.get("tracker_explained", 0.0) < BAD_TRACKER:
            sentences.append(
                f"记分牌的把握与得分差得远（解释方差 {record['tracker_explained']:.2f}，偏差 {record['tracker_bias']:+.2f}）："
                "检查 --reward_low、--reward_high，或用 --offline_samples 先定起点"
            )
        return sentences

    def _length(self, record: dict[str, float]) -> list[str]:
        if record.get("kept", 1.0) <= 0.0:
            return [
                "这一段的样本全被遮掉了，权重没有动："
                "回答都被截断时加大 --max_gen_len，全组同分时换题，或关掉 --mask_truncated、--dynamic_sampling"
            ]
        if record.get("truncated", 0.0) >= NEVER_ENDS:
            return [
                f"{record['truncated']:.0%} 的回答写满 {self.max_gen_len} 个词元还没结束："
                "加大 --max_gen_len，或先微调到会停的模型"
            ]
        return []


class AgentHealth(RLHealth):
    """带工具的强化学习另看调用：没有调用、写坏、工具总出错、没写完。"""

    def _length(self, record: dict[str, float]) -> list[str]:
        sentences = []
        if record.get("valid_calls", 1.0) < 0.5:
            sentences.append(
                f"只有 {record['valid_calls']:.0%} 的调用合乎工具的说明：先用带调用的对话微调（minimind sft），再来练"
            )
        elif record.get("tool_errors", 0.0) > 0.5:
            sentences.append(
                f"{record['tool_errors']:.0%} 的调用得到的是错误：看样例里错在哪里，工具是不是合用"
            )
        if record.get("unfinished", 0.0) >= NEVER_ENDS:
            why = "到了回合数还在调用" if record.get("out_of_turns", 0.0) >= NEVER_ENDS / 2 else "写满了长度"
            sentences.append(
                f"{record['unfinished']:.0%} 的对话没写完，多是{why}：加大 --max_turns、--max_gen_len 或 --max_total_len，"
                "或先微调到会停的模型"
            )
            return sentences
        return [*sentences, *super()._length({**record, "truncated": 0.0})]
