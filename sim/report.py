"""The parts that every HTML report shares: one self-contained page of tables and inline figures.

Figures are drawn by matplotlib in the light theme's colours and then refer to CSS variables, so
that the page is readable in a light and in a dark browser alike.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

INK, SOFT, RULE, PAPER = "#1c1d21", "#62656e", "#dcdde1", "#fdfdfc"  # as in page.jinja

# Told apart with any common colour blindness; (light theme, dark theme).
SERIES = (
    ("#0072b2", "#56a8e0"),  # blue
    ("#d55e00", "#f08a3c"),  # vermilion
    ("#00876c", "#35c3a0"),  # green
    ("#b4528f", "#e08fc0"),  # purple
    ("#8a6d00", "#d9b93b"),  # ochre
    ("#3d4f9f", "#98a6f0"),  # indigo
    ("#a3262b", "#f07f7f"),  # red
    ("#4e8f1f", "#98d15c"),  # leaf
)
SCALE = (  # an ordered quantity, small to large
    ("#bcd9ec", "#2c4f69"),
    ("#6ea8d3", "#3f7cab"),
    ("#1f6aa5", "#69addd"),
    ("#0b3a66", "#bfe0f7"),
)
GREYS = (("#9a9ea8", "#70747e"), ("#6f737d", "#969aa5"), ("#45484f", "#c0c3cb"))
MISSED = (("#f1d3cf", "#50302d"), ("#e2aba4", "#7a4a44"), ("#c97c72", "#a8675e"))
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": SOFT,
    "axes.labelsize": 11,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "semibold",
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 11,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "besteffort",
    "text.color": INK,
    "xtick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.color": RULE,
    "ytick.labelcolor": SOFT,
    "ytick.left": False,
}

drawn = rc_context(STYLE)  # decorates a function that draws a figure


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, and the tables and figures under it."""

    title: str
    parts: Sequence[Markup]
    text: str = ""


@dataclass(frozen=True)
class Value:
    """A table cell: text, something smaller behind it, and whether it is the one to look at."""

    text: str
    small: str = ""
    mark: bool = False


def badge(profile_kind: str) -> str:
    """What to write beside the title: step times that were not measured are called so."""
    return "" if profile_kind == "measured" else f"{profile_kind} profile"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f} %"


def signed(share: float | None) -> str:
    """A relative error in percent."""
    return "–" if share is None else f"{100 * share:+.1f} %".replace("-", "−")


def quantity(value: float, unit: str) -> str:
    """A value with a prefix of its unit that leaves one to three digits before the point."""
    return EngFormatter(unit=unit, places=2)(value)


def table(header: Sequence[str], rows: Sequence[Sequence[Value | str]], caption: str) -> Markup:
    """An HTML table under its caption; the first column names the rows."""
    head = Markup().join(Markup("<th scope=col>{}</th>").format(name) for name in header)
    body = Markup().join(
        Markup("<tr><th scope=row>{}</th>{}</tr>\n").format(
            _value(row[0]).text, Markup().join(_data(_value(cell)) for cell in row[1:])
        )
        for row in rows
    )
    return Markup(
        "<p class=note>{}</p>\n"
        "<div class=scroll><table><thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table></div>"
    ).format(caption, head, body)


@drawn
def figure(picture: Figure, caption: str, label: str) -> Markup:
    """A matplotlib figure as inline SVG, with a caption and a label for those who cannot see it."""
    buffer = io.StringIO()
    picture.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # repeated in every figure, referred to by none
    svg = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', _opening(label), svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda colour: _variable(colour.group()), svg)
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(Markup(svg), caption)


def provenance(entries: Mapping[str, str]) -> Markup:
    """Where the numbers come from: names and values."""
    pairs = Markup().join(
        Markup("<dt>{}</dt><dd>{}</dd>").format(*pair) for pair in entries.items()
    )
    return Markup("<dl>{}</dl>").format(pairs)


def folded(summary: str, text: str) -> Markup:
    """Preformatted text that opens on demand."""
    return Markup("<details><summary>{}</summary><pre>{}</pre></details>").format(summary, text)


def write_page(
    path: Path,
    *,
    title: str,
    kicker: str,
    verdict: str,
    sections: Sequence[Section],
    profile_kind: str,
) -> None:
    """Write one self-contained HTML file; every text is escaped."""
    source = resources.files("sim").joinpath("page.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    path.write_text(
        page.render(
            title=title,
            kicker=kicker,
            verdict=verdict,
            sections=sections,
            badge=badge(profile_kind),
            light=_declarations(0),
            dark=_declarations(1),
        ),
        encoding="utf-8",
    )


def _value(cell: Value | str) -> Value:
    return Value(cell) if isinstance(cell, str) else cell


def _data(cell: Value) -> Markup:
    small = Markup("<small>{}</small>").format(cell.small) if cell.small else ""
    mark = Markup(" class=mark") if cell.mark else ""
    return Markup("<td{}>{}{}</td>").format(mark, cell.text, small)


def _opening(label: str) -> str:
    return rf'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" \1 role="img" aria-label="{escape(label)}">'  # noqa: E501


def _variable(colour: str) -> str:
    """The CSS variable of a colour of the theme; any other colour stays."""
    return f"var(--{_names()[colour]})" if colour in _names() else colour


@cache
def _names() -> dict[str, str]:
    fixed = {INK: "ink", SOFT: "soft", RULE: "rule", PAPER: "paper"}
    return fixed | {light: f"c{light[1:]}" for light, _ in _palette()}


def _palette() -> tuple[tuple[str, str], ...]:
    return SERIES + SCALE + GREYS + MISSED


def _declarations(theme: int) -> Markup:
    """CSS variables of the palette; theme 0 is light, 1 dark."""
    return Markup("\n".join(f"  --c{pair[0][1:]}: {pair[theme]};" for pair in _palette()))
