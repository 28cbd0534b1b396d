"""The sections of a run file on what joins the sites: strategy, privacy, evaluation; and on simulating them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedmed.config.sections import Count, Fraction, Name, Positive, Section

Share = Annotated[float, Field(ge=0, lt=1)]
LEAST_CLIP, MOST_CLIP = 1e-6, 1e6  # norms are squared in float32, which holds the squares of these with room to spare


class StrategyConfig(Section):
    """How the server turns updates into the next global network."""

    name: str = "fedavg"
    weight_by: Literal["images", "patients", "uniform"] = "images"
    proximal: Annotated[float, Field(ge=0, description="fedprox: μ, how strongly sites are held near the network")] = (
        0.01
    )
    personal_penalty: Annotated[
        float, Field(ge=0, description="ditto: λ, how strongly a site's own network is held near the shared one")
    ] = 0.1
    personal_steps: Annotated[
        Count, Field(description="optimizer steps of every site on the kept network, for one of its own; 0 = none")
    ] = 0
    personal_learning_rate: Annotated[
        float, Field(ge=0, description="of a site's own network; 0 = train.learning-rate")
    ] = 0.0
    fraction: Annotated[float, Field(gt=0, le=1, description="share of the sites that a round asks, drawn anew")] = 1.0
    min_sites: Positive = 2
    min_fraction: Fraction = 0.0
    required_sites: tuple[Name, ...] = ()
    round_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    retries: Annotated[
        Count,
        Field(description="how often a site that died, or went away and is needed, is asked again in a round"),
    ] = 1
    lost_after: Annotated[
        Count, Field(description="rounds missed in a row after which a site is no longer asked; 0 = never")
    ] = 3
    max_update_norm: Annotated[
        float,
        Field(ge=0, description="distance from the network that was sent, above which updates are refused; 0 = any"),
    ] = 0.0
    checkpoint_every: Annotated[Positive, Field(description="rounds between checkpoints")] = 1
    keep_checkpoints: Annotated[Positive, Field(description="how many of the last checkpoints stay")] = 2
    secure_sum: Annotated[
        bool,
        Field(description="whether the server learns the sum of the sites' changes alone, and no single site's"),
    ] = False
    combine: Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median"] = "mean"
    dishonest_sites: Annotated[Count, Field(description="f: how many sites a rule other than mean must withstand")] = 1
    clip_norm: Annotated[float, Field(ge=0, description="norm to which every site's change is clipped; 0 = none")] = 0.0
    max_weight_share: Annotated[
        float, Field(gt=0, le=1, description="of all weight that one site may have; 1 = no limit")
    ] = 0.5
    server_learning_rate: Annotated[float, Field(ge=0, description="η; 0 = the algorithm's own")] = 0.0
    server_momentum: Annotated[float, Field(ge=0, lt=1, description="fedavgm; β₁ of the adaptive ones")] = 0.9
    server_second_momentum: Annotated[float, Field(ge=0, lt=1, description="β₂ of fedadam and fedyogi")] = 0.99
    server_adaptivity: Annotated[float, Field(gt=0, description="τ of fedadam, fedyogi and fedadagrad")] = 1e-3
    adjustment: Annotated[float, Field(ge=0, le=1, description="of feddg-ga: first step of the weights")] = 0.2


class PrivacyConfig(Section):
    """Differential privacy of the training."""

    mode: Literal["none", "dp-sgd", "central"] = "none"
    unit: Annotated[
        Literal["patient", "image"], Field(description="whose gradient is clipped; a budget is always a patient's")
    ] = "patient"
    epsilon: Annotated[float, Field(gt=0)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    noise_multiplier: Annotated[
        float, Field(ge=0, description="standard deviation of the noise / max-grad-norm; 0 = from epsilon and delta")
    ] = 0.0
    max_grad_norm: Annotated[
        float,
        Field(
            ge=LEAST_CLIP,
            le=MOST_CLIP,
            description="C: norm to which a gradient, or under central a site's change, is clipped",
        ),
    ] = 1.0
    clipping: Annotated[
        Literal["flat", "per-layer", "adaptive"],
        Field(description="one bound; a share of it for every layer; or one that follows a quantile of the norms"),
    ] = "flat"
    clip_quantile: Annotated[
        float, Field(gt=0, lt=1, description="adaptive: share of gradients, or of changes, that are to pass unclipped")
    ] = 0.5
    metrics_epsilon: Annotated[
        float, Field(ge=0, description="dp-sgd: ε of each held-out patient for a site's noised metrics; 0 = none leave")
    ] = 0.0
    sites: Annotated[
        Count, Field(description="central: fixed number of sites that the sum is divided by; 0 = that of data.sites")
    ] = 0
    images_per_patient: Annotated[
        Positive, Field(description="images of one patient in a step, at most; drawn in secret")
    ] = 8
    augmentations: Annotated[
        Positive, Field(description="changed copies of an image whose gradients are averaged before clipping")
    ] = 1
    physical_batch_size: Annotated[Positive, Field(description="images in memory at once; nothing else changes")] = 32
    noise: Literal["secure", "insecure-test"] = "secure"

    @property
    def adapts_at_sites(self) -> bool:
        """Whether every site keeps a bound of its own from round to round."""
        return self.mode == "dp-sgd" and self.clipping == "adaptive"


class EvaluateConfig(Section):
    """How networks are judged and which one is kept."""

    every: Positive = 1
    primary: Annotated[str, Field(description='the metric that selects; "" = auroc or dice by task')] = ""
    keep: Literal["best", "last"] = "best"
    patience: Annotated[Count, Field(description="evaluations without improvement before stopping; 0 = never")] = 0
    selection_share: Annotated[Share, Field(description="share of the server's patients that select the network")] = 0.3
    site_share: Annotated[Share, Field(description="share of each site's patients held out for evaluation")] = 0.2
    sites: Annotated[
        Literal["final", "every"], Field(description="when sites evaluate on their own held-out patients")
    ] = "final"
    bootstrap: Annotated[Count, Field(description="patient-bootstrap replicates behind each interval")] = 1000
    split_seed: Annotated[
        int, Field(ge=0, lt=2**63, description="decides who is held out; 0 = seed, so another seed holds out others")
    ] = 0
    compare: Annotated[
        tuple[str, ...],
        Field(description="arms of fedmed compare: local, federated, pooled (empty = these), or algorithms"),
    ] = ()
    endpoint: Annotated[
        Literal["sites", "server"],
        Field(description="where arms are compared: the mean of the primary metric over sites, or the server's set"),
    ] = "sites"
    family: Annotated[
        tuple[str, ...], Field(description='declared comparisons, "ARM vs ARM"; empty = federated vs pooled and local')
    ] = ()
    resplit: Annotated[bool, Field(description="every seed of an experiment holds out other patients")] = False
    seeds: Annotated[Positive, Field(description="trainings of every arm of fedmed compare, or point of a sweep")] = 5


class SimulationConfig(Section):
    """How many virtual hospitals run at once on this machine."""

    workers: Annotated[Count, Field(description="worker processes; 0 = as many as cores")] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    partition: Annotated[
        Literal["as-given", "iid", "column", "dirichlet", "quantity", "scanner"],
        Field(description="how the patients of data.sites are dealt to virtual hospitals; as-given = a manifest each"),
    ] = "as-given"
    partition_sites: Annotated[Positive, Field(description="virtual hospitals of iid, dirichlet and quantity")] = 4
    partition_column: Annotated[str, Field(description="column of the manifests, for column")] = "site"
    partition_alpha: Annotated[
        float, Field(gt=0, description="of dirichlet and quantity: the smaller, the more unequal the hospitals")
    ] = 0.5
    policy: str = ""
