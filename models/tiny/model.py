"""A compact Llama 4 text model for training, equal in mathematics to Llama4ForCausalLM.

Parameter names and shapes are those of the published checkpoints (fused experts stored
[experts, in, out], gate first), so that state_dict() is the checkpoint. Weights are held in
fp32; `dtype` is what matrix products run in. The residual stream stays in fp32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    vocab: int = 4096
    hidden: int = 128
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    experts: int = 16
    width: int = 256  # of the routed experts and of the shared one
    context: int = 1024
    chunk: int = 256  # RoPE layers attend within blocks of this many positions
    nope_every: int = 4
    theta: float = 10000.0
    eps: float = 1e-5
    attn_scale: float = 0.1
    floor_scale: int = 256

    def uses_rope(self, layer: int) -> bool:
        return (layer + 1) % self.nope_every != 0

    def to_hf(self, bos: int, eos: int, pad: int) -> dict:
        """config.json in the form in which Llama 4 text models are published."""
        return {
            "architectures": ["Llama4ForCausalLM"],
            "attention_bias": False,
            "attention_chunk_size": self.chunk,
            "attention_dropout": 0.0,
            "attn_scale": self.attn_scale,
            "attn_temperature_tuning": True,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "floor_scale": self.floor_scale,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "interleave_moe_layer_step": 1,
            "intermediate_size": self.width,
            "intermediate_size_mlp": 2 * self.width,
            "max_position_embeddings": self.context,
            "model_type": "llama4_text",
            "no_rope_layer_interval": self.nope_every,
            "no_rope_layers": [],
            "num_attention_heads": self.heads,
            "num_experts_per_tok": 1,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "output_router_logits": False,
            "pad_token_id": pad,
            "rms_norm_eps": self.eps,
            "rope_scaling": None,
            "rope_theta": self.theta,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_qk_norm": True,
            "vocab_size": self.vocab,
        }


class Permute(torch.autograd.Function):
    """x[order], whose gradient is a gather by the inverse permutation and not a scatter."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x, dtype):
        return (rms(x.float(), self.eps) * self.weight).to(dtype)


