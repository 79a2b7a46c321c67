"""预期的每字节比特数：留一的点落在区间里，离跑过的越远区间越宽，别的数据不作数。"""

import math

import numpy as np
import pytest

from minimind.model import count_parameters
from minimind.plan import quality
from minimind.plan.planning import blank


def test_拟合就是最小二乘():
    x = np.array([quality.design(run.data, run.parameters, run.tokens) for run in quality.RUNS])
    y = np.log([run.bpb for run in quality.RUNS])
    expected, *_ = np.linalg.lstsq(x, y, rcond=None)
    beta, _, spread, freedom = quality.fit()
    square = (y - x @ expected) ** 2
    for data, least in quality.LEAST_SPREAD.items():
        own = [run.data == data for run in quality.RUNS]
        share = freedom * sum(own) / len(own)
        assert spread[data] == pytest.approx(max((square[own].sum() / share) ** 0.5, least))
    assert beta == pytest.approx(expected, rel=1e-6)
    assert freedom == len(quality.RUNS) - 5


def test_留一_每个点都落在其余各点给的区间里():
    checked = quality.leave_one_out()
    assert len(checked) >= 10
    for run, found in checked:
        assert found.low <= run.bpb <= found.high, run
        if run.data == "zh":  # 宽到什么都装得下就不算预测；微世界点少，去掉一端就是外推
            assert found.high / found.low < 1.25, run


def test_词元越多越好_离跑过的越远区间越宽():
    near = quality.predict("zh", quality.TINY, 1e6)
    far = quality.predict("zh", quality.TINY, 1e9)
    assert far.middle < near.middle
    assert far.high / far.low > near.high / near.low
    assert near.inside and not far.inside
    assert any("外推" in note for note in far.notes()) and not near.notes()


def test_外推得再远_上界也不低于跑过的边上():
    edge = quality.predict("microworld", quality.TINY, 2 * 1_646_592)
    far = quality.predict("microworld", quality.TINY, 1e9)
    assert far.high >= edge.high and far.low < edge.low


def test_没跑过的尺寸算外推():
    assert not quality.predict("zh", count_parameters(blank("small")), 1e6).inside


@pytest.mark.parametrize(("ratio", "same"), [(1.0, True), (0.93, True), (0.8, False), (1.3, False)])
def test_不是一种数据就折算_放宽_并说不保证(ratio, same):
    plain = quality.predict("zh", quality.TINY, 1e6)
    found = quality.predict("zh", quality.TINY, 1e6, ratio)
    assert found.same == same
    if same:
        assert found == plain
    else:
        assert found.middle == pytest.approx(plain.middle * ratio)
        assert found.low == pytest.approx(plain.low * ratio * 0.7)
        assert any("不保证" in note for note in found.notes())


def test_表里的尺寸是真的():
    assert count_parameters(blank("tiny")) == quality.TINY
    assert all(run.bpb > 0 and math.isfinite(run.bpb) for run in quality.RUNS)


def test_表里的点与仓库里的结果相同(root_dir):
    import json

    files = {"quality-small-3seeds": "ours_quarter", "quality-long-small-long": None}
    for name, only in files.items():
        path = root_dir / f"benchmarks/results/{name}-cpu-amd-epyc-avx512-bf16-1t.json"
        found = json.loads(path.read_text("utf-8"))
        per_step = found["arguments"]["batch_size"] * found["arguments"]["max_seq_len"]
        expected = {
            (recipe, round(bpb, 4))
            for recipe in ([only] if only else ["ours_quarter", "ours_half"])
            for bpb in found["recipes"][recipe]["val_bpb_each"]
        }
        mine = [run for run in quality.RUNS if run.source == name]
        assert {run.bpb for run in mine} == {bpb for _, bpb in expected}
        for run in mine:
            share = {"quality-small-3seeds": (0.25,), "quality-long-small-long": (0.25, 0.5)}[name]
            assert run.tokens in [round(found["arguments"]["steps"] * part) * per_step for part in share]
            assert run.parameters == found["parameters"]
