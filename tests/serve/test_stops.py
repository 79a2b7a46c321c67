"""停止串：怎么切开放进去，给出来的都是第一个停止串之前的文字。"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minimind.serve.stops import StopMatcher

ALPHABET = st.text(alphabet="ab停", max_size=12)


def test_跨词元的停止串认得出_自己不漏出去():
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ("好E", "N", "D后面")] == ["好", "", ""]
    assert matcher.matched == "END" and matcher.finish() == ""


def test_像停止串的开头最后还回来():
    matcher = StopMatcher(["END"])
    assert matcher.push("好EN") == "好" and matcher.finish() == "EN" and matcher.matched is None


@given(st.lists(ALPHABET, max_size=6), st.lists(st.text(alphabet="ab停", min_size=1, max_size=3), max_size=3))
def test_怎么切开结果都一样(pieces, stops):
    whole = "".join(pieces)
    # 逐字往后看：第一个以某个停止串结尾的前缀，去掉其中最长的那个
    ends = [(n, stop) for n in range(len(whole) + 1) for stop in stops if whole[:n].endswith(stop)]
    first = min((n for n, _ in ends), default=None)
    cut = max((len(stop) for n, stop in ends if n == first), default=0)
    expected = whole if first is None else whole[: first - cut]
    matcher = StopMatcher(stops)
    got = "".join([*(matcher.push(piece) for piece in pieces), matcher.finish()])
    assert got == expected and (matcher.matched is not None) == bool(ends)
