"""DPO 配方：学得会偏好，参考模型的对数概率只算一遍，数据的毛病说得出文件与行号。"""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest
import torch

from minimind.errors import UserError
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.objectives.preference import LOSS_TYPES
from minimind.recipes import dpo
from minimind.recipes.health import preference_health, ranking_health
from minimind.recipes.unpaired import mismatched_ratios
from minimind.runtime.checkpoint import config_dict, load_file, save_weights, weights_path
from minimind.tokenizer import load_tokenizer
from minimind.trainer import reference

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_seq_len": 64,
    "data_path": "dpo.jsonl",
    "val_ratio": 0.0,
    "save_interval": 0,
    "eval_interval": 0,
    "log_interval": 5,
    "device": "cpu",
    "dtype": "float32",
}
NAMES = ("云川", "小满", "石桥", "木舟", "青岚", "白露", "星门", "雨巷")


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def pair(question, good, bad):
    return {"chosen": turns(question, good), "rejected": turns(question, bad)}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """有随机初始化的 full_sft 与一份“客气好、不耐烦坏”的偏好数据。"""
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_jsonl(
        tmp_path / "dpo.jsonl",
        [
            pair(f"{n}{i}在哪里？", f"您好，{n}在河边{'，请慢走' * (i % 3)}。", f"哼，{n}在河边。")
            for i, n in enumerate(NAMES * 2)
        ],
    )
    torch.manual_seed(3)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2)
    model = MiniMindForCausalLM(config)
    save_weights(model, weights_path(config, "full_sft", "out"), {"config": config_dict(config)})
    return tmp_path


def train(**changes):
    return dpo.run(dpo.DPOArguments(**{**SMALL, **changes}))


def log_of(result):
    return [json.loads(line) for line in result.log.read_text().splitlines()]


def test_学会偏好_验证集上也分得开(home):
    write_jsonl(home / "val.jsonl", [pair(f"{n}远吗？", f"您好，{n}不远。", f"哼，{n}不远。") for n in NAMES])
    result = train(val_path="val.jsonl", epochs=8, learning_rate=1e-3, log_interval=1)
    lines = [line for line in log_of(result) if "lr" in line]
    # 策略就是参考模型：第一步的损失是 ln 2，优势是 0
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4) and abs(lines[0]["margin"]) < 1e-4
    assert lines[-1]["accuracy"] == 1 and lines[-1]["reward_chosen"] > lines[-1]["reward_rejected"]
    assert result.metrics["val_accuracy"] > 0.9 and result.metrics["val_margin"] > 0.1
    assert "val_bpb" not in result.metrics  # 损失不是每个词元的负对数概率


def test_参考值只算一遍_换了参考权重才重算(home, monkeypatch, capsys):
    calls = []
    original = reference.sequence_logprobs
    monkeypatch.setattr(reference, "sequence_logprobs", lambda *args: calls.append(1) or original(*args))
    first = train(max_steps=2)
    assert calls
    calls.clear()
    again = train(max_steps=2)
    assert not calls and "读自缓存" in capsys.readouterr().err
    assert log_of(first)[0]["loss"] == log_of(again)[0]["loss"]
    resumed = train(max_steps=4, from_resume=1)
    assert not calls and resumed.step == 4
    train(max_steps=2, from_weight="dpo")
    assert calls


