"""The table of claims in the README, made from verdicts.json: one line for each claim."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.harness import forest, protocol, report

BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"


def table(verdicts: Path) -> str:
    """The claims as a table in Markdown.

    Args:
      verdicts: a verdicts.json.

    Returns:
      A line for each claim: the effect and the interval of its first part on its first data set, and for each data set
      the verdict on the claim, with the numbers of parts that hold and that are refuted.
    """
    claims = report.read(verdicts)
    datasets = report.datasets(claims)
    rows = [["claim", "first part: effect [interval], threshold", *(f"verdict on {name}" for name in datasets)]]
    rows.append(["---"] * len(rows[0]))
    for claim in claims:
        part = claim.results[0].parts[0]
        effect = f"{part.name}: {forest.numbers(part)}, {forest.limit(part)}"
        found = {result.dataset: _verdict(result) for result in claim.results}
        rows.append([claim.claim, effect, *(found.get(name, "not run") for name in datasets)])
    return "\n".join(_line(row) for row in rows)


def update(readme: Path, verdicts: Path) -> None:
    """Replace the table in the README.

    Raises:
      ValueError: if the README does not have the marks `BEGIN` and `END`, each once and in this order. Nothing is
        written then.
    """
    text = readme.read_text(encoding="utf-8")
    readme.write_text(replaced(text, table(verdicts)), encoding="utf-8")


def replaced(text: str, content: str) -> str:
    """The text with the content between the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or text.count(BEGIN) + text.count(END) > 2:
        raise ValueError(f"update(readme=...): expected the line {BEGIN!r} and after it {END!r}, each once.")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def _verdict(result: report.Result) -> str:
    found, number = Counter(part.verdict for part in result.parts), len(result.parts)
    if len(found) == 1:
        return f"{result.verdict} ({number} of {number})"
    return f"{result.verdict} ({found[protocol.HOLDS]} hold, {found[protocol.REFUTED]} refuted of {number})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
