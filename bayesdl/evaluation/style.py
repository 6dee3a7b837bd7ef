"""Colours and the style sheet of reports, shared by Matplotlib figures and the HTML page.

Figures are drawn with the light colours; on the page each of these becomes a CSS variable, so that one SVG serves both
colour schemes. Series colours are those of Okabe and Ito (2008), which stay apart for all common kinds of colour
blindness; every series also has its own marker and dash.
"""

from __future__ import annotations

INK = "#1b2430"
MUTED = "#5b6675"
GRID = "#dfe3e8"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#9a6a00", "#56b4e9", "#4d4d4d", "#7a5195")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))

_LIGHT = {
    "page": "#f6f7f9", "card": "#ffffff", "ink": INK, "muted": MUTED, "grid": GRID, "line": "#e3e7ec",
    "accent": "#0b5cad", "best": "#e7f1fb", "bestink": "#0a4a8c",
}  # fmt: skip
_DARK = {
    "page": "#0f141a", "card": "#171e26", "ink": "#e8edf3", "muted": "#9aa7b5", "grid": "#2b3540", "line": "#28313b",
    "accent": "#6db3f2", "best": "#14304b", "bestink": "#a9d4fb",
}  # fmt: skip
_DARK_SERIES = ("#4ea8e6", "#ff8a4c", "#2fc79a", "#e39cc4", "#e0b04a", "#8fd0f5", "#b8c0c9", "#b79bd6")


def colour(index: int) -> str:
    """Colour of series `index`; they repeat after eight, markers and dashes with them."""
    return SERIES[index % len(SERIES)]


def set_colour(index: int) -> str:
    """Colour of out-of-distribution set `index`: the series colours from the far end, which few methods reach."""
    return SERIES[(len(SERIES) - 1 - index) % len(SERIES)]


def css_names() -> dict[str, str]:
    """The CSS variable that stands for each colour a figure is drawn with."""
    names = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
    return names | {value: f"var(--s{i})" for i, value in enumerate(SERIES)}