def test_几次训练同时要同一份参考值_只有一个算_其余等它算完来读(home):
    """扫 beta 时的样子：四个进程同时来。"""
    context = multiprocessing.get_context("spawn")
    results, go = context.Queue(), context.Event()
    workers = [context.Process(target=reference_in_process, args=(go, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    go.set()
    got = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(computed for computed, _ in got) == 1
    assert all(values == got[0][1] for _, values in got)
    assert [p.suffix for p in (home / "cache" / "reference").iterdir()] == [".pt"]


def reference_in_process(go, results):
    from minimind.dataset import DPODataset

    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    pairs = DPODataset("dpo.jsonl", load_tokenizer(), 64)
    computed, original = [], reference.pair_logprobs

    def counted(*args, **options):
        computed.append(1)
        time.sleep(1)  # 放大窗口：别的进程这时都在门外
        return original(*args, **options)

    reference.pair_logprobs = counted
    go.wait()
    logps = reference.cached_pair_logprobs(model, pairs, key="k", batch_size=4, dtype=torch.float32)
    results.put((len(computed), logps.tolist()))


def test_参考值的缓存断电截短了_重新算(home, capsys):
    first = train(max_steps=2)
    [cache] = (home / "cache" / "reference").iterdir()
    cache.write_bytes(cache.read_bytes()[:100])
    again = train(max_steps=2)
    assert "重新算" in capsys.readouterr().err
    assert log_of(first)[0]["loss"] == log_of(again)[0]["loss"]


def test_丢弃与截断的对在开头说出条数(home, capsys):
    long = "很长，" * 200
    records = [pair(f"问{i}", "好", "差") for i in range(3)]
    records += [pair("问", long + "好", long + "差"), pair("问二", "好" + long, "差")]
    write_jsonl(home / "dpo.jsonl", records)
    train(max_steps=1)
    said = capsys.readouterr().err
    assert "dpo.jsonl：1 对截到 64 个 token（后面的" in said and "丢弃 1 对" in said


def test_续训时参考模型换了_报错(home):
    train(max_steps=2)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2)
    save_weights(MiniMindForCausalLM(config), weights_path(config, "full_sft", "out"), {})
    with pytest.raises(UserError, match="参考"):
        train(max_steps=4, from_resume=1)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo"])
def test_现算参考值与缓存的结果相同(home, loss_type):
    options = {"max_steps": 3, "loss_type": loss_type, "log_interval": 1, "sft_coef": 0.1}
    cached = train(**options)
    weights = load_file(home / "checkpoints" / "dpo_64_resume.pth")["model"]
    online = train(**options, cache_reference=0)
    for a, b in zip(log_of(cached), log_of(online)):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    for key, value in load_file(home / "checkpoints" / "dpo_64_resume.pth")["model"].items():
        torch.testing.assert_close(value, weights[key], atol=1e-4, rtol=0, msg=key)
    assert online.step == 3


def test_参考值与逐对单独算一致_和批的切法无关(home):
    from minimind.dataset import DPODataset

    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    pairs = DPODataset("dpo.jsonl", load_tokenizer(), 64)
    options = {"dtype": torch.float32, "description": "测"}
    one = reference.pair_logprobs(model, pairs, batch_size=1, **options)
    many = reference.pair_logprobs(model, pairs, batch_size=5, **options)
    torch.testing.assert_close(one, many, atol=1e-4, rtol=0)
    ids, labels = pairs[3]["rejected"], pairs[3]["rejected_labels"]
    with torch.no_grad():
        table = model.eval()(ids[None]).logits[0].log_softmax(-1)
    alone = sum(float(table[t - 1, ids[t]]) for t in (labels != -100).nonzero()[:, 0].tolist())
    assert float(one[3, 1]) == pytest.approx(alone, abs=1e-3)


def test_按长度排过再算_次序仍对得上(home):
    from minimind.dataset import DPODataset

    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    pairs = DPODataset("dpo.jsonl", load_tokenizer(), 64)
    whole = reference.pair_logprobs(model, pairs, batch_size=4, dtype=torch.float32, description="测")
    for i in (0, 7, 15):
        single = reference.sequence_logprobs(model, pairs.collate([pairs[i]])).logps
        torch.testing.assert_close(whole[i], single.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "record, words",
    [
        (pair("问", "答", "答"), r"dpo\.jsonl.*3.*完全相同.*删掉这一行"),
        (pair("问", "答", ""), r"dpo\.jsonl.*3.*rejected.*回答是空的"),
        (pair("问", " ", "答"), r"dpo\.jsonl.*3.*chosen.*回答是空的"),
        ({"chosen": turns("问", "答")}, r"dpo\.jsonl.*3.*rejected"),
        ({"chosen": turns("问甲", "答"), "rejected": turns("问乙", "答")}, r"dpo\.jsonl.*3.*提问相同"),
    ],
)
def test_坏的偏好对_说出文件行号与修法(home, record, words):
    good = pair("问", "好", "坏")
    write_jsonl(home / "dpo.jsonl", [good, pair("二", "好", "坏"), record])
    with pytest.raises(UserError, match=words):
        train()
    result = train(on_bad_line="skip", max_steps=1)
    assert result.step == 1


@pytest.mark.parametrize(
    "changes, flag",
    [
        ({"beta": 0.0}, "--beta"),
        ({"loss_type": "kto", "desirable_weight": 0}, "--desirable_weight"),
        ({"loss_type": "simpo", "simpo_gamma": -1}, "--simpo_gamma"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "--label_smoothing"),
        ({"loss_type": "orpo", "label_smoothing": 0.1}, "--label_smoothing"),
        ({"simpo_gamma": 0.5}, "--simpo_gamma"),
        ({"loss_type": "orpo", "undesirable_weight": 2}, "--undesirable_weight"),
        ({"loss_type": "simpo", "cache_reference": 0}, "--cache_reference"),
        ({"label_smoothing": 0.5}, "--label_smoothing"),
        ({"sft_coef": -1}, "--sft_coef"),
    ],
)
def test_参数取值不对(changes, flag):
    with pytest.raises(UserError, match=flag):
        dpo.DPOArguments(**changes)


def test_没有写明的beta与间隔随损失而定():
    betas = {name: dpo.DPOArguments(loss_type=name).beta for name in LOSS_TYPES}
    assert betas == {"sigmoid": 0.1, "sigmoid_norm": 2, "ipo": 0.1, "orpo": 0.1, "simpo": 2, "kto": 0.1}
    assert dpo.DPOArguments(loss_type="simpo").simpo_gamma == 1
    assert dpo.DPOArguments(loss_type="simpo", simpo_gamma=0.0, beta=3.0).simpo_gamma == 0
    assert dpo.DPOArguments().simpo_gamma is None


@pytest.mark.parametrize("loss_type", ["orpo", "simpo"])
def test_不要参考模型的_不算参考值_也不带着起点(home, monkeypatch, loss_type):
    def never(*args, **kwargs):
        raise AssertionError("算了参考值")

    monkeypatch.setattr(reference, "cached_pair_logprobs", never)
    monkeypatch.setattr(dpo, "StartingPoint", never)
    options = {"loss_type": loss_type, "epochs": 12, "learning_rate": 3e-3, "log_interval": 1}
    result = train(**options)
    lines = [line for line in log_of(result) if "lr" in line]
    assert lines[-1]["accuracy"] == 1 and lines[-1]["margin"] > lines[0]["margin"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert load_file(home / "checkpoints" / "dpo_64_resume.pth")["recipe_state"] == {}


def log_without_time(result):
    skipped = ("time", "tokens_per_s", "mfu")
    return [{k: v for k, v in line.items() if k not in skipped} for line in log_of(result)]


@pytest.mark.parametrize("loss_type", ["orpo", "simpo", "kto"])
def test_换了损失_续训也逐位相同(home, loss_type):
    options = {"loss_type": loss_type, "log_interval": 1, "epochs": 4, "learning_rate": 1e-3}
    whole = train(**options, max_steps=6, save_weight="whole")
    train(**options, max_steps=6, save_interval=2, save_weight="parts")
    # 从第 2 步的存档续：把总步数相同的一次停在半途
    train(**options, max_steps=6, save_interval=2, save_weight="parts", keep_checkpoints=3)
    parts = train(**options, max_steps=6, save_weight="parts_step2", from_resume=1, keep_checkpoints=3)
    states = [
        load_file(home / "checkpoints" / f"{name}_64_resume.pth")["model"]
        for name in ("whole", "parts_step2")
    ]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert log_without_time(parts)[-1] == log_without_time(whole)[-1]


# ---------------------------------------------------------------- 不成对的（KTO）


def unpaired_rows():
    good = [{"prompt": f"{n}在哪里？", "completion": f"您好，{n}在河边。", "label": True} for n in NAMES]
    bad = [{"conversations": turns(f"{n}远吗？", f"哼，{n}不远。"), "label": False} for n in NAMES]
    return good + bad


@pytest.mark.parametrize("paired", [True, False])
def test_kto_成对与不成对的数据都学得会(home, paired):
    if not paired:
        write_jsonl(home / "dpo.jsonl", unpaired_rows())
    result = train(loss_type="kto", epochs=8, learning_rate=1e-3, log_interval=1)
    lines = [line for line in log_of(result) if "lr" in line]
    # 策略就是参考模型：z0 = 0，每条 1 − σ(0) = 0.5
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-5) and abs(lines[0]["kl"]) < 1e-4
    assert lines[-1]["accuracy"] > 0.9 and lines[-1]["loss"] < 0.4
    assert lines[-1]["reward_chosen"] > 0 > lines[-1]["reward_rejected"]


def test_kto_验证集只有一边时_另一边没有数_不写成零(home, capsys):
    write_jsonl(home / "val.jsonl", [row for row in unpaired_rows() if row["label"]])
    result = train(loss_type="kto", val_path="val.jsonl", max_steps=1)
    line = next(line for line in log_of(result) if "val_loss" in line)
    assert "val_reward_chosen" in line and "val_reward_rejected" not in line
    assert f"留意：val.jsonl 的 {len(NAMES)} 条全是好的" in capsys.readouterr().err


def test_kto_批怎么切都不改变结果(home):
    """z0 由这一步的全部微批次一起算：每批 8 条与 4 × 2 条，权重相同。全是好的，别人的回答也跟着涨，z0 才不是零。"""
    write_jsonl(home / "dpo.jsonl", [row for row in unpaired_rows() if row["label"]])
    options = {"loss_type": "kto", "log_interval": 1, "learning_rate": 1e-3, "max_steps": 4, "epochs": 4}
    states = []
    for size, accumulation in ((8, 1), (2, 4)):
        result = train(**options, batch_size=size, accumulation_steps=accumulation)
        states.append((load_file(home / "checkpoints" / "dpo_64_resume.pth")["model"], log_of(result)))
    (one, log_one), (two, log_two) = states
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], atol=1e-4, rtol=0, msg=key)
    for a, b in zip(log_one, log_two, strict=True):
        if "kl" in a:
            assert a["kl"] == pytest.approx(b["kl"], abs=1e-4)
    assert log_one[-1 if "kl" in log_one[-1] else -2]["kl"] > 0


