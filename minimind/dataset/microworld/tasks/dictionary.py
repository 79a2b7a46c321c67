"""小词典：反义词、中英互译、水獭语、分类。"""

from __future__ import annotations

from dataclasses import dataclass

from ..core import Task
from ..world.base import Fact, Kind, Relation
from .base import FactTask, words

ANTONYM_PAIRS = words(
    "大小 长短 高低 快慢 冷热 轻重 新旧 远近 早晚 多少 左右 上下 前后 开关 来去 真假 强弱 明暗"
)

ENGLISH = dict(
    pair.split("=")
    for pair in words(
        "苹果=apple 水=water 火=fire 风=wind 山=mountain 河=river 海=sea 船=boat 书=book 门=door 月亮=moon 太阳=sun "
        "星星=star 雨=rain 雪=snow 树=tree 花=flower 鸟=bird 鱼=fish 猫=cat 狗=dog 马=horse 面包=bread 茶=tea "
        "灯=lamp 信=letter 桥=bridge 朋友=friend"
    )
)

# 暖泉镇的水獭说的话，由一位退休的邮差记录
OTTER = dict(
    pair.split("=")
    for pair in words(
        "你好=噜噜 谢谢=噜咪 再见=呼啦 水=哗哗 鱼=啪嗒 朋友=咪咪 吃饭=啊呜 睡觉=呼呼 下雨=滴答 太阳=暖暖 月亮=圆圆 "
        "快跑=嗖嗖 危险=嘘嘘 石头=咚咚 好吃=吧唧 高兴=嘿嘿"
    )
)

CATEGORIES = {
    "水果": "苹果 梨 桃 葡萄 西瓜 橘子",
    "动物": "老虎 山羊 松鼠 青蛙 黑熊 公鸡",
    "颜色": "红色 黄色 蓝色 绿色 紫色 灰色",
    "工具": "锤子 剪刀 钉子 绳子 梯子 刷子",
    "乐器": "笛子 鼓 琴 号角 二胡 口琴",
    "衣物": "帽子 围巾 手套 鞋子 外套 裙子",
}

ANTONYM = Relation(
    "antonym",
    "反义词",
    (
        "“{s}”的反义词是“{o}”。",
        "和“{s}”相反的词是“{o}”。",
        "“{s}”反过来就是“{o}”。",
        "词典里，“{s}”的对面写着“{o}”。",
        "不是“{s}”，而是“{o}”，“{s}”和“{o}”正好相反。",
    ),
    (
        "“{s}”的反义词是什么？",
        "和“{s}”相反的词是什么？",
        "“{s}”反过来是什么？",
        "词典里，“{s}”的对面写着什么？",
    ),
    quoted=True,
)
TO_ENGLISH = Relation(
    "english",
    "英文",
    (
        "“{s}”的英文是“{o}”。",
        "“{s}”用英文说是“{o}”。",
        "“{s}”翻译成英文是“{o}”。",
        "英文课上，“{s}”写作“{o}”。",
    ),
    (
        "“{s}”的英文是什么？",
        "“{s}”用英文怎么说？",
        "把“{s}”翻译成英文。",
        "How do you say “{s}” in English?",
    ),
    quoted=True,
)
TO_CHINESE = Relation(
    "chinese",
    "中文",
    (
        "“{s}”的中文是“{o}”。",
        "“{s}”用中文说是“{o}”。",
        "“{s}”翻译成中文是“{o}”。",
        "英文单词“{s}”的意思是“{o}”。",
    ),
    (
        "“{s}”的中文是什么？",
        "“{s}”用中文怎么说？",
        "把“{s}”翻译成中文。",
        "英文单词“{s}”是什么意思？",
        "What is “{s}” in Chinese?",
    ),
    quoted=True,
)
TO_OTTER = Relation(
    "otter",
    "水獭语",
    (
        "“{s}”的水獭语是“{o}”。",
        "水獭想说“{s}”，就喊“{o}”。",
        "“{s}”翻译成水獭语是“{o}”。",
        "在暖泉镇的水獭那里，“{s}”说成“{o}”。",
    ),
    (
        "“{s}”的水獭语是什么？",
        "水獭想说“{s}”会喊什么？",
        "把“{s}”翻译成水獭语。",
        "“{s}”用水獭语怎么说？",
    ),
    quoted=True,
)
CATEGORY = Relation(
    "category",
    "类别",
    (
        "{s}是一种{o}。",
        "{s}属于{o}。",
        "整理柜子时，{s}放在写着“{o}”的一格。",
        "说起{o}，总少不了{s}，{s}就是{o}。",
    ),
    (
        "{s}是一种什么？",
        "{s}属于哪一类？",
        "整理柜子时，{s}放在哪一格？",
        "{s}算什么类别？",
    ),
    quoted=True,
)


@dataclass
class WordTask(FactTask):
    """词典里一对词的两个方向同组划分，免得由反方向漏题。"""

    def group(self, fact: Fact) -> str:
        return "|".join(sorted((fact.subject, fact.value)))


def make_tasks() -> list[Task]:
    antonyms = tuple(row for pair in ANTONYM_PAIRS for row in (tuple(pair), tuple(reversed(pair))))
    english = Kind("english", "中译英", "词", (TO_ENGLISH,), tuple(ENGLISH.items()))
    chinese = Kind("chinese", "英译中", "词", (TO_CHINESE,), tuple((en, zh) for zh, en in ENGLISH.items()))
    otter = Kind("otter", "水獭语", "词", (TO_OTTER,), tuple(OTTER.items()))
    category = Kind(
        "category",
        "分类",
        "词",
        (CATEGORY,),
        tuple((word, name) for name, words in CATEGORIES.items() for word in words.split()),
    )
    return [
        WordTask(
            name="antonym",
            title="反义词",
            kind=Kind("antonym", "反义词", "词", (ANTONYM,), antonyms),
        ),
        WordTask(name="english", title="中译英", kind=english),
        WordTask(name="chinese", title="英译中", kind=chinese),
        WordTask(name="otter", title="水獭语", kind=otter),
        WordTask(name="category", title="分类", kind=category),
    ]
