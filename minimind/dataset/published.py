"""公共项目发布过的数据文件：名字、公布的大小、给哪个阶段。

两代名字不同：v2 的是 ``pretrain_hq`` 那一套，v3（minimind-3）的是 ``t2t`` 那一套；名字相同的（``dpo``、``lora_…``）格式也相同。
大小取自它的说明，只供挑选；下载时以托管站报的为准。
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """一个发布过的文件。

    Args:
        name: 不带 ``.jsonl``。
        versions: 哪几代用它。
        megabytes: 公布的大小；没有公布为 ``None``。
        stage: 哪个阶段没有 ``--data_path`` 时会用它（:func:`usual_files`）；``None`` 是都不会，要自己写明。
        purpose: 一句话：哪个命令用，是什么。
        recommended: 走完预训练与微调的最小一套之一。
    """

    name: str
    versions: tuple[str, ...]
    megabytes: float | None
    stage: str | None
    purpose: str
    recommended: bool = False

    @property
    def file(self) -> str:
        return f"{self.name}.jsonl"

    @property
    def size(self) -> str:
        """``1.2 GB``、``24 MB``、``23 KB``；没有公布是一个横线。"""
        if self.megabytes is None:
            return "—"
        for unit, scale in (("GB", 1000), ("MB", 1), ("KB", 1e-3)):
            if self.megabytes >= scale:
                return f"{self.megabytes / scale:.3g} {unit}"
        return "不到 1 KB"


V2, V3, BOTH = ("v2",), ("v3",), ("v2", "v3")
# 同一阶段里排在前面的优先：先小后大
PUBLISHED = (
    Published("pretrain_hq", V2, 1600, "pretrain", "minimind pretrain", True),
    Published("pretrain_t2t_mini", V3, 1200, "pretrain", "minimind pretrain", True),
    Published("pretrain_t2t", V3, 10_000, "pretrain", "minimind pretrain，完整的一份"),
    Published("sft_mini_512", V2, 1200, "sft", "minimind sft", True),
    Published("sft_512", V2, 7500, "sft", "minimind sft --max_seq_len 512"),
    Published("sft_1024", V2, 5600, "sft", "minimind sft --max_seq_len 1024"),
    Published("sft_2048", V2, 9000, "sft", "minimind sft --max_seq_len 2048"),
    Published("sft_t2t_mini", V3, 1600, "sft", "minimind sft，混有工具调用与思考", True),
    Published("sft_t2t", V3, 14_000, "sft", "minimind sft，完整的一份"),
    Published("r1_mix_1024", V2, 340, "reason", "minimind reason，先想再答"),
    Published("dpo", BOTH, 53, "dpo", "minimind dpo、minimind reward，好坏成对的回答"),
    Published("rlaif-mini", V2, 1, "rl", "minimind ppo、grpo、spo，要奖励模型"),
    Published("rlaif", V3, 24, "rl", "minimind ppo、grpo、spo，要奖励模型"),
    Published("agent_rl", V3, 86, "agent", "minimind agent，带工具的多轮题"),
    Published("agent_rl_math", V3, 18, "agent", "minimind agent，只有算式"),
    Published("lora_identity", V2, 0.0228, "lora_identity", "minimind lora"),
    Published("lora_medical", V2, 34, None, "minimind lora --lora_name lora_medical"),
    Published("lora_exam", V3, None, None, "minimind lora --lora_name lora_exam，选择题的答法"),
    Published("tokenizer_train", V2, 1000, None, "minimind tokenizer train --data_path"),
)


def usual_files(stage: str, arch: str = "v2") -> list[str]:
    """这个阶段的惯用文件名：与模型同一代的在前，同一代里小的在前。"""
    files = [one for one in PUBLISHED if one.stage == stage]
    return [one.file for one in sorted(files, key=lambda one: arch not in one.versions)]


def recommended() -> list[tuple[str, ...]]:
    """走完预训练与微调的最小一套，新的一代在前。"""
    return [tuple(one.file for one in PUBLISHED if one.recommended and one.versions == v) for v in (V3, V2)]


def catalogue() -> str:
    """写进 ``--help`` 的几行：名字、公布的大小、给哪个命令。"""
    lines = ["公共项目发布过的文件（大小是它公布的；✔ 是不写文件名时下载的，清单里有哪一套就取哪一套）："]
    for one in PUBLISHED:
        lines.append(f"  {'✔' if one.recommended else ' '} {one.name:<18} {one.size:>8}  {one.purpose}")
    return "\n".join(lines)
