"""Makes the tokenizers and goldens in this folder, with the `tokenizers` package as the truth.

    python make_tokenizer_goldens.py        (no downloads; made with tokenizers 0.23)

Writes
  llama3/ llama4/ byte_fallback/   tokenizer.json folders, as checkpoints have them but with small vocabularies
  goldens.json                     texts → ids, id sequences → text, for each of the three
  components.json                  one small model with many settings around it: texts → ids, ids → text
"""

import json
import random
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA4_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                  "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
                  "<|python_tag|>"] + [f"<|reserved_special_token_{i}|>" for i in range(2, 24)]
LLAMA4_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
                  "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>",
                  "<|text_post_train_reserved_special_token_0|>", "<|python_start|>", "<|python_end|>",
                  "<|finetune_right_pad|>", "<|image_start|>", "<|image_end|>", "<|image|>"]

WORDS = {
    "latin": "the of and to in is that it for was on are as with his they at be this from have or by one had not but "
             "what all were when we there can an your which their said if do will each about how up out them then she "
             "many some so these would other into has more her two like him see time could no make than first been its "
             "who now people my made over did down only way find use may water long little very after words called "
             "just where most know Straße größer naïve café façade señor œuvre İstanbul ılık Łódź žluťoučký".split(),
    "cyrillic": "и в не на что он как это она они мы все так его но да ты к у же вы за бы по только её мне было вот".split(),
    "greek": "και το να που με για από στο της Ελλάδα είναι αυτό δεν ένα ΣΊΣΥΦΟΣ".split(),
    "arabic": "في من على إلى هذا كان أن ما لا مع كل التي العربية السلام عليكم ٱلرَّحْمَٰنِ".split(),
    "hebrew": "של את על לא זה עם אני הוא היא שָׁלוֹם".split(),
    "devanagari": "है के में की और को से का एक पर नमस्ते हिन्दी क्षत्रिय".split(),
    "thai": "ที่ การ และ ใน เป็น ของ ไม่ สวัสดี".split(),
    "cjk": "的 一 是 不 了 人 我 在 有 他 这 中 大 来 上 国 こんにちは 世界 ひらがな カタカナ 東京 한국어 안녕하세요 漢字".split(),
    "code": "int main() { return 0; } def f(self, x): if x == None: != <= >= -> => :: // /* */ #include std::vector<T> "
            "\"a\" 'b' 100 2024 3.14 1e-5 0x1F ... --- === \\n \\t https://example.org/?q=a&b=c".split(),
}
# Tricky single characters, by what they are there for.
SPACES = list(" \t\n\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u2003\u2007\u2009\u200a\u200b\u2028\u2029\u202f"
              "\u205f\u2060\u3000\ufeff")
CONTROLS = [chr(c) for c in range(32)] + ["\x7f", "\x80", "\x9f", "\u200c", "\u200d", "\u200e", "\u202e", "\ufff9",
                                          "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ue000", "\U000e0041"]
MARKS = ["\u0301", "\u0308", "\u0483", "\u0903", "\u20dd", "\u093f", "\u0e31", "\ufe0f", "\u3099", "\U0001d165"]
LETTERS = list("aZßſK\u212aıİǅǈʰªºﬁǄΩσςЖжאبकกあ漢한𝒜𐐀Ꞔ") + ["\U0001f130", "\u24b6", "\u2160", "\U00031350",
                                                           "\U0002ebf0", "\u1c89", "\ua7cb", "\U00010d50", "\U0001e030"]
DIGITS = list("07²½٣५๗Ⅷ〇㊅𝟘") + ["\U00011de0", "\U0001e4f0", "\u0bf0"]
SYMBOLS = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«»“”‘’…–—€₿™©°§¿№↑∑√∞≠▁▲♥☃Ġ｜．") + [
    "😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "🫨", "☝️", "🤷🏻‍♀️", "\U0001fae9"]
CONTRACTIONS = ["'s", "'S", "'ſ", "'t", "'T", "'re", "'RE", "'Re", "'ve", "'VE", "'m", "'M", "'ll", "'LL", "'lL",
                "'d", "'D", "’s", "''s", "'ss", "'x", "' s", "'sa", "'llama"]


def training_text():
    rng = random.Random(1)
    lines = []
    for _ in range(1500):
        words = [rng.choice(WORDS[rng.choice(list(WORDS))]) for _ in range(rng.randint(3, 14))]
        line = "".join(w + rng.choice([" "] * 8 + ["  ", ", ", ". ", "\n", "    ", "'s ", "-"]) for w in words)
        lines.append(line.capitalize() if rng.random() < 0.3 else line)
    lines += ["".join(rng.choice(SYMBOLS + DIGITS) for _ in range(12)) for _ in range(150)]
    # Pieces that hold a space character between others, so that where it is cut shows in the ids.
    lines += [f"x{c}{c}!{c}!{c} {c}y" for c in SPACES for _ in range(20)]
    lines += ["a" * 64, "ab" * 32, "A" * 32, "\u0301" * 16, "'s" * 8] * 20  # for long runs that merge again and again
    return lines


