#!/usr/bin/env python3
"""Makes the golden checkpoints of this folder with transformers on the CPU.

    python make_goldens.py [--out DIR] [--hidden] [CASE ...]

Each case becomes a folder in the published Hugging Face form (config.json,
generation_config.json, weights) plus golden.safetensors, what transformers
computes from it. README.md says what each tensor is and what each case is for.
Everything is seeded; a seed that gives dull weights (an idle expert, a routing
or a greedy choice that is nearly a tie) is skipped for the next one.

Needs torch, transformers 5.17 and safetensors.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import pathlib
import shutil
import tempfile

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.models.llama4 import modeling_llama4
from transformers.models.mixtral import modeling_mixtral

VOCAB = 160
GREEDY_TOKENS = 16
# How far apart two choices must be, in logits: far more than fp32 noise (~1e-6).
ROUTING_MARGIN = 4e-3
GREEDY_MARGIN = 2e-2


@dataclasses.dataclass
class Case:
    config: dict  # config.json as a checkpoint of that time has it
    cls: type
    dtype: torch.dtype  # of the file
    tokens: int
    generation: dict
    published: bool  # write `config` as it stands, instead of what save_pretrained makes of it
    shard_size: str = "50GB"
    absent: tuple = ()  # tensors the file must not hold
    present: tuple = ()  # and some that it must


ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {"vocab_size": VOCAB, "hidden_size": 64, "hidden_act": "silu", "attention_dropout": 0.0,
          "initializer_range": 0.02, "use_cache": True, **ATTENTION}
LLAMA4 = {**COMMON, "model_type": "llama4_text", "head_dim": 16, "rms_norm_eps": 1e-5, "attention_bias": False,
          "bos_token_id": 150, "eos_token_id": [151, 157, 158], "pad_token_id": 159, "num_experts_per_tok": 1,
          "output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0}
LLAMA4_GENERATION = {"bos_token_id": 150, "eos_token_id": [151, 157, 158], "pad_token_id": 159, "do_sample": True,
                     "temperature": 0.6, "top_p": 0.9}

SCOUT_TEXT = {**LLAMA4, "num_hidden_layers": 5, "intermediate_size": 64, "intermediate_size_mlp": 128,
              "num_local_experts": 4, "interleave_moe_layer_step": 1, "use_qk_norm": True, "no_rope_layers": [],
              "attention_chunk_size": 16, "attn_temperature_tuning": 4, "attn_scale": 0.2, "floor_scale": 8,
              "max_position_embeddings": 10485760, "rope_theta": 500000.0,
              "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                               "original_max_position_embeddings": 16, "rope_type": "llama3"},
              "cache_implementation": "hybrid", "for_llm_compressor": False, "torch_dtype": "bfloat16"}
SCOUT_VISION = {"model_type": "llama4_vision_model", "hidden_size": 16, "intermediate_size": 64,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_channels": 3, "image_size": 4,
                "patch_size": 2, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16,
                "pixel_shuffle_ratio": 0.5, "hidden_act": "gelu", "rope_theta": 10000}

CASES = {
    "llama4_scout": Case(
        cls=transformers.Llama4ForConditionalGeneration, dtype=torch.bfloat16, tokens=56,
        generation=LLAMA4_GENERATION, published=True,
        config={"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
                "boi_token_index": 140, "eoi_token_index": 141, "image_token_index": 142,
                "text_config": SCOUT_TEXT, "vision_config": SCOUT_VISION, "tie_word_embeddings": False,
                "torch_dtype": "bfloat16", "transformers_version": "4.51.0"},
        present=("language_model.model.layers.4.feed_forward.experts.gate_up_proj", "language_model.lm_head.weight",
                 "multi_modal_projector.linear_1.weight", "vision_model.class_embedding")),
    "llama4_text": Case(
        cls=transformers.Llama4ForCausalLM, dtype=torch.bfloat16, tokens=48,
        generation=LLAMA4_GENERATION, published=False,
        config={**LLAMA4, "num_hidden_layers": 4, "intermediate_size": 64, "intermediate_size_mlp": 128,
                "num_local_experts": 4, "use_qk_norm": False, "attn_temperature_tuning": False,
                "no_rope_layers": [1, 0, 1, 0], "attention_chunk_size": 20, "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0,
                                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                    "original_max_position_embeddings": 64}},
        present=("model.layers.0.feed_forward.experts.down_proj", "lm_head.weight")),
    "llama4_maverick": Case(
        cls=transformers.Llama4ForCausalLM, dtype=torch.bfloat16, tokens=40,
        generation=LLAMA4_GENERATION, published=True,
        config={**LLAMA4, "architectures": ["Llama4ForCausalLM"], "num_hidden_layers": 4, "intermediate_size": 64,
                "intermediate_size_mlp": 128, "num_local_experts": 8, "interleave_moe_layer_step": 2,
                "use_qk_norm": False, "no_rope_layers": [], "attention_chunk_size": 32,
                "attn_temperature_tuning": 4, "attn_scale": 0.1, "floor_scale": 8,
                "max_position_embeddings": 1048576, "rope_theta": 500000.0, "rope_scaling": None,
                "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0"},
        present=("model.layers.0.feed_forward.gate_proj.weight", "model.layers.1.feed_forward.router.weight"),
        absent=("lm_head.weight", "model.layers.0.feed_forward.router.weight")),
    "llama3": Case(
        cls=transformers.LlamaForCausalLM, dtype=torch.float32, tokens=56,
        generation={"bos_token_id": 150, "eos_token_id": [151, 158], "do_sample": True, "temperature": 0.6,
                    "top_p": 0.9}, published=True,
        config={**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 3,
                "intermediate_size": 128, "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False,
                "bos_token_id": 150, "eos_token_id": [151, 158], "pretraining_tp": 1,
                "max_position_embeddings": 131072, "rope_theta": 500000.0,
                "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 64, "rope_type": "llama3"},
                "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.43.0"},
        present=("lm_head.weight",)),
    "llama3_tied": Case(
        cls=transformers.LlamaForCausalLM, dtype=torch.bfloat16, tokens=40,
        generation={"bos_token_id": 150, "eos_token_id": 151}, published=False, shard_size="120KB",
        config={**COMMON, "model_type": "llama", "num_hidden_layers": 3, "intermediate_size": 128,
                "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-5, "attention_bias": False,
                "mlp_bias": False, "bos_token_id": 150, "eos_token_id": 151, "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0,
                                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                    "original_max_position_embeddings": 128},
                "tie_word_embeddings": True},
        absent=("lm_head.weight",)),
    "mixtral": Case(
        cls=transformers.MixtralForCausalLM, dtype=torch.float16, tokens=40,
        generation={"bos_token_id": 1, "eos_token_id": 2}, published=True,
        config={**COMMON, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "head_dim": None,
                "num_hidden_layers": 2, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2,
                "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
                "rope_theta": 1000000.0, "sliding_window": None, "output_router_logits": False,
                "router_aux_loss_coef": 0.02, "tie_word_embeddings": False, "torch_dtype": "float16",
                "transformers_version": "4.36.0"},
        present=("model.layers.0.block_sparse_moe.experts.3.w2.weight",
                 "model.layers.0.block_sparse_moe.gate.weight")),
}


def read_config(folder):
    """The folder's config as transformers reads it, except that 5.17 refuses the old integer for
    attn_temperature_tuning, so it is made the bool that it stood for."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    if "attn_temperature_tuning" in text:
        text["attn_temperature_tuning"] = bool(text["attn_temperature_tuning"])
    with tempfile.TemporaryDirectory() as copied:
        (pathlib.Path(copied) / "config.json").write_text(json.dumps(config))
        return transformers.AutoConfig.from_pretrained(copied)


