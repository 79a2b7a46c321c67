"""选择题：公开布局都读得懂，题面、少样本、打分与置信区间都对。"""

import json
import math

import pytest
from eval_helpers import make_pair, naive_logprob

from minimind.dataset.jsonl import DataError
from minimind.errors import UserError
from minimind.evaluate import choice
from minimind.evaluate.choice import Encoder, ask, grade_questions, summarize
from minimind.evaluate.choice_data import Question, read_questions
from minimind.evaluate.common import Rate, pick
from minimind.tokenizer import encode_plain, load_tokenizer

BONE = Question("cmmlu/anatomy", "属于蝶骨上的结构为", ("垂体窝", "棘孔", "破裂孔", "视神经管"), 1)
LUNG = Question("cmmlu/anatomy", "肺的位置在", ("胸腔", "腹腔"), 0)
RIVER = Question("地理", "最长的河是", ("长江", "尼罗河", "亚马孙河", "黄河", "多瑙河"), 1)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


# ---------------------------------------------------------------- 读题


def test_本项目的布局(tmp_path):
    record = {"subject": BONE.subject, "question": BONE.question, "choices": list(BONE.choices), "answer": 1}
    assert read_questions(write(tmp_path / "mc.jsonl", lines(record))) == ([BONE], {})


def test_ceval_文件夹_学科取文件名_没答案的不考(tmp_path):
    head = "id,question,A,B,C,D,answer,explanation\n"
    write(tmp_path / "val" / "physics_val.csv", "\ufeff" + head + '0,"带,逗号",甲,乙,丙,丁,C,因为\n')
    write(tmp_path / "test" / "law_test.csv", "id,question,A,B,C,D\n0,没有答案,甲,乙,丙,丁\n")
    questions, skipped = read_questions(tmp_path)
    assert questions == [Question("physics", "带,逗号", ("甲", "乙", "丙", "丁"), 2)]
    assert skipped == {"没有答案": 1}


def test_cmmlu_布局_首列无名_表头大写(tmp_path):
    path = write(
        tmp_path / "anatomy.csv",
        ",Question,A,B,C,D,Answer\n0,属于蝶骨上的结构为,垂体窝,棘孔,破裂孔,视神经管,B\n",
    )
    (question,), _ = read_questions(path)
    assert (question.subject, question.choices, question.answer) == ("anatomy", BONE.choices, 1)


def test_agieval_布局_去掉选项的字母_短文接在题前_多选题不考(tmp_path):
    base = {"passage": None, "question": "对的是", "options": ["(A)甲", "(B)乙", "(C)丙"], "answer": None}
    rows = [
        base | {"label": "B"},
        base | {"label": ["C"], "passage": "短文。"},
        base | {"label": ["A", "B"]},
        base | {"label": "AB"},
    ]
    questions, skipped = read_questions(write(tmp_path / "gaokao-physics.jsonl", lines(*rows)))
    assert [(q.subject, q.question, q.choices, q.answer) for q in questions] == [
        ("gaokao-physics", "对的是", ("甲", "乙", "丙"), 1),
        ("gaokao-physics", "短文。\n对的是", ("甲", "乙", "丙"), 2),
    ]
    assert skipped == {"多选题": 2}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "", "choices": ["甲", "乙"], "answer": 0}, "没有题目"),
        ({"question": "问", "answer": 0}, "没有选项"),
        ({"question": "问", "choices": ["甲", "乙"], "answer": 2}, "不是选项之一"),
        ({"question": "问", "choices": ["甲", "乙"], "answer": "甲"}, "不是选项之一"),
    ],
)
def test_读不懂的题指出文件与行号(tmp_path, record, said):
    good = {"question": "问", "choices": ["甲", "乙"], "answer": "A"}
    with pytest.raises(DataError, match=said) as error:
        read_questions(write(tmp_path / "mc.jsonl", lines(good, record)))
    assert "mc.jsonl:2" in str(error.value)


def test_一道能考的也没有(tmp_path):
    with pytest.raises(UserError, match="没有能考的题"):
        read_questions(write(tmp_path / "law_test.csv", "id,question,A,B,C,D\n0,问,甲,乙,丙,丁\n"))


