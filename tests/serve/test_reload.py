"""重读权重：远程采样对着本项目自己的服务，与本进程里采样一字不差；不对的权重一项也不换。"""

from __future__ import annotations

import threading
import time

import httpx
import pytest
import torch
from live_server import LiveServer
from processes import ServerProcess, save_small
from safetensors.torch import load_file, save_file

from minimind.errors import UserError
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.rl.remote import RemoteRollout, write_weights
from minimind.rl.rollout import LocalRollout
from minimind.serve.cli import ServeArguments, run
from minimind.serve.generation import Settings
from minimind.tokenizer import encode_plain, load_tokenizer


def assert_same(remote, local):
    assert remote.responses == local.responses and remote.truncated == local.truncated
    assert remote.texts == local.texts and remote.group == local.group
    for ours, theirs in zip(remote.logprobs, local.logprobs):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_送去权重_远处采样与这里的相同(tmp_path, temperature):
    tokenizer = load_tokenizer()
    prompts = [encode_plain(tokenizer, text) for text in ("从前有座山", "云川", "一加一")]
    with LiveServer(Settings(reload_dir=tmp_path / "weights"), slots=32, queue=64) as server:
        config = server.table.default.loaded.model.config
        remote = RemoteRollout(server.url, tokenizer, max_new_tokens=12, temperature=temperature)
        for seed in (1, 2):  # 两次不同的权重
            torch.manual_seed(seed)
            model = MiniMindForCausalLM(config).eval()
            with torch.no_grad():
                model.lm_head.weight[2] *= 40  # 结束符常常写出来：它的对数概率也要对
            remote.push_weights(model)
            local = LocalRollout(model, tokenizer, max_new_tokens=12, temperature=temperature)
            expected = local.generate(prompts, 8, seed)
            assert_same(remote.generate(prompts, 8, seed), expected)
            assert {True, False} == set(expected.truncated), "有写完的，也有写满的"


def test_服务排满了_远处采样等一等再来(tmp_path):
    """六个提示各要八个，服务只排得下十二个。"""
    tokenizer = load_tokenizer()
    prompts = [encode_plain(tokenizer, "说" * n) for n in range(1, 7)]
    with LiveServer(slots=4, queue=8) as server:
        remote = RemoteRollout(server.url, tokenizer, max_new_tokens=4)
        got = remote.generate(prompts, 8, seed=5)
        busy = httpx.get(f"{server.url}/metrics").text
        local = LocalRollout(server.table.default.loaded.model, tokenizer, max_new_tokens=4)
        assert_same(got, local.generate(prompts, 8, seed=5))
    assert 'endpoint="/v1/completions",status="429"' in busy


def test_GRPO两步_远程采样与本进程采样相同(tmp_path, monkeypatch):
    """同样的两步训练：每步的采样与训练的损失都要对上，说明每步送去的权重真的换上了。"""
    from minimind.microworld import ensure_microworld
    from minimind.recipes import grpo

    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "weights"
    save_small(weights)
    seen: dict[str, list] = {"RemoteRollout": [], "LocalRollout": []}
    for kind in (RemoteRollout, LocalRollout):
        original = kind.generate

        def recorded(self, *args, original=original, **kwargs):
            seen[type(self).__name__].append(original(self, *args, **kwargs))
            return seen[type(self).__name__][-1]

        monkeypatch.setattr(kind, "generate", recorded)

    def train(**options):
        grpo.run(
            grpo.GRPOArguments(
                data_path=str(ensure_microworld() / "rl.jsonl"),
                save_dir=str(weights),
                checkpoint_dir=str(tmp_path / "checkpoints"),
                from_weight="full_sft",
                hidden_size=64,
                num_hidden_layers=2,
                device="cpu",
                dtype="float32",
                val_ratio=0.0,
                batch_size=2,
                num_generations=4,
                max_gen_len=8,
                max_steps=2,
                accumulation_steps=1,
                optimizer="adamw",
                learning_rate=3e-3,
                save_interval=0,
                eval_interval=0,
                num_workers=0,
                reward=write_reward(tmp_path),
                **options,
            )
        )

    train()
    options = ("--save_dir", weights, "--reload_dir", tmp_path / "served", "--api_key", "k")
    monkeypatch.setenv("ROLLOUT_API_KEY", "k")
    with ServerProcess(*options, folder=tmp_path) as server:
        train(rollout_url=server.url)
    remote, local = seen["RemoteRollout"], seen["LocalRollout"]
    assert len(remote) == len(local) == 2
    for ours, theirs in zip(remote, local):
        assert_same(ours, theirs)


