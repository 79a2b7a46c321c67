"""排计划：放得下、走得完、命令真能解析；坏的输入一句话。"""

import itertools

import pytest

from minimind.arguments import parse_args
from minimind.errors import UserError
from minimind.plan import cards, planning, quality
from minimind.plan.arguments import PlanArguments
from minimind.plan.draw import draw_plan
from minimind.plan.place import card_place
from minimind.plan.planning import LENGTH, Batch, Costs
from minimind.recipes.full_sft import SFTArguments
from minimind.recipes.pretrain import PretrainArguments
from minimind.runtime.device import PEAK_TFLOPS

COSTS = Costs(start=10.0, tokenize=5.0, step=0.5, samples=2.0, save=0.5)


def test_花费是各项之和():
    batch = Batch(4)
    rows = 64
    expected = 10 + 5 + 100 * 0.5 + 4 * (64 * LENGTH / (4 * LENGTH) * 0.5 / 3 + 2) + 3 * 0.5
    assert COSTS.of(100, 4, rows, batch) == pytest.approx(expected)


@pytest.mark.parametrize("seconds", [60, 120, 600, 1800, 36000])
def test_步数用满时间又不超出(seconds):
    batch = Batch(4)
    steps, rows = planning.steps_within(seconds, COSTS, batch, 4)
    assert steps % 4 == 0
    assert 0.9 * seconds < COSTS.of(steps, 4, rows, batch) <= seconds
    assert rows in planning.VALIDATION_ROWS


def test_时间太短_说出至少几分钟_照它就够():
    with pytest.raises(UserError, match="--minutes") as caught:
        planning.steps_within(20, COSTS, Batch(4), 4)
    least = float(str(caught.value).split("至少 ")[1].split("；")[0])
    steps, _ = planning.steps_within(60 * least, COSTS, Batch(4), 4)
    assert steps >= planning.FEWEST_STEPS


@pytest.mark.parametrize(("tokens", "positions"), [(1e4, 2048), (1e6, 2048), (2.1e6, 4096), (1e12, 16384)])
def test_一步的位置数随词元数变_不超过训练的默认(tokens, positions):
    assert planning.positions_for(tokens) == positions


def test_放不下就分成几个微批次_位置数不变_再不行就重算():
    from minimind.trainer.footprint import CARD_OVERHEAD, FRAGMENTS, GB, footprint

    seen = set()
    for room in (24.0, 8.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.2, 0.9):
        batch = planning.fit_batch("small", 16384, room, half=True, on_cpu=False)
        if batch is None:
            seen.add("none")
            continue
        assert batch.positions == 16384
        needed = footprint(
            planning.blank("small"), batch.rows * LENGTH, half=True,
            checkpoint_layers=batch.checkpoint_layers, accumulates=batch.accumulation > 1,
        ).peak  # fmt: skip
        assert needed * (1 + FRAGMENTS) + CARD_OVERHEAD <= room * GB
        seen.add((batch.accumulation > 1, batch.checkpoint_layers))
    assert {(False, "0"), (True, "0"), "none"} <= seen


def test_尺寸_每个参数看得到二十个词元才换大的():
    flops = dict.fromkeys(planning.LADDER, 1e14)
    assert planning.choose_preset(None, 60, flops, 1e15) == ["tiny"]
    assert planning.choose_preset(None, 20 * 60, flops, 1e15) == ["small", "tiny"]
    assert planning.choose_preset(None, 24 * 3600, flops, 1e15) == ["base", "small", "tiny"]
    assert planning.choose_preset(None, 24 * 3600, flops, 1e8) == ["tiny"]  # 数据少，大的喂不饱
    assert planning.choose_preset("moe", 60, flops, 1e15) == ["moe"]


def test_重复的词元打折扣_四遍以内几乎不打():
    assert planning.worth(1e6, 2e6) == 1e6
    assert planning.worth(4e6, 1e6) == pytest.approx(4e6, rel=0.1)
    assert planning.worth(1e9, 1e6) == pytest.approx(16.4e6, rel=0.01)


# ---- 卡的名字 ----


def test_每张有峰值的卡都有显存():
    assert set(cards.CARD_GB) == set(PEAK_TFLOPS)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("4090", "RTX 4090"), ("h100", "H100"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("Tesla T4", "T4"),
        ("A100", "A100"), ("l40s", "L40S"), ("RTX-4090", "RTX 4090"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Ascend910B4", "Ascend910B"), ("Ascend910_9392", "Ascend910_93"), ("GH200 480GB", "GH200"), ("A10G", "A10G"),
    ],
)  # fmt: skip
def test_卡的名字怎么写都认得(name, card):
    assert cards.find_card(name) == card


@pytest.mark.parametrize(
    "name",
    # 后几个的名字里含着 A40、A100、T4、A30、L4：当成那一张，算力与显存就差几倍
    ["RTX 9999", "显卡", "RTX 4O90", "cuda:x", "tpu", "RTX A4000", "RTX A1000", "Quadro T400", "RTX A3000", "L400"],
)  # fmt: skip
def test_不认识的卡_列出认得的(name):
    with pytest.raises(UserError, match="--device") as caught:
        cards.find_card(name)
    assert "RTX 4090" in str(caught.value)