class Linear(nn.Module):
    """weight [out, in]; cast to the input's type where used."""

    def __init__(self, n_in: int, n_out: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * std)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c, self.rope = c, c.uses_rope(layer)
        std = c.hidden**-0.5
        self.q_proj = Linear(c.hidden, c.heads * c.head_dim, std)
        self.k_proj = Linear(c.hidden, c.kv_heads * c.head_dim, std)
        self.v_proj = Linear(c.hidden, c.kv_heads * c.head_dim, std)
        self.o_proj = Linear(c.heads * c.head_dim, c.hidden, 0.02 * (2 * c.layers) ** -0.5)

    def forward(self, x, cos, sin, temperature):
        c = self.c
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, c.heads, c.head_dim)
        k = self.k_proj(x).view(b, t, c.kv_heads, c.head_dim)
        v = self.v_proj(x).view(b, t, c.kv_heads, c.head_dim)
        if self.rope:
            q, k = (rms(rotate(z, cos, sin), c.eps).to(x.dtype) for z in (q, k))
        else:
            q = (q * temperature).to(x.dtype)
        n = c.chunk if self.rope and t > c.chunk else t
        pad = -t % n  # a last, shorter block: its padding comes after it, so causality hides it
        q, k, v = (F.pad(z, (0, 0, 0, 0, 0, pad)) if pad else z for z in (q, k, v))
        q, k, v = (z.reshape(b * ((t + pad) // n), n, -1, c.head_dim).transpose(1, 2) for z in (q, k, v))
        k, v = (z.repeat_interleave(c.heads // c.kv_heads, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t + pad, -1)[:, :t])


def rotate(x, cos, sin):
    """Interleaved pairs, as in the complex view; cos, sin [t, head_dim / 2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Mlp(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden, c.width, c.hidden**-0.5)
        self.up_proj = Linear(c.hidden, c.width, c.hidden**-0.5)
        self.down_proj = Linear(c.width, c.hidden, 0.02 * (2 * c.layers) ** -0.5)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(c.experts, c.hidden, 2 * c.width) * c.hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(c.experts, c.width, c.hidden) * 0.02 * (2 * c.layers) ** -0.5)


class Moe(nn.Module):
    """grouped: one grouped matrix product over tokens sorted by expert (bf16 on a GPU)."""

    def __init__(self, c: Config):
        super().__init__()
        self.c, self.grouped = c, False
        self.experts = Experts(c)
        self.router = Linear(c.hidden, c.experts, 0.02)
        self.shared_expert = Mlp(c)

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        logits = F.linear(x.float(), self.router.weight)
        expert = logits.detach().argmax(-1)
        chosen = F.one_hot(expert, self.c.experts)
        top = (logits * chosen).sum(-1)
        routed_in = x * torch.sigmoid(top).to(x.dtype).unsqueeze(-1)
        counts = chosen.sum(0)
        gate_up, down = self.experts.gate_up_proj.to(x.dtype), self.experts.down_proj.to(x.dtype)
        if self.grouped:
            order = torch.argsort(expert, stable=True)
            inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
            ends = counts.cumsum(0).to(torch.int32)
            h = F.grouped_mm(Permute.apply(routed_in, order, inverse), gate_up, offs=ends)
            gate, up = h.chunk(2, -1)
            routed = Permute.apply(F.grouped_mm(F.silu(gate) * up, down, offs=ends), inverse, order)
        else:
            routed = torch.zeros_like(x)
            for e in range(self.c.experts):
                rows = (expert == e).nonzero().squeeze(-1)
                gate, up = (routed_in[rows] @ gate_up[e]).chunk(2, -1)
                routed = routed.index_add(0, rows, (F.silu(gate) * up) @ down[e])
        # The balance term of Switch, over the whole batch rather than each sequence: experts
        # may specialise by text, as long as all are used. Its minimum is 1.
        share = counts.float() / expert.numel()
        balance = self.c.experts * (share * logits.softmax(-1).mean(0)).sum()
        z = logits.logsumexp(-1).pow(2).mean()
        return (self.shared_expert(x) + routed).view(shape), expert, torch.stack((balance, z))


class Layer(nn.Module):
    def __init__(self, c: Config, i: int):
        super().__init__()
        self.input_layernorm = Norm(c.hidden, c.eps)
        self.self_attn = Attention(c, i)
        self.post_attention_layernorm = Norm(c.hidden, c.eps)
        self.feed_forward = Moe(c)


class Trunk(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.1)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.layers))
        self.norm = Norm(c.hidden, c.eps)


class TinyLlama4(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c, self.model = c, Trunk(c)
        self.lm_head = Linear(c.hidden, c.vocab, 0.01)
        self.dtype = torch.float32
        # A tensor, so that one compiled graph serves with dropout and without (1: keep all).
        self.register_buffer("keep", torch.ones(()), persistent=False)
        pos = torch.arange(c.context).float()
        freq = pos[:, None] / c.theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        self.register_buffer("cos", freq.cos(), persistent=False)
        self.register_buffer("sin", freq.sin(), persistent=False)
        temp = 1 + c.attn_scale * torch.log1p(torch.floor((pos + 1) / c.floor_scale))
        self.register_buffer("temperature", temp[:, None, None], persistent=False)

    def set_grouped(self, on: bool):
        for m in self.modules():
            if isinstance(m, Moe):
                m.grouped = on

    def forward(self, ids):
        """ids [batch, t <= context] -> logits, experts [layers, batch * t], (balance, z) averaged over layers."""
        t = ids.shape[1]
        drop = lambda y: y * ((torch.rand_like(y) < self.keep) / self.keep) if self.training else y  # noqa: E731
        x = drop(self.model.embed_tokens(ids))
        experts, aux = [], 0.0
        for layer in self.model.layers:
            a = layer.self_attn(layer.input_layernorm(x, self.dtype), self.cos[:t], self.sin[:t], self.temperature[:t])
            x = x + drop(a)
            y, expert, losses = layer.feed_forward(layer.post_attention_layernorm(x, self.dtype))
            x = x + drop(y)
            experts.append(expert)
            aux = aux + losses / self.c.layers
        return self.lm_head(self.model.norm(x, self.dtype)), torch.stack(experts), aux