def write_reward(folder) -> str:
    """各条的分数总不相同，两步都有梯度。"""
    path = folder / "my_reward.py"
    path.write_text(
        "def spread(prompt, response, reference):\n    return (sum(map(ord, response)) % 97) / 97\n", "utf-8"
    )
    return f"{path}:spread"


@pytest.fixture
def served(tmp_path):
    with LiveServer(Settings(reload_dir=tmp_path)) as server:
        write_weights(server.table.default.loaded.model, tmp_path)
        yield server


def reload(server, method="reload_weights"):
    return httpx.post(f"{server.url}/collective_rpc", json={"method": method}, timeout=60)


def answer(server, **options):
    body = {"prompt": "从前", "max_tokens": 8, "temperature": 0, **options}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "nan", "broken", "gone"])
def test_不对的权重一项也不换_说清哪里不对(served, tmp_path, how):
    before, path = answer(served), tmp_path / "model.safetensors"
    state = {name: torch.randn_like(value) for name, value in load_file(path).items()}
    name = "model.layers.1.mlp.down_proj.weight"
    if how == "missing":
        del state[name]
    elif how == "extra":
        state["多余"] = torch.ones(1)
    elif how == "shape":
        state[name] = state[name].T.contiguous()
    elif how == "nan":
        state[name][0, 0] = float("nan")
    save_file(state, path)
    if how == "broken":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "gone":
        path.unlink()
    reply = reload(served)
    assert reply.status_code == 400, reply.text
    expected = {"extra": "多余", "broken": "读不到", "gone": "读不到"}.get(how, name)
    assert expected in reply.json()["error"]["message"]
    assert answer(served) == before


def test_在写的写完才换_新来的等着换好(served, tmp_path, monkeypatch):
    """换之前进来的全用旧权重，换之后进来的全用新权重，没有一半一半的。"""
    long = {"max_tokens": 150, "logit_bias": {"2": -100, "0": -100}}
    old = answer(served, **long)
    torch.manual_seed(9)
    write_weights(MiniMindForCausalLM(served.table.default.loaded.model.config), tmp_path)
    engine = served.runner.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.01) or step())
    results: dict[str, object] = {}

    def start(name, work):
        thread = threading.Thread(target=lambda: results.update({name: work()}))
        thread.start()
        return thread

    threads = [start("旧", lambda: answer(served, **long))]
    while not engine.running and "旧" not in results:
        time.sleep(0.005)
    threads.append(start("换", lambda: reload(served).status_code))
    while not served.runner._when_idle and "换" not in results:
        time.sleep(0.005)
    threads.append(start("新", lambda: answer(served, **long)))
    for thread in threads:
        thread.join(60)
    assert results["旧"] == old and results["换"] == 200
    assert results["新"] != old and results["新"] == answer(served, **long)
    served.wait_idle()


def test_别的方法是400_没开的服务没有这个地址(served, live):
    assert reload(served, "shutdown").status_code == 400
    assert httpx.post(f"{served.url}/reset_prefix_cache", timeout=30).status_code == 200
    assert reload(live).status_code == 404
    assert "root" not in httpx.get(f"{live.url}/v1/models").json()["data"][0]


def test_对外开放而没有密钥_不让开():
    with pytest.raises(UserError, match="密钥"):
        run(ServeArguments(host="0.0.0.0", reload_dir="out/x"))


def test_int8的权重不能在运行中换():
    with pytest.raises(UserError, match="不能在运行中换"):
        run(ServeArguments(reload_dir="out/x", quantize="int8"))


def test_要密钥的服务_换权重也要(tmp_path):
    with LiveServer(Settings(api_key="k", reload_dir=tmp_path)) as server:
        assert reload(server).status_code == 401


def test_结构不同的模型不让送(tmp_path):
    with LiveServer(Settings(reload_dir=tmp_path)) as server:
        remote = RemoteRollout(server.url, load_tokenizer(), max_new_tokens=4)
        other = MiniMindForCausalLM(
            MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        )
        with pytest.raises(UserError, match=r"结构不同|形状"):
            remote.push_weights(other)
