"""时钟：现在几点，今天几号；可以问别的城市。"""

from __future__ import annotations

import datetime
import zoneinfo
from typing import Any

from minimind.tools.base import Tool, ToolError

WEEKDAYS = "一二三四五六日"

_BEIJING = (
    "北京",
    "上海",
    "广州",
    "深圳",
    "杭州",
    "成都",
    "武汉",
    "西安",
    "南京",
    "重庆",
    "天津",
    "中国",
    "beijing",
    "shanghai",
)
_ZONES = {
    "Asia/Shanghai": _BEIJING,
    "Asia/Hong_Kong": ("香港", "hong kong"),
    "Asia/Taipei": ("台北", "taipei"),
    "Asia/Tokyo": ("东京", "日本", "tokyo"),
    "Asia/Seoul": ("首尔", "韩国", "seoul"),
    "Asia/Singapore": ("新加坡", "singapore"),
    "Asia/Kolkata": ("新德里", "印度", "new delhi"),
    "Asia/Dubai": ("迪拜", "dubai"),
    "Europe/Moscow": ("莫斯科", "moscow"),
    "Europe/Berlin": ("柏林", "德国", "berlin"),
    "Europe/Paris": ("巴黎", "法国", "paris"),
    "Europe/London": ("伦敦", "英国", "london"),
    "America/New_York": ("纽约", "华盛顿", "new york"),
    "America/Chicago": ("芝加哥", "chicago"),
    "America/Los_Angeles": ("洛杉矶", "旧金山", "los angeles", "san francisco"),
    "Australia/Sydney": ("悉尼", "sydney"),
    "UTC": ("utc",),
}
_CITIES = {city: zone for zone, cities in _ZONES.items() for city in cities}
HERE = ("", "本地", "这里", "local")


def read_clock(city: str = "", now: datetime.datetime | None = None) -> dict[str, Any]:
    """某地的日期、时间与星期。

    Args:
        city: 城市名；空着是本机的时区。
        now: 带时区的此刻；测试用。

    Raises:
        ToolError: 不认识的城市，或系统里没有时区数据。
    """
    now = now or datetime.datetime.now(datetime.timezone.utc)
    name = city.strip().lower().removesuffix("市")
    if name in HERE:
        local = now.astimezone()
    elif name in _CITIES:
        try:
            local = now.astimezone(zoneinfo.ZoneInfo(_CITIES[name]))
        except zoneinfo.ZoneInfoNotFoundError:
            raise ToolError("这台机器没有时区数据，只能问本地时间") from None
    else:
        known = "、".join(cities[0] for cities in list(_ZONES.values())[:6])
        raise ToolError(f"不知道 {city[:20]} 的时区，认得 {known} 等；空着是本地时间")
    return {
        "time": f"{local.hour}:{local.minute:02d}",
        "date": local.date().isoformat(),
        "weekday": f"星期{WEEKDAYS[local.weekday()]}",
    }


CLOCK = Tool("get_time", "查时间", {"city": {"type": "string"}}, read_clock, optional=("city",))
