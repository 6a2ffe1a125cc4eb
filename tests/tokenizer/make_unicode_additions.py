"""Prints runtime/tokenizer/unicode_additions.h: what Unicode gained after version 14.

PCRE2 10.42, the oldest that lighter builds with, knows Unicode 14; the regex engine of the `tokenizers`
package knows a later one. Run with a Python whose unicodedata is version 14 or older (3.11 is) and the
`tokenizers` package installed:  python make_unicode_additions.py > runtime/tokenizer/unicode_additions.h
"""

import unicodedata

from tokenizers import Regex, pre_tokenizers

CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co".split()
REFUSED = {"Mn"}
SURROGATES = range(0xD800, 0xE000)


def members(category):
    """The code points that the package's engine puts into a general category."""
    text = [chr(c) for c in range(0x110000) if c not in SURROGATES]
    split = pre_tokenizers.Split(Regex(r"\p{%s}" % category), "removed", invert=True)
    return {ord(piece) for piece, _ in split.pre_tokenize_str("".join(text))}


def ranges(code_points):
    out = []
    for c in sorted(code_points):
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def main():
    assert tuple(map(int, unicodedata.unidata_version.split("."))) <= (14, 99), unicodedata.unidata_version
    old = {c: set() for c in CATEGORIES}
    for c in range(0x110000):
        old.setdefault(unicodedata.category(chr(c)), set()).add(c)
    rows = []
    for category in CATEGORIES:
        new = members(category)
        gone = old[category] - new
        # Two-letter names that lost members cannot be completed by adding: regex_dialect.cpp refuses them.
        assert not gone or category in REFUSED, f"{category} lost {[hex(c) for c in sorted(gone)]}"
        rows += [(category, first, last) for first, last in ranges(new - old[category])]
    print("""// Made by tests/tokenizer/make_unicode_additions.py; do not edit.
//
// The code points that general categories gained between Unicode 14 (PCRE2 10.42) and the version of the
// reference tokenizer's regex engine. With a newer PCRE2 they are merely said twice.
#pragma once

#include <array>

namespace lighter::tokenizer {

struct CategoryRange {
  const char* category;
  char32_t first;
  char32_t last;
};
""")
    print("// clang-format off")
    print(f"inline constexpr std::array<CategoryRange, {len(rows)}> kUnicodeAdditions = {{{{")
    for i in range(0, len(rows), 3):
        print("    " + " ".join('{"%s", 0x%X, 0x%X},' % row for row in rows[i : i + 3]))
    print("}};\n// clang-format on\n\n}  // namespace lighter::tokenizer")


if __name__ == "__main__":
    main()
