"""Print cards as tables."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity.judge.card import Card, Finding, differences, keys
from parity.report.terminal import few

MARKS = {
    "found": ("\N{CHECK MARK}", "green"), "odd": ("!", "bold yellow"), "cannot tell": ("?", "cyan"),
    "unknown": ("\N{BALLOT X}", "bold red"),
}  # fmt: skip


def print_cards(console: Console, cards: list[Card]) -> None:
    """One card with how sure each line is, or several side by side; then the proof of each."""
    console.print(_alone(cards[0]) if len(cards) == 1 else _beside(cards))
    if len(cards) > 1:
        keys_that_differ = ", ".join(key for key in differences(cards) if all(card.get(key) for card in cards))
        said = f"they differ in: {keys_that_differ}" if keys_that_differ else "nothing that was asked tells them apart"
        console.print(Text(f"\n{said}", "bold"), soft_wrap=True)
    for card in cards:
        style = "bold green" if card.proved else "bold red"
        verdict = "proved" if card.proved else "not proved"
        console.print(Text.assemble(f"\n{card.backend}: ", (verdict, style), f": {card.proof}"), soft_wrap=True)
        console.print(Text(f"  again:  {card.command}", "cyan"), soft_wrap=True)
    console.print("time: " + ", ".join(f"{card.backend} {card.seconds:.1f} s" for card in cards))
    if len(cards) == 1:
        console.print(
            "\N{CHECK MARK} found: it explains what was measured, and nothing else does; ! found, and no case can say "
            "it; ? several explanations hold; \N{BALLOT X} none does",
            style="dim",
        )


def _alone(card: Card) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column(card.backend, no_wrap=True)
    table.add_column("is", overflow="fold", ratio=3)
    table.add_column("off by", justify="right", no_wrap=True)
    table.add_column("next", overflow="fold", ratio=2)
    table.add_column("shown by", overflow="fold", ratio=2)
    for finding in card.findings:
        rival = f"{few(finding.rival_residual)} {finding.rival}".strip()
        table.add_row(
            mark(finding), finding.key, Text(finding.what), few(finding.residual), Text(rival, "dim"),
            Text(finding.experiment, "dim"),
        )  # fmt: skip
    return table


def _beside(cards: list[Card]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for card in cards:
        table.add_column(card.backend, overflow="fold", ratio=1)
    differ = differences(cards)
    for i, key in enumerate(keys(cards)):
        if i == len(differ):
            table.add_row(Text("the same" if differ else "all the same", "dim"))
        found = [card.get(key) for card in cards]
        if key in differ:
            table.add_row(Text(key, "bold"), *(_cell(finding) for finding in found))
        else:
            table.add_row(Text(key), _cell(found[0]))
    return table


def _cell(finding: Finding | None) -> Text:
    return Text("-", "dim") if finding is None else Text.assemble(mark(finding), " ", finding.what)


def mark(finding: Finding) -> Text:
    """How sure a finding is."""
    return Text(*MARKS[finding.state])
