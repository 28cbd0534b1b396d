"""How numbers, names and lists read in the report."""

from __future__ import annotations

from collections.abc import Iterable

from fedmed.reporting.facts import Counts, Estimate, Findings, Metrics, Privacy, RunFacts, metric_of
from fedmed.types import SMALL, rounded_up

UNDEFINED = "–"
MOST_SCANNERS = 8  # of one site
NAMES = {
    "f1": "F1",
    "accuracy": "Accuracy",
    "brier": "Brier score",
    "assd": "ASSD",
    "micro-dice": "Micro-Dice",
    "micro-iou": "Micro-IoU",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "positive-predictive-value": "Positive predictive value",
    "negative-predictive-value": "Negative predictive value",
    "sensitivity-at-90-specificity": "Sensitivity at 90 % specificity",
    "hd95-excluded": "Cases without HD95",
    "lesion-sensitivity": "Lesion sensitivity",
    "lesion-false-positives": "False lesions per case",
    "chexnet": "CheXNet",
    "resnet50": "ResNet-50",
    "vgg16": "VGG-16",
    "unet": "U-Net",
    "attention-unet": "Attention U-Net",
    "deepmedic": "DeepMedic",
    "small-cnn": "Small CNN",
    "cnn-lstm": "CNN-LSTM",
    "fedavg": "FedAvg",
    "fedavgm": "FedAvgM",
    "fedadagrad": "FedAdagrad",
    "fednova": "FedNova",
    "feddg-ga": "FedDG-GA",
    "ditto": "Ditto",
    "cyclic": "Cyclic weight transfer",
    "fedprox": "FedProx",
    "scaffold": "SCAFFOLD",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedbn": "FedBN",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95",
    "ece": "ECE",
    "loss": "Loss",
}
LOWER_IS_BETTER = frozenset({"loss", "brier", "ece", "hd95", "assd", "hd95-excluded", "lesion-false-positives"})