def randomize(model, dtype, generator):
    """Weights, exact in dtype, that keep every activation near 1, so that no part is lost in rounding."""
    tied = model.config.get_text_config().tie_word_embeddings
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1 and "norm" in name:
            p.data = (1 + 0.2 * noise).to(dtype)
        elif name.endswith(("router.weight", "gate.weight")):
            p.data = (0.2 * noise).to(dtype)
        elif "embed_tokens" in name and not tied:
            p.data = (0.5 * noise).to(dtype)
        else:
            p.data = (0.125 * noise).to(dtype)


class Router:
    """Stands in for the routers' forward: the same arithmetic, but records the choice or takes it
    from an earlier run. A forced choice still takes its weights from this run's own logits."""

    def __init__(self, forced=None):
        self.forced = forced
        self.chosen, self.margin = [], float("inf")

    def choose(self, scores, k):
        best = torch.topk(scores.float(), min(k + 1, scores.shape[1]), dim=1)
        self.margin = min(self.margin, (best.values[:, k - 1] - best.values[:, k]).min().item())
        index = best.indices[:, :k] if self.forced is None else self.forced[len(self.chosen)].long()
        self.chosen.append(index)
        return index

    def llama4(self, module, x):
        logits = torch.nn.functional.linear(x, module.weight)
        index = self.choose(logits, module.top_k)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, index, logits.gather(1, index))
        return torch.sigmoid(scores.float()).to(scores.dtype), logits

    def mixtral(self, module, x):
        x = x.reshape(-1, module.hidden_dim)
        logits = torch.nn.functional.linear(x, module.weight)
        index = self.choose(logits, module.top_k)
        weights = torch.softmax(logits.float(), dim=-1).gather(1, index)
        return logits, weights / weights.sum(dim=-1, keepdim=True), index

    @contextlib.contextmanager
    def installed(self):
        llama4, mixtral = modeling_llama4.Llama4Router, modeling_mixtral.MixtralTopKRouter
        kept = llama4.forward, mixtral.forward
        llama4.forward = lambda module, x: self.llama4(module, x)
        mixtral.forward = lambda module, x: self.mixtral(module, x)
        try:
            yield self
        finally:
            llama4.forward, mixtral.forward = kept


