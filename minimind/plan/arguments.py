"""计划的参数。"""

from __future__ import annotations

from dataclasses import dataclass

from minimind.arguments import Arguments, arg
from minimind.model.presets import PRESETS
from minimind.model_arguments import ON_OFF


@dataclass
class PlanArguments(Arguments, group="计划"):
    """这么多分钟能训练出什么：测一测这台机器，给出尺寸、词元数、批、预期的每字节比特数与照抄就能跑的命令。"""

    minutes: float = arg(60.0, "打算用多少分钟，从第一条命令开始到最后一条结束", above=0, high=43200)
    device: str = arg(
        "auto",
        "在哪里训练：auto、cpu、cuda:0、npu:0、mps，现场测；或一张卡的名字（如 'RTX 4090'），那时按公布的数估计",
        text="filled",
    )
    preset: str | None = arg(None, "指定尺寸；不给则按时间、内存挑", tuple(PRESETS))
    data_path: str | None = arg(
        None,
        "预训练数据，写法同 pretrain；不给则找 dataset/ 下的惯用文件，再没有就用内置的微世界",
        text="paths",
    )
    sft_path: str | None = arg(
        None, "微调数据；不给时，预训练数据也没给才找惯用文件或微世界的，否则只做预训练", text="paths"
    )
    memory_gb: float | None = arg(
        None, "至多用多少 GB 内存（显存）；不给则用现在空着的，卡的名字用公布的", above=0, high=10000
    )
    save_dir: str = arg("out/plan", "权重、日志与 plan.json 的目录", text="path")
    go: int = arg(0, "1 表示接着就按计划跑，一条接一条", ON_OFF)
