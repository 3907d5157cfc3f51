"""The sentences of a report: what was chosen and why, and what else there is to know."""

from math import floor, log10

from engine.manifest import Goal
from export.figures import Candidate, Report, better_first


def significant(value: float) -> str:
    """Three significant digits, all digits before the point: `251`, `39.8`, `0.400`, `1234`."""
    decimals = 2 - floor(log10(abs(value))) if value else 0
    return f"{value:.{max(decimals, 0)}f}"


def summary(report: Report) -> list[str]:
    """What was chosen and why, its pictures, and what is as fast."""
    sentences = [_choice(report), _pictures(report.choice), _ties(report)]
    return [sentence for sentence in sentences if sentence]


def _choice(report: Report) -> str:
    choice, accepted = report.choice, [each for each in report.candidates if each.accepted]
    if choice.accepted is False:
        return _refused(report, accepted)
    if report.goal is None:
        return f"{choice.variant} is selected; it was not chosen by measurement."
    parts = [_figure(choice, report.goal), *_ratios(report, report.goal, accepted)]
    figures = ", ".join(part for part in parts if part)
    return f"{choice.variant} was selected for {report.goal}" + (
        f": {figures}." if figures else "."
    )


def _refused(report: Report, accepted: list[Candidate]) -> str:
    """What to say of a selected candidate that was refused, with the one nearest to acceptance."""
    choice = report.choice
    if accepted:
        names = ", ".join(each.variant for each in accepted)
        return f"{choice.variant} is selected, but refused: {choice.reason}. Accepted: {names}."
    said = f"No candidate was accepted; {choice.variant} is kept: {choice.reason}."
    compared = [
        (each.psnr_db_min, each) for each in report.candidates if each.psnr_db_min is not None
    ]
    nearest = max(compared, key=lambda pair: pair[0])[1] if compared else choice
    if nearest.variant == choice.variant:
        return said
    return f"{said} The closest is {nearest.variant}: {nearest.reason}."


def _figure(choice: Candidate, goal: Goal) -> str:
    """The figure that the goal looks at."""
    if goal == "size":
        return f"{significant(choice.size_bytes / 1e6)} MB" if choice.size_bytes else ""
    if choice.latency_ms is None or choice.images_per_s is None or choice.conditions is None:
        return ""
    if goal == "latency":
        return f"{significant(choice.latency_ms)} ms for a picture alone"
    batch = choice.conditions.batch
    return f"{significant(choice.images_per_s)} images/s in batches of {batch}"


def _ratios(report: Report, goal: Goal, accepted: list[Candidate]) -> list[str]:
    """Against the next accepted candidate, and the best in fp32 where that is another one."""
    choice, cost = report.choice, better_first(goal)
    rivals = [
        each
        for each in sorted(accepted, key=cost)
        if each.variant not in (choice.variant, *report.within_noise)
        and (goal == "size" or each.conditions == choice.conditions)
        and cost(each) != float("inf")
    ]
    named = {each.variant: "the next one accepted" for each in rivals[:1]}
    for each in [each for each in rivals if each.precision == "fp32"][:1]:
        named.setdefault(each.variant, "the best in fp32")
    by_name = {each.variant: each for each in rivals}
    return [_ratio(choice, by_name[name], goal, what) for name, what in named.items()]


def _ratio(choice: Candidate, rival: Candidate, goal: Goal, what: str) -> str:
    cost = better_first(goal)
    ratio = abs(cost(choice) / cost(rival))
    ratio = 1 / ratio if goal == "latency" else ratio
    word = "the size of" if goal == "size" else "as fast as"
    return f"{ratio:.2f} times {word} {rival.variant} ({what})"


def _pictures(choice: Candidate) -> str:
    if choice.psnr_db_min is None or choice.ssim_mean is None or choice.floors is None:
        unchecked = "Its pictures have not been compared with the reference."
        return unchecked if choice.accepted is None else ""
    floors = choice.floors
    return (
        f"The worst of its {choice.pictures} pictures is {choice.psnr_db_min:.1f} dB from the "
        f"fp32 torch reference with the same start noise (floor {floors.psnr_db:g} dB); their "
        f"mean SSIM is {choice.ssim_mean:.4f} (floor {floors.ssim:g})."
    )


def _ties(report: Report) -> str:
    if not report.within_noise:
        return ""
    names = " and ".join(report.within_noise)
    verb = "are" if len(report.within_noise) > 1 else "is"
    return f"{names} {verb} as fast, as far as was measured: the difference is within the noise."
