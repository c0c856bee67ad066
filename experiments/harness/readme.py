"""The lines on the claims in the README, made from verdicts.json: how many hold on each data set, and two numbers."""

from pathlib import Path

from experiments.harness import protocol, report

BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"
PAGE = "docs/claims.md"


def lines(verdicts: Path) -> str:
    """The claims as a list in Markdown.

    Args:
      verdicts: a verdicts.json.

    Returns:
      For each data set, how many claims have which verdict and how many parts are decided. Then the numbers of the
      first claim that holds and of the first one that is refuted or refuted in part, with a link to all.
    """
    claims = report.read(verdicts)
    found = [_first(claims, *names) for names in ((protocol.HOLDS,), (protocol.REFUTED, protocol.REFUTED_IN_PART))]
    last = [*filter(None, found), f"[All claims]({PAGE})."]
    return "\n".join(f"* {line}" for line in (*report.tallies(claims), " ".join(last)))


def update(readme: Path, verdicts: Path) -> None:
    """Replace the lines in the README.

    Raises:
      ValueError: if the README does not have the marks `BEGIN` and `END`, each once and in this order. Nothing is
        written then.
    """
    text = readme.read_text(encoding="utf-8")
    readme.write_text(replaced(text, lines(verdicts)), encoding="utf-8")


def replaced(text: str, content: str) -> str:
    """The text with the content between the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or text.count(BEGIN) + text.count(END) > 2:
        raise ValueError(f"update(readme=...): expected the line {BEGIN!r} and after it {END!r}, each once.")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def _first(claims: list[report.Claim], *verdicts: str) -> str:
    """The first claim with one of these verdicts on its first data set, as a sentence; empty if there is none."""
    for claim in claims:
        if claim.results[0].verdict in verdicts:
            number = report.said(claim)
            doubt = f" ({number.verdict})" if number.verdict else ""
            return f"{claim.results[0].verdict.capitalize()}: {claim.claim} ({number.words}{doubt})."
    return ""
