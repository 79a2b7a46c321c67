"""演示的参数与课表。"""

from __future__ import annotations

from dataclasses import dataclass

from minimind.arguments import Arguments, arg
from minimind.errors import UserError
from minimind.ranges import DEVICE, MANY

# 一步 2,048 个位置：同样的词元数，步子小而多学得更好；微世界的文档与对话都不到 256 个词元
ROW_LENGTH, ROWS = 256, 8

# 与 minimind.model.PRESETS 相同；抄在这里，--help 就不必等 torch
SIZES = ("tiny", "small", "base", "moe", "minimind3", "minimind3_moe")
# 课表，先后次序不能变：后面的从前面的权重开始
STAGES = ("pretrain", "sft", "lora", "dpo", "distill", "reason", "ppo", "grpo", "spo", "agent")


@dataclass
class CourseArguments(Arguments, group="训练与考试"):
    """训练多少、考多少、在哪里算。"""

    scale: float = arg(1.0, "微世界训练语料的规模", above=0, high=100)
    pretrain_epochs: int = arg(1, "预训练轮数", low=1, high=MANY)
    sft_epochs: int = arg(1, "微调轮数", low=1, high=MANY)
    pretrain_lr: float = arg(6e-3, "预训练的最高学习率", low=0, high=1)
    sft_lr: float = arg(1.5e-3, "微调的最高学习率", low=0, high=1)
    max_steps: int = arg(0, "每个阶段至多多少步；0 表示按课程的安排", low=0, high=MANY)
    items_per_task: int = arg(0, "每个任务至多考几题；0 表示全部", low=0, high=MANY)
    batch_size: int = arg(ROWS, f"每步多少行，每行 {ROW_LENGTH} 个词元", low=1, high=65536)
    device: str = arg("auto", "设备：auto、cpu、cuda:0、npu:0、mps", pattern=DEVICE)
    seed: int = arg(42, "随机种子", low=0, high=2**63 - 1)


@dataclass
class DemoArguments(CourseArguments, group="演示"):
    """从零走完全程：造数据、十个阶段的训练、评测、出报告、对话。"""

    stages: str = arg(
        "all",
        f"走哪几段，逗号分隔：{','.join(STAGES)}；没走预训练与微调时用 out_dir 里上次的权重",
        text="filled",
    )
    out_dir: str = arg("out/demo", "数据、权重与日志的目录", text="path")
    report_dir: str = arg("out/report", "报告的目录", text="path")
    preset: str = arg("tiny", "模型尺寸", SIZES)
    minutes: float = arg(
        17.0, "全程至多多少分钟：机器慢就少走几步，最少走三成；0 表示不论多久都走满", low=0, high=100_000
    )
    fast: int = arg(0, "只看流程通不通：百分之一的数据、每阶段两三小步、每个任务 1 题", (0, 1))
    chat: int = arg(1, "结束后打开对话（仅当在终端里运行）", (0, 1))
    explain: int | str = arg(
        0, "1 走完后逐行说记分牌上的数是什么意思；last 不训练，只解释 report_dir 里上一次的", (0, 1, "last")
    )

    def __post_init__(self):
        super().__post_init__()
        self.chosen_stages()
        if self.fast:
            self.scale, self.max_steps, self.batch_size, self.items_per_task = 0.01, 3, 4, 1

    def chosen_stages(self) -> list[str]:
        """要走的阶段，按课表的次序。

        Raises:
            UserError: 有不认识的名字，或一个也没选。
        """
        names = list(STAGES) if self.stages == "all" else [n.strip() for n in self.stages.split(",")]
        names = [name for name in names if name]
        unknown = [name for name in names if name not in STAGES]
        if unknown or not names:
            raise UserError(
                f"没有阶段 {'、'.join(unknown)}" if unknown else "一个阶段也没选",
                where="--stages",
                expected=f"all，或 {','.join(STAGES)} 里的几个，逗号分隔",
            )
        return [name for name in STAGES if name in names]
