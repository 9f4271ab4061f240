"""Texts that tokenizers disagree on, if they disagree on any."""

from __future__ import annotations

import random
from collections.abc import Iterable

_TEXTS = (
    "Hello, world!",
    " leading and trailing ",
    "  two  spaces   three    four     five",
    "\t\ttabs\tand\n\nnewlines\r\n\r\n   \n mixed \t \n",
    "x" + " " * 97 + "y" + "\n" * 33 + "z" + "\t" * 19,
    "emoji 😀👨‍👩‍👧‍👦🏳️‍🌈🚀👩🏽‍🚒 ❤️‍🔥 1️⃣",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "Z\u0351\u036b\u0343a\u0321\u0353l\u0348g\u0328o\u0489 \u1100\u1161\u11a8 \uac01 \u212b \ufb01 \ufb00 ǅ ß ẞ İ ı",
    "漢字かな交じり文と한국어 그리고 ไทย и русский हिन्दी ქართული አማርኛ",
    "עברית \u200fمرحبا بالعالم\u200e ١٢٣ \u202eright to left\u202c \u2067isolated\u2069",
    "digits 1234567890 3.14159 1,000,000 0x1F 1e-9 ½ ² Ⅷ ٣ ১২৩ 0000 12 123 1234 12345",
    "It's we'll THEY'RE i'M don't 'tis 'S I’m don’t",
    "if (x<=0x7F){return a[i]->b&&!c;} // --== ~~ __init__ $%^&* λ: #!/bin/sh",
    "def f(a, *, b=None):\n    return {**a, 'b': b}  # comment\n\n\nclass A:\n\tpass\n",
    '{"a": [1, 2.5, null, true], "b": {"c": "d\\n\\u00e9"}}',
    "https://example.org/?q=a%20b&c=d#e  name@host.tld  C:\\Users\\x",
    "\u200bzero\u200dwidth\ufeff nbsp\u00a0em\u2003ideographic\u3000\u2028line\u2029paragraph\u0085next",
    "\x01\x02\x07\x08\x0b\x0c\x1b[31m\x7f control \u0080\u009f",
    "\u0000 a null \u0000",
    "\U000e0041\U0010ffff\ufffd\ufffe\ue000 private and non-characters \U0001f9ff\U0002070e",
    "▁▁ lower one eighth blocks ▁a <0x41> <0x0A> <unk> </s> <s>",
    "<div><p>html &amp; entities &#233;</p></div>\n\n\n\n<table>",
    "a" * 300,
    "ab" * 400,
    "=" * 257 + "-" * 129 + "." * 65 + "!" * 33,
    "“quotes” ‘single’ … — – « » „low“ ¿qué? ¡hola!",
    "\n",
    " ",
    "\r\n",
    "\n\n\n \n\t\n▁\n" + "\n" * 31 + " " + "\n" * 32,
    "MiXeD cAsE wOrDs ALLCAPS camelCase snake_case kebab-case PascalCase123abc",
    "ſ ŉ ǰ ΐ ΰ ﬃ Ω K Å ①②③ ㎏ ﹏ ｆｕｌｌ　ｗｉｄｔｈ",
)  # fmt: skip
_RANDOM, _LENGTH = 12, 160
_RANGES = ((0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE00),
           (0x2000, 0x2200), (0x3040, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F300, 0x1F700))  # fmt: skip


def adversarial(special: Iterable[str]) -> list[str]:
    """The texts, with a model's own special tokens spelled by a user, whole, cut short and glued together, and random
    characters of many scripts (the same ones every time)."""
    spelled = [token for token in special if token.strip()][:24]
    texts = list(_TEXTS)
    if spelled:
        texts += ["".join(f"{token}x" for token in spelled), " ".join(token[:-1] for token in spelled)]
        texts += [f"{token} {token}\n{token}{token}  {token[1:]} {token.upper()}" for token in spelled[:8]]
    rng = random.Random(4)
    for _ in range(_RANDOM):
        spans = (rng.choice(_RANGES) for _ in range(_LENGTH))
        characters = (chr(rng.randrange(*span)) if rng.random() < 0.8 else rng.choice(" \n\t") for span in spans)
        texts.append("".join(characters))
    return texts
