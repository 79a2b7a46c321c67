"""引擎各测试共用的小模型与提示。"""

from __future__ import annotations

import torch

from minimind.inference.cuda_graph import GraphedDecode
from minimind.model import MiniMindConfig, MiniMindForCausalLM

VOCAB = 64


def tiny(kind="v2", **options):
    """两层的 MiniMind：``v2``、``v3``、``moe``、``v3moe``。"""
    torch.manual_seed(0)
    config = MiniMindConfig(
        arch="v3" if kind.startswith("v3") else "v2",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_moe=kind.endswith("moe"),
        **{"max_position_embeddings": 96, "vocab_size": VOCAB, "initializer_range": 0.4, **options},
    )
    return MiniMindForCausalLM(config).eval()


def hf_model(name, **options):
    """两层的 transformers 模型：``Llama``、``Qwen3``、``Qwen2``……"""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"max_position_embeddings": 96, "initializer_range": 0.4, **options},
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def any_model(name):
    return hf_model(name) if name[0].isupper() else tiny(name)


def prompts_of(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def drain(engine):
    """跑到没有在写的为止：``{(请求, 第几个): 样本}``。"""
    done = {}
    while engine.has_unfinished:
        for sequence in engine.step():
            assert (sequence.request_id, sequence.index) not in done
            done[sequence.request_id, sequence.index] = sequence
    return done


def replayable(run):
    """录制的替身：不录、照常跑，结果写回同一个张量，与重放一样只认那几个输入张量。"""
    out = run()

    def replay():
        out.copy_(run())

    return replay, out


def pinned(engine):
    """:func:`replayable`，照显卡的规矩：图读写的是录的那时的地址，谁搬了家而图还在用就是错。"""

    def places(whole):
        graphs, decoder = engine._graphs, engine.decoder
        held = [decoder.cache.store, decoder._cos, decoder._sin]
        held += [graphs.count, graphs.turn, graphs.ids, graphs.logp] if whole else [graphs.logits]
        state = engine._state.places() if whole else []
        return [one.data_ptr() for one in held], state, decoder.shared.places()

    def recorder(run):
        whole = "_record_step" in run.__qualname__
        replay, out = replayable(run)
        recorded = places(whole)

        def checked():
            assert places(whole) == recorded, "搬了家"
            replay()

        return checked, out

    return recorder


def graphed(engine, recorder=None, stride=1):
    """换上录制的解码（替身），``stride`` 步对一次账。"""
    engine._graphs = GraphedDecode(engine.decoder, engine.max_slots, recorder or pinned(engine))
    engine.stride = stride
    return engine