def hard_strings(special):
    rng = random.Random(2)
    out = ["", " ", "  ", "a", "\n", "\0", "\0\0a\0", "'", "''", "<", "<|", "<0x41>", "<0xE4><0xBD>", "▁", "▁▁a▁", "Ġa"]
    pool = SPACES + CONTROLS + MARKS + LETTERS + DIGITS + SYMBOLS
    out += pool
    for c in SPACES:
        out += [f"a{c}b", f"a{c}{c}{c}b", f"{c}a ", f"a{c}", f" {c}a", f"{c}\n{c}a", f"1{c}2", f"!{c}!", f"{c * 7}", f"\n{c}"]
    for c in CONTROLS[:33] + MARKS:
        out += [f"a{c}b", f" {c} ", f"{c}{c}1"]
    for c in CONTRACTIONS:
        out += [c, f"it{c}", f"IT{c} x", f"it{c}x", f"1{c}", f"漢{c}\n"]
    out += ["1" * n for n in range(1, 13)] + ["a" * n for n in (2, 3, 17, 100)] + ["A" * 40 + "b", "ab" * 90, " " * 130,
            "\n" * 50, " \n" * 25, "é" * 60, "漢" * 50, "😀" * 30, "\u0301" * 40, "aB" * 30, "!?" * 40, "'s" * 30]
    out += ["camelCaseWord", "HTTPServer", "iPhone15Pro", "ABCdef", "fooBAR's", "Ünïcödé", "ΑΒγδ", "ǅungla", "a_b-c.d/e",
            "x=1;\r\ny=2;\r\n\r\n", "//comment\n/path/\r", "a \n b", "a\r\n \r\n", "tab\tsep\t\tx", "100,000.00", "１２３４",
            "שלום עולם", "مرحبا بالعالم ١٢٣", "\u202eabc\u202c", "สวัสดีครับ", "नमस्ते दुनिया", "각각", "각",
            "Hello, world!", "Hello World", "The end.", "I'll we've THEY'RE"]
    for token in special[:9] + ["<unk>", "<|nothing|>", "<|begin_of_text|", "<s>", "</s>"]:
        out += [token, f"a{token}b", f" {token} ", f"{token}{token}", f"x\n{token}\n\ny", token[:-1], f"<{token}>"]
    while len(out) < 1250:
        n = rng.randint(2, 12)
        kind = rng.random()
        if kind < 0.45:
            out.append("".join(rng.choice(pool) for _ in range(n)))
        elif kind < 0.6:
            out.append("".join(rng.choice(SPACES[:12] + list("ab1!'\n")) for _ in range(n)))
        elif kind < 0.7:
            out.append("".join(rng.choice(CONTRACTIONS + LETTERS) for _ in range(n)))
        elif kind < 0.8:
            out.append("".join(chr(rng.choice([rng.randrange(0x20, 0x3000), rng.randrange(0x3000, 0xD800),
                                               rng.randrange(0xE000, 0x20000)])) for _ in range(n)))
        else:
            parts = [w for ws in WORDS.values() for w in ws] + special[:8] + SPACES[:8] + CONTRACTIONS
            out.append("".join(rng.choice(parts) + rng.choice(["", " "]) for _ in range(n)))
    return list(dict.fromkeys(out))


