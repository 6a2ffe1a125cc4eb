#!/usr/bin/env python3
"""Does `lighter eval` give the perplexity that transformers gives? In fp32, windows as in runtime/cli/text_windows.h.

  check_eval.py LIGHTER CONFIG.yaml MODEL TEXT [--context N] [--tokens N] [--set KEY=VALUE]...
      compares; exit code 1 beyond 0.1 %
  check_eval.py --golden FOLDER MODEL
      writes FOLDER/golden.json for FOLDER/text.txt and FOLDER/tokenizer.json, which the tests compare with

Needs torch, transformers, tokenizers, safetensors.
"""

import argparse
import json
import math
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import Llama4ForCausalLM


@torch.no_grad()
def reference(model: Path, tokenizer: Path, text: Path, context: int, limit: int | None) -> dict:
    tok = Tokenizer.from_file(str(tokenizer))
    content = text.read_bytes().decode("utf-8", errors="replace")
    ids = tok.encode(content, add_special_tokens=False).ids[:limit]
    begin = tok.encode("a").ids[: -len(tok.encode("a", add_special_tokens=False).ids)][:1]
    net = Llama4ForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    nll, tokens = 0.0, 0
    for first in range(0, len(ids), context - 1):
        window = torch.tensor([begin + ids[first : first + context - 1]])
        if window.shape[1] < 2:
            continue
        logits = net(window[:, :-1], use_cache=False).logits[0].double()
        nll += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        tokens += window.shape[1] - 1
    return {"tokens": tokens, "nll": nll, "perplexity": math.exp(nll / tokens)}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--golden", type=Path, metavar="FOLDER")
    ap.add_argument("paths", nargs="+", type=Path)
    ap.add_argument("--context", type=int)
    ap.add_argument("--tokens", type=int)
    ap.add_argument("--set", action="append", default=[])
    args = ap.parse_args()
    if args.golden:
        (model,) = args.paths
        context = args.context or 128
        found = reference(model, args.golden / "tokenizer.json", args.golden / "text.txt", context, args.tokens)
        found = {"model": model.name, "context": context, **found}
        (args.golden / "golden.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found))
        return
    lighter, config, model, text = args.paths
    context = args.context or 1024
    expected = reference(model, model / "tokenizer.json", text, context, args.tokens)
    command = [lighter, "eval", config, "--text", text, "--json", "--set", "model.dtype=fp32"]
    command += ["--set", f"memory.context={context}"] + [x for s in args.set for x in ("--set", s)]
    command += ["--tokens", str(args.tokens)] if args.tokens else []
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    off = found["perplexity"] / expected["perplexity"] - 1
    print(f"transformers {expected}\nlighter      { {k: found[k] for k in expected} }\noff by {100 * off:+.5f} %")
    raise SystemExit(0 if abs(off) < 1e-3 and found["tokens"] == expected["tokens"] else 1)


if __name__ == "__main__":
    main()
