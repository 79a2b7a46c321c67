"""没有在手边的卡：公布的峰值与显存，加上一个写明的假设。"""

from __future__ import annotations

import difflib
import re

from minimind.errors import UserError
from minimind.runtime.device import PEAK_TFLOPS, known_card

# 各卡的显存，GB，厂商公布；一个名字有几种的取小的。峰值在 minimind.runtime.device.PEAK_TFLOPS
CARD_GB = {
    "H100 PCIe": 80, "H100 NVL": 94, "H100": 80, "H200": 141, "H800": 80, "H20": 96, "GH200": 96,
    "B200": 180, "A100": 40, "A800": 40, "A30": 24, "A10G": 24, "A10": 24, "A40": 48, "A6000": 48,
    "L40S": 48, "L40": 48, "L20": 48, "L4": 24, "V100": 16, "T4": 16, "RTX 6000 Ada": 48,
    "RTX 5090": 32, "RTX 5080": 16, "RTX 4090": 24, "RTX 4080": 16, "RTX 4070": 12, "RTX 4060": 8,
    "RTX 3090": 24, "RTX 3080": 10, "RTX 3070": 8, "RTX 3060": 12, "RTX 2080 Ti": 11,
    "Ascend910B": 64, "Ascend910_93": 64, "Ascend910": 32, "910B": 64,
}  # fmt: skip
# 假设：别的卡的利用率与一张 H200 上量过的相同（逐算子执行，每步 32,768 个位置，2026-11-26）；
# tiny 没有量过，按 small 的三分之一：宽度小到喂不满一张卡
UTILISATION = {"tiny": 0.05, "small": 0.147, "base": 0.211, "moe": 0.200}
MEASURED_CARD = "H200"
# 假设：从命令到第一步、到存完最后一份权重之间的零碎（导入、建上下文、预热）
CARD_START_SECONDS = 40.0
NOT_RUN = "估计，没有在这张卡上跑过"


def find_card(name: str) -> str:
    """卡的名字 → 表里的名字；大小写、空格与前缀（NVIDIA GeForce）不计。

    Raises:
        UserError: 表里没有；附最接近的与全部名字。
    """
    wanted = _plain(name)
    if re.search(r"laptop|mobile|max-?q|笔记本|移动版", wanted):
        raise UserError(
            f"{name!r} 是笔记本上的，与台式的同名而算力、显存都小，没有它的数",
            where="--device",
            fix="在那台机器上运行 minimind plan，现场测",
        )
    if found := known_card(name):
        return found
    unfinished = [card for card in CARD_GB if wanted and _plain(card).endswith(wanted)]
    if len(unfinished) == 1:  # 4090 → RTX 4090
        return unfinished[0]
    close = difflib.get_close_matches(wanted, {_plain(card): card for card in CARD_GB}, n=1)
    near = next((card for card in CARD_GB if close and _plain(card) == close[0]), None)
    raise UserError(
        f"不认识 {name!r}",
        where="--device",
        expected=f"auto、cpu、cuda:0、npu:0、mps，或一张卡的名字：{'、'.join(CARD_GB)}",
        fix=f"改成 '{near}'" if near else "在那台机器上运行 minimind plan，现场测",
    )


def memory_of(name: str, card: str) -> float:
    """显存，GB：名字里写了（``A100 80GB``）用写的，没有写用表里的。GH200 名字里的 480GB 是主机的内存，不算。"""
    written = re.search(r"(?<![\w.])(\d{1,3})\s*g(?:i?b)?(?![a-z0-9])", name, re.IGNORECASE)
    return float(written[1]) if written and int(written[1]) and card != "GH200" else CARD_GB[card]


def peak_of(card: str) -> float:
    """公布的 bf16/fp16 稠密峰值，FLOP/s。"""
    return PEAK_TFLOPS[card] * 1e12


def source_of(size: str) -> str:
    """这个尺寸的利用率从哪里来。"""
    return "没有量过" if size == "tiny" else f"一张 {MEASURED_CARD} 上量过的"


def _plain(text: str) -> str:
    return "".join(text.lower().split())
