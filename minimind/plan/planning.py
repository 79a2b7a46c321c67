"""排：这么多秒里，哪个尺寸、多少步、每步多少，写成照抄就能跑的命令。"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM, count_parameters, flops_per_token, preset
from minimind.plan.quality import Estimate
from minimind.trainer.footprint import largest_rows
from minimind.trainer.train_args import TrainArguments

LENGTH = TrainArguments.max_seq_len  # 行长用训练的默认值，一步的位置数至多也是默认的
MOST_POSITIONS, FEWEST_POSITIONS = TrainArguments.batch_size * LENGTH, 2048
WANTED_STEPS = 500  # 同样的词元数，步子小而多学得更好；步数够了再加大
FEWEST_STEPS = 20
TOKENS_PER_PARAMETER = 20  # 每个参数看过这么多词元，才值得换大一号（Hoffmann et al. 2022，arXiv 2203.15556）
MOST_EPOCHS = 16  # 数据再少，也至多看这么多遍：多看的渐渐等于没看，还会背下来
# 看了 R 遍以上，抵得上多少新数据：U·(1 + R*·(1 − e^(−(R − 1) / R*)))（Muennighoff et al. 2023，arXiv 2305.16264）
REPEAT_WORTH = 15.4
LADDER = ("base", "small", "tiny")  # 由大到小；moe 要自己指定
VALIDATIONS, SFT_VALIDATIONS = 4, 2
VALIDATION_ROWS = (256, 128, 64, 32)
VALIDATION_SHARE = 0.02  # 一次验证至多占这么多时间，行数取得下的最大一档
FORWARD = 1 / 3  # 只有前向的验证，每个位置是训练的几分之几
SAVE_BYTES_PER_SECOND = 2e8  # 存盘一次：参数与优化器状态 12 字节一个参数
SFT_SHARE, SFT_MINUTES, SFT_EPOCHS = 0.2, 5.0, 3  # 微调用两成时间，至多这么多轮；更短的计划不微调
HEADROOM = 0.98  # 机器总有一点忙闲：按这么多排


@dataclass(frozen=True)
class Batch:
    """一步：每个微批次几行，几个微批次，重算几层。"""

    rows: int
    accumulation: int = 1
    checkpoint_layers: str = "0"

    @property
    def positions(self) -> int:
        return self.rows * self.accumulation * LENGTH

    def flags(self) -> list[str]:
        words = ["--batch_size", str(self.rows)]
        if self.accumulation > 1:
            words += ["--accumulation_steps", str(self.accumulation)]
        if self.checkpoint_layers != "0":
            words += ["--checkpoint_layers", self.checkpoint_layers]
        return words


@dataclass(frozen=True)
class Costs:
    """一段训练的花费，秒：起步与存盘、分词、一步、答一次样例、存一次。"""

    start: float
    tokenize: float
    step: float
    samples: float
    save: float

    def of(self, steps: int, validations: int, rows: int, batch: Batch) -> float:
        """一共多少秒；起步里已有一次存盘。"""
        validation = self.validation(rows, batch) + self.samples
        return (
            self.start
            + self.tokenize
            + steps * self.step
            + validations * validation
            + (validations - 1) * self.save
        )

    def validation(self, rows: int, batch: Batch) -> float:
        return rows * LENGTH / batch.positions * self.step * FORWARD


@dataclass
class Leg:
    """计划里的一条命令。"""

    title: str
    words: list[str]  # minimind 之后的：命令名与参数
    steps: int
    tokens: int
    epochs: float
    seconds: float
    validations: int
    validation_rows: int

    @property
    def command(self) -> str:
        """照抄就能跑的一行。"""
        return shlex.join(["minimind", *self.words])


@dataclass
class Plan:
    """一份计划；``quality`` 是预训练结束时的每字节比特数，``notes`` 是要说明的话。"""

    preset: str
    parameters: int
    budget: float  # 到这么多秒结束：要的时间，数据不够时更短
    batch: Batch
    costs: Costs
    memory_gb: float | None
    stages: list[Leg]
    quality: Estimate
    measured: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def schedule_flags(steps: int, validations: int, epochs: float) -> list[str]:
    """走多少步，多久验证、存盘一次；轮数只要够，由步数说了算。"""
    interval = str(math.ceil(steps / validations))
    words = ["--epochs", str(int(1.5 * epochs) + 2), "--max_steps", str(steps)]
    return [*words, "--eval_interval", interval, "--save_interval", interval]


def set_steps(stage: Leg, steps: int, batch: Batch) -> Leg:
    """换一个总步数，别的不变。"""
    epochs = stage.epochs * steps / stage.steps
    flags = schedule_flags(steps, stage.validations, epochs)
    words = list(stage.words)
    for name, value in zip(flags[::2], flags[1::2]):
        words[words.index(name) + 1] = value
    seconds = stage.seconds * steps / stage.steps
    return replace(
        stage, words=words, steps=steps, tokens=steps * batch.positions, epochs=epochs, seconds=seconds
    )


def blank(name: str) -> Any:
    """只有形状的模型：数参数、数内存用，不占地方。"""
    with torch.device("meta"):
        return MiniMindForCausalLM(preset(name))


def floor_power(value: float) -> int:
    """不大于 ``value`` 的 2 的幂。"""
    return 2 ** int(math.log2(max(value, 1)))


def positions_for(tokens: float) -> int:
    """一步多少个位置：步数够 :data:`WANTED_STEPS` 的前提下取大的，2,048 到训练的默认值。"""
    return min(max(floor_power(tokens / WANTED_STEPS), FEWEST_POSITIONS), MOST_POSITIONS)


def fit_batch(name: str, positions: int, room_gb: float | None, **options: Any) -> Batch | None:
    """``positions`` 个位置分成放得下的微批次；一行也放不下时重算各层，再放不下返回 None。

    Args:
        room_gb: 空着的内存，None 是不知道，当作放得下。
        options: ``half``、``on_cpu``，见 :func:`minimind.trainer.footprint.footprint`。
    """
    rows = positions // LENGTH
    if room_gb is None:
        return Batch(rows)
    model = blank(name)
    for layers in ("0", "all"):
        for accumulates in (False, True):
            most = largest_rows(
                model, room_gb, LENGTH, checkpoint_layers=layers, accumulates=accumulates, **options
            )
            if most >= rows:
                return Batch(rows, checkpoint_layers=layers)
            if accumulates and most:
                fitting = min(floor_power(most), rows)
                return Batch(fitting, rows // fitting, layers)
    return None


def worth(tokens: float, data_tokens: float) -> float:
    """这么多词元，有的是重复的，抵得上多少新的。"""
    again = tokens / data_tokens - 1
    if again <= 0:
        return tokens
    return data_tokens * (1 + REPEAT_WORTH * (1 - math.exp(-again / REPEAT_WORTH)))


def choose_preset(wanted: str | None, seconds: float, flops: dict[str, float], most: float) -> list[str]:
    """可取的尺寸，由好到次：时间与数据够每个参数看二十个词元的里面最大的，其次是更小的。

    Args:
        wanted: 使用者指定的。
        most: 数据至多给得出多少词元。
        flops: 各尺寸每秒大约做多少次浮点运算。
    """
    if wanted:
        return [wanted]
    for index, name in enumerate(LADDER):
        model = blank(name)
        tokens = min(seconds * flops[name] / flops_per_token(model.config, LENGTH / 2), most)
        if tokens >= TOKENS_PER_PARAMETER * count_parameters(model):
            return list(LADDER[index:])
    return [LADDER[-1]]


def steps_within(seconds: float, costs: Costs, batch: Batch, validations: int) -> tuple[int, int]:
    """``(步数, 每次验证几行)``：步数是验证次数的整数倍，验证就落在结尾。

    Raises:
        UserError: 连 :data:`FEWEST_STEPS` 步也走不完；说出至少要几分钟。
    """
    rows = next((n for n in VALIDATION_ROWS if costs.validation(n, batch) <= VALIDATION_SHARE * seconds), 0)
    rows = rows or VALIDATION_ROWS[-1]
    left = HEADROOM * seconds - costs.of(0, validations, rows, batch)
    steps = int(left / costs.step) // validations * validations
    if steps < FEWEST_STEPS:
        least = costs.of(FEWEST_STEPS + validations, validations, rows, batch) / HEADROOM / 60
        raise UserError(
            f"{seconds / 60:.3g} 分钟太短：起步、分词、验证就要 {costs.of(0, validations, rows, batch):.0f} 秒",
            where="--minutes",
            expected=f"这台机器、这份数据上至少 {math.ceil(10 * least) / 10:g}",
            fix="加大 --minutes，或换小一点的数据、--preset tiny",
        )
    return steps, rows
