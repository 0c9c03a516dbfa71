"""How a run looks: HTML of its figures and texts."""

from __future__ import annotations

from html import escape

from runs import Piece, Row, Run, Side

NAMES = {"network": "drafted by the network", "copy": "copied from the text", "assistant": "drafted by the small model"}
OWN = "written by the target"

CSS = """
.sf {--network: 34 160 90; --copy: 40 120 220; --assistant: 150 80 200; --wrong: 214 60 60; font-size: 15px}
.sf * {box-sizing: border-box}
.sf mark {color: inherit; padding: 1px 0; border-radius: 3px; background: none}
.sf .network {background: rgb(var(--network) / .26)}
.sf .copy {background: rgb(var(--copy) / .26)}
.sf .assistant {background: rgb(var(--assistant) / .26)}
.sf .key {display: flex; flex-wrap: wrap; gap: 6px 8px; font-size: 13px}
.sf .key mark {padding: 2px 8px}
.sf .instead {border-bottom: 1px dotted rgb(var(--wrong) / .8); position: relative; cursor: help; outline: none}
.sf .instead:hover::after, .sf .instead:focus::after {content: "not taken: " attr(data-drafts); position: absolute;
  left: 0; top: 100%; z-index: 9; padding: 3px 8px; border-radius: 6px; background: #222; color: #fff; font-size: 12px;
  line-height: 1.4; width: max-content; max-width: 190px; white-space: pre-wrap}
.sf .tiles {display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 8px; margin-bottom: 10px}
.sf .tile {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px}
.sf .tile b {display: block; font-size: 21px; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums}
.sf .tile span {font-size: 12px; opacity: .75}
.sf .tile.same b {color: rgb(var(--network))}
.sf .tile.other b {color: rgb(var(--wrong))}
.sf .row {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 12px; margin-top: 10px}
.sf .prompt {font-weight: 600; margin-bottom: 6px; overflow-wrap: anywhere}
.sf .pair {display: grid; grid-template-columns: 1fr 1fr; gap: 14px}
.sf .pair h4 {margin: 0 0 3px; font-size: 12px; font-weight: 500; opacity: .75}
.sf .text {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55; min-height: 1.55em}
.sf .bars {display: flex; align-items: flex-end; gap: 1px; height: 26px; margin-top: 8px; overflow: hidden}
.sf .bars i {flex: 0 1 7px; background: rgb(var(--network) / .75); min-width: 1px}
.sf .bars i.none {background: rgb(128 128 128 / .5)}
@media (max-width: 640px) {.sf .pair {grid-template-columns: 1fr} .sf .tiles {grid-template-columns: 1fr 1fr}}
"""


def page(run: Run) -> str:
    prompts = zip(run.settings.prompts, run.speculative.rows, run.plain.rows, strict=True)
    rows = "".join(texts(prompt, ours, theirs) for prompt, ours, theirs in prompts)
    return f'<div class="sf">{tiles(run)}{key(run.speculative)}{rows}</div>'


def tiles(run: Run) -> str:
    ours, theirs = run.speculative, run.plain
    shown = [
        tile(figure(ours.tokens_per_second, "{:.1f}"), "tokens/s with drafts"),
        tile(figure(theirs.tokens_per_second, "{:.1f}"), "tokens/s, plain generate"),
        tile(figure(ours.tokens_per_pass, "{:.2f}"), "tokens per pass (plain: 1)"),
        sign(run),
    ]
    return f'<div class="tiles">{"".join(shown)}</div>'


def sign(run: Run) -> str:
    so_far = "" if run.is_complete else " so far"
    if run.identical is None:
        return tile("...", "the same text?")
    if run.identical:
        return tile(f"identical{so_far}", "to plain generate, token by token", "same")
    return tile(f"different{so_far}", "from plain generate", "other")


def tile(value: str, name: str, kind: str = "") -> str:
    return f'<div class="tile {kind}"><b>{value}</b><span>{name}</span></div>'


def figure(value: float | None, how: str) -> str:
    return "..." if value is None else how.format(value)


def key(side: Side) -> str:
    """The meaning of the colours that are there."""
    there = {piece.source for row in side.rows for piece in row.pieces if piece.source}
    marks = "".join(
        f'<mark class="{escape(source)}">{escape(NAMES.get(source, source))}</mark>' for source in sorted(there)
    )
    instead = '<mark><span class="instead" data-drafts="the drafts">in place of a wrong draft</span></mark>'
    return f'<div class="key">{marks}<mark>{OWN}</mark>{instead}</div>'


def texts(prompt: str, ours: Row, theirs: Row) -> str:
    return (
        f'<div class="row"><div class="prompt">{escape(prompt)}</div><div class="pair">'
        f'<div><h4>with drafts</h4><div class="text ours">{"".join(map(marked, ours.pieces))}</div>{bars(ours)}</div>'
        f'<div><h4>plain generate</h4><div class="text plain">{escape(theirs.shown)}</div></div></div></div>'
    )


def marked(piece: Piece) -> str:
    text = escape(piece.text)
    if not text:  # a special token, or the beginning of a character
        return ""
    if piece.source is not None:
        return f'<mark class="{escape(piece.source)}">{text}</mark>'
    if piece.rejected:
        return f'<span class="instead" tabindex="0" data-drafts="{escape(piece.rejected)}">{text}</span>'
    return text


def bars(row: Row) -> str:
    """What each round added to a row, as the height of a bar: 1 and the accepted drafts."""
    most = max((drafted for _, drafted in row.rounds), default=0)
    drawn = "".join(
        f'<i class="{"" if accepted else "none"}" style="height: {100 * (1 + accepted) / (1 + most):.0f}%" '
        f'title="{accepted} of {drafted} drafts accepted"></i>'
        for accepted, drafted in row.rounds
    )
    return f'<div class="bars" title="tokens of each round">{drawn}</div>'
