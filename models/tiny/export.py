"""Writes the model folder, reads it back through transformers and measures it.

Held-out perplexity: the file is tokenised as a whole without begin-of-text; it is cut into
windows of (context - 1) tokens, the last one shorter; each window is prefixed with
begin-of-text and all its tokens are scored. perplexity = exp(sum of nll / tokens scored).
"""

import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F

PROMPTS = [
    "",
    "In the beginning",
    "It was a dark and stormy night, and",
    "She looked at him for a moment and said",
    "The purpose of this function is to",
    "My fellow citizens,",
    "When the server receives a request,",
    "And the king said unto",
]
PART = 15 * 2**20


def windows(tok, text: str, context: int):
    """Targets [n, context - 1] with -100 after the end, and inputs that begin with begin-of-text."""
    bos = tok.token_to_id("<|begin_of_text|>")
    ids = tok.encode(text, add_special_tokens=False).ids
    n = context - 1
    rows = [ids[i : i + n] for i in range(0, len(ids), n)]
    y = torch.full((len(rows), n), -100)
    for i, r in enumerate(rows):
        y[i, : len(r)] = torch.tensor(r)
    x = torch.cat((torch.full((len(rows), 1), bos), y[:, :-1].clamp_min(0)), 1)
    return x, y


@torch.no_grad()
def perplexity(logits_of, x, y, device):
    nll = torch.zeros((), dtype=torch.float64)
    for xb, yb in zip(x.split(4), y.split(4)):
        out = logits_of(xb.to(device)).float()
        nll += F.cross_entropy(out.flatten(0, 1), yb.to(device).flatten(), ignore_index=-100, reduction="sum").double().cpu()
    count = int((y >= 0).sum())
    return {"tokens": count, "nll": round(nll.item(), 3), "perplexity": round(math.exp(nll.item() / count), 4)}


@torch.no_grad()
def expert_load(model, x, y, device):
    """Per layer, over the scored positions: share of each expert, its entropy, and how often a token
    takes the same expert as the token before it (chance: the sum of squared shares)."""
    c, rows = model.c, []
    experts = torch.cat([model(xb.to(device))[1].view(c.layers, *xb.shape) for xb in x.split(4)], 1).cpu()
    for layer in range(c.layers):
        e = experts[layer]
        share = torch.bincount(e[y >= 0], minlength=c.experts).double()
        share /= share.sum()
        both = (y[:, 1:] >= 0) & (y[:, :-1] >= 0)
        rows.append({
            "layer": layer,
            "min_share": round(share.min().item(), 4),
            "max_share": round(share.max().item(), 4),
            "entropy_of_uniform": round((-(share * share.clamp_min(1e-12).log()).sum() / math.log(c.experts)).item(), 4),
            "repeat": round((e[:, 1:] == e[:, :-1])[both].double().mean().item(), 4),
            "repeat_by_chance": round(share.square().sum().item(), 4),
            "shares": [round(s, 4) for s in share.tolist()],
        })  # fmt: skip
    return rows


def export(model, tok, report: dict, out: Path, copy_to: Path | None, heldout: Path, quick: bool):
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, Llama4ForCausalLM

    out.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    bos, eot, pad = (tok.token_to_id(t) for t in ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad|>"))
    weights = {k: v.detach().to(torch.bfloat16).contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    (out / "config.json").write_text(json.dumps(model.c.to_hf(bos, eot, pad), indent=2) + "\n")
    generation = {"bos_token_id": bos, "eos_token_id": [eot], "pad_token_id": pad, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (out / name).exists():
            shutil.copy(heldout.parent / name, out / name)

    # From here on the training model holds the rounded weights and computes in fp32, ungrouped.
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    model.eval()
    model.set_grouped(False)
    model.dtype = torch.float32
    torch.set_float32_matmul_precision("highest")
    text = heldout.read_text()
    x, y = windows(tok, text[:20_000] if quick else text, model.c.context)
    hf = Llama4ForCausalLM.from_pretrained(out, dtype=torch.float32).to(device).eval()
    with torch.no_grad():
        a, b = model(x[:2].to(device))[0], hf(x[:2].to(device)).logits
    report["equal_to_transformers"] = {
        "max_abs_logit_difference_fp32": round((a - b).abs().max().item(), 7),
        "same_argmax": round((a.argmax(-1) == b.argmax(-1)).double().mean().item(), 6),
    }
    print(report["equal_to_transformers"], flush=True)
    if report["equal_to_transformers"]["max_abs_logit_difference_fp32"] > 1e-2:
        raise SystemExit("the exported model differs from the trained one")

    report["heldout"] = {"file_bytes": len(text.encode()), "fp32": perplexity(lambda t: hf(t).logits, x, y, device)}
    if not quick:
        half = Llama4ForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(device).eval()
        report["heldout"]["bf16"] = perplexity(lambda t: half(t).logits, x, y, device)
        report["heldout"]["bits_per_byte_fp32"] = round(report["heldout"]["fp32"]["nll"] / math.log(2) / len(text.encode()), 4)
        del half
    print(json.dumps(report["heldout"]), flush=True)

    report["expert_load"] = expert_load(model, x, y, device)
    for r in report["expert_load"]:
        print("  ".join(f"{k} {v}" for k, v in r.items() if k != "shares"), flush=True)

    fast = AutoTokenizer.from_pretrained(out)
    report["samples"] = []
    for prompt in PROMPTS[: 2 if quick else None]:
        ids = fast(prompt, return_tensors="pt").to(device)
        for kind in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}):
            torch.manual_seed(1)
            new = hf.generate(**ids, max_new_tokens=20 if quick else 110, **kind)
            text = fast.decode(new[0], skip_special_tokens=True)
            report["samples"].append({"prompt": prompt, "greedy": not kind["do_sample"], "text": text})
            print(f"--- {'greedy' if not kind['do_sample'] else 'sampled'}: {text}", flush=True)
    (out / "training_report.json").write_text(json.dumps(report, indent=1) + "\n")

    if copy_to:
        copy_to.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "generation_config.json", "training_report.json"):
            shutil.copy(out / name, copy_to / name)
        raw = (out / "model.safetensors").read_bytes()
        for i in range(0, len(raw), PART):  # join again with: cat model.safetensors.part* > model.safetensors
            (copy_to / f"model.safetensors.part{i // PART}").write_bytes(raw[i : i + PART])
