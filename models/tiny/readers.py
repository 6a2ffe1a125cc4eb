"""Readers that turn unpacked packages into documents: lists of clean paragraphs.

A document is (name, [paragraph, ...]); a paragraph is one line of plain ASCII prose
(verse keeps its line breaks). Code, tables, menus and signature lists are dropped.
"""

import gzip
import re
import struct
import subprocess
import unicodedata
import zlib
from pathlib import Path

_PUNCT = {
    "\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"',
    "\u2013": "-", "\u2014": "--", "\u2015": "--", "\u2212": "-", "\u2026": "...", "\u00a0": " ",
    "\u2022": " ", "\u00b6": " ", "\u00ad": "", "\u200b": "", "\ufeff": "", "\u00e6": "ae",
    "\u00c6": "Ae", "\u0153": "oe", "\u00d7": "x", "\u2192": "->",
}  # fmt: skip
_PUNCT_RE = re.compile("[" + "".join(_PUNCT) + "]")
_COMMON = set(
    "the a an of to and in is that it for on with as be this are by or not from at you was which can his "
    "i my your he her they but have has had will if when all we so one there their its were him me no "
    "these may must should do does been more any than then into would what who".split()
)


def ascii_text(text: str) -> str:
    """Plain ASCII, with typographic marks spelled out; characters without a likeness vanish."""
    text = _PUNCT_RE.sub(lambda m: _PUNCT[m.group()], text)
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return text


def clean(text: str) -> str:
    return re.sub(r"\s+", " ", ascii_text(text)).strip()


def is_prose(p: str, min_words: int = 10) -> bool:
    """Whether a paragraph reads as English sentences rather than code, signatures or a menu."""
    if not 40 <= len(p) <= 4000 or p[-1] not in ".!?:;\"')" or not (p[0].isupper() or p[0] in "\"'("):
        return False
    words = p.split()
    if len(words) < min_words:
        return False
    letters = sum(c.isalpha() for c in p)
    if letters < 0.84 * (len(p) - len(words) + 1):
        return False
    odd = sum(p.count(c) for c in "_/\\{}=<>|#@$%^~`[]*+&")
    if odd > 0.012 * len(p):
        return False
    common = sum(w.strip(".,;:!?\"'()").lower() in _COMMON for w in words)
    return 0.22 * len(words) <= common <= 0.8 * len(words)


# -- books ------------------------------------------------------------------------------------


def book(name: str, text: str, per_doc: int = 24, strip_gutenberg: bool = True):
    """A plain-text book with blank lines between paragraphs, in documents of per_doc paragraphs."""
    text = text.replace("\r\n", "\n")
    if strip_gutenberg:
        m = re.search(r"\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG[^\n]*\n", text)
        text = text[m.end() :] if m else text
        m = re.search(r"\n[^\n]*(?:\*\*\* ?)?END OF TH(?:E|IS) PROJECT GUTENBERG|\nEnd of (?:the )?Project Gutenberg", text, re.I)
        text = text[: m.start()] if m else text
    paras = []
    for block in re.split(r"\n\s*\n", text):
        p = clean(re.sub(r"[_*]", "", block))
        if re.search(r"gutenberg|etext|e-text|illustration|www\.|http", p, re.I):
            continue
        if len(p) > 20 and sum(c.isalpha() for c in p) > 0.7 * len(p.replace(" ", "")) and p[-1] in ".!?\"',;:-)":
            paras.append(p)
    for i in range(0, len(paras), per_doc):
        yield f"{name}/{i // per_doc}", paras[i : i + per_doc]


def verse(name: str, text: str, per_doc: int = 40):
    """A play or a poem: blocks keep their line breaks, indentation goes."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = [clean(x.replace("_", "")) for x in block.split("\n")]
        lines = [x for x in lines if x]
        if lines and sum(map(len, lines)) > 30 and not re.search(r"gutenberg|etext|www\.|http", block, re.I):
            blocks.append("\n".join(lines))
    for i in range(0, len(blocks), per_doc):
        yield f"{name}/{i // per_doc}", blocks[i : i + per_doc]


def r_strings(path: Path):
    """The character vectors in an R lazy-load database: one list of strings per stored object."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        z = zlib.decompressobj()
        obj = z.decompress(data[at + 4 :])
        at = len(data) - len(z.unused_data)
        strings, i = [], 0
        # CHARSXP: flag word whose low byte is 9, then a length, then the bytes.
        while i + 8 <= len(obj):
            flags, n = struct.unpack(">II", obj[i : i + 8])
            if flags & 0xFF == 9 and flags >> 20 == 0 and i + 8 + n <= len(obj):
                strings.append(obj[i + 8 : i + 8 + n].decode("utf-8", "replace"))
                i += 8 + n
            else:
                i += 1
        yield strings