def test_kto_另加的交叉熵只在好的回答上(home):
    from minimind.dataset import KTODataset
    from minimind.recipes.unpaired import unpaired_loss

    answers = KTODataset("dpo.jsonl", load_tokenizer(), 64)
    rows = [answers[0], answers[5], answers[20]]
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2)).eval()
    losses = []
    for coefficient in (0.0, 0.3):
        args = dpo.DPOArguments(loss_type="kto", sft_coef=coefficient)
        with torch.no_grad():
            losses.append(float(unpaired_loss(model, answers.collate(rows), args, model)[0]))
    by_hand = 0.0
    for item in rows:
        ids, labels = item["answer"], item["answer_labels"]
        with torch.no_grad():
            table = model(ids[None]).logits[0].log_softmax(-1)
        places = (labels != -100).nonzero()[:, 0].tolist()
        by_hand -= item["desirable"] * sum(float(table[t - 1, ids[t]]) for t in places) / len(places)
    assert 0 < sum(bool(item["desirable"]) for item in rows) < 3
    assert losses[1] - losses[0] == pytest.approx(0.3 * by_hand, abs=1e-4)


def test_kto_现算参考值与缓存的结果相同(home):
    options = {"loss_type": "kto", "max_steps": 3, "log_interval": 1}
    cached, online = train(**options), train(**options, cache_reference=0)
    for a, b in zip(log_of(cached), log_of(online), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_kto_不配对的回答来自别的提问_参考值与逐条现算一致(home):
    from minimind.dataset import KTODataset

    answers = KTODataset("dpo.jsonl", load_tokenizer(), 64)
    assert len(answers) == 2 * 16 and sum(item["desirable"] for item in answers) == 16
    decode = load_tokenizer().decode
    for i in range(len(answers)):
        item, other = answers[i], answers[int(answers.others[i])]
        own, wrong = (item[f"{name}_labels"] != -100 for name in ("answer", "mismatched"))
        assert decode(item["answer"][~own]) == decode(item["mismatched"][~wrong])
        assert decode(item["mismatched"][wrong]) == decode(other["answer"][other["answer_labels"] != -100])
        assert decode(item["answer"][~own]) != decode(other["answer"][other["answer_labels"] == -100])
    torch.manual_seed(0)
    policy, base = (
        MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2)).eval() for _ in range(2)
    )
    got = mismatched_ratios(policy, answers.collate([answers[3], answers[20]]), base)
    for k, i in enumerate((3, 20)):
        ids, labels = answers[i]["mismatched"], answers[i]["mismatched_labels"]
        sums = []
        for model in (policy, base):
            with torch.no_grad():
                table = model(ids[None]).logits[0].log_softmax(-1)
            sums.append(sum(float(table[t - 1, ids[t]]) for t in (labels != -100).nonzero()[:, 0].tolist()))
        assert float(got[k]) == pytest.approx(sums[0] - sums[1], abs=1e-3)


