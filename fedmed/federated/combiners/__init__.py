"""How many updates become one: the mean, and rules that withstand some dishonest sites. One file each, one table."""

from __future__ import annotations

from fedmed.config import StrategyConfig
from fedmed.federated.combiners.base import Combiner, RoundTerms
from fedmed.federated.combiners.bulyan import BULYAN
from fedmed.federated.combiners.gathered import Gathered
from fedmed.federated.combiners.geometric_median import GEOMETRIC_MEDIAN
from fedmed.federated.combiners.krum import KRUM, MULTI_KRUM
from fedmed.federated.combiners.masked_sum import MaskedSum
from fedmed.federated.combiners.mean import Mean
from fedmed.federated.combiners.median import MEDIAN
from fedmed.federated.combiners.noised_sum import NoisedSum
from fedmed.federated.combiners.rule import Rule, too_few
from fedmed.federated.combiners.trimmed_mean import TRIMMED_MEAN

RULES: dict[str, Rule | None] = {  # by strategy.combine; None = the mean
    "mean": None,
    "median": MEDIAN,
    "trimmed-mean": TRIMMED_MEAN,
    "krum": KRUM,
    "multi-krum": MULTI_KRUM,
    "bulyan": BULYAN,
    "geometric-median": GEOMETRIC_MEDIAN,
}

__all__ = ["RULES", "Combiner", "RoundTerms", "combiner", "too_few_sites"]


def combiner(terms: RoundTerms) -> Combiner:
    """What combines the updates of one round."""
    if terms.noise is not None:
        return NoisedSum(terms, terms.noise)
    if terms.strategy.secure_sum:
        return MaskedSum(terms)
    rule = RULES[terms.strategy.combine]
    return Mean(terms) if rule is None and not terms.step.weighs else Gathered(terms, rule)


def too_few_sites(strategy: StrategyConfig, count: int) -> str | None:
    """Why so many sites are too few for `strategy.combine`, or None."""
    rule = RULES[strategy.combine]
    return None if rule is None else too_few(rule, strategy.dishonest_sites, count)
