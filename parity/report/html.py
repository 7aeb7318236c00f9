"""A report as one page that needs nothing else: no server, no network."""

from parity.records import Report


def page(report: Report) -> str:
    """The page."""
    return repr(report)
