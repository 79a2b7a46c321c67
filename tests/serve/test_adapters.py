"""服务里的 LoRA 叠在同一份底座上：内存只多两个小矩阵，算的与合并后的相同，底座换了跟着换，名字不撞。"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import httpx
import pytest
import torch
from live_server import LiveServer
from safetensors.torch import save_file
from test_sources import HELLO, LORAS, build, save
from waiting import until

from minimind.errors import UserError
from minimind.inference.engine import Engine
from minimind.inference.generate import generate_batch
from minimind.inference.int8 import int8_available
from minimind.inference.loading import load_for_inference, stop_ids
from minimind.inference.requests import Request
from minimind.inference.sampling import SamplingParams
from minimind.inference.shared import SharedModel
from minimind.model.model_lora import apply_lora, lora_layers, lora_state_dict
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path
from minimind.serve.cli import ServeArguments, model_table
from minimind.serve.generation import Settings
from minimind.tokenizer import encode_chat

RANK = 4


def save_lora(folder, model, name, seed, targets="all", path=None):
    """随机的 LoRA，大到看得出差别；返回文件的位置。"""
    apply_lora(model, RANK, 8.0, targets)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora.B.weight.data.normal_(std=0.3, generator=generator)
    lora = {"rank": RANK, "alpha": 8.0, "targets": targets}
    path = path or weights_path(model.config, name, folder / "lora")
    save_weights(lora_state_dict(model), path, {"config": {**config_dict(model.config), "lora": lora}})
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    save(folder, build())
    save(folder, build(arch="v3", use_moe=True))
    for seed, name in enumerate(LORAS, start=1):
        save_lora(folder, build(), name, seed)
    save_lora(folder, build(), "qv", 3, "q_proj,v_proj")
    save_lora(folder, build(arch="v3", use_moe=True), "moe", 4)
    return folder


@contextmanager
def opened(out, lora, **options):
    """``model_table`` 打开的模型表，用完关掉引擎。"""
    arguments = {"save_dir": str(out), "use_moe": 0, "device": "cpu", "lora_weight": lora, **options}
    table = model_table(ServeArguments(**arguments))
    try:
        yield table
    finally:
        for runner in table.runners:
            runner.close()


def tensors(root) -> dict[int, int]:
    """从 ``root`` 走得到的每块内存 → 字节数；预排过的张量没有地址，按对象算。"""
    found, seen, todo = {}, set(), [root]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            dense = one.layout is torch.strided
            key = one.untyped_storage().data_ptr() if dense else id(one)
            found[key] = one.untyped_storage().nbytes() if dense else one.numel() * one.element_size()
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, (list, tuple)):
            todo += one
        elif type(one).__module__.startswith(("minimind.", "torch.nn.")) and hasattr(one, "__dict__"):
            todo.append(vars(one))
    return found


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_内存是一份底座加上小矩阵(out, quantize):
    if quantize == "int8" and not int8_available():
        pytest.skip("这台机器没有 int8 的矩阵乘")
    with opened(out, ",".join(LORAS), quantize=quantize) as table:
        decoders = [runner.engine.decoder for runner in table.runners]
        weights = [tensors([decoder.model, decoder.layers, decoder.head]) for decoder in decoders]
        base, both = weights[0], {**weights[1], **weights[2]}
        assert set(base) <= set(both), "底座的每一块都是共用的"
        extra = sum(size for key, size in both.items() if key not in base)
        adapters = sum(v.numel() for _, one in table.default.loaded.beside for v in one.state.values()) * 4
    assert sum(base.values()) > 2e6
    assert 0 < extra <= 3 * adapters < 0.5 * sum(base.values()), (extra, adapters, sum(base.values()))


def logits_of(model, prompt) -> torch.Tensor:
    """一个引擎读完提示、再走几步的 logits。"""
    with torch.inference_mode():
        decoder = Engine(model, eos_ids={2}, max_slots=2).decoder
        decoder.open(0, len(prompt) + 3)
        rows = [decoder.prefill([prompt], [0])[0]]
        for at in range(len(prompt), len(prompt) + 3):
            rows.append(decoder.decode(torch.tensor([5 + at]), torch.tensor([at]), [at])[0])
    return torch.stack(rows)


@pytest.mark.parametrize(("name", "moe"), [*((name, 0) for name in (*LORAS, "qv")), ("moe", 1)])
def test_不合并算的_与合并后的相同(out, name, moe):
    source = {"save_dir": str(out), "use_moe": moe, "device": "cpu", "dtype": "float32"}
    merged = load_for_inference(**source, lora_weight=name)
    loaded = load_for_inference(**source, beside=name)
    base = SharedModel(loaded.model)
    shared = base.adapted(loaded.beside[0][1])
    prompt = encode_chat(loaded.tokenizer, HELLO, add_generation_prompt=True).ids
    expected, got = logits_of(merged.model, prompt), logits_of(shared, prompt)
    assert (expected - logits_of(loaded.model, prompt)).abs().max() > 0.1, "LoRA 真的起作用"
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    torch.testing.assert_close(logits_of(base, prompt), logits_of(loaded.model, prompt), atol=0, rtol=0)
    eos = stop_ids(merged.model, merged.tokenizer)
    for n in (1, 5):
        ((_, a),) = generate_batch(merged.model, [prompt[n:]], max_new_tokens=24, eos_ids=eos)
        engine = Engine(shared, eos_ids=eos, max_slots=2)
        engine.add_request(prompt[n:], SamplingParams(temperature=0.0), 24)
        done = []
        while engine.has_unfinished:
            done += engine.step()
        assert done[0].ids == a.ids


def test_int8的底座_LoRA叠在还原的权重上(out):
    if not int8_available():
        pytest.skip("这台机器没有 int8 的矩阵乘")
    with opened(out, "qv", quantize="int8") as table:
        loaded = table.default.loaded
        prompt = encode_chat(loaded.tokenizer, HELLO, add_generation_prompt=True).ids
        shared = table.find("qv").runner.engine.decoder.shared
        got, plain = logits_of(shared, prompt), logits_of(loaded.model, prompt)
    exact = load_for_inference(save_dir=str(out), use_moe=0, device="cpu", lora_weight="qv").model
    expected = logits_of(exact, prompt)
    error, effect = (got - expected).abs().mean(), (plain - expected).abs().mean()
    assert error < 0.2 * effect, (error, effect)


def follow(server, name) -> str:
    body = {"messages": HELLO, "max_tokens": 12, "temperature": 0, "model": name}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    return reply.json()["choices"][0]["message"]["content"]


def test_底座换了权重_LoRA跟着换(out, tmp_path):
    fresh = build(seed=9)
    save(tmp_path / "new", fresh)
    (tmp_path / "new" / "lora").mkdir()
    for path in (out / "lora").glob("lora_a_64.*"):
        (tmp_path / "new" / "lora" / path.name).write_bytes(path.read_bytes())
    with opened(out, "lora_a") as table, LiveServer(Settings(reload_dir=tmp_path), table=table) as server:
        before = {name: follow(server, name) for name in ("minimind", "lora_a")}
        state = {key: value.half().float() for key, value in fresh.named_parameters()}
        save_file(state, tmp_path / "model.safetensors")
        assert (
            httpx.post(f"{server.url}/collective_rpc", json={"method": "reload_weights"}).status_code == 200
        )
        after = {name: follow(server, name) for name in ("minimind", "lora_a")}
    wanted = {}
    for name, lora in (("minimind", "None"), ("lora_a", "lora_a")):
        loaded = load_for_inference(save_dir=str(tmp_path / "new"), device="cpu", lora_weight=lora)
        prompt = encode_chat(loaded.tokenizer, HELLO, add_generation_prompt=True).ids
        eos = stop_ids(loaded.model, loaded.tokenizer)
        ((_, done),) = generate_batch(loaded.model, [prompt], max_new_tokens=12, eos_ids=eos)
        wanted[name] = loaded.tokenizer.decode(done.ids)
    assert after == wanted and after["lora_a"] != before["lora_a"]


def test_有一个引擎还在写_谁的权重也不换_写完都换(out):
    """LoRA 写着时底座不能就地换掉共用的权重；等着的请求换好之后才写。"""
    with opened(out, "lora_a") as table:
        base, lora = table.runners
        order = []

        async def scenario():
            long = lora.submit(Request([5, 6, 7], SamplingParams(temperature=0.0), 64))

            async def reading(ticket, name):
                while True:
                    progress = await ticket.events.get()
                    if progress.finished:
                        order.append(name)
                        return

            async def reload():
                async with lora.paused(), base.paused():
                    order.append("换")
                    late.append(base.submit(Request([5, 6, 7], SamplingParams(temperature=0.0), 2)))
                    for _ in range(5):
                        await base.call(lambda: None)
                    assert not base.engine.has_unfinished and base._held, "停着时新来的等着"

            late = []
            await asyncio.gather(reading(long, "在写的"), reload())
            await reading(late[0], "新来的")

        asyncio.run(scenario())
        until(lambda: base.idle and lora.idle, lambda: "没有放开")
    assert order == ["在写的", "换", "新来的"]


@pytest.mark.parametrize(
    ("lora", "options", "word"),
    [
        ("lora_a,lora_a", {}, "lora_a_64.pth 写了两遍.*只写一遍"),
        ("lora_a,{copy}", {}, "都叫 lora_a.*改名"),
        ("lora_a", {"model_name": "lora_a"}, "底座在 API 里都叫 lora_a.*--model_name"),
        ("{minimind}", {}, "底座在 API 里都叫 minimind.*--model_name"),
    ],
)
def test_名字撞了_启动时说清楚(out, tmp_path, lora, options, word):
    copy = save_lora(None, build(), "lora_a", 5, path=tmp_path / "lora_a_64.pth")
    minimind = save_lora(None, build(), "minimind", 6, path=tmp_path / "minimind_64.pth")
    with (
        pytest.raises(UserError, match=word),
        opened(out, lora.format(copy=copy, minimind=minimind), **options),
    ):
        pass


def test_用路径写的LoRA_名字是文件名去掉尺寸(out, tmp_path):
    path = save_lora(None, build(), "x", 5, path=tmp_path / "mine_64.pth")
    with opened(out, f"{path},lora_b") as table:
        assert list(table.models) == ["minimind", "mine", "lora_b"]
        assert table.find("mine").parent == "minimind"