def test_kto_历史只是上文_只学最后的回答(home):
    from minimind.dataset import KTODataset

    record = {"conversations": [*turns("你好", "您好"), *turns("远吗？", "不远。")], "label": True}
    write_jsonl(home / "dpo.jsonl", [record, {"prompt": "问", "completion": "答", "label": 0}])
    answers = KTODataset("dpo.jsonl", load_tokenizer(), 64)
    decode = load_tokenizer().decode
    said = [
        decode(item["answer"][item["answer_labels"] != -100], skip_special_tokens=True) for item in answers
    ]
    assert said == ["不远。", "答"] and [item["desirable"] for item in answers] == [True, False]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "问", "completion": "答"}, r"dpo\.jsonl.*2.*label"),
        ({"prompt": "问", "completion": "答", "label": "好"}, r"dpo\.jsonl.*2.*label.*true 或 false"),
        ({"prompt": "问", "completion": "", "label": True}, r"dpo\.jsonl.*2.*completion"),
        ({"prompt": "问", "completion": " ", "label": True}, r"dpo\.jsonl.*2.*回答是空的"),
        ({"conversations": turns("问", "答")[:1], "label": True}, r"dpo\.jsonl.*2.*以 assistant 的回答结尾"),
    ],
)
def test_kto_坏的行_说出文件行号与修法(home, record, words):
    write_jsonl(home / "dpo.jsonl", [{"prompt": "问", "completion": "答", "label": True}, record])
    with pytest.raises(UserError, match=words):
        train(loss_type="kto")


def test_健康的话_各说各的毛病():
    fine = {"step": 100, "accuracy": 0.9, "margin": 1.0, "reward_chosen": 0.3, "reward_rejected": -0.7}
    assert preference_health(fine) == []
    assert "50 %" in preference_health({**fine, "accuracy": 0.5})[0]
    assert "大跌" in preference_health({**fine, "reward_chosen": -1.5, "reward_rejected": -2.5})[0]
    assert "可以停了" in preference_health({**fine, "margin": 12.0})[0]
    assert preference_health({**fine, "step": 5, "accuracy": 0.5}) == []
    # kto 没有 margin；奖励模型的分数可以都是负的，只看准确率
    assert preference_health({"step": 100, "accuracy": 0.9, "reward_chosen": 0.4}) == []
    scores = {**fine, "reward_chosen": -3.0, "reward_rejected": -4.0}
    assert ranking_health(scores) == [] and "50 %" in ranking_health({**scores, "accuracy": 0.5})[0]
