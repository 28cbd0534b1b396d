"""`fedmed server feasibility`: whether the sites behind some data cards fit each other, as a table and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from fedmed.intake.card import Card

FACTOR = 2.0  # medians of spacing or prevalence further apart are worth a word
SMALL_SITE = 50  # patients


def table_of(cards: Mapping[str, Card]) -> list[list[str]]:
    """One line a question, one cell a site; the first line names the sites."""
    labels = list(dict.fromkeys(name for card in cards.values() for name in card.labels))
    sites = list(cards.values())
    lines = [
        ["", *cards],
        ["check", *(card.check for card in sites)],
        ["fedmed", *(card.fedmed for card in sites)],
        ["task", *(card.task for card in sites)],
        ["patients", *(_number(card.patients) for card in sites)],
        ["images a patient", *(_number(card.images_per_patient) for card in sites)],
        ["modality", *(_names(card.modalities) for card in sites)],
        ["maker", *(_names(card.makers) for card in sites)],
        ["spacing, mm", *(_range(card.spacing_mm) for card in sites)],
        ["distance of slices, mm", *(_range(card.gap_mm) for card in sites)],
    ]
    return lines + [[f"label {name}", *(_prevalence(card, name) for card in sites)] for name in labels]


def warnings_of(cards: Mapping[str, Card]) -> list[str]:
    """What does not fit, in sentences."""
    return [*_unlike(cards), *_labels(cards), *_sizes(cards)]


def _unlike(cards: Mapping[str, Card]) -> Iterator[str]:
    for what, values, do in (
        ("runs fedmed", {site: card.fedmed for site, card in cards.items()}, "a federation refuses unequal versions"),
        ("has data for", {site: card.task for site, card in cards.items()}, "one run has one task"),
        (
            "has modality",
            {site: " and ".join(card.modalities) for site, card in cards.items() if card.modalities},
            "one run reads all images by one preset",
        ),
    ):
        usual = Counter(values.values()).most_common(1)
        for site, value in values.items():
            if value != usual[0][0]:
                yield f"{site} {what} {value}, most others {usual[0][0]}: {do}."
    for site, card in cards.items():
        if card.check == "fail":
            yield f"{site} did not pass its own data check: its data engineer knows what to do."


def _labels(cards: Mapping[str, Card]) -> Iterator[str]:
    for name in dict.fromkeys(name for card in cards.values() for name in card.labels):
        having = {site: card.labels[name] for site, card in cards.items() if name in card.labels}
        known = {site for site, label in having.items() if label.patients is not None}
        lacking = [site for site in cards if site not in known]
        if lacking:
            told = "it is masked there, and they need the column, empty"
            yield f'The label "{name}" is unknown at {", ".join(lacking)}: {told}.'
        rates = {site: label.prevalence for site, label in having.items() if label.prevalence}
        if len(rates) > 1 and max(rates.values()) > FACTOR * min(rates.values()):
            low, high = min(rates, key=lambda site: rates[site]), max(rates, key=lambda site: rates[site])
            yield (
                f'The label "{name}" is at {100 * rates[high]:.0f} % in {high} and {100 * rates[low]:.0f} % in {low}: '
                "judge the network site by site."
            )
        one_sided = [site for site in known if having[site].prevalence is None]
        if one_sided:
            yield f'Of "{name}" fewer than ten patients are positive, or negative, at {", ".join(sorted(one_sided))}.'


def _sizes(cards: Mapping[str, Card]) -> Iterator[str]:
    for what, spacings in (
        ("pixels", {site: card.spacing_mm for site, card in cards.items() if card.spacing_mm}),
        ("distances of slices", {site: card.gap_mm for site, card in cards.items() if card.gap_mm}),
    ):
        medians = {site: spacing[1] for site, spacing in spacings.items()}
        if len(medians) > 1 and max(medians.values()) > FACTOR * min(medians.values()):
            low, high = min(medians, key=lambda site: medians[site]), max(medians, key=lambda site: medians[site])
            yield (
                f"The {what} of {high} ({medians[high]:g} mm) and {low} ({medians[low]:g} mm) differ much: set "
                "data.spacing-mm for volumes, and data.image-size to what the coarser images hold."
            )
    for site, card in cards.items():
        if card.patients is None or card.patients < SMALL_SITE:
            said = "fewer than 10" if card.patients is None else f"about {card.patients}"
            yield f"{site} has {said} patients: held-out metrics will have wide intervals there."


def _number(value: float | None) -> str:
    return "< 10" if value is None else f"{value:g}"


def _names(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "–"


def _range(spacing: tuple[float, float, float] | None) -> str:
    return "–" if spacing is None else f"{spacing[1]:g} ({spacing[0]:g}-{spacing[2]:g})"


def _prevalence(card: Card, name: str) -> str:
    label = card.labels.get(name)
    if label is None:
        return "no column"
    if label.patients is None:
        return "unknown"
    return f"of {label.patients}" if label.prevalence is None else f"{100 * label.prevalence:.0f} % of {label.patients}"
