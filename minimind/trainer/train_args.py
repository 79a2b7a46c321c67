"""所有训练命令共用的参数；默认值只在这里写一次，各配方继承后只改自己不同的几项。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from minimind.arguments import Arguments, arg, override
from minimind.errors import UserError
from minimind.model.presets import PRESETS
from minimind.model_arguments import ON_OFF, ModelArguments
from minimind.ranges import DEVICE, MANY
from minimind.trainer.optim import OPTIMIZERS, describe_optimizers

MAX_SEED = 2**63 - 1  # torch 收得下的
MAX_LENGTH = 32768  # 模型的位置上限 max_position_embeddings
# 八个头、每头的维数是偶数（旋转位置编码两两成对）：宽度要是 16 的倍数
SIZES = ("hidden_size", "num_hidden_layers", "use_moe")
WIDTHS = {"low": 16, "high": 16384, "multiple": 16}
LAYERS = {"low": 1, "high": 256}


@dataclass
class StartArguments(ModelArguments, group="模型"):
    """训练哪个模型，从哪里开始。"""

    preset: str | None = arg(
        None,
        "预设尺寸（tiny、small、base、moe；minimind3、minimind3_moe 与公共 minimind-3 的权重通用）；"
        "尺寸由它定，另写了不同的尺寸就报错",
        tuple(PRESETS),
        resume="content",
    )
    hidden_size: int = override(ModelArguments, "hidden_size", 512, help="隐层宽度", **WIDTHS)
    num_hidden_layers: int = override(ModelArguments, "num_hidden_layers", 8, help="层数")
    use_moe: int = override(ModelArguments, "use_moe", 0, help="是否用混合专家（0 否，1 是）")
    arch: str | None = override(
        ModelArguments,
        "arch",
        None,
        help="模型结构：v2 或 v3（QK 归一化，与 Qwen3 同构）；不给则由预设或起点的权重决定，都没说就是 v2",
    )
    tokenizer_path: str | None = override(
        ModelArguments, "tokenizer_path", None, help="分词器目录；不给则用自带的 6400 词表"
    )
    from_weight: str = arg("none", "从哪个权重开始（名字，如 pretrain）；none 表示从头训练", text="name")
    from_resume: int = arg(0, "是否从续训存档继续（0 否，1 是）", ON_OFF, resume="harmless")


@dataclass
class DataArguments(Arguments, group="数据"):
    """训练与验证的数据。"""

    data_path: str | None = arg(
        None,
        "训练数据：jsonl、.gz、.zst、Parquet、Arrow 文件，文件夹或通配符，几个用逗号隔开，可带权重"
        "（a.jsonl:0.7,b.jsonl:0.3）；不给则找 dataset/ 下的惯用文件，再没有就用内置的微世界",
        text="paths",
        resume="content",
    )
    on_bad_line: str = arg(
        "error", "遇到坏行：error 报错停下，skip 跳过并计数", ("error", "skip"), resume="content"
    )
    val_path: str | None = arg(
        None, "验证数据，写法同上；不给则从训练数据里按文档划出 val_ratio", text="paths", resume="content"
    )
    val_ratio: float = arg(0.005, "划作验证的文档比例；0 表示不验证", low=0, below=1)
    val_max_rows: int = arg(
        256, "每次验证至多用多少行（固定的随机子集）；0 表示全部", low=0, high=MANY, resume="noted"
    )
    eval_interval: int = arg(
        200, "每多少个优化步验证一次；0 表示只在结束时验证", low=0, high=MANY, resume="harmless"
    )


@dataclass
class AmountArguments(Arguments, group="训练量"):
    """训练多少。"""

    epochs: int = arg(1, "训练轮数", low=1, high=MANY, resume="noted")
    max_steps: int = arg(0, "至多训练多少个优化步；0 表示由轮数决定", low=0, high=MANY, resume="noted")
    batch_size: int = arg(32, "每个进程每个微批次的行数", low=1, high=65536, resume="noted")
    accumulation_steps: int = arg(1, "多少个微批次合成一个优化步", low=1, high=65536, resume="noted")
    checkpoint_layers: str = arg(
        "0",
        "反向时重算前几层、不存它们的中间结果：省显存，多花至多三分之一的时间，结果不变；0 不重算，all 全部",
        pattern=(r"all|[0-9]{1,3}", "0 到 999 的层数，或 all", "不是层数："),
        resume="harmless",
    )
    max_seq_len: int = arg(512, "每行的 token 数（多篇文档会装进同一行）", low=2, high=MAX_LENGTH)
    seed: int = arg(42, "随机种子：初始化、数据顺序与 dropout 都由它决定", low=0, high=MAX_SEED)


@dataclass
class OptimizerArguments(Arguments, group="优化"):
    """优化器与学习率。"""

    optimizer: str = arg("muon", f"优化器：{describe_optimizers()}", tuple(OPTIMIZERS))
    learning_rate: float | None = arg(
        None,
        "最高学习率，Muon 与 AdamW 共用；不给则按宽度：预训练 1.5 / 隐层宽度，微调 0.5 / 隐层宽度",
        low=0,
        high=1,
        resume="noted",
    )
    embed_lr_scale: float = arg(4.0, "词嵌入的学习率倍数（只对 muon 有意义；adamw 时按 1）", low=0, high=1000)
    weight_decay: float = arg(0.1, "解耦权重衰减，只作用于隐层矩阵", low=0, high=100)
    muon_momentum: float = arg(0.95, "Muon 的动量", low=0, below=1)
    adam_beta2: float = arg(0.95, "AdamW 的二阶矩衰减", low=0, below=1)
    schedule: str = arg(
        "cosine",
        "学习率日程：wsd（预热、平稳、衰减）或 cosine（余弦降到一成）",
        ("wsd", "cosine"),
        resume="noted",
    )
    warmup_ratio: float = arg(0.05, "预热占总步数的比例", low=0, high=1, resume="noted")
    decay_ratio: float = arg(
        0.3, "wsd 末段衰减占总步数的比例；与预热合起来不超过 1", low=0, high=1, resume="noted"
    )
    grad_clip: float = arg(1.0, "梯度范数上限；0 表示不裁剪", low=0, high=MANY, resume="noted")


@dataclass
class DeviceArguments(Arguments, group="设备"):
    """在哪里算、用什么精度。"""

    device: str = arg(
        "auto",
        "设备：auto、cpu、cuda:0、npu:0、mps；auto 依次找 NPU、CUDA、MPS、CPU",
        pattern=DEVICE,
        resume="noted",
    )
    dtype: str = arg(
        "auto",
        "计算精度；auto：NPU 用 float16，CUDA 用 bfloat16，CPU 现场测速决定",
        ("auto", "float32", "bfloat16", "float16"),
        resume="noted",
    )
    use_compile: int | str = arg(
        0,
        "是否用 torch.compile（0 否，1 是，auto 在 CUDA 上且训练够长时用；头一步先核对梯度，不对就不用；NPU、MPS 上跳过）",
        (*ON_OFF, "auto"),
        resume="rounding",
    )
    num_workers: int | None = arg(
        None,
        "读数据的子进程数，0 表示在主进程里读；不给则 CPU 上 0 个、卡上 2 个",
        low=0,
        high=256,
        resume="harmless",
    )


@dataclass
class OutputArguments(Arguments, group="存档与日志"):
    """写到哪里，多久写一次。"""

    save_dir: str = arg("out", "权重与日志的目录", text="path", resume="harmless")
    save_weight: str = arg(
        "pretrain",
        "保存权重的名字，文件为 {save_dir}/{save_weight}_{hidden_size}[_moe].pth",
        text="name",
        resume="harmless",
    )
    checkpoint_dir: str = arg("checkpoints", "续训存档的目录", text="path", resume="harmless")
    log_interval: int = arg(10, "每多少个优化步打印一行日志", low=0, high=MANY, resume="harmless")
    save_interval: int = arg(
        200, "每多少个优化步保存一次；0 表示只在结束时保存", low=0, high=MANY, resume="harmless"
    )
    keep_checkpoints: int = arg(
        1,
        "留最近几次存档：1 只有最新的；更多则每次另存为 {save_weight}_step{步数}，超出的删掉旧的",
        low=1,
        high=MANY,
        resume="harmless",
    )
    tracker: str = arg(
        "none", "除 JSON 行之外的记录工具", ("none", "swanlab", "wandb", "tensorboard"), resume="harmless"
    )
    use_wandb: int = arg(
        0, "同 --tracker swanlab（沿用旧参数名；旧项目的这个开关用的就是 swanlab）", ON_OFF, resume="harmless"
    )
    wandb_project: str = arg("MiniMind", "记录工具里的项目名", text="filled", resume="harmless")
    sample_prompts: str = arg(
        "3",
        "每次验证时让模型回答几个固定的提示，打印并写进日志：几个（内置的），或一个文本文件（一行一个提示）；0 不要",
        text="path",
        resume="harmless",
    )
    watch: int = arg(
        0,
        "训练时开着网页看曲线与样例（0 否，1 是；同 minimind watch，另一个进程，只在本机）",
        ON_OFF,
        resume="harmless",
    )


@dataclass
class TrainArguments(
    StartArguments, DataArguments, AmountArguments, OptimizerArguments, DeviceArguments, OutputArguments
):
    """训练的共用参数。"""

    # 学习率 × 隐层宽度。宽度 256 时 6e-3 最好，512 时 3e-3 好过 6e-3（docs/quality.md），所以按宽度反比
    LEARNING_RATE_TIMES_WIDTH: ClassVar[float] = 1.5

    @property
    def width(self) -> int:
        """隐层宽度；给了 ``--preset`` 就以它为准。"""
        return PRESETS.get(self.preset, {}).get("hidden_size", self.hidden_size)

    def trained_length(self, before: int | None) -> int:
        """这次训练之后，模型见过多长的一篇；``before`` 是起点的权重见过的，不知道为 None。"""
        return max(before or 0, self.max_seq_len)

    def usual_learning_rate(self) -> float | None:
        """没有给 ``--learning_rate`` 时用多少；这时还定不下来的是 ``None``，由配方补上。"""
        return self.LEARNING_RATE_TIMES_WIDTH / self.width

    def __post_init__(self):
        """查取值，填上随宽度而定的学习率。"""
        self.checkpoint_layers = str(self.checkpoint_layers)  # 代码里也可以写数
        super().__post_init__()
        self._check_preset(
            name for name in SIZES if getattr(self, name) != type(self).__dataclass_fields__[name].default
        )
        if self.learning_rate is None:
            self.learning_rate = self.usual_learning_rate()
        total = self.warmup_ratio + self.decay_ratio
        if self.schedule == "wsd" and total > 1:
            raise UserError(
                f"合起来是 {total:g}",
                where=f"--warmup_ratio {self.warmup_ratio:g} 与 --decay_ratio {self.decay_ratio:g}",
                expected="不超过 1：预热完才衰减",
                fix="减小其中一个",
            )

    def check_written(self, names: frozenset[str]) -> None:
        self._check_preset(name for name in SIZES if name in names)

    def _check_preset(self, written: Iterable[str]) -> None:
        """``--preset`` 定下的尺寸不能另写成别的：不悄悄收下用不上的。

        Args:
            written: ``SIZES`` 里写了的。

        Raises:
            UserError: 有一个不同。
        """
        for name in written if self.preset else ():
            given, fixed = getattr(self, name), int(PRESETS[self.preset].get(name, 0))
            if given != fixed:
                moe = "；混合专家的预设是 moe、minimind3_moe" if name == "use_moe" else ""
                raise UserError(
                    f"值是 {given}，而 --preset {self.preset} 的是 {fixed}",
                    where=f"--{name}",
                    expected="尺寸由 --preset 定，或者由各个尺寸参数定",
                    fix=f"去掉 --preset 或 --{name}{moe}",
                )


def refuse_unused(args: Any, choice: str, used_by: Mapping[str, tuple[str, ...]]) -> None:
    """写了而 ``--{choice}`` 的这个取值用不到的参数：报错，不悄悄收下。

    Args:
        used_by: 参数 → 用得到它的取值。

    Raises:
        UserError: 有一个用不到。
    """
    chosen = getattr(args, choice)
    for name, users in used_by.items():
        value, default = getattr(args, name), type(args).__dataclass_fields__[name].default
        if value not in (default, None) and chosen not in users:
            raise UserError(
                f"值是 {value:g}，而 --{choice} {chosen} 用不到它",
                where=f"--{name}",
                expected=f"与 --{choice} {'、'.join(users)} 一起用",
                fix=f"去掉它，或换一个 --{choice}",
            )
