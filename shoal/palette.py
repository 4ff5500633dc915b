"""Colors and markers of all figures, of the report's and of what experiments draw themselves."""

from __future__ import annotations

# Okabe and Ito's palette without its yellow, which is too pale on white, then dark hues that stay apart from it for
# the common kinds of color blindness. GD is always the near-black one: it is the yardstick.
GD_COLOR = "#222222"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288", "#44AA99")
# (matplotlib's marker, plotly's symbol): a second way to tell methods apart, where color is not enough.
SYMBOLS = (
    ("o", "circle"),
    ("s", "square"),
    ("D", "diamond"),
    ("^", "triangle-up"),
    ("v", "triangle-down"),
    ("P", "cross"),
    ("X", "x"),
    ("p", "pentagon"),
)
