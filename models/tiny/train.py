#!/usr/bin/env python3
"""Trains the tiny Llama-4 mixture of experts on one GPU and exports the model folder.

    python3 models/tiny/train.py --minutes 8.5            # the shipped recipe
    python3 models/tiny/train.py --minutes 1.2 --trial    # a look at speed, loss and text
    python3 models/tiny/train.py --smoke                  # a few steps, also on a CPU

Reads .tiny-data/ (from prepare_data.py) and the tokenizer beside this file; writes
config.json, generation_config.json, model.safetensors and training_report.json. Seeded; the
learning rate follows the clock (or --max-tokens, whichever comes first), so the run ends in
time on any machine. --resume continues from the state file that --state-every leaves;
--init starts from an exported model's weights.
"""

import argparse
import json
import lzma
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from export import export  # noqa: E402
from model import Config, TinyLlama4  # noqa: E402


class Data:
    """Token windows drawn by group weight; a quarter of them begin at a document's start."""

    def __init__(self, folder: Path, context: int, bos: int, eot: int, device):
        meta = json.loads((folder / "meta.json").read_text())
        xz = folder / "train.bin.xz"
        raw = lzma.decompress(xz.read_bytes()) if xz.exists() else (folder / "train.bin").read_bytes()
        tokens = np.frombuffer(raw, np.uint16).astype(np.int32)
        self.context, self.bos, self.size, self.meta = context, bos, len(tokens), meta
        self.tokens = torch.from_numpy(tokens).to(device)
        starts = np.concatenate([[0], np.flatnonzero(tokens == eot)[:-1] + 1])
        self.groups, weights = [], []
        for g in meta["groups"].values():
            inside = starts[(starts >= g["start"]) & (starts < g["end"] - context)]
            if g["end"] - g["start"] > context and len(inside):
                self.groups.append((g["start"], g["end"] - context, torch.from_numpy(inside).to(device)))
                weights.append((g["end"] - g["start"]) * g["weight"])
        self.weights = torch.tensor(weights, device=device, dtype=torch.float)
        val = np.frombuffer((folder / "val.bin").read_bytes(), np.uint16).astype(np.int64)
        self.val = torch.from_numpy(val[: len(val) // context * context].reshape(-1, context)).to(device)
        self.ramp = torch.arange(context, device=device)

    def shift(self, y):
        """Inputs for the targets y: begin-of-text, then all but the last token."""
        return torch.cat((torch.full_like(y[:, :1], self.bos), y[:, :-1]), 1)

    def batch(self, n: int, gen):
        dev = self.tokens.device
        pick = torch.multinomial(self.weights, n, replacement=True, generator=gen)
        u = torch.rand(n, device=dev, generator=gen, dtype=torch.float64)
        head = torch.rand(n, device=dev, generator=gen) < 0.25
        at = torch.zeros(n, dtype=torch.long, device=dev)
        for i, (lo, hi, starts) in enumerate(self.groups):
            any_at = lo + (u * (hi - lo)).long()
            doc_at = starts[(u * len(starts)).long()]
            at = torch.where(pick == i, torch.where(head, doc_at, any_at), at)
        y = self.tokens[at[:, None] + self.ramp].long()
        return self.shift(y), y


def orthogonalize(g):
    """Newton-Schulz iteration towards the nearest orthogonal matrices; g [n, rows, cols]."""
    x = g.to(torch.bfloat16 if g.is_cuda else torch.float32)
    turn = x.shape[1] > x.shape[2]
    x = x.mT if turn else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-7)
    for a, b, c in [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)]:  # fmt: skip
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if turn else x).float()


class Muon:
    """Momentum with orthogonalised updates, for the matrices inside the layers.

    Matrices of one shape go through one batched iteration; the fused gate and up halves of an
    expert are two matrices. The update's root mean square is that of Adam (0.2 per entry).
    """

    def __init__(self, params, momentum=0.95, decay=0.1):
        self.params, self.momentum, self.decay, self.fn = params, momentum, decay, orthogonalize
        self.buf = [torch.zeros_like(p) for p in params]

    @staticmethod
    def halves(t):
        """Views as [n, rows, cols] of one shape each."""
        if t.dim() == 2:
            return [t.unsqueeze(0)]
        return list(t.chunk(2, 2)) if t.shape[2] > 2 * t.shape[1] else [t]

    @torch.no_grad()
    def step(self, lr):
        torch._foreach_lerp_(self.buf, [p.grad for p in self.params], 1 - self.momentum)
        updates = torch._foreach_lerp([p.grad for p in self.params], self.buf, self.momentum)
        torch._foreach_mul_(self.params, 1 - lr * self.decay)
        shapes = {}
        for p, u in zip(self.params, updates):
            for pv, uv in zip(self.halves(p), self.halves(u)):
                shapes.setdefault(uv.shape[1:], []).append((pv, uv))
        for (rows, cols), pairs in shapes.items():
            o = self.fn(torch.cat([u for _, u in pairs]))
            for (p, _), d in zip(pairs, o.split([u.shape[0] for _, u in pairs])):
                p.add_(d, alpha=-lr * 0.2 * math.sqrt(max(rows, cols)))


