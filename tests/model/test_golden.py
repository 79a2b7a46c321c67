"""与公开 MiniMind 的参考输出逐项核对，容差 1e-4。"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache

from minimind.model import MiniMindConfig, MiniMindForCausalLM, count_parameters

NAMES = ["v2_dense", "v2_moe_seqaux", "v2_moe_tokaux", "v2_yarn", "v3_dense", "v3_moe"]
TOL = dict(rtol=0, atol=1e-4)


@pytest.fixture(params=NAMES)
def golden(request, shared_dir):
    with safe_open(shared_dir / "golden" / f"{request.param}.safetensors", "pt") as f:
        data = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        meta = f.metadata()
    model = MiniMindForCausalLM(MiniMindConfig(arch=request.param[:2], **json.loads(meta["config"])))
    model.load_state_dict({k[2:]: v for k, v in data.items() if k.startswith("w.")}, strict=True)
    assert count_parameters(model) == int(meta["n_params"])
    return model, data


@pytest.mark.compat
def test_推理_logits_与公开版一致(golden):
    model, data = golden
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(data["input_ids"]).logits, data["logits_eval"], **TOL)


@pytest.mark.compat
def test_缓存逐词元与公开版一致(golden):
    model, data = golden
    model.eval()
    ids, cache = data["input_ids"], DynamicCache()
    with torch.no_grad():
        out = [model(ids[:, :10], past_key_values=cache, use_cache=True).logits]
        for t in range(10, ids.shape[1]):
            out.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(out, 1), data["logits_cached"], **TOL)


@pytest.mark.compat
def test_左补齐与公开版一致(golden):
    model, data = golden
    mask = data["attention_mask_leftpad"]
    with torch.no_grad():
        logits = model.eval()(data["input_ids"], attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[mask.bool()], data["logits_leftpad"][mask.bool()], **TOL)


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.compat
def test_训练的损失辅助损失与梯度与公开版一致(golden, return_logits):
    model, data = golden
    out = model.train()(data["input_ids"], labels=data["labels"], return_logits=return_logits)
    if return_logits:
        torch.testing.assert_close(out.logits, data["logits_train"], **TOL)
    torch.testing.assert_close(out.loss, data["loss_train"].squeeze(), **TOL)
    torch.testing.assert_close(out.aux_loss, data["aux_loss_train"].squeeze(), **TOL)
    (out.loss + out.aux_loss).backward()
    for name, parameter in model.named_parameters():
        for key in [f"grad.{name}"] + (["grad.lm_head.weight"] if "embed_tokens" in name else []):
            if key in data:
                torch.testing.assert_close(parameter.grad, data[key], **TOL)


@pytest.mark.parametrize("arch", ["v2", "v3"])
def test_参数量与形状与公开版一致(arch, shared_dir):
    for entry in json.loads((shared_dir / "golden" / f"{arch}_param_counts.json").read_text()).values():
        with torch.device("meta"):
            model = MiniMindForCausalLM(MiniMindConfig(arch=arch, **entry["config"]))
        assert model.config.intermediate_size == entry["intermediate_size"]
        assert count_parameters(model) == entry["params"]
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == entry["state_dict"]
