"""刚录好的图对不对：与照常算的同一步比。每个函数返回哪里不对，一句话；都对是空串。"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimind.inference.row_state import RowState
from minimind.inference.sampling import SamplingParams

# 差不超过最大绝对值的这些。核相同，本该逐位相同；注意力看的长度凑过整，求和的次序会不同
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
LOGP_TOLERANCE = 1e-4  # 同样的 logits、同样的核，对数概率本该逐位相同


def difference(got: Tensor, want: Tensor, least: float = 1.0) -> str:
    """两份结果 ``[B, …]`` 差得太多；最大绝对值不到 ``least`` 的按 ``least`` 算。"""
    scale, gap = want.float().abs().max().item(), (got.float() - want.float()).abs().max().item()
    limit = TOLERANCE[want.dtype] * max(scale, least)
    return "" if gap <= limit else f"与照常解码差 {gap:.3g}（不该超过 {limit:.3g}）"


def step_difference(
    state: RowState,
    before: list[Tensor],
    rule: SamplingParams,
    logits: Tensor,
    drawn: tuple[Tensor, Tensor, int],
) -> str:
    """刚重放过的一整步，与同样的 logits 照常抽的比：词元、对数概率、各行的状态。

    Args:
        state: 重放之后的状态；返回时已照常走过这一步。
        before: 重放之前的，见 :meth:`RowState.snapshot`。
        rule: 抽样规则。
        logits: ``[行数, V]``，重放给出的，行数补过。
        drawn: 重放抽出的词元、对数概率，都是 ``[在写的行数]``，与台账往前走了几步。
    """
    ids, logp, turned = drawn
    rows, count = len(logits), len(ids)
    after = state.snapshot(rows)
    state.restore(before)
    live = torch.arange(rows, device=logits.device) < count
    want_ids, want_logp = state.advance(logits, rule, live)
    different = int((ids != want_ids[:count]).sum())
    if different:
        return f"有 {different} 行抽出的词元与照常抽的不同"
    if not torch.allclose(logp, want_logp[:count], rtol=0, atol=LOGP_TOLERANCE):
        return "抽出的词元的对数概率与照常的不同"
    same = all(torch.equal(one, other) for one, other in zip(after, state.snapshot(rows)))
    return "" if same and turned == 1 else "走完一步，各行的状态与照常的不同"


def experts_difference(decoder: Any) -> str:
    """混合专家的定形写法，逐层与照路由分组的比：同样的输入，路由也就相同。

    Args:
        decoder: :class:`minimind.inference.decoder.FusedDecoder`，用着定形的写法。
    """
    for number, layer in enumerate(decoder.layers):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(4, decoder.config.hidden_size, generator=generator).to(decoder.device, decoder.dtype)
        for rows in (1, 4):  # 行数少的可能走另一条路
            with decoder.precision():
                want = layer.experts(x[None, :rows], None)[0][0]
                trouble = difference(layer.stacked(x[:rows]), want, least=0.0)
            if trouble:
                return f"第 {number} 层的专家{trouble}"
    return ""
