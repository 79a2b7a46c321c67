"""交给别人的工具：Trainer、梯度重算、扩词表、peft、generate 与自己的引擎、AutoModelForCausalLM。"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments

from minimind.inference.generate import generate_batch
from minimind.model import MiniMindConfig, MiniMindForCausalLM

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
IDS = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(5))
LABELS = IDS.clone()
for _row, _start in enumerate((1, 9, 4, 10)):  # 各行目标数不同：11、3、8、2，合计 24
    LABELS[_row, :_start] = -100


def make(seed: int = 0, **extra) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(MiniMindConfig(**(SIZES | extra)))
    with torch.no_grad():  # 放大后贪心不受舍入左右
        for p in model.parameters():
            p.mul_(4.0) if p.dim() > 1 else None
    return model


# ---------------------------------------------------------------- Trainer


def trainer(model, folder, batch: int, accumulate: int) -> Trainer:
    pytest.importorskip("accelerate")
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulate, max_steps=1, optim="sgd", learning_rate=0.5, max_grad_norm=0,
        lr_scheduler_type="constant", report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [dict(input_ids=i, labels=t, attention_mask=torch.ones_like(i)) for i, t in zip(IDS, LABELS)]
    return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)


@pytest.mark.compat
def test_Trainer_分两次累积等于一整批_也等于手算的一步(tmp_path):
    by_hand, after = make(), []
    by_hand.train()(IDS, labels=LABELS).loss.backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            p.sub_(0.5 * p.grad)
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = make()
        trainer(model, tmp_path, batch, accumulate).train()
        after.append(model.state_dict())
    start = make().state_dict()
    for key, expected in by_hand.state_dict().items():
        assert not torch.equal(expected, start[key]), key
        for state in after:
            torch.testing.assert_close(state[key], expected, rtol=0, atol=1e-6)


@pytest.mark.compat
def test_Trainer_能评估与预测(tmp_path):
    model = make()
    one = trainer(model, tmp_path, 2, 1)
    model.eval()
    with torch.no_grad():
        halves = [model(IDS[s], labels=LABELS[s]) for s in (slice(0, 2), slice(2, 4))]
    loss = one.evaluate()["eval_loss"]
    # 各版本按批平均，或按目标数平均
    means = sum(h.loss for h in halves) / 2, sum(h.loss_sum for h in halves) / 24
    assert any(loss == pytest.approx(float(mean), rel=1e-5) for mean in means)
    predicted = one.predict(one.eval_dataset).predictions
    assert predicted.shape == (4, 12, 97)  # 只收 logits
    torch.testing.assert_close(torch.from_numpy(predicted), torch.cat([h.logits for h in halves]))


@pytest.mark.compat
def test_num_items_in_batch_是损失的分母():
    model = make()
    out = model(IDS, labels=LABELS)
    torch.testing.assert_close(out.loss, out.loss_sum / 24)
    for count in (48, torch.tensor(48)):
        torch.testing.assert_close(
            model(IDS, labels=LABELS, num_items_in_batch=count).loss, out.loss_sum / 48
        )
    assert model(IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=0).loss == 0


# ---------------------------------------------------------------- 梯度重算、扩词表


@pytest.mark.parametrize("extra", [{}, {"use_moe": True}])
@pytest.mark.compat
def test_梯度重算不改变梯度(extra):
    gradients = []
    for enable in (None, "gradient_checkpointing_enable", "activation_checkpointing_enable"):
        model = make(**extra).train()
        runs = []
        model.model.layers[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        if enable:
            getattr(model, enable)()
        model(IDS, labels=LABELS).loss.backward()
        assert len(runs) == (2 if enable else 1)  # 真的重算了
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    model.gradient_checkpointing_disable()
    assert not model.model.gradient_checkpointing
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("size", [120, 80])
@pytest.mark.compat
def test_扩词表与缩词表之后仍绑定_旧的行不变_能训练能存(size, tmp_path):
    model, old = make(), make().lm_head.weight.detach()
    model.resize_token_embeddings(size)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (size, 64) and model.config.vocab_size == size
    kept = min(size, 97)
    assert torch.equal(model.lm_head.weight[:kept], old[:kept])
    ids = IDS.clamp_max(size - 1)
    assert model.eval()(ids).logits.shape == (4, 12, size)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.05 * p.grad)
    assert model(ids, labels=ids).loss < loss
    model.save_pretrained(tmp_path)
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


# ---------------------------------------------------------------- peft


@pytest.mark.compat
def test_peft_加在_q_v_上能训练能生成能合并(tmp_path):
    peft = pytest.importorskip("peft")
    base = make()
    plain = base.eval()(IDS).logits
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    torch.testing.assert_close(model.eval()(input_ids=IDS).logits, plain)
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained) and len(trained) == 2 * 2 * 2
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    kw = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    tuned, text = model(input_ids=IDS).logits, model.generate(input_ids=IDS, **kw)
    assert not torch.allclose(tuned, plain, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, tuned)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, tuned, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(IDS, **kw), text)
    merged.check_tied()


@pytest.mark.parametrize(("target", "extra"), [("lm_head", {}), ("gate", {"use_moe": True})])
@pytest.mark.compat
def test_peft_加在直接取权重的层上是错误(target, extra):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(**extra), peft.LoraConfig(r=4, target_modules=[target]))
    with pytest.raises(TypeError, match=rf"{target} 被换成了 .*不要在它上面加 LoRA"):
        model(input_ids=IDS, labels=LABELS)


# ---------------------------------------------------------------- generate 与引擎


@pytest.mark.parametrize("extra", [{}, {"arch": "v3"}, {"use_moe": True}])
@pytest.mark.compat
def test_generate_左补齐_动态与静态缓存都等于引擎的贪心(extra):
    model = make(**extra).eval()
    prompts = [IDS[0, :4].tolist(), IDS[1, :9].tolist(), IDS[2, :7].tolist()]
    engine = dict(generate_batch(model, prompts, max_new_tokens=8, eos_ids=()))
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, 9 - len(p) :], mask[i, 9 - len(p) :] = torch.tensor(p), 1
    kw = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    static = dict(cache_implementation="static", disable_compile=True)
    for options in ({}, {"use_cache": False}, static):
        out = model.generate(ids, **kw, **options)
        assert out[:, 9:].tolist() == [engine[i].ids for i in range(3)], options


@pytest.mark.compat
def test_generate_采样时静态缓存与动态缓存写出同样的():
    model = make().eval()
    kw = dict(max_new_tokens=10, do_sample=True, temperature=1.5, top_k=0, eos_token_id=None, pad_token_id=0)
    outs = []
    for options in ({}, dict(cache_implementation="static", disable_compile=True)):
        torch.manual_seed(3)
        outs.append(model.generate(IDS, **kw, **options))
    assert torch.equal(*outs) and len({tuple(row[12:].tolist()) for row in outs[0]}) == 4


# ---------------------------------------------------------------- AutoModelForCausalLM

ORDERS = {
    "先引用 minimind": "import minimind.model\nfrom transformers import AutoConfig, AutoModelForCausalLM",
    "后引用 minimind": "from transformers import AutoConfig, AutoModelForCausalLM\nimport minimind.model",
    "只引用配置": "from minimind.model.model_minimind import MiniMindConfig\n"
    "from transformers import AutoConfig, AutoModelForCausalLM",
}
OPEN = """
import sys
config = AutoConfig.from_pretrained(sys.argv[1])
assert type(config).__module__ == "minimind.model.model_minimind", type(config)
for model in (AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_config(config)):
    assert type(model).__module__ == "minimind.model.hf", type(model)
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.compat
def test_引用了_minimind_的任何一部分_Auto_类就认得(order, tmp_path, root_dir):
    make().save_pretrained(tmp_path)
    subprocess.run(
        [sys.executable, "-c", f"{ORDERS[order]}\n{OPEN}", str(tmp_path)],
        check=True,
        cwd=root_dir,
        timeout=300,
    )


def test_引用配置与核心_不读入编译器与_transformers_的模型(root_dir):
    code = (
        "import sys, torch\n"
        "from minimind.model import MiniMindConfig, MiniMindLM\n"
        "model = MiniMindLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1))\n"
        "heavy = ('torch._dynamo', 'transformers.modeling_utils', 'transformers.generation.utils')\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root_dir, timeout=300)
