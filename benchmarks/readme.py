"""The README's result tables, made from committed results."""

import json
from pathlib import Path

from engine.quality import IDENTICAL_DB

RESULTS = Path(__file__).parent / "results"


def selection_table() -> str:
    """Markdown of what `benchmarks/selection.py` measured, with its hardware."""
    report = json.loads((RESULTS / "selection.json").read_text("utf-8"))
    lines = [
        "| | ms a picture | pictures/s | PSNR worst of 64 | mean SSIM |",
        "|---|---|---|---|---|",
    ]
    for name, row in report["rows"].items():
        psnr = "-" if row["psnr_db_min"] == IDENTICAL_DB else f"{row['psnr_db_min']:.1f} dB"
        lines.append(
            f"| {name} | {row['ms_per_picture']:.1f} | {row['images_per_s']:.2f} | {psnr} "
            f"| {row['ssim_mean']:.4f} |"
        )
    machine, versions = report["machine"], report["versions"]
    lines.append("")
    lines.append(
        f"{report['over_eager']:.2f} times diffusers eager, {report['over_best_peer']:.2f} times "
        f"{report['best_peer']} as its users call it, {report['over_reshaped_bf16']:.2f} times the "
        f"same reshaped by hand for this one batch; medians over rounds. "
        f"{report['num_inference_steps']} steps, guidance "
        f"{report['guidance_scale']:g}, batch {report['batch']}; {machine['processor']}, "
        f"{machine['cores']} cores, no GPU; torch {versions['torch']}, ONNX Runtime "
        f"{versions['onnxruntime']}, OpenVINO {versions['openvino']}."
    )
    return "\n".join(lines)


def demo_table() -> str:
    """Markdown of what `vitrine demo` measured, with its hardware."""
    report = json.loads((RESULTS / "demo.json").read_text("utf-8"))
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
