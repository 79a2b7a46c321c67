"""学习率日程。"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.trainer.progress import lr_at


def curve(total: int = 100, **options) -> list[float]:
    return [lr_at(step + 0.5, total, peak=1.0, **options) for step in range(total)]


def test_wsd先升后平再降到零():
    lrs = curve(warmup_ratio=0.1, decay_ratio=0.2)
    assert lrs[:10] == pytest.approx([0.05 + 0.1 * i for i in range(10)])
    assert lrs[10:80] == pytest.approx([1.0] * 70)
    assert lrs[80:] == pytest.approx([0.975 - 0.05 * i for i in range(20)])


def test_余弦降到一成():
    lrs = curve(schedule="cosine", warmup_ratio=0.0)
    assert lrs[0] == pytest.approx(1.0, abs=1e-3) and lrs[-1] == pytest.approx(0.1, abs=1e-3)
    assert lrs == sorted(lrs, reverse=True)
    assert (lrs[49] + lrs[50]) / 2 == pytest.approx(0.55)
    warmed = curve(schedule="cosine", warmup_ratio=0.1)
    assert warmed[:9] == sorted(warmed[:9]) and warmed[-1] == pytest.approx(0.1, abs=1e-3)


@given(
    step=st.floats(0, 1),
    schedule=st.sampled_from(["wsd", "cosine"]),
    warmup=st.just(0.0) | st.floats(1e-3, 0.5),
    decay=st.just(0.0) | st.floats(1e-3, 1),
    scale=st.floats(1e-2, 1e9),
)
def test_只看进度且不出界(step, schedule, warmup, decay, scale):
    options = {"peak": 3.0, "schedule": schedule, "warmup_ratio": warmup, "decay_ratio": decay}
    lr = lr_at(step, 1.0, **options)
    assert 0.0 <= lr <= 3.0 * (1 + 1e-9)
    assert lr_at(step * scale, scale, **options) == pytest.approx(lr, rel=1e-6, abs=1e-6)


def test_第一步和最后一步都不为零():
    for schedule in ("wsd", "cosine"):
        for total in (1, 2, 1000):
            lrs = curve(total, schedule=schedule)
            assert lrs[0] > 0 and lrs[-1] > 0


def test_不认识的日程报错():
    with pytest.raises(ValueError, match="linear"):
        lr_at(0, 1, peak=1.0, schedule="linear")
