#!/usr/bin/env python3
"""Writes a Llama-4 folder in the published Hugging Face format at Scout's exact width, with random weights.

For checking on a GPU machine that a real-format checkpoint larger than the device budget loads and runs; it
needs torch and safetensors, about 4.7 GB of disk a layer, and 4.2 GB for embedding and head. The text that such
a model makes is noise.

usage: make_scout_checkpoint.py OUT [--layers 4] [--vocab 202048]
"""
import argparse
import json
import pathlib
import time

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS = 5120, 40, 8, 128, 8192, 16


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=202048)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def matrix(*shape):
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return values.normal_(0, 0.02, generator=generator).cpu()

    config = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text", "vocab_size": options.vocab, "hidden_size": HIDDEN,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
            "num_hidden_layers": options.layers, "intermediate_size": FFN, "intermediate_size_mlp": 2 * FFN,
            "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
            "use_qk_norm": True, "no_rope_layers": [], "attention_chunk_size": 8192,
            "attn_temperature_tuning": 4, "attn_scale": 0.1, "floor_scale": 8192, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "max_position_embeddings": 10485760, "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 1.0, "original_max_position_embeddings": 8192},
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": [2],
        },
    }
    (options.out / "config.json").write_text(json.dumps(config, indent=2))
    weight_map, total, begin = {}, 0, time.time()
    shards = options.layers + 1

    def save(index, tensors):
        nonlocal total
        name = f"model-{index:05}-of-{shards:05}.safetensors"
        save_file(tensors, options.out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
        print(f"{name}: {total / 1e9:.1f} GB after {time.time() - begin:.0f} s", flush=True)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for layer in range(options.layers):
        prefix = f"language_model.model.layers.{layer}."
        attention, ffn = prefix + "self_attn.", prefix + "feed_forward."
        save(layer + 1, {
            prefix + "input_layernorm.weight": ones.clone(),
            prefix + "post_attention_layernorm.weight": ones.clone(),
            attention + "q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            attention + "k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            attention + "v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            attention + "o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            ffn + "router.weight": matrix(EXPERTS, HIDDEN),
            ffn + "shared_expert.gate_proj.weight": matrix(FFN, HIDDEN),
            ffn + "shared_expert.up_proj.weight": matrix(FFN, HIDDEN),
            ffn + "shared_expert.down_proj.weight": matrix(HIDDEN, FFN),
            ffn + "experts.gate_up_proj": matrix(EXPERTS, HIDDEN, 2 * FFN),
            ffn + "experts.down_proj": matrix(EXPERTS, FFN, HIDDEN),
        })
    save(shards, {
        "language_model.model.embed_tokens.weight": matrix(options.vocab, HIDDEN),
        "language_model.model.norm.weight": ones.clone(),
        "language_model.lm_head.weight": matrix(options.vocab, HIDDEN),
    })
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    main()