@pytest.mark.parametrize("name", ["RTX 4090 Laptop GPU", "4070 laptop", "RTX 2080 Ti Max-Q", "4060 笔记本"])
def test_笔记本的与台式的同名_不拿台式的数充(name):
    with pytest.raises(UserError, match="笔记本"):
        cards.find_card(name)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("A100", 40), ("A100 80GB", 80), ("A100-80G", 80), ("V100-SXM2-16GB", 16), ("RTX 4090 48 GiB", 48), ("A10G", 24), ("GH200 480GB", 96)],
)  # fmt: skip
def test_名字里写了显存就用写的(name, gigabytes):
    card = cards.find_card(name)
    assert card_place(card, PlanArguments(device=name)).room_gb == gigabytes
    assert card_place(card, PlanArguments(device=name, memory_gb=6)).room_gb == 6


# ---- 画出来的计划 ----


@pytest.fixture
def world(tmp_path, monkeypatch):
    """一个空的起点，内置语料写在里面。"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    return tmp_path


def flags(words: list[str]) -> dict[str, str]:
    return {a: b for a, b in itertools.pairwise(words) if a.startswith("--")}


@pytest.fixture
def endless(monkeypatch):
    """数据看多少遍都行：这几条测的是时间。"""
    monkeypatch.setattr(planning, "MOST_EPOCHS", 10**9)


def test_数据不够用满时间_至多十六遍_提早结束并说清楚(world):
    plan = draw_plan(PlanArguments(minutes=600, device="H200"))
    first = plan.stages[0]
    assert first.epochs <= planning.MOST_EPOCHS and plan.preset == "tiny"
    assert plan.seconds == plan.budget < 3600
    assert any("用不完 600 分钟" in note for note in plan.notes)


@pytest.mark.parametrize("card", ["H200", "RTX 4090", "T4"])
def test_卡的计划_命令真能解析_微调从预训练开始_并注明没有跑过(world, endless, card):
    plan = draw_plan(PlanArguments(minutes=60, device=card))
    assert any("没有在这张卡上跑过" in note for note in plan.notes)
    assert plan.seconds == pytest.approx(3600, rel=0.1)
    for stage, cls in zip(plan.stages, (PretrainArguments, SFTArguments), strict=True):
        args = parse_args(cls, stage.words[1:])
        assert args.max_steps == stage.steps and args.preset == plan.preset
        assert args.batch_size * args.accumulation_steps * args.max_seq_len * stage.steps == stage.tokens
        assert (world / args.data_path).is_file() and (world / args.val_path).is_file()
    assert flags(plan.stages[1].words)["--from_weight"] == "pretrain"
    assert plan.memory_gb < cards.CARD_GB[card]


def test_卡越快词元越多_显存越大批越大(world, endless):
    slow, fast = (
        draw_plan(PlanArguments(minutes=60, device=card, preset="small")) for card in ("T4", "H100")
    )
    assert fast.stages[0].tokens > 5 * slow.stages[0].tokens
    tight = draw_plan(PlanArguments(minutes=60, device="H100", preset="base", memory_gb=6))
    assert tight.batch.positions == 16384 and tight.batch.rows < fast.batch.rows


def test_自己的数据_不微调_说清楚(world):
    import json

    path = world / "我的 数据.jsonl"
    lines = [
        {"text": f"第{n}天，今天的天气是{n * 7919 % 37}度，风向{n % 8}，记在本子上。" * 5} for n in range(400)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    plan = draw_plan(PlanArguments(minutes=30, device="T4", data_path=str(path)))
    assert len(plan.stages) == 1 and not plan.quality.same
    assert any("--sft_path" in note for note in plan.notes)
    assert any("遍" in note for note in plan.notes)
    parse_args(PretrainArguments, plan.stages[0].words[1:])


def test_微调数据太少_照实说_不说成时间不够(world):
    import json

    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    text = json.dumps({"conversations": turns}, ensure_ascii=False) + "\n"
    (world / "问答.jsonl").write_text(text * 50, "utf-8")
    plan = draw_plan(PlanArguments(minutes=30, device="T4", sft_path="问答.jsonl"))
    assert len(plan.stages) == 1
    said = "".join(plan.notes)
    assert "微调数据只有" in said and "时间不够" not in said


@pytest.mark.parametrize("text", ["你好", "短"])
def test_几个字的数据_预期不高于没训练过的(world, text):
    import json

    (world / "一行.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", "utf-8")
    plan = draw_plan(PlanArguments(minutes=5, device="T4", data_path="一行.jsonl"))
    most = quality.untrained(6400, plan.measured["bytes_per_token"])
    assert plan.quality.low <= plan.quality.middle <= plan.quality.high <= most < 13
    assert plan.measured["squeezed_bits"] <= 8