def save(tokenizer, name):
    (HERE / name).mkdir(exist_ok=True)
    text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (HERE / name / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    return Tokenizer.from_file(str(HERE / name / "tokenizer.json"))


def byte_level(split, special, bos_template):
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(training_text(), trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    # Tokens that no merge makes: ignore_merges must find them. Real Llama vocabularies have such tokens.
    spec = json.loads(tokenizer.to_str())
    for extra in ("Ġzebra", "HelloWorld", "ĊĊĊĊ"):
        spec["model"]["vocab"][extra] = len(spec["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B:1",
                                             special_tokens=[bos])
    tokenizer.post_processor = (
        processors.Sequence([processors.ByteLevel(trim_offsets=False), template]) if bos_template == "sequence" else template)
    return tokenizer


def byte_fallback():
    """As Llama 2 and Mixtral ship it; the merges in the older "a b" form."""
    control = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]*"), "isolated")
    latin = [line for line in training_text() if sum(ord(c) > 0x500 for c in line) < len(line) // 2]
    # An alphabet that is chosen here: the trainer's own limit breaks ties at random.
    counts = Counter("".join(latin))
    alphabet = set(sorted(counts, key=lambda c: (-counts[c], c))[:180])
    latin = ["".join(c for c in line if c in alphabet) for line in latin]
    trained.train_from_iterator(latin, trainers.BpeTrainer(
        vocab_size=1550, special_tokens=control, show_progress=False))
    spec = json.loads(trained.to_str())
    spec["pre_tokenizer"] = None
    spec["model"].update(byte_fallback=True, fuse_unk=True)
    spec["model"]["merges"] = [" ".join(m) for m in spec["model"]["merges"]]
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1",
                                                             special_tokens=[("<s>", 1)])
    return tokenizer, spec["model"]["merges"]


def hash_ids(ids):
    value = 0xCBF29CE484222325
    for i in ids:
        value = ((value ^ i) * 0x100000001B3) & (2**64 - 1)
    return f"{value:016x}"


def goldens(tokenizer, special):
    ids_of = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    bos = tokenizer.encode("", add_special_tokens=True).ids
    texts = []
    for text in hard_strings(special):
        ids = ids_of(text)
        assert tokenizer.encode(text).ids == bos + ids, text
        case = {"text": text, "ids": ids}
        tokenizer.encode_special_tokens = True
        plain = ids_of(text)
        tokenizer.encode_special_tokens = False
        if plain != ids:
            case["plain_ids"] = plain
        # Decoded text is left out where it equals the text itself.
        for key, skip in (("decoded", False), ("decoded_skipping", True)):
            decoded = tokenizer.decode(ids, skip_special_tokens=skip)
            if decoded != text:
                case[key] = decoded
        texts.append(case)
    long_texts = []
    for unit, times in (("a", 100000), ("ab", 50000), (" ", 30000), ("the quick 漢字 😀\n", 4000), ("'s", 20000), ("é1 ", 20000),
                        ("A", 60000), ("\u0301", 20000), ("Straße ", 10000)):
        ids = ids_of(unit * times)
        long_texts.append({"unit": unit, "times": times, "count": len(ids), "hash": hash_ids(ids)})
    rng = random.Random(3)
    size = tokenizer.get_vocab_size()
    sequences = []
    for i in range(160):
        low, high = (0, size) if i % 2 else (0, 300)  # the low ids are single bytes
        ids = [rng.randrange(low, high) for _ in range(rng.randint(1, 12))]
        sequences.append({"ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False),
                          "decoded_skipping": tokenizer.decode(ids, skip_special_tokens=True)})
    return {"vocab_size": size, "prefix": bos, "texts": texts, "long_texts": long_texts, "sequences": sequences}


def component_cases():
    """Settings around one model whose merges join whatever the settings leave together."""
    alphabet = "ab1-▁ Ġ"
    tokens = list(alphabet)
    merges = []
    for length in (2, 3):
        longer = [t + c for t in tokens if len(t) == length - 1 for c in alphabet]
        merges += [[t[:-1], t[-1]] for t in longer]
        tokens += longer
    tokens += ["<unk>"]
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}
    base = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}
    added = lambda i, content, **flags: {"id": len(tokens) + i, "content": content, "single_word": False, "lstrip": False,
                                         "rstrip": False, "normalized": False, "special": True, **flags}
    split = lambda pattern, behavior, invert=False: {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}
    replace = lambda pattern, content: {"type": "Replace", "pattern": pattern, "content": content}
    sequence = lambda key, *steps: {"type": "Sequence", key: list(steps)}
    metaspace = lambda scheme, do_split=True: {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": do_split}
    settings = []
    for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        settings.append({"pre_tokenizer": split({"String": "-"}, behavior)})
        settings.append({"pre_tokenizer": split({"Regex": "-|1+"}, behavior, True)})
        settings.append({"pre_tokenizer": split({"Regex": "b*"}, behavior)})
    for scheme in ("always", "first", "never"):
        for do_split in (True, False):
            settings.append({"pre_tokenizer": metaspace(scheme, do_split), "added_tokens": [added(0, "<x>")],
                             "decoder": metaspace(scheme, do_split)})
    for add_space in (True, False):
        for use_regex in (True, False):
            settings.append({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": add_space, "trim_offsets": True,
                                               "use_regex": use_regex}, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}})
    for each in (True, False):
        settings.append({"pre_tokenizer": {"type": "Digits", "individual_digits": each}})
    settings += [
        {"pre_tokenizer": sequence("pretokenizers", split({"String": "1"}, "Isolated"), metaspace("always"))},
        {"normalizer": {"type": "Prepend", "prepend": "▁"}, "added_tokens": [added(0, "<x>"), added(1, "-1", normalized=True)]},
        {"normalizer": sequence("normalizers", replace({"String": " "}, "▁"), replace({"Regex": "-+"}, "1")),
         "added_tokens": [added(0, "a a", normalized=True), added(1, "--", special=False)]},
        {"normalizer": replace({"Regex": r"\s"}, ""), "added_tokens": [added(0, "<x>", special=False, normalized=True)]},
        {"model": {"fuse_unk": True}}, {"model": {"unk_token": None}}, {"model": {"ignore_merges": True, "merges": []}},
        {"model": {"merges": [["a", "b"], ["b", "a"], ["ab", "a"], ["-", "-"], ["ba", "b"], ["a", "b"]]}},
        {"model": {"merges": ["b a", "a b", "1 1", "a ba"]}},
        {"model": {"byte_fallback": True, "fuse_unk": True, "vocab": {**{t: i for i, t in enumerate(tokens)}, "<0x78>": len(tokens)}}},
        {"added_tokens": [added(0, "a-"), added(1, "a-b"), added(2, "b1", special=False), added(3, "<x>", special=False)]},
        {"added_tokens": [added(0, "<x>", lstrip=True)]}, {"added_tokens": [added(0, "<x>", rstrip=True)]},
        {"added_tokens": [added(0, "<x>", lstrip=True, rstrip=True), added(1, "-", single_word=True)]},
        {"added_tokens": [added(0, "1", single_word=True, special=False), added(1, " a", rstrip=True)]},
        {"added_tokens": [{**added(0, "<unk>"), "id": len(tokens) - 1}, {**added(0, "ab"), "id": tokens.index("ab")}]},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                            {"SpecialToken": {"id": "Y", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                            "special_tokens": {"X": {"id": "X", "ids": [1, 2], "tokens": ["b", "1"]}, "Y": {"id": "Y", "ids": [0], "tokens": ["a"]}}}},
        {"decoder": sequence("decoders", {"type": "Strip", "content": "a", "start": 2, "stop": 0})},
        {"decoder": sequence("decoders", {"type": "Fuse"}, {"type": "Strip", "content": "a", "start": 3, "stop": 0})},
        {"decoder": sequence("decoders", replace({"String": "ab"}, "<>"), {"type": "Fuse"})},
        {"decoder": {"type": "Strip", "content": "b", "start": 0, "stop": 1}},
    ]
    rng = random.Random(4)
    texts = ["", " ", "a", "<x>", "x", " a", "<x>a<x> b", "a  <x>\t\n<x>1", "é", "-", "b", "xx", "ｘ<x>\u200d", "-1-1", "a a a", "a-b1a-a-b", "x x▁x", "xx xxa-b1"]
    texts += ["".join(rng.choice(["a", "b", "1", "-", " ", "▁", "<x>", "x", "ab", "--", "\u3000", "é"]) for _ in range(rng.randint(2, 9)))
              for _ in range(36)]
    cases = []
    for setting in settings:
        spec = {**base, **setting, "model": {**model, **setting.get("model", {})}}
        tokenizer = Tokenizer.from_str(json.dumps(spec))
        for token in setting.get("added_tokens", []):
            token["id"] = tokenizer.token_to_id(token["content"])  # the model's own if it has the token
        rows = []
        for text in texts:
            ids = tokenizer.encode(text).ids
            tokenizer.encode_special_tokens = True
            plain = tokenizer.encode(text).ids
            tokenizer.encode_special_tokens = False
            rows.append([ids, None if plain == ids else plain, tokenizer.decode(ids, skip_special_tokens=False)])
        if "vocab" in setting.get("model", {}):
            setting = {**setting, "model": {**setting["model"], "vocab": {"<0x78>": len(tokens)}}}  # merged in the test
        cases.append({"setting": setting, "rows": rows})
    return {"base": base, "texts": texts, "cases": cases}


def write(name, value):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.replace('{"text":', '\n{"text":').replace('{"setting":', '\n{"setting":')
    (HERE / name).write_text(text + "\n", encoding="utf-8")


def main():
    out = {"llama3": goldens(save(byte_level(LLAMA3_SPLIT, LLAMA3_SPECIAL, "sequence"), "llama3"), LLAMA3_SPECIAL),
           "llama4": goldens(save(byte_level(LLAMA4_SPLIT, LLAMA4_SPECIAL, "template"), "llama4"), LLAMA4_SPECIAL)}
    tokenizer, merges = byte_fallback()
    tokenizer = save(tokenizer, "byte_fallback")
    path = HERE / "byte_fallback" / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["model"]["merges"] = merges
    path.write_text(json.dumps(spec, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    out["byte_fallback"] = goldens(Tokenizer.from_file(str(path)), ["<s>", "</s>", "<unk>"])
    write("goldens.json", out)
    write("components.json", component_cases())


if __name__ == "__main__":
    main()
