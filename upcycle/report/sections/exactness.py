"""Shows how equal the model is to its parent, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.report.drawing.frame import Plot
from upcycle.report.drawing.lines import Series, lines
from upcycle.verification.verdict import LOGITS, said, unseen_ratio


def exactness_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the verification's numbers as rows, and plots over layers."""
    check = data["verification"]
    limit = f"promised below {check['tolerance']:.0e}" if check["tolerance"] else "no limit was promised"
    rows = [
        ("verdict", f"{check['verdict']}: {check['explanation']}"),
        (
            f"relative error of the {check.get('compared', LOGITS)}",
            f"{said(check['relative_logit_error'], '.1e')} ({limit})",
        ),
        ("largest difference", said(check["max_logit_difference"], ".1e")),
    ]
    if check.get("compared", LOGITS) == LOGITS:
        rows += [
            ("KL of next-token distributions", f"{said(check['kl'], '.1e')} nats"),
            ("same most likely token", f"{check['top1_agreement']:.1%}"),
            ("perplexity", f"dense {said(check['perplexity_dense'], '.3f')}, now {said(check['perplexity'], '.3f')}"),
        ]
    elif check.get("cosine") is not None:
        rows.append(("mean cosine with the dense model's states", said(check["cosine"], ".4f")))
    unit = next((what for what in ("images", "random sounds", "calibration sounds") if what in check["text"]), "tokens")
    unit = unit.rpartition(" ")[2]
    rows.append(("measured on", f"{check['tokens']:,} {unit}, {check['text']}"))
    if (other := check.get("unseen")) and "cosine" in other:
        rows.append(
            (
                "on text of another kind",
                f"relative error {said(other['relative_error'], '.1e')}, mean cosine {said(other['cosine'], '.4f')} "
                f"({other['tokens']:,} tokens of everyday English, which was not calibrated on)",
            )
        )
    if (ratio := unseen_ratio(check)) is not None:
        other = check["unseen"]
        rows.append(
            (
                "perplexity on text of another kind",
                f"dense {other['perplexity_dense']:.3f}, now {other['perplexity']:.3f}, {ratio:.2f}x "
                f"({other['tokens']:,} tokens of everyday English, which was not calibrated on)",
            )
        )
    if check["all_experts_error"] is not None:
        rows.append(
            ("all experts on", f"{check['all_experts_reference']} within {check['all_experts_error']:.1e}, relative")
        )
    if check["compared_tensors"]:
        rows.append(("tensors compared bit for bit", f"{check['compared_tensors']:,}"))
    plots = [_errors(check["layer_errors"])] if any(check["layer_errors"]) else []
    return {"rows": rows, "plots": plots + _calibration(data["calibration"])}


def _errors(measured: list[float | None]) -> Plot:
    errors = [0.0 if error is None else error for error in measured]
    unknown = [str(layer) for layer, error in enumerate(measured) if error is None]
    worst = max(range(len(errors)), key=errors.__getitem__)
    equal = sum(error == 0 for error in measured)
    same = f" {equal} layers are equal bit for bit and have no mark." if equal else ""
    if unknown:
        same += f" Layer {', '.join(unknown)}: the dense block's output is zero and this one's is not, so there is no ratio."
    return lines(
        [Series("error", range(len(errors)), errors)],
        title="Which layers differ from the dense ones?",
        reading=f"Lower is better; fp32 rounding is about 1e-7. The largest is layer {worst}, {errors[worst]:.1e}.{same}",
        x="layer",
        y="relative error of the block's output",
        logarithmic=True,
        whole=True,
    )


def _calibration(reports: list[dict[str, Any]]) -> list[Plot]:
    plots = []
    captured = [report for report in reports if report.get("captured") is not None]
    if captured:
        layers = [report["layer"] for report in captured]
        low = min(report["captured"] for report in captured)
        series = [Series("router", layers, [report["captured"] for report in captured])]
        if all("random" in report for report in captured):
            series.append(Series("random choice", layers, [report["random"] for report in captured]))
        plots.append(
            lines(
                series,
                title="How close is the router to an oracle?",
                reading=f"1 is as good as knowing every expert's output. The lowest layer has {low:.0%}.",
                x="layer",
                y="share of what an oracle would capture",
                include=(0.0, 1.0),
                whole=True,
            )
        )
    fitted = [report for report in reports if report.get("error_before") is not None]
    if fitted:
        layers = [report["layer"] for report in fitted]
        before = [report["error_before"] for report in fitted]
        after = [report["error_after"] for report in fitted]
        series = [Series("before", layers, before), Series("after", layers, after)]
        means = f"Mean error {sum(before) / len(before):.2f} before, {sum(after) / len(after):.2f} after"
        if all("error_trained" in report for report in fitted):
            trained = [report["error_trained"] for report in fitted]
            series.append(Series("after training", layers, trained))
            means += f", {sum(trained) / len(trained):.2f} after training"
        plots.append(
            lines(
                series,
                title="What did the refit repair?",
                reading=f"{means}, on held-out tokens.",
                x="layer",
                y="relative error",
                include=(0.0,),
                whole=True,
            )
        )
    return plots