def difference(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def cached_logits(model, ids, prefill):
    """Logits from `prefill` tokens at once, then one token a step through transformers' cache."""
    out = model(ids[:, :prefill], use_cache=True)
    parts, cache = [out.logits], out.past_key_values
    for i in range(prefill, ids.shape[1]):
        out = model(ids[:, i:i + 1], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, dim=1)[0]


def greedy(model, ids):
    """16 most likely tokens, one after another, without a cache; and the narrowest lead of a choice."""
    margin, n = float("inf"), ids.shape[1]
    for _ in range(GREEDY_TOKENS):
        best = torch.topk(model(ids, use_cache=False).logits[0, -1], 2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        ids = torch.cat([ids, best.indices[:1].view(1, 1)], dim=1)
    return ids[0, n:], margin


def write_checkpoint(case, folder, seed):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config_path = folder / "config.json"
    config_path.write_text(json.dumps(case.config, indent=2) + "\n")
    model = case.cls(read_config(folder))
    randomize(model, case.dtype, torch.Generator().manual_seed(seed))
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=case.shard_size)
    if case.published:
        config_path.write_text(json.dumps(case.config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(case.generation, indent=2) + "\n")

    names = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as f:
            names |= set(f.keys())
    assert names.issuperset(case.present) and names.isdisjoint(case.absent), sorted(names)
    assert (case.shard_size == "50GB") == (folder / "model.safetensors").exists()


def load(case, folder, dtype, attention="sdpa", cls=None, **overrides):
    config = read_config(folder)
    for key, value in overrides.items():
        setattr(config.get_text_config(), key, value)
    model, info = (cls or case.cls).from_pretrained(folder, config=config, dtype=dtype, attn_implementation=attention,
                                                    output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    if cls is None:
        assert not info["unexpected_keys"], info
    return model.eval()


@torch.no_grad()
def golden(case, folder, seed, hidden):
    """golden.safetensors' tensors and a line about them, or None if this seed's weights are dull."""
    ids = torch.randint(0, 140, (1, case.tokens), generator=torch.Generator().manual_seed(seed + 1000))
    model = load(case, folder, torch.float32)
    with Router().installed() as router:
        traced = model(ids, use_cache=False, output_hidden_states=True)
    logits = traced.logits[0]
    assert torch.equal(logits, model(ids, use_cache=False).logits[0]), "the recording router changes the result"

    moe = bool(router.chosen)
    routing = torch.stack(router.chosen).int() if moe else None
    if moe:
        experts = model.config.get_text_config().num_local_experts
        used = torch.stack([torch.bincount(layer.flatten(), minlength=experts) for layer in routing])
        if router.margin < ROUTING_MARGIN or used.min() < routing[0].numel() // (4 * experts):
            return None
    with Router().installed() as long_router:
        greedy_ids, greedy_margin = greedy(model, ids)
    if greedy_margin < GREEDY_MARGIN or long_router.margin < ROUTING_MARGIN or len(greedy_ids.unique()) < 6:
        return None
    eos = case.generation["eos_token_id"]
    if set(greedy_ids.tolist()) & set(eos if isinstance(eos, list) else [eos]):
        return None  # so that a generation that stops at EOS gives the same ids

    # transformers against itself: attention kernels, and a cache filled by tokens or by prefill.
    assert 0.5 < logits.std() < 2, logits.std()
    noise = {"eager": difference(load(case, folder, torch.float32, "eager")(ids, use_cache=False).logits[0], logits),
             "cache": difference(cached_logits(model, ids, 1), logits),
             "prefill": difference(cached_logits(model, ids, case.tokens - 5), logits)}
    if moe and "Mixtral" in case.cls.__name__:
        model.set_experts_implementation("eager")
        noise["experts"] = difference(model(ids, use_cache=False).logits[0], logits)
        model.set_experts_implementation("grouped_mm")
    if case.config["model_type"] == "llama4":
        text = load(case, folder, torch.float32, cls=transformers.Llama4ForConditionalGeneration).language_model
        noise["text"] = difference(text(ids, use_cache=False).logits[0], logits)
    assert max(noise.values()) < 3e-6, noise
    whole = torch.cat([ids, greedy_ids[None]], dim=1)
    assert torch.equal(cached_logits(model, whole, case.tokens)[case.tokens - 1:-1].argmax(-1), greedy_ids)

    # Each feature must move the logits by far more than the tolerance, or the case proves nothing.
    matters = {}
    config = model.config.get_text_config()
    switches = {"rope_scaling": {"rope_parameters": {"rope_type": "default",
                                                     "rope_theta": config.rope_parameters["rope_theta"]}}}
    if "Llama4" in case.cls.__name__:
        switches |= {"chunks": {"layer_types": ["full_attention"] * config.num_hidden_layers},
                     "temperature": {"attn_temperature_tuning": False}, "qk_norm": {"use_qk_norm": False}}
    for name, overrides in switches.items():
        matters[name] = difference(load(case, folder, torch.float32, **overrides)(ids, use_cache=False).logits[0],
                                   logits)
    off = {"temperature": not getattr(config, "attn_temperature_tuning", False),
           "qk_norm": not getattr(config, "use_qk_norm", False),
           "rope_scaling": config.rope_parameters["rope_type"] == "default"}
    for name, value in matters.items():
        assert (value == 0) if off.get(name) else (value > 1e-2), matters

    half = load(case, folder, torch.bfloat16)
    with Router(forced=routing).installed():
        logits_bf16 = half(ids, use_cache=False).logits[0].float()

    tensors = {"input_ids": ids[0], "logits": logits, "logits_bf16": logits_bf16, "greedy_ids": greedy_ids}
    if moe:
        tensors["routing"] = routing
    if hidden:
        tensors["hidden"] = torch.stack([h[0] for h in traced.hidden_states])
    line = (f"seed {seed}, logits std {logits.std():.2f}, bf16 error {difference(logits_bf16, logits):.4f}, noise "
            + " ".join(f"{k} {v:.1e}" for k, v in noise.items())
            + "; matters " + " ".join(f"{k} {v:.2g}" for k, v in matters.items())
            + f"; greedy margin {greedy_margin:.3f}")
    if moe:
        line += f", routing margin {min(router.margin, long_router.margin):.4f}, tokens per expert {used.tolist()}"
    return {k: v.contiguous() for k, v in tensors.items()}, line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"all, or some of: {', '.join(CASES)}")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--hidden", action="store_true",
                        help="also store `hidden` [layers + 1, n, hidden], to find the first layer that differs")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in arguments.cases or CASES:
        case, folder = CASES[name], arguments.out / name
        for seed in itertools.count(1):
            write_checkpoint(case, folder, seed)
            if (made := golden(case, folder, seed, arguments.hidden)) is not None:
                break
        tensors, line = made
        save_file(tensors, folder / "golden.safetensors")
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors makes them private
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{name}: {size / 1024:.0f} KiB, {line}", flush=True)


if __name__ == "__main__":
    main()
