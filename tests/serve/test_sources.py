"""真的服务进程打开各种来源：本项目的 .pth、它旁边的几份 LoRA（按名字选）、Hugging Face 目录（稠密与混合专家）。"""

from __future__ import annotations

import httpx
import pytest
import torch
from processes import ServerProcess

from minimind.export.cli import main_hf
from minimind.inference.generate import generate_batch
from minimind.inference.loading import load_for_inference, stop_ids
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.model.model_lora import apply_lora, lora_layers, lora_state_dict
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path
from minimind.tokenizer import encode_chat, load_tokenizer, tokenizer_fingerprint

HELLO = [{"role": "user", "content": "从前有座山，山里有座庙"}]
LORAS = ("lora_a", "lora_b")


def build(seed: int = 0, **changes) -> MiniMindForCausalLM:
    """随机的小模型；权重放大，各份增量才看得出差别。"""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, **changes)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(3 if value.dim() > 1 else 1)
    return model


def save(folder, model, name="full_sft"):
    sidecar = {"config": config_dict(model.config), "recipe": "full_sft"}
    sidecar["tokenizer_hash"] = tokenizer_fingerprint(load_tokenizer())
    save_weights(model, weights_path(model.config, name, folder), sidecar)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """有底座、两份 LoRA 与一份混合专家的目录。"""
    folder = tmp_path_factory.mktemp("out")
    save(folder, build())
    save(folder, build(arch="v3", use_moe=True))
    for seed, name in enumerate(LORAS, start=1):
        model = build()
        apply_lora(model, 4, 8.0, "all")
        generator = torch.Generator().manual_seed(seed)
        for layer in lora_layers(model).values():
            layer.lora.B.weight.data.normal_(std=0.3, generator=generator)
        lora = {"rank": 4, "alpha": 8.0, "targets": "all"}
        path = weights_path(model.config, name, folder / "lora")
        save_weights(lora_state_dict(model), path, {"config": {**config_dict(model.config), "lora": lora}})
    return folder


def expected(**source) -> str:
    """不经过服务，引擎直接贪心写的。"""
    loaded = load_for_inference(device="cpu", dtype="float32", **source)
    prompt = encode_chat(loaded.tokenizer, HELLO, add_generation_prompt=True).ids
    eos = stop_ids(loaded.model, loaded.tokenizer)
    ((_, done),) = generate_batch(loaded.model, [prompt], max_new_tokens=12, eos_ids=eos)
    return loaded.tokenizer.decode(done.ids)


def ask(server, model: str | None = None) -> str:
    body = {"messages": HELLO, "max_tokens": 12, "temperature": 0, "model": model}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    message = reply.json()["choices"][0]["message"]
    return message["content"]


def names(server) -> dict[str, str | None]:
    return {card["id"]: card["parent"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]}


def test_pth与旁边的LoRA_按名字选(out, tmp_path):
    source = {"save_dir": str(out), "use_moe": 0}
    options = ("--save_dir", out, "--use_moe", 0, "--lora_weight", ",".join(LORAS), "--model_name", "base")
    with ServerProcess(*options, folder=tmp_path) as server:
        assert names(server) == {"base": None, "lora_a": "base", "lora_b": "base"}
        answers = {name: ask(server, name) for name in ("base", *LORAS)}
        assert ask(server) == answers["base"], "不写 model 就是底座"
        missing = httpx.post(
            f"{server.url}/v1/chat/completions", json={"messages": HELLO, "model": "lora_c"}, timeout=60
        )
        assert missing.status_code == 404 and "lora_a" in missing.json()["error"]["message"]
    assert answers["base"] == expected(**source)
    for name in LORAS:
        assert answers[name] == expected(**source, lora_weight=name)
    assert len(set(answers.values())) == 3


@pytest.mark.parametrize("moe", [0, 1])
def test_Hugging_Face目录(out, tmp_path, moe):
    """导出的目录拿回来服务，答的与 .pth 一样；混合专家的目录里有模型文件，但不执行它。"""
    folder = tmp_path / "hf"
    assert main_hf(
        ["full_sft", str(folder), "--save_dir", str(out), "--use_moe", str(moe), "--dtype", "float32"]
    ) in (None, 0)
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('执行了目录里的代码')\n", "utf-8")
    with ServerProcess("--load_from", folder, folder=tmp_path) as server:
        assert names(server) == {"minimind": None}
        answer = ask(server)
    assert answer == expected(save_dir=str(out), use_moe=moe)