def _variables(colours: dict[str, str], series: tuple[str, ...]) -> str:
    pairs = [*colours.items(), *((f"s{i}", value) for i, value in enumerate(series))]
    return "".join(f"--{name}:{value};" for name, value in pairs)


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font-variant-numeric:tabular-nums;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans","DejaVu Sans",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 56px}
header{margin-bottom:24px}
.eyebrow{margin:0 0 6px;color:var(--muted);font-size:14px;max-width:none}
h1{margin:0;font-size:32px;line-height:1.2;letter-spacing:-.015em}
h2{margin:0 0 4px;font-size:20px;line-height:1.3;letter-spacing:-.005em}
h3{margin:0;font-size:15px;line-height:1.4;overflow-wrap:anywhere}
p{margin:0 0 10px;max-width:74ch}
.lead{color:var(--muted);font-size:15px}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:24px;margin:0 0 20px}
.verdict{border-left:5px solid var(--accent)}
.verdict p:first-of-type{font-size:20px;line-height:1.45;max-width:64ch;margin-top:8px}
.verdict ul{margin:12px 0 0;padding:0 0 0 20px;max-width:80ch}
.verdict li{margin:6px 0}
.scroll{position:relative;overflow-x:auto;margin:12px -24px 0}
.scroll:focus-visible{outline:3px solid var(--accent);outline-offset:-3px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:15px}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.said{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.skip{position:absolute;left:12px;top:-60px;padding:8px 14px;background:var(--card);color:var(--accent);z-index:2}
.skip:focus{top:12px}
nav{margin:0 0 20px;font-size:14px}
nav ul{display:flex;flex-wrap:wrap;gap:2px 18px;margin:0;padding:0;list-style:none}
nav a{display:inline-block;padding:3px 0;color:var(--accent)}
a:focus-visible,summary:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
h2{scroll-margin-top:16px}
.under{color:var(--muted);font-size:13.5px;line-height:1.5;margin:12px 0 0;max-width:110ch}
th,td{padding:10px 12px;text-align:right;vertical-align:top;white-space:nowrap;border-bottom:1px solid var(--line)}
thead th{font-weight:600;vertical-align:bottom;font-size:14px}
thead .group{color:var(--muted);font-weight:600;font-size:13px;text-align:left;padding:4px 0 0 30px;border-bottom:0}
thead .group span{display:block;padding:0 12px 5px 0;text-align:center;border-bottom:2px solid var(--grid)}
thead tr:first-child:not(:last-child) td{border-bottom:0}
thead .unit{display:block;color:var(--muted);font-weight:400;font-size:12.5px}
tbody tr:last-child>*{border-bottom:0}
tr>:first-child{text-align:left;position:sticky;left:0;padding-left:24px;background:var(--card);z-index:1}
tr>:last-child{padding-right:24px}
th[scope=row]{font-weight:600;white-space:normal;overflow-wrap:anywhere;min-width:172px;max-width:230px}
th[scope=row] small{display:block;font-weight:400;color:var(--muted);font-size:12.5px}
.dot{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:8px;vertical-align:baseline}
.value{display:inline-block;padding:1px 7px;margin-right:-7px;border-radius:6px}
.best .value{font-weight:700;background:var(--best);color:var(--bestink)}
.range{display:block;color:var(--muted);font-size:12.5px}
.na{color:var(--muted);white-space:normal;font-size:13px}
.failed{text-align:left}
.failed span{display:block;max-width:50vw;overflow-wrap:anywhere}
.bar{display:block;margin:4px 0 0 auto;overflow:visible}
.multiples{display:grid;grid-template-columns:repeat(var(--cols),minmax(0,1fr));gap:22px 20px;margin-top:16px}
.wide{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:20px;margin:0 0 20px}
.wide section{margin:0}
@media (min-width:901px){.wide section:only-child{display:grid;grid-template-columns:1fr minmax(0,600px);gap:28px}}
figure{margin:0;min-width:0}
figure svg.plot{display:block;width:100%;height:auto;max-width:620px}
svg.plot text{font-family:inherit!important}
figcaption{color:var(--muted);font-size:13.5px;line-height:1.5;margin-top:6px}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;padding:0;list-style:none;font-size:13.5px}
.swatch{display:inline-block;width:14px;height:10px;border-radius:2px;margin-right:6px}
details{margin-top:14px}
summary{cursor:pointer;color:var(--accent);font-size:14px}
dl{margin:12px 0 0;font-size:14px}
dl div{display:grid;grid-template-columns:minmax(120px,240px) 1fr;gap:2px 20px;padding:5px 0}
dt{font-weight:600;overflow-wrap:anywhere}
dd{margin:0;color:var(--muted);max-width:80ch}
.plain{margin:14px 0 0;padding:0 0 0 18px;font-size:14px;color:var(--muted);max-width:90ch}
footer{color:var(--muted);font-size:13px;padding:4px 2px}
@media (max-width:640px){
main{padding:20px 12px 36px}
h1{font-size:25px}
section{padding:18px 16px;border-radius:12px}
.verdict p:first-of-type{font-size:18px}
.scroll{margin:12px -16px 0}
th,td{padding:9px 9px}
tr>:first-child{padding-left:16px}
tr>:last-child{padding-right:16px}
th[scope=row]{min-width:148px;font-size:14px}
dl div{grid-template-columns:1fr}
.multiples{grid-template-columns:1fr}
}
@media (min-width:641px) and (max-width:900px){.multiples{grid-template-columns:1fr 1fr}}
@media print{
nav,.skip,section:has(details){display:none}
body{background:#fff;font-size:12px}
main{max-width:none;padding:0}
h1{font-size:22px}
h2{font-size:15px}
h3{font-size:11.5px}
h2,h3{break-after:avoid}
.verdict p:first-of-type{font-size:15px}
section{padding:12px 14px;margin:0 0 10px;border-color:#ccc;break-inside:avoid}
figure,tr{break-inside:avoid}
table,thead th{font-size:11.5px}
.range,.under,.plain,dl,figcaption,.lead,.eyebrow,thead .unit,thead .group,th[scope=row] small{font-size:10px}
th,td{padding:4px 8px}
th[scope=row]{min-width:118px;font-size:11.5px;overflow-wrap:break-word}
.scroll{overflow:visible;margin:6px 0 0}
.multiples{grid-template-columns:repeat(var(--cols),minmax(0,1fr));gap:10px 12px}
}
"""


def style_sheet() -> str:
    """The page's whole CSS."""
    light, dark = _variables(_LIGHT, SERIES), _variables(_DARK, _DARK_SERIES)
    return f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"
