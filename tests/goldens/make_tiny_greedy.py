#!/usr/bin/env python3
"""Writes tests/goldens/tiny_greedy.json: what transformers generates greedily in fp32 from models/tiny.

Needs torch, transformers and tokenizers. Run it again when the model changes.
"""
import json
import pathlib

import torch
from tokenizers import Tokenizer
from transformers import Llama4ForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPTS = ["It was a dark and stormy night", "And the king said unto him,", "The server returns", "My dear sir,"]

model = Llama4ForCausalLM.from_pretrained(ROOT / "models/tiny", dtype=torch.float32).eval()
tokenizer = Tokenizer.from_file(str(ROOT / "models/tiny/tokenizer.json"))
cases = []
for prompt in PROMPTS:
    ids = tokenizer.encode(prompt).ids
    prompt_ids = list(ids)
    with torch.no_grad():
        for _ in range(60):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
    generated = ids[len(prompt_ids):]
    cases.append({"prompt": prompt, "prompt_ids": prompt_ids, "ids": generated, "text": tokenizer.decode(generated)})
    print(prompt, "|", cases[-1]["text"])
(ROOT / "tests/goldens/tiny_greedy.json").write_text(json.dumps(cases, indent=1) + "\n")
