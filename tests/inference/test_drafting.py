"""``--draft``：写什么就由谁来猜；开错了说清楚；对话与服务真的在猜，文字不变。"""

import pytest
import torch
from engine_helpers import hf_model
from other_models import write_tokenizer

from minimind import chat
from minimind.chat import ChatArguments
from minimind.errors import UserError
from minimind.inference.decoder import FusedDecoder
from minimind.inference.draft_model import DraftModel
from minimind.inference.drafting import choose_drafter
from minimind.inference.loading import Loaded, load_for_inference
from minimind.inference.speculative import PromptLookup
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime.checkpoint import config_dict, save_weights
from minimind.serve.cli import ServeArguments
from minimind.tokenizer import load_tokenizer


def write_weights(folder, width, name="full_sft", **options):
    """``name_width.pth``，带旁注。"""
    torch.manual_seed(width)
    config = MiniMindConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **options
    )
    folder.mkdir(exist_ok=True)
    sidecar = {"config": config_dict(config), "recipe": name}
    save_weights(MiniMindForCausalLM(config), folder / f"{name}_{width}.pth", sidecar)
    return folder / f"{name}_{width}.pth"


@pytest.fixture
def big(tmp_path):
    write_weights(tmp_path / "out", 64)
    return load_for_inference(save_dir=str(tmp_path / "out"), device="cpu", dtype="float32", hidden_size=64)


def test_不写就是auto_CPU上照上文猜_别的结构不猜(big):
    assert ChatArguments().draft == ServeArguments().draft == "auto"
    assert choose_drafter("auto", big, "full_sft", "out") is PromptLookup
    assert choose_drafter("none", big, "full_sft", "out") is None
    assert choose_drafter("prompt", big, "full_sft", "out") is PromptLookup
    other = Loaded(hf_model("Qwen2"), load_tokenizer(), False, None)
    assert choose_drafter("auto", other, "full_sft", "out") is None


def test_卡上auto不猜(big, monkeypatch):
    """一步录成了图，核对还没有录。"""
    away = next(big.model.parameters()).to("meta")
    monkeypatch.setattr(big.model, "parameters", lambda: iter([away]))
    assert choose_drafter("auto", big, "full_sft", "out") is None


@pytest.mark.parametrize("written", ["tiny", "path"])
def test_同名的小权重来猜_精度随大的(big, tmp_path, written):
    folder = tmp_path / "out"
    path = write_weights(folder, 192)
    big.model.to(torch.bfloat16)
    make = choose_drafter("tiny" if written == "tiny" else str(path), big, "full_sft", folder)
    one, two = make(), make()
    assert isinstance(one, DraftModel) and one is not two
    assert one.decoder.shared is two.decoder.shared, "几个引擎共用一份权重，各有自己的缓存"
    assert one.decoder.config.hidden_size == 192 and one.decoder.dtype == torch.bfloat16
    named = choose_drafter("tiny", big, str(folder / "full_sft_64.pth"), folder)
    assert named().decoder.config.hidden_size == 192, "大的写的是路径，小的还是同名的那份"


def test_写错了_说清楚(big, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(UserError, match="不认识 'prompts'") as error:
        choose_drafter("prompts", big, "full_sft", folder)
    assert "auto、none、prompt" in str(error.value) and "tiny" in str(error.value)
    with pytest.raises(UserError, match="没有 tiny 尺寸的 full_sft 权重") as error:
        choose_drafter("tiny", big, "full_sft", folder)
    assert "full_sft_192.pth" in str(error.value) and "--preset tiny" in str(error.value)
    with pytest.raises(UserError, match="权重文件"):
        choose_drafter(str(folder / "full_sft_100.pth"), big, "full_sft", folder)
    other = Loaded(hf_model("Qwen2"), load_tokenizer(), False, None)
    for draft in ("prompt", "tiny"):
        with pytest.raises(UserError, match="Qwen2ForCausalLM 不能用推测解码"):
            choose_drafter(draft, other, "full_sft", folder)


def test_分词器不同_说清楚(big, tmp_path):
    write_weights(tmp_path / "out", 192, vocab_size=6464)
    with pytest.raises(UserError, match="词表 6464 与 6400"):
        choose_drafter("tiny", big, "full_sft", tmp_path / "out")
    write_weights(tmp_path / "out", 192)
    write_tokenizer(tmp_path / "other", "llama")
    strange = Loaded(big.model, load_tokenizer(str(tmp_path / "other")), False, big.source)
    with pytest.raises(UserError, match="指纹不同"):
        choose_drafter("tiny", strange, "full_sft", tmp_path / "out")


@pytest.mark.parametrize("draft", ["prompt", "tiny"])
def test_对话里真的在猜_文字不变(tmp_path, monkeypatch, capsys, draft):
    write_weights(tmp_path / "out", 64), write_weights(tmp_path / "out", 192)
    verified = []
    real = FusedDecoder.verify
    monkeypatch.setattr(FusedDecoder, "verify", lambda *args: (verified.append(1), real(*args))[1])

    def answer(*flags):
        chat.main([
            "--save_dir", str(tmp_path / "out"), "--hidden_size", "64", "--device", "cpu", "--prompt", "一二三四一二三四一二",
            "--temperature", "0", "--max_new_tokens", "60", "--show_speed", "0", *flags,
        ])  # fmt: skip
        return capsys.readouterr().out

    want = answer("--draft", "none")
    assert not verified
    assert answer("--draft", draft) == want and verified