def probe_grouped(model, device):
    """Whether the grouped product works here and agrees with the plain loop."""
    if device.type != "cuda":
        return False
    try:
        moe = model.model.layers[0].feed_forward
        x = torch.randn(1, 512, model.c.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        outs = []
        for moe.grouped in (False, True):
            y = moe(x)[0]
            outs.append((y.detach().float(), torch.autograd.grad(y.float().square().sum(), x)[0].float()))
        moe.grouped = False
        return all(torch.allclose(a, b, atol=2e-2 * a.abs().max().item() + 1e-6) for a, b in zip(*outs))
    except Exception as e:
        print(f"grouped product not used: {e}")
        return False


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", type=Path, default=HERE.parents[1] / ".tiny-data")
    ap.add_argument("--out", type=Path, default=HERE)
    ap.add_argument("--copy-to", type=Path, help="also copy the results here, the checkpoint in parts of 15 MiB")
    ap.add_argument("--minutes", type=float, default=8.0, help="of training, compilation included; export comes after")
    ap.add_argument("--max-tokens", type=float, default=math.inf)
    ap.add_argument("--max-steps", type=int, default=10**9)
    ap.add_argument("--batch", type=int, default=128, help="windows of the whole context in a step")
    ap.add_argument("--lr", type=float, default=6e-3)
    ap.add_argument("--dropout", type=float, default=0.05)
    ap.add_argument("--decay", type=float, default=0.1)
    ap.add_argument("--cooldown", type=float, default=0.6, help="the part of the run in which the rate falls to zero")
    ap.add_argument("--balance", type=float, default=0.01)
    ap.add_argument("--z", type=float, default=1e-4)
    ap.add_argument("--seed", type=int, default=4)
    ap.add_argument("--no-compile", action="store_true")
    ap.add_argument("--trial", action="store_true", help="as short runs: log and evaluate more often")
    ap.add_argument("--smoke", action="store_true", help="a few small steps, for testing")
    ap.add_argument("--state", type=Path, default=Path("tiny-state.pt"))
    ap.add_argument("--state-every", type=float, default=0, help="minutes between state files; 0: none")
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--init", type=Path, help="a model.safetensors to start from")
    args = ap.parse_args()
    began = time.time()
    if args.smoke:
        args.max_steps, args.batch, args.no_compile = min(args.max_steps, 30), min(args.batch, 4), True

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    bos, eot = tok.token_to_id("<|begin_of_text|>"), tok.token_to_id("<|end_of_text|>")
    config = Config(vocab=tok.get_vocab_size())
    data = Data(args.data, config.context, bos, eot, device)
    model = TinyLlama4(config).to(device)
    model.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.init:
        from safetensors.torch import load_file

        model.load_state_dict({k: v.float() for k, v in load_file(args.init).items()})
    grouped = probe_grouped(model, device)
    model.set_grouped(grouped)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, {data.size / 1e6:.1f} M training tokens, {device}, grouped={grouped}", flush=True)

    def loss_fn(x, y):
        logits, _, aux = model(x)
        ce = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        return ce + args.balance * aux[0] + args.z * aux[1], ce.detach(), aux.detach()

    gen = torch.Generator(device=device).manual_seed(args.seed)
    matrices = [p for n, p in model.named_parameters() if p.dim() >= 2 and ".layers." in n and "router" not in n]
    inside = {id(p) for p in matrices}
    muon = Muon(matrices, decay=args.decay)
    rates = {"embed_tokens": 1.5, "lm_head": 0.5, "router": 0.5}
    groups = [
        {"params": [p], "scale": next((s for k, s in rates.items() if k in n), 0.5), "weight_decay": 0.0}
        for n, p in model.named_parameters() if id(p) not in inside
    ]  # fmt: skip
    adam = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda")
    step, tokens, spent, log = 0, 0, 0.0, []
    if args.resume:
        s = torch.load(args.state, map_location=device, weights_only=False)
        model.load_state_dict(s["model"])
        adam.load_state_dict(s["adam"])
        torch._foreach_copy_(muon.buf, s["muon"])
        gen.set_state(s["gen"].cpu())
        step, tokens, spent, log = s["step"], s["tokens"], s["spent"], s["log"]

    run, compiled = loss_fn, False
    if not args.no_compile and device.type == "cuda":
        try:
            xy, grads = data.batch(args.batch, torch.Generator(device=device).manual_seed(1)), []
            for fn in (loss_fn, trial := torch.compile(loss_fn)):
                fn(*xy)[0].backward()
                grads.append([p.grad.clone() for p in model.parameters()])
                model.zero_grad(set_to_none=True)
            names = [n for n, _ in model.named_parameters()]
            worst, name = max(((a - b).norm() / (a.norm() + 1e-12), n) for n, a, b in zip(names, *grads))
            print(f"compiled gradients: largest relative difference {worst:.3f} in {name}", flush=True)
            if not worst < 0.35:  # bf16 rounding moves a few tokens to other experts: some per cent
                raise RuntimeError("compiled gradients differ from the plain ones")
            run, compiled = trial, True
            muon.fn = torch.compile(orthogonalize, dynamic=False)
        except Exception as e:
            print(f"compilation not used: {str(e)[:400]}")
            run = loss_fn
        model.zero_grad(set_to_none=True)
        print(f"compiled={compiled} after {time.time() - began:.0f} s", flush=True)

    @torch.no_grad()
    def validate():
        model.eval()
        total = torch.zeros((), device=device)
        for y in data.val.split(32)[: 1 if args.smoke else None]:
            total += F.cross_entropy(model(data.shift(y))[0].flatten(0, 1).float(), y.flatten(), reduction="sum")
        model.train()
        return (total / (data.val[:32].numel() if args.smoke else data.val.numel())).item()

    model.train()
    model.keep.fill_(1 - args.dropout)  # the comparison above ran without dropout
    clock = time.time()
    budget = max(5.0, args.minutes * 60 - (clock - began))
    every, look, next_state = (20 if args.trial or args.smoke else 100), (200 if args.trial else 1000), args.state_every * 60
    mark = (clock, tokens)
    while True:
        now = time.time()
        progress = max((spent + now - clock) / (args.minutes * 60 if args.resume else budget), tokens / args.max_tokens, step / args.max_steps)
        if progress >= 1:
            break
        lr = args.lr * min(1.0, (step + 1) / 150, (1 - progress) / args.cooldown)
        loss, ce, aux = run(*data.batch(args.batch, gen))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        for g in adam.param_groups:
            g["lr"] = lr * g["scale"]
        adam.step()
        muon.step(lr)
        model.zero_grad(set_to_none=True)
        step += 1
        tokens += args.batch * config.context
        if step % every == 0 or step == 1:
            row = {"step": step, "tokens": tokens, "loss": round(ce.item(), 4), "balance": round(aux[0].item(), 4), "lr": round(lr, 6)}
            if not math.isfinite(row["loss"]):
                raise SystemExit(f"loss is not finite at step {step}; lower --lr")
            t = time.time()
            row["tokens_per_s"] = int((tokens - mark[1]) / max(t - mark[0], 1e-9))
            if step % look == 0:
                row["val"] = round(validate(), 4)
            mark = (time.time(), tokens)
            log.append(row)
            print(f"{spent + time.time() - clock:6.1f} s  {json.dumps(row)}", flush=True)
            if next_state and spent + time.time() - clock > next_state:
                next_state += args.state_every * 60
                state = {"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.buf, "gen": gen.get_state()}
                torch.save({**state, "step": step, "tokens": tokens, "spent": spent + time.time() - clock, "log": log}, args.state)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = spent + time.time() - clock
    val = validate()
    print(f"trained {step} steps, {tokens / 1e6:.1f} M tokens in {seconds:.0f} s; validation loss {val:.4f}", flush=True)

    recipe = {k: (str(v) if isinstance(v, Path) else v) for k, v in vars(args).items() if v is not None and v != math.inf}
    report = {
        "recipe": recipe,
        "model": {**vars(config), "parameters": count},
        "data": {"train_tokens": data.size, "groups": data.meta["groups"]},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "grouped_mm": grouped,
        "compiled": compiled,
        "steps": step,
        "tokens": tokens,
        "epochs": round(tokens / data.size, 2),
        "seconds": round(seconds, 1),
        "tokens_per_s": int(tokens / max(seconds, 1e-9)),
        "final_validation_nll": round(val, 4),
        "log": log,
    }
    export(model, tok, report, args.out, args.copy_to, heldout=HERE / "heldout.txt", quick=args.smoke)
    print(f"all done after {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
