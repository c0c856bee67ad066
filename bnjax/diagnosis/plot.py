"""The figure of a diagnosis: a row for each layer shows its statistics next to their limits."""

from collections.abc import Callable
from typing import Any

import numpy as np

# The colours of Okabe and Ito (2008), which colour-blind readers can distinguish; the markers differ as well.
_STYLES = {"error": ("#D55E00", "s"), "warning": ("#E69F00", "D"), "note": ("#0072B2", "^")}
_STYLES["no finding"] = ("0.45", "o")


def draw(figure: Any, diagnosis: Any, limits: Callable[[Any], tuple[Any, Any]]) -> None:
    """Draw two panels with a row for each layer: the range, the middle half, and the median of its features.

    Args:
      figure: an empty `matplotlib.figure.Figure`.
      diagnosis: a `Diagnosis`.
      limits: function from an effective batch size to the limits of the shift and of the ratio of variances.
    """
    reports, findings = diagnosis.layers.values(), diagnosis.findings
    worst = [next((f.severity for f in findings if f.layer == name), "no finding") for name in diagnosis.layers]
    compared = any(report.effective_batch for report in reports)
    left, right = figure.subplots(1, 2, sharey=True)
    if compared:
        rows = [r.shift for r in reports], [r.var_ratio for r in reports]
        labels = "shift of the mean, in standard deviations of the batch", "running variance / variance of the batch"
    else:
        rows = [abs(r.mean) / np.sqrt(abs(r.var) + diagnosis.epsilon) for r in reports], [r.var for r in reports]
        labels = "|running mean|, in running standard deviations", "running variance, in squared units of the input"
        right.axvline(diagnosis.epsilon, color="0.3", linewidth=1, linestyle="--", label="epsilon")
    least, ends = (0.01, 1e-6), ([0.01, 10.0], [0.1, 10.0])  # values below `least` are drawn at it: the axis is a log
    for y, (report, severity) in enumerate(zip(reports, worst, strict=True)):
        colour, marker = _STYLES[severity]
        for panel, axes in enumerate((left, right)):
            if report.effective_batch:
                limit = limits(report.effective_batch)[panel]
                start = 1 / limit if panel else least[0]
                axes.barh(y, limit - start, 1, start, color="0.88", zorder=0)
            values = np.zeros(0) if (row := rows[panel][y]) is None else row[np.isfinite(row)]
            values = np.maximum(values, least[panel])
            if values.size:
                low, quarter, middle, most, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
                axes.hlines(y, low, high, color=colour, linewidth=1.5)
                axes.hlines(y, quarter, most, color=colour, linewidth=5, alpha=0.5)
                axes.plot(middle, y, marker, color=colour, markersize=6)
                ends[panel][:] = min(ends[panel][0], max(low / 1.5, least[panel])), max(ends[panel][1], high * 1.5)
        number = int(report.nonfinite.sum())
        text = f"{number} not finite" if number else "no batch" if compared and not report.effective_batch else ""
        right.text(1.01, y, text, transform=right.get_yaxis_transform(), va="center", fontsize=8, color=colour)
    for panel, axes in enumerate((left, right)):
        axes.set(xscale="log", xlim=ends[panel], xlabel=labels[panel], ylim=(len(reports) - 0.4, -0.6))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(reports)), [short(name, 40) for name in diagnosis.layers], fontsize=8)
    for severity, (colour, marker) in _STYLES.items():
        if severity in worst:
            left.plot([], [], color=colour, marker=marker, label=severity)
    if compared:
        left.bar(1, 0, color="0.88", label="within limits")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    title = f"no findings, {len(reports)} layer{'s' * (len(reports) != 1)}"
    if findings:
        number, of = findings[0].features
        place = f"{findings[0].problem} in {short(findings[0].layer, 48)}, {number} of {of} features"
        if findings[0].damage is not None:
            place += f", the most in feature {findings[0].indices[0]}"
        title = f"{len(findings)} finding{'s' * (len(findings) != 1)}, the worst: {place}"
    title += "\nmedian, middle half and range of each layer's features"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)


def short(name: str, width: int) -> str:
    """The name in `width` characters. Long parts lose their middle, because names differ at the start and the end."""
    whole, longest = name, len(name)
    while len(whole) > width and longest > 5:
        longest -= 1
        head, tail = longest // 2, (longest - 1) // 2
        whole = "/".join(p if len(p) <= longest else f"{p[:head]}…{p[-tail:]}" for p in name.split("/"))
    return whole if len(whole) <= width else f"…{whole[1 - width :]}"
