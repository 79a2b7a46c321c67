"""预期的每字节比特数：拿我们自己跑过的训练拟合，区间由拟合的残差与离数据多远而来。

    ln bpb = a_数据 + b_数据 · ln D + c · ln N        D 词元数，N 参数个数

最小二乘；新的一次落在 ŷ ± t·s·√(1 + x(XᵀX)⁻¹xᵀ) 里的机会是九成五，离跑过的越远，根号里的越大。每个点都是**走完自己的日程**
的终点，不是长训练的半途：学习率没有降完的半途要差得多。点由 ``benchmarks/bench_plan.py --fit 1`` 重跑，它也逐点留一核对。
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Trained:
    """走完的一次训练：``data`` 是 zh（真实的中文网页文本）或 microworld（内置语料）。"""

    data: str
    parameters: int
    tokens: int
    bpb: float
    source: str


SMALL = 1_606_784  # 128 × 4 层，benchmarks/results/quality-*.json，三个种子
TINY = 3_590_592
RUNS = (
    Trained("zh", SMALL, 450_560, 2.3199, "quality-small-3seeds"),
    Trained("zh", SMALL, 450_560, 2.3080, "quality-small-3seeds"),
    Trained("zh", SMALL, 450_560, 2.3106, "quality-small-3seeds"),
    Trained("zh", SMALL, 2_252_800, 1.9797, "quality-long-small-long"),
    Trained("zh", SMALL, 2_252_800, 1.9835, "quality-long-small-long"),
    Trained("zh", SMALL, 2_252_800, 1.9726, "quality-long-small-long"),
    Trained("zh", SMALL, 4_505_600, 1.8585, "quality-long-small-long"),
    Trained("zh", SMALL, 4_505_600, 1.8644, "quality-long-small-long"),
    Trained("zh", SMALL, 4_505_600, 1.8655, "quality-long-small-long"),
    Trained("zh", TINY, 249_856, 2.5874, "bench_plan"),
    Trained("zh", TINY, 499_712, 2.4312, "bench_plan"),
    Trained("microworld", TINY, 249_856, 0.6722, "bench_plan"),
    Trained("microworld", TINY, 458_752, 0.5730, "bench_plan"),
    Trained("microworld", TINY, 1_646_592, 0.3006, "demo"),
)
# 双侧九成五的 t 分位数，自由度 1 起；更大的按正态的 1.96 略放宽
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
T_MANY = 2.1
# s 不小于它：换一个种子、验证的子集或批的大小，同样的训练也会差这么多，而拟合里各点的这些大多相同；
# 微世界的曲线一截一截地降（学会一类题降一截），点又少，一步大小不同也差得多，放得更宽
LEAST_SPREAD = {"zh": 0.015, "microworld": 0.05}
# 两种数据的样本用 bz2 压缩后每字节几比特；使用者的数据与 zh 差不到一成才当作同一种
SQUEEZED = {"zh": 2.85, "microworld": 0.97}
SAME_KIND = 0.10
# 不是同一种：按压缩后的比特数折算，再往两边各放宽三成，只是个大概
OTHER_KIND = 0.30


@dataclass(frozen=True)
class Estimate:
    """预期的每字节比特数与区间。

    same: 与拟合的是同一种数据，区间才作数；inside: 尺寸与词元数在跑过的范围里（词元数容许两倍）。
    """

    middle: float
    low: float
    high: float
    data: str
    same: bool
    inside: bool

    def capped(self, most: float) -> Estimate:
        """不高于 ``most``（没训练过的模型）：折算、外推再放宽，也不会越训练越不会猜。"""
        values = {name: min(getattr(self, name), most) for name in ("low", "middle", "high")}
        return replace(self, **values)

    def words(self) -> str:
        return f"{self.middle:.2f}（{self.low:.2f} 到 {self.high:.2f}）"

    def notes(self) -> list[str]:
        """区间在什么意义上作数。"""
        found = []
        if not self.same:
            found.append(
                "这份数据与我们跑过的不是一种，每字节比特数只是按可压缩的程度折算的大概，不保证；"
                "保证的只有真实的中文网页文本与内置的微世界"
            )
        if not self.inside:
            found.append("尺寸或词元数在我们跑过的之外，每字节比特数是外推，区间随之放宽")
        return found


def design(data: str, parameters: float, tokens: float) -> list[float]:
    """一行 ``x``：两种数据各自的截距与斜率，共用的参数个数；以百万为单位取对数。"""
    size, amount = math.log(parameters / 1e6), math.log(tokens / 1e6)
    return [float(data == name) * value for name in SQUEEZED for value in (1.0, amount)] + [size]


def fit(runs: tuple[Trained, ...] = RUNS) -> tuple[np.ndarray, np.ndarray, dict[str, float], int]:
    """最小二乘，返回 ``(系数, (XᵀX)⁻¹, 每种数据各自的残差的标准差 s, 自由度)``；s 不小于 :data:`LEAST_SPREAD`。"""
    x = np.array([design(run.data, run.parameters, run.tokens) for run in runs])
    y = np.log([run.bpb for run in runs])
    inverse = np.linalg.inv(x.T @ x)
    beta = inverse @ x.T @ y
    freedom = len(runs) - x.shape[1]
    square = (y - x @ beta) ** 2
    spread = {}
    for data, least in LEAST_SPREAD.items():  # 自由度按点数分给两种数据
        own = np.array([run.data == data for run in runs])
        spread[data] = max(float(np.sqrt(square[own].sum() / (own.mean() * freedom))), least)
    return beta, inverse, spread, freedom


def predict(
    data: str, parameters: int, tokens: float, ratio: float = 1.0, runs: tuple[Trained, ...] = RUNS
) -> Estimate:
    """预期的每字节比特数，区间九成五。

    Args:
        data: ``zh`` 或 ``microworld``，照哪一种拟合。
        ratio: 这份数据压缩后的比特数是那一种的几倍；差得多就折算。
    """
    beta, inverse, spread, freedom = fit(runs)
    x = np.array(design(data, parameters, tokens))
    quantile = T_95[freedom - 1] if freedom <= len(T_95) else T_MANY
    half = quantile * spread[data] * math.sqrt(1 + x @ inverse @ x)
    middle = math.exp(x @ beta)
    same = abs(ratio - 1) <= SAME_KIND
    own = [run for run in runs if run.data == data]
    amounts, sizes = [run.tokens for run in own], [run.parameters for run in own]
    inside = min(amounts) / 2 <= tokens <= 2 * max(amounts) and parameters in sizes
    edge = 2 * max(amounts)
    # 跑过的之外，幂律还接不接着走不知道：上界留在跑过的边上
    most = predict(data, parameters, edge, 1.0, runs).high if tokens > edge else 0.0
    scale, slack = (1.0, 0.0) if same else (ratio, OTHER_KIND)
    low, high = (middle * scale * math.exp(sign * half) * (1 + sign * slack) for sign in (-1, 1))
    return Estimate(middle * scale, low, max(high, most * scale), data, same, inside)


def untrained(vocab_size: int, bytes_per_token: float) -> float:
    """没训练过的模型的每字节比特数：各个词元一样可能。"""
    return math.log2(vocab_size) / bytes_per_token


def leave_one_out(runs: tuple[Trained, ...] = RUNS) -> list[tuple[Trained, Estimate]]:
    """每个点都用其余的点预测一遍。"""
    return [
        (run, predict(run.data, run.parameters, run.tokens, runs=(*runs[:i], *runs[i + 1 :])))
        for i, run in enumerate(runs)
    ]
