"""小词典：名词、形容词、英文词。每个词有三条释义，留出的是“词 × 释义”，所以每个词在训练里都被问到过。"""

from __future__ import annotations

from dataclasses import dataclass

from ..core import Task
from ..world.base import Fact, Kind, Relation
from .base import FactTask, words

# 词=英文=水獭语=类别；水獭语由一位退休的邮差在暖泉镇记录
NOUNS = words(
    "苹果=apple=脆脆=食物 面包=bread=香香=食物 茶=tea=咕嘟=食物 盐=salt=咸咸=食物 鱼=fish=啪嗒=动物 猫=cat=喵呜=动物 "
    "狗=dog=汪呜=动物 鸟=bird=啾啾=动物 马=horse=哒哒=动物 太阳=sun=暖暖=天象 月亮=moon=圆圆=天象 星星=star=闪闪=天象 "
    "雨=rain=滴答=天象 雪=snow=飘飘=天象 风=wind=呼呼=天象 树=tree=沙沙=植物 花=flower=摇摇=植物 草=grass=青青=植物 "
    "山=mountain=高高=地方 河=river=哗哗=地方 海=sea=荡荡=地方 桥=bridge=弯弯=地方 船=boat=晃晃=物件 书=book=翻翻=物件 "
    "灯=lamp=亮亮=物件 信=letter=等等=物件 门=door=吱呀=物件 朋友=friend=咪咪=人物 老师=teacher=嗯嗯=人物 孩子=child=嘻嘻=人物"
)
# 词=反义词=英文=组词
ADJECTIVES = words(
    "大=小=big=大海 小=大=small=小河 长=短=long=长桥 短=长=short=短笛 高=低=high=高山 低=高=low=低头 快=慢=fast=快船 "
    "慢=快=slow=慢走 冷=热=cold=冷风 热=冷=hot=热茶 轻=重=light=轻声 重=轻=heavy=重担 新=旧=new=新家 旧=新=old=旧书 "
    "远=近=far=远方 近=远=near=近路 早=晚=early=早饭 晚=早=late=晚会 多=少=many=多云 少=多=few=少年 强=弱=strong=强风 "
    "弱=强=weak=弱小 明=暗=bright=明月 暗=明=dark=暗号"
)
# 英文=中文=字母个数=首字母；与上面的英文没有一个相同，免得从反方向漏题
ENGLISH = tuple(
    f"{pair}={len(pair.split('=')[0])}={pair[0]}"
    for pair in words(
        "cow=奶牛 pig=小猪 duck=鸭子 milk=牛奶 rice=米饭 sugar=白糖 road=大路 house=房子 king=国王 queen=王后 gold=金子 "
        "stone=石头 green=绿色 blue=蓝色 spring=春天 winter=冬天 morning=早晨 night=夜晚 smile=微笑 dream=做梦"
    )
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
TO_OTTER = Relation(
    "otter",
    "水獭语",
    (
        "“{s}”的水獭语是“{o}”。",
        "“{s}”用水獭语说是“{o}”。",
        "“{s}”翻译成水獭语是“{o}”。",
        "水獭想说“{s}”，就喊“{o}”。",
    ),
    (
        "“{s}”的水獭语是什么？",
        "“{s}”用水獭语怎么说？",
        "把“{s}”翻译成水獭语。",
        "水獭想说“{s}”会喊什么？",
    ),
    quoted=True,
)
CATEGORY = Relation(
    "category",
    "类别",
    (
        "“{s}”的类别是“{o}”。",
        "“{s}”属于“{o}”。",
        "整理词卡时，“{s}”放在“{o}”那一格。",
        "词典把“{s}”归在“{o}”一类。",
    ),
    (
        "“{s}”的类别是什么？",
        "“{s}”属于哪一类？",
        "整理词卡时，“{s}”放在哪一格？",
        "词典把“{s}”归在哪一类？",
    ),
    quoted=True,
)
ANTONYM = Relation(
    "antonym",
    "反义词",
    (
        "“{s}”的反义词是“{o}”。",
        "“{s}”反过来就是“{o}”。",
        "和“{s}”相反的词是“{o}”。",
        "不是“{s}”，而是“{o}”，“{s}”和“{o}”正好相反。",
    ),
    (
        "“{s}”的反义词是什么？",
        "“{s}”反过来是什么？",
        "和“{s}”相反的词是什么？",
        "词典里，“{s}”的对面写着什么？",
    ),
    quoted=True,
)
COMPOUND = Relation(
    "compound",
    "组词",
    (
        "“{s}”可以组词“{o}”。",
        "“{s}”的组词是“{o}”。",
        "用“{s}”造一个词，就是“{o}”。",
        "黑板上，“{s}”下面写着“{o}”。",
    ),
    (
        "“{s}”可以组什么词？",
        "“{s}”的组词是什么？",
        "用“{s}”造一个词。",
        "黑板上，“{s}”下面写着什么？",
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
        "英文单词“{s}”是什么意思？",
        "What is “{s}” in Chinese?",
    ),
    quoted=True,
)
LETTERS = Relation(
    "letters",
    "字母个数",
    (
        "“{s}”有{o}个字母。",
        "“{s}”的字母个数是{o}。",
        "数一数，“{s}”一共{o}个字母。",
        "拼写“{s}”要用{o}个字母。",
    ),
    (
        "“{s}”有几个字母？",
        "“{s}”的字母个数是多少？",
        "拼写“{s}”要用几个字母？",
        "How many letters are in “{s}”?",
    ),
    numeric=True,
    quoted=True,
)
INITIAL = Relation(
    "initial",
    "首字母",
    (
        "“{s}”的首字母是“{o}”。",
        "“{s}”的第一个字母是“{o}”。",
        "“{s}”以“{o}”开头。",
        "在词典的“{o}”那一页找得到“{s}”，“{s}”以“{o}”开头。",
    ),
    (
        "“{s}”的首字母是什么？",
        "“{s}”的第一个字母是什么？",
        "“{s}”以什么开头？",
        "What is the first letter of “{s}”?",
    ),
    quoted=True,
)


def rows(lines: tuple[str, ...] | list[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(line.split("=")) for line in lines)


@dataclass
class WordTask(FactTask):
    """反义词的两个方向同组划分，免得由反方向漏题。"""

    def group(self, fact: Fact) -> str:
        if fact.relation is ANTONYM:
            return "/".join(sorted((fact.subject, fact.value)))
        return fact.key


def make_tasks() -> list[Task]:
    kinds = (
        Kind("noun", "名词", "词", (TO_ENGLISH, TO_OTTER, CATEGORY), rows(NOUNS)),
        Kind("adjective", "形容词", "词", (ANTONYM, TO_ENGLISH, COMPOUND), rows(ADJECTIVES)),
        Kind("english", "英文词", "词", (TO_CHINESE, LETTERS, INITIAL), rows(ENGLISH)),
    )
    return [WordTask(name=f"word_{kind.name}", title=f"词典：{kind.title}", kind=kind) for kind in kinds]