def jargon(path: Path):
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    text = re.sub(r"\n *(:[^\n:]+:[^\n]*)\n", r"\n\n", text.replace("\u00a0", " "))  # entry heads
    paras = [clean(re.sub(r"[{}_]", "", b)) for b in re.split(r"\n\s*\n", text)]
    paras = [re.sub(r"^\d+\. ", "", p) for p in paras]
    paras = [p for p in paras if is_prose(p)]
    for i in range(0, len(paras), 24):
        yield f"jargon/{i // 24}", paras[i : i + 24]


# -- scripture --------------------------------------------------------------------------------


def kjv(program: Path, data_dir: Path):
    """The King James text, read by the package's own program; a document is a chapter."""
    run = subprocess.run(
        [program, "-f", "-l99999", "-p", data_dir, "gen1:1-rev22:21"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    chapters = {}
    for line in run.stdout.splitlines():  # "Ge1:1 In the beginning ..."
        where, _, text = line.partition(" ")
        chapters.setdefault(where.partition(":")[0], []).append(clean(re.sub(r"[\[\]<>*]", "", text)))
    for title, verses in chapters.items():
        yield f"kjv/{title}", [" ".join(verses[i : i + 5]) for i in range(0, len(verses), 5)]


def sword(module: Path):
    """A SWORD zText module (verse index -> zlib blocks of OSIS markup)."""
    for part in ("ot", "nt"):
        blocks = struct.iter_unpack("<III", (module / f"{part}.bzs").read_bytes())
        raw = (module / f"{part}.bzz").read_bytes()
        texts = [zlib.decompress(raw[o : o + n]) if n else b"" for o, n, _ in blocks]
        verses = []
        for b, start, size in struct.iter_unpack("<IIH", (module / f"{part}.bzv").read_bytes()):
            osis = texts[b][start : start + size].decode("utf-8", "replace") if b < len(texts) else ""
            osis = re.sub(r"<(note|title)\b.*?</\1>", "", osis, flags=re.S)
            osis = re.sub(r"<(?:lb?|p|div|lg)\b[^>]*>", " ", osis)
            v = clean(re.sub(r"<[^>]+>", "", osis))
            if len(v) > 3:
                verses.append(re.sub(r"\s+([.,;:!?])", r"\1", v))
        paras = [" ".join(verses[i : i + 5]) for i in range(0, len(verses), 5)]
        for i in range(0, len(paras), 8):
            yield f"web/{part}/{i // 8}", paras[i : i + 8]


# -- documentation ----------------------------------------------------------------------------

_DROP = "script style pre code-block table nav header footer form button svg math aside select noscript".split()
_DROP_CLASS = re.compile(r"sphinxsidebar|related|toc|highlight|footer|navheader|navfooter|navigation|sidebar|breadcrumb|headerlink|menu|SIntrapara|RktBlk")
_BLOCK = {"p", "li", "dd", "dt", "div", "blockquote", "ul", "ol", "dl", "section", "h1", "h2", "h3", "h4", "h5", "h6", "td", "body", "article", "main"}  # fmt: skip
_SKIP_FILE = re.compile(r"genindex|modindex|search\.html|/changelog|changes|release.?notes|/_modules/|/_sources/|licen[cs]e|copyright|\.(de|es|fr|ja|ko|tr|ru|da|pt-br|zh-cn)\.|/(de|es|fr|ja|ko|tr|ru|da|pt-br|zh-cn|pl|it)/|search_index|/src/", re.I)  # fmt: skip


def html(path: Path):
    """The prose paragraphs of one HTML page."""
    from lxml import html as lx

    try:
        root = lx.fromstring(path.read_bytes(), parser=lx.HTMLParser(encoding="utf-8", remove_comments=True))
    except Exception:  # an empty or broken page holds no prose
        return []
    for el in list(root.iter()):
        if not isinstance(el.tag, str):
            continue
        cls = el.get("class") or ""
        if el.tag in _DROP or (cls and el.tag not in ("html", "body") and _DROP_CLASS.search(cls)):
            if el.getparent() is not None:
                el.drop_tree()
    out = []
    for el in root.iter("p", "li", "dd", "blockquote", "div"):
        if el.tag != "p" and any(isinstance(c.tag, str) and c.tag in _BLOCK for c in el):
            continue
        out.append(clean(el.text_content()))
    return [p for p in out if is_prose(p)]


def pod(path: Path):
    paras = []
    for block in re.split(r"\n\s*\n", path.read_text("utf-8", "replace")):
        if block[:1] in (" ", "\t", "=", "") or block.startswith("\n"):
            continue
        for _ in range(2):
            block = re.sub(r"[A-Z]<{1,2}\s?([^<>]*?)\s?>{1,2}", r"\1", block)
        paras.append(clean(block))
    return [p for p in paras if is_prose(p)]


def docs(root: Path):
    """Every HTML page or POD under an unpacked documentation package, one document each."""
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        rel = str(path.relative_to(root))
        if _SKIP_FILE.search(rel) or path.stat().st_size > 4_000_000:
            continue
        if path.suffix in (".html", ".htm", ".xhtml"):
            yield rel, html(path)
        elif path.suffix == ".pod":
            yield rel, pod(path)