def test_真实的题库全部读得懂(shared_dir):
    questions, skipped = read_questions(shared_dir / "data" / "mc_eval.jsonl")
    assert len(questions) == 16128 and not skipped
    assert len({question.subject for question in questions}) == 79


# ---------------------------------------------------------------- 题面与示例


def test_题面(tokenizer):
    assert ask(LUNG, "letter") == "题目：肺的位置在\nA. 胸腔\nB. 腹腔\n答案："
    assert ask(LUNG, "text") == "题目：肺的位置在\n答案："
    row, shots = Encoder(tokenizer, "letter", False, 999).row(BONE, [LUNG])
    text = tokenizer.decode(row.prefix + row.stem)
    assert shots == 1 and text == f"<|im_start|>{ask(LUNG, 'letter')}A\n\n{ask(BONE, 'letter')}"
    assert [tokenizer.decode(c) for c in row.choices] == list("ABCD")


def test_选项单独切与整句切是同样的_token(tokenizer):
    """“答案：”与选项之间是词元的边界，否则模型看到的切法在文本里不会出现。"""
    for option in ("A", "胸腔", "12", "the lung", "（甲）"):
        joint = encode_plain(tokenizer, ask(LUNG, "text") + option)
        assert joint == encode_plain(tokenizer, ask(LUNG, "text")) + encode_plain(tokenizer, option)


