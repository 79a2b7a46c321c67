"""单位换算：长度、质量、面积、体积、时间、速度、数据量、温度；中文、英文与市制都认。"""

from __future__ import annotations

import decimal
import math
from decimal import Decimal
from typing import Any

from minimind.tools.base import Tool, ToolError
from minimind.tools.calculator import show

# 每一类：单位的各种写法 → 等于多少个基本单位，写成分数以免除不尽
_KINDS: dict[str, dict[str, str]] = {
    "长度": {
        "米 m metre meter": "1", "千米 公里 km": "1000", "分米 dm": "0.1", "厘米 公分 cm": "0.01", "毫米 mm": "0.001",
        "微米 um": "0.000001", "里 华里": "500", "丈": "10/3", "尺": "1/3", "寸": "1/30", "英里 mile mi": "1609.344",
        "码 yard yd": "0.9144", "英尺 foot feet ft": "0.3048", "英寸 inch in": "0.0254", "海里 nmi": "1852",
    },
    "质量": {
        "千克 公斤 kg": "1", "克 g gram": "0.001", "毫克 mg": "0.000001", "吨 t ton": "1000", "斤": "0.5", "两": "0.05",
        "钱": "0.005", "磅 pound lb": "0.45359237", "盎司 ounce oz": "0.028349523125",
    },
    "面积": {
        "平方米 m2 m²": "1", "平方千米 平方公里 km2 km²": "1000000", "平方厘米 cm2 cm²": "0.0001", "公顷 ha": "10000",
        "亩": "2000/3", "英亩 acre": "4046.8564224", "平方英尺 ft2": "0.09290304",
    },
    "体积": {
        "升 公升 l litre liter": "1", "毫升 ml": "0.001", "立方米 m3 m³": "1000", "立方厘米 cm3 cm³": "0.001",
        "加仑 gallon gal": "3.785411784",
    },
    "时间": {
        "秒 s second sec": "1", "毫秒 ms": "0.001", "分钟 分 min minute": "60", "小时 时 h hour": "3600",
        "天 日 day d": "86400", "周 星期 week": "604800",
    },
    "速度": {
        "米每秒 m/s": "1", "千米每小时 公里每小时 km/h kmh": "5/18", "英里每小时 mph": "0.44704", "节 knot": "463/900",
    },
    "数据量": {
        "字节 b byte": "1", "kb": "1000", "mb": "1000000", "gb": "1000000000", "tb": "1000000000000",
        "kib": "1024", "mib": "1048576", "gib": "1073741824", "tib": "1099511627776",
    },
}  # fmt: skip
# 温度有零点：摄氏 = (x - 零点) × 倍数
_TEMPERATURES = {
    "摄氏度 度 ℃ °c c celsius": ("0", "1"),
    "华氏度 ℉ °f f fahrenheit": ("32", "5/9"),
    "开尔文 k kelvin": ("273.15", "1"),
}


def _fraction(text: str) -> tuple[Decimal, Decimal]:
    top, _, bottom = text.partition("/")
    return Decimal(top), Decimal(bottom or "1")


# 写法 → (哪一类, 零点, 分子, 分母)
_UNITS: dict[str, tuple[str, Decimal, Decimal, Decimal]] = {}
for _kind, _units in _KINDS.items():
    for _names, _factor in _units.items():
        for _name in _names.split():
            _UNITS[_name] = (_kind, Decimal(0), *_fraction(_factor))
for _names, (_zero, _factor) in _TEMPERATURES.items():
    for _name in _names.split():
        _UNITS[_name] = ("温度", Decimal(_zero), *_fraction(_factor))


def find_unit(name: str) -> tuple[str, Decimal, Decimal, Decimal]:
    """认一个单位；英文复数也认。

    Raises:
        ToolError: 不认识。
    """
    key = name.strip().lower()
    for spelling in (key, key.removesuffix("s"), key.removesuffix("es")):
        if spelling in _UNITS:
            return _UNITS[spelling]
    kinds = "、".join([*_KINDS, "温度"])
    raise ToolError(f"不认识单位 {name[:20]}，会换算的有{kinds}")


def convert(value: float, from_unit: str, to_unit: str) -> dict[str, Any]:
    """换算。

    Raises:
        ToolError: 单位不认识、不是同一类，或数太大。
    """
    if not math.isfinite(value) or abs(value) > 1e30:
        raise ToolError("数太大了")
    kind, zero, top, bottom = find_unit(from_unit)
    target_kind, target_zero, target_top, target_bottom = find_unit(to_unit)
    if kind != target_kind:
        raise ToolError(f"{from_unit} 是{kind}，{to_unit} 是{target_kind}，不能换算")
    with decimal.localcontext(decimal.Context(prec=40)):
        base = (Decimal(repr(value)) - zero) * top * target_bottom / (bottom * target_top)
        return {"result": show(base + target_zero), "unit": to_unit.strip()}


UNITS = Tool(
    "convert_unit",
    "换算单位",
    {"value": {"type": "number"}, "from_unit": {"type": "string"}, "to_unit": {"type": "string"}},
    convert,
)
