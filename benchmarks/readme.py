"""The README's results table, made from a committed result."""

import json
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "demo.json"


def demo_table(result: Path = RESULT) -> str:
    """Markdown of what `vitrine demo` measured, with its hardware."""
    report = json.loads(result.read_text("utf-8"))
    lines = [
        "| model | PSNR to torch, worst of 32 | mean SSIM | served bytes identical | rows a tick "
        "| p50 | p95 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, served in report["served"].items():
        parity = report["parity"][name]
        lines.append(
            f"| {name} | {parity['psnr_db_min']:.1f} dB | {parity['ssim_mean']:.4f} "
            f"| {served['byte_identical']} of {served['requests']} | {served['rows_per_tick']:.1f} "
            f"| {served['p50_ms']:.0f} ms | {served['p95_ms']:.0f} ms |"
        )
    machine = report["machine"]
    lines.append("")
    lines.append(
        f"{machine['processor']}, {machine['cores']} cores, no GPU; 32 requests at once a model; "
        f"Triton was ready after {report['ready_seconds']} s, the whole demo took "
        f"{report['seconds']:.0f} s."
    )
    return "\n".join(lines)