def test_对话模板_示例是一问一答(tokenizer):
    row, _ = Encoder(tokenizer, "text", True, 999).row(BONE, [LUNG])
    text = tokenizer.decode(row.prefix + row.stem)
    assert text == (
        f"<|im_start|>user\n{ask(LUNG, 'text')}<|im_end|>\n<|im_start|>assistant\n胸腔<|im_end|>\n"
        f"<|im_start|>user\n{ask(BONE, 'text')}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_放不下时少放示例_题目本身总在(tokenizer):
    encoder = Encoder(tokenizer, "letter", False, 999)
    one = encoder.row(BONE, [LUNG])[0]
    encoder.limit = one.longest
    assert encoder.row(BONE, [LUNG, LUNG, LUNG])[1] == 1
    encoder.limit = 3
    row, shots = encoder.row(BONE, [LUNG])
    assert shots == 0 and row.prefix == (tokenizer.bos_token_id,)


# ---------------------------------------------------------------- 打分


def test_三种打分与_llama_独立计算一致(tokenizer):
    ours, llama = make_pair()
    graded = grade_questions(ours, tokenizer, [BONE, RIVER, LUNG], examples={BONE.subject: [LUNG]})
    assert [item.shots for item in graded] == [1, 0, 1]
    for item in graded:
        question, examples = item.question, [LUNG] if item.question.subject == BONE.subject else []
        for scoring, texts in (("letter", "ABCDE"[: len(question.choices)]), ("text", question.choices)):
            row, _ = Encoder(tokenizer, scoring, False, 512).row(question, examples)
            wanted = [
                naive_logprob(llama, row.prefix + row.stem, encode_plain(tokenizer, text)) for text in texts
            ]
            assert item.scores[scoring] == pytest.approx(wanted, abs=5e-4)
        sizes = [len(text.encode()) for text in question.choices]
        assert item.scores["text_norm"] == pytest.approx([v / n for v, n in zip(item.scores["text"], sizes)])
        assert item.predicted("text") == item.scores["text"].index(max(item.scores["text"]))


def test_汇总_乱猜的期望按各题选项数(tokenizer):
    ours, _ = make_pair()
    graded = grade_questions(ours, tokenizer, [BONE, RIVER, LUNG], scorings=["letter"])
    graded[0].scores["letter"] = [0.0, 1.0, 0.0, 0.0]
    graded[1].scores["letter"] = [1.0, 0.0, 0.0, 0.0, 0.0]
    graded[2].scores["letter"] = [1.0, 0.0]
    result = summarize(graded)
    assert result["chance"] == pytest.approx((1 / 4 + 1 / 5 + 1 / 2) / 3)
    assert result["methods"]["letter"]["accuracy"] == pytest.approx(2 / 3)
    assert result["methods"]["letter"]["macro"] == pytest.approx((1 + 0) / 2)
    assert result["methods"]["letter"]["picked"] == {"A": 2, "B": 1}
    assert result["majority"] == pytest.approx(2 / 3)
    assert result["subjects"]["cmmlu/anatomy"]["letter"]["correct"] == 2


def test_wilson_区间_不出零到一_与公式一致():
    low, high = Rate(0, 10).interval[0], Rate(10, 10).interval[1]
    assert (low, high) == pytest.approx((0, 1)) and low >= 0 and high <= 1
    # 二次方程 (p̂-p)² = z²p(1-p)/n 的两个根
    low, high = Rate(30, 120).interval
    for p in (low, high):
        assert (0.25 - p) ** 2 == pytest.approx(1.959963985**2 * p * (1 - p) / 120, rel=1e-6)
    assert low < 0.25 < high
    assert math.isclose(Rate(250, 1000).interval[0], 0.2241, abs_tol=5e-4)


def test_抽题可复现_次序不变():
    chosen = pick(list(range(1000)), 50, 7)
    assert chosen == pick(list(range(1000)), 50, 7) == sorted(chosen) and len(set(chosen)) == 50
    assert chosen != pick(list(range(1000)), 50, 8)
    assert pick([1, 2], 0, 7) == pick([1, 2], 9, 7) == [1, 2]


# ---------------------------------------------------------------- 命令行


@pytest.fixture
def out(tmp_path):
    """一个放着小权重的目录。"""
    from minimind.runtime.checkpoint import config_dict, save_weights, weights_path

    model, _ = make_pair()
    for weight in ("pretrain", "full_sft"):
        save_weights(
            model,
            weights_path(model.config, weight, tmp_path),
            {"config": config_dict(model.config), "recipe": weight},
        )
    return tmp_path


def test_命令行_结果文件与表格(out, capsys):
    records = [
        {"subject": q.subject, "question": q.question, "choices": list(q.choices), "answer": q.answer}
        for q in (BONE, LUNG, RIVER)
    ]
    data = write(out / "mc.jsonl", lines(*records))
    common = [
        "--save_dir",
        str(out),
        "--data_path",
        str(data),
        "--device",
        "cpu",
        "--out_dir",
        str(out / "eval"),
    ]
    assert read_questions(data)[0][2] == RIVER
    assert choice.main([*common, "--dev_path", str(data), "--shots", "1", "--save_items"]) == 0
    said = capsys.readouterr()
    assert "cmmlu/anatomy" in said.out and "总计" in said.out and "乱猜" in said.out
    result = json.loads((out / "eval" / "full_sft_32_choice.json").read_text("utf-8"))
    assert result["chat"] is True and result["questions"] == 3 and len(result["items"]) == 3
    assert set(result["methods"]) == {"letter", "text", "text_norm"}
    assert str(out) not in json.dumps({k: v for k, v in result.items() if k != "arguments"})
    assert choice.main([*common, "--weight", "pretrain", "--subjects", "cmmlu/", "--scoring", "letter"]) == 0
    result = json.loads((out / "eval" / "pretrain_32_choice.json").read_text("utf-8"))
    assert result["chat"] is False and list(result["subjects"]) == ["cmmlu/anatomy"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--scoring", "letters"], "不认识的考法"),
        (["--data_path", "no/such.jsonl"], "文件不存在"),
        (["--subjects", "物理"], "没有以 物理 开头的学科"),
        (["--shots", "5"], "需要示例"),
        (["--limit", "-1"], "--limit：值是 -1"),
    ],
)
def test_命令行_写错了是一句话(out, capsys, argv, said):
    data = write(out / "mc.jsonl", lines({"question": "问", "choices": ["甲", "乙"], "answer": 0}))
    assert choice.main(["--save_dir", str(out), "--data_path", str(data), "--device", "cpu", *argv]) == 2
    assert said in capsys.readouterr().err
