"""Texts that tokenizers disagree on, for hypothesis."""

from hypothesis import strategies as st

SPECIAL = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜",
    "｜>",
    "<|endoftext|>",
]
CODE = [
    "def f(x):\n\treturn x**2\n",
    "for (int i=0;i<n;++i){",
    "#include <vector>\r\n",
    "a->b::c",
    "'''",
    "/* x */",
    "0x1F",
    "1e-5",
]
EMOJI = ["👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "\u200d", "\ufe0f"]
PIECES = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(categories=["Lo", "Mn", "Nd", "So", "Sc"]), max_size=8),
    st.text(" \t\n\r\u00a0\u3000\u2028", max_size=12),
    st.text(st.characters(codec="utf-8", categories=["Cc", "Cf"]), max_size=6),
    st.text("0123456789.,", max_size=12),
    st.sampled_from(
        SPECIAL + CODE + EMOJI + ["I'm", "don't", "HELLOworld", "naïve", "北京", "日本語", "한국어", "ﬁ", "İ"]
    ),
)
TEXTS = st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=6)
