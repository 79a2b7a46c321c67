"""公共项目教模型用的六样工具，名字与参数照旧，读它的数据、用它的权重时才用得上。

算式与单位用本项目的实现（自己解析，不执行模型写的字）；天气、汇率、翻译与时间在那边就是固定的表，公开数据里的答案
（``gt``）由表里的值而来，所以这里也是同样的值，查不到就说查不到。
"""

from __future__ import annotations

import datetime
import zoneinfo
from decimal import Decimal
from typing import Any

from minimind.tools.base import Tool, ToolError
from minimind.tools.calculator import evaluate, show
from minimind.tools.units import convert

_TEXT, _NUMBER = {"type": "string"}, {"type": "number"}
# 城市 气温 天气
_WEATHER = """北京 28 晴、上海 15 多云、广州 32 闷热、深圳 30 晴、杭州 22 阴、成都 18 小雨、武汉 25 多云、南京 20 晴、
西安 16 大风、重庆 26 阴、Tokyo 12 晴、New_York 8 晴、London 5 小雨、Paris 10 阴、Sydney 25 晴朗"""
# 一个前者等于多少后者
_RATES = """USD CNY 7.21、EUR CNY 7.85、GBP CNY 9.12、JPY CNY 0.048、USD EUR 0.92、USD GBP 0.79、CNY JPY 20.83、AUD CNY 4.72"""
# 中文 英文，两个方向都查得到
_PHRASES = """你好世界 Hello_World、早上好 Good_morning、今天天气真好 The_weather_is_nice_today、
我喜欢编程 I_love_programming、机器学习很有趣 Machine_learning_is_interesting、生日快乐 Happy_birthday"""
# 那边的钟停在这一刻
NOW = datetime.datetime(2025, 3, 7, 6, 30, tzinfo=datetime.timezone.utc)


def _rows(text: str) -> list[list[str]]:
    return [[word.replace("_", " ") for word in row.split()] for row in text.split("、")]


_CITIES = {city.lower(): (city, f"{degree}°C", sky) for city, degree, sky in _rows(_WEATHER)}
_PAIRS = {(a, b): float(rate) for a, b, rate in _rows(_RATES)}
_ENGLISH = dict(_rows(_PHRASES))
_CHINESE = {english.lower(): chinese for chinese, english in _ENGLISH.items()}
_LANGUAGES = {"english": "en", "en": "en", "英文": "en", "英语": "en"}
_LANGUAGES |= {"chinese": "zh", "zh": "zh", "中文": "zh", "汉语": "zh"}


def calculate_math(expression: str) -> dict[str, Any]:
    """算式；``math.sqrt(2)`` 的前缀去掉。"""
    return {"result": show(evaluate(expression.replace("math.", "")))}


def unit_converter(value: float, from_unit: str, to_unit: str) -> dict[str, Any]:
    """换算，保留四位小数；倍数取六位有效数字（公开的答案是这样算的），温度照公式。"""
    one = Decimal(str(convert(1.0, from_unit, to_unit)["result"]))
    zero = Decimal(str(convert(0.0, from_unit, to_unit)["result"]))
    if zero:
        result = Decimal(str(convert(float(value), from_unit, to_unit)["result"]))
    else:
        result = Decimal(repr(value)) * Decimal(f"{one:.6g}")
    return {"result": float(round(result, 4))}


def get_current_weather(location: str) -> dict[str, Any]:
    """查表。"""
    known = _CITIES.get(location.strip().removesuffix("市").lower())
    if known is None:
        raise ToolError(
            f"没有 {location[:20]} 的天气，只有 {'、'.join(city for city, _, _ in _CITIES.values())}"
        )
    city, degree, sky = known
    return {"city": city, "temperature": degree, "humidity": "65%", "condition": sky}


def get_current_time(timezone: str = "Asia/Shanghai") -> dict[str, Any]:
    """停着的那一刻在某个时区是几点。"""
    try:
        now = NOW.astimezone(zoneinfo.ZoneInfo(timezone.strip()))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ToolError(f"没有时区 {timezone[:30]}，要写成 Asia/Shanghai 的样子") from None
    return {"datetime": now.strftime("%Y-%m-%d %H:%M:%S"), "timezone": timezone.strip()}


def get_exchange_rate(from_currency: str, to_currency: str) -> dict[str, Any]:
    """查表。"""
    pair = from_currency.strip().upper(), to_currency.strip().upper()
    if pair not in _PAIRS:
        raise ToolError(
            f"没有 {pair[0][:10]} 兑 {pair[1][:10]} 的汇率，只有 {'、'.join('/'.join(p) for p in _PAIRS)}"
        )
    return {"from": pair[0], "to": pair[1], "rate": _PAIRS[pair]}


def translate_text(text: str, target_language: str) -> dict[str, Any]:
    """查表。"""
    language = _LANGUAGES.get(target_language.strip().lower())
    if language is None:
        raise ToolError(f"不会译成 {target_language[:20]}，只会 english、chinese")
    found = _ENGLISH.get(text.strip()) if language == "en" else _CHINESE.get(text.strip().lower())
    if found is None:
        raise ToolError(f"没有 {text[:20]} 的译文")
    return {"translated_text": found}


PUBLIC_TOOLS = (
    Tool("calculate_math", "计算数学表达式", {"expression": _TEXT}, calculate_math),
    Tool("unit_converter", "单位换算", {"value": _NUMBER, "from_unit": _TEXT, "to_unit": _TEXT}, unit_converter),
    Tool("get_current_weather", "获取天气", {"location": _TEXT}, get_current_weather),
    Tool("get_current_time", "获取时间", {"timezone": _TEXT}, get_current_time, optional=("timezone",)),
    Tool("get_exchange_rate", "查询汇率", {"from_currency": _TEXT, "to_currency": _TEXT}, get_exchange_rate),
    Tool("translate_text", "翻译文本", {"text": _TEXT, "target_language": _TEXT}, translate_text),
)  # fmt: skip