def title(name: str) -> str:
    """A model's, strategy's or metric's name as papers write it; `auroc/nodule` becomes `AUROC, nodule`."""
    head, _, label = name.partition("/")
    return NAMES.get(head, head) + (f", {label}" if label else "")


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value is the better one."""
    return metric.partition("/")[0] in LOWER_IS_BETTER


def number(value: float | None) -> str:
    """Three decimals, or three digits where decimals would hide them."""
    if value is None:
        return UNDEFINED
    text = f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
    return text.replace("-", "−")


def signed(value: float | None) -> str:
    """A difference with its sign."""
    return f"+{number(value)}" if value is not None and value > 0 else number(value)


def p_value(value: float | None) -> str:
    """`0.031`, `< 0.001`."""
    return UNDEFINED if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def count(value: int | None) -> str:
    """A count with thousands apart."""
    return UNDEFINED if value is None else f"{value:,}"


def site_count(value: int | None) -> str:
    """A count that came from a site; a small one is not told."""
    return f"< {SMALL}" if value is not None and 0 < value < SMALL else count(value)


def prevalence(found: Counts | None, *, own: bool = False) -> str:
    """`23.4 % (117)`: the share of positives among known images; of a site, neither count may be small.

    Args:
        found: of one label.
        own: whether the reader owns the patients.
    """
    if found is None or found.positives is None or found.negatives is None:
        return UNDEFINED
    known = found.positives + found.negatives
    if not known:
        return UNDEFINED
    if not own and 0 < found.positives < SMALL:
        return f"< {SMALL}"
    if not own and 0 < found.negatives < SMALL:
        return f"all but < {SMALL}"
    return f"{100 * found.positives / known:.1f} % ({found.positives:,})"


def plural(amount: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def interval(estimate: Estimate) -> str:
    """`0.880–0.940`; "to" where a minus sign would be read as a dash."""
    if estimate.low is None or estimate.high is None:
        return UNDEFINED
    joint = " to " if estimate.low < 0 else "–"
    return f"{number(estimate.low)}{joint}{number(estimate.high)}"


def ordered(metrics: Metrics, primary: str) -> list[tuple[str, Estimate]]:
    """The primary metric first, then the other pooled ones, then those per label; none for which nobody counts."""
    told = [(name, found) for name, found in metrics.items() if found.value is not None or found.patients != 0]
    return sorted(told, key=lambda item: (item[0] != primary, "/" in item[0]))


def duration(seconds: float | None) -> str:
    """`9.1 s`, `3 min 12 s`, `2 h 5 min`."""
    if seconds is None:
        return UNDEFINED
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def memory(mebibytes: float | None) -> str:
    """`812 MiB`, `3.4 GiB`."""
    if mebibytes is None:
        return UNDEFINED
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


def epsilon(value: float | None) -> str:
    """Two decimals, rounded up: a report never shows less than was spent."""
    return UNDEFINED if value is None else rounded_up(value, 2)


def total(spent: Privacy) -> str:
    """ε over all runs, and by which accountant: later runs may follow from earlier ones, which PRV does not allow."""
    return epsilon(spent.epsilon_total) + (f" by {spent.accountant_total}" if spent.accountant_total else "")


def privacy(spent: Privacy | None, run: RunFacts) -> str:
    """What a site spent, or why nothing can be said."""
    if spent is None:
        return "at the server" if run.privacy_mode == "central" else "no DP"
    if run.void_privacy:
        return "void: test noise"
    parts = [f"ε {epsilon(spent.epsilon)}"]
    if spent.epsilon_total is not None:
        parts.append(f"in total ε {total(spent)}")
    if spent.delta is not None:
        parts.append(f"δ {spent.delta:.0e}".replace("e-0", "e-"))
    if spent.unit:
        parts.append("per patient, clipped by image" if spent.unit == "image" else f"per {spent.unit}")
    if spent.adjacency:
        parts.append(f"neighbours: {spent.adjacency}")
    if spent.accountant:
        parts.append(f"accountant {spent.accountant}")
    return ", ".join(parts)


def privacy_summary(run: RunFacts) -> str:
    """The largest ε that any site spent in this run, in one sentence; empty without differential privacy."""
    known = [site.privacy for site in run.sites if site.privacy and site.privacy.epsilon is not None]
    if not known or run.void_privacy:
        return ""
    most = max(known, key=lambda spent: spent.epsilon or 0.0)
    if run.privacy_mode == "central":
        return f"Differential privacy, with noise at a server that is trusted: {privacy(most, run)}."
    return f"Differential privacy: at every site that reports it, at most {privacy(most, run)}."


def ranges(rounds: Iterable[int]) -> str:
    """`1, 3–5`."""
    spans: list[list[int]] = []
    for item in sorted(set(rounds)):
        if spans and item == spans[-1][1] + 1:
            spans[-1][1] = item
        else:
            spans.append([item, item])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)


def took_part(run: RunFacts) -> int:
    """How many sites joined at least one round."""
    logged = {name for entry in run.log if entry.number for name in entry.joined}
    return len(logged | {site.name for site in run.sites if site.rounds_joined})


def summary(run: RunFacts) -> str:
    """The run in one sentence."""
    model = title(run.model) if run.model else "The network"
    if not run.rounds:
        return f"{model} finished no round of training."
    trained = f"{model} trained by {plural(took_part(run), 'site')} for {plural(run.rounds, 'round')}"
    reached = metric_of(run.server, run.primary)
    if reached.value is None:
        return f"{trained}; held-out {title(run.primary)} is undefined."
    facts = [] if reached.low is None or reached.high is None else [f"95 % interval {interval(reached)}"]
    if reached.patients is not None:
        facts.append(plural(reached.patients, "patient"))
    brackets = f" ({', '.join(facts)})" if facts else ""
    return f"{trained}; held-out {title(run.primary)} {number(reached.value)}{brackets}."


def troubles(run: RunFacts) -> list[tuple[str, str, str]]:
    """Who was dropped, refused or late: (site, rounds, reason), the same reason of one site on one line."""
    found: dict[tuple[str, str], list[int]] = {}
    for entry in run.log:
        for site, reason in entry.failed.items():
            found.setdefault((site, reason), []).append(entry.number)
    for (site, number_), reason in run.unfinished.items():
        found.setdefault((site, reason), []).append(number_)
    return [(site, ranges(rounds), reason or "no reason was given") for (site, reason), rounds in found.items()]


def scanners(found: Findings, *, own: bool = False) -> str:
    """`Acme X1 (DX) 120, Other (CR) < 10`: how many images each scanner made, of those that were looked at."""
    shown = [
        f"{name} {count(images) if own else site_count(images)}" for name, images in found.scanners[:MOST_SCANNERS]
    ]
    more = len(found.scanners) - len(shown)
    return ", ".join([*shown, *([f"and {more} more"] if more > 0 else [])]) or UNDEFINED


def prevalences(run: RunFacts) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Labels, and for each site and the server's test part how common they are; nothing where nobody counted."""
    counts = run.evaluation.counts if run.evaluation else {}
    labels = list(dict.fromkeys([*(label for own in run.findings.values() for label in own.prevalence), *counts]))
    rows = [
        (site.name, [prevalence(run.findings[site.name].prevalence.get(label)) for label in labels])
        for site in run.sites
        if site.name in run.findings
    ]
    if counts:
        rows.append(("server, test part", [prevalence(counts.get(label), own=True) for label in labels]))
    return labels, rows
