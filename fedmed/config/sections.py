"""The sections of a run file: every key, its type, its default, and what must agree with what."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _three_or_none(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(values) not in (0, 3):
        raise ValueError(f"expected three numbers: depth, height, width; got {len(values)}")
    return values


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Number = TypeVar("Number", int, float)
Triple = Annotated[tuple[Number, ...], AfterValidator(_three_or_none)]
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]*$")]


class Section(BaseModel):
    """Base of all sections: frozen, kebab-case, and no unknown key."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        allow_inf_nan=False,
    )


class ModelConfig(Section):
    """Which network, and how it is built."""

    name: Annotated[str, Field(description='a built-in network, or "module:function"')] = "chexnet"
    norm: Literal["batch", "group", "instance", "none"] = "group"
    width: Annotated[Count, Field(description="base channels; 0 = the paper's")] = 0
    in_channels: Positive = 1
    weights: Annotated[str, Field(description="a local file of weights; never a download")] = ""
    freeze: Annotated[str, Field(description="stage of the network up to which nothing trains")] = ""
    low_rank: Annotated[
        Count, Field(description="rank of the corrections that are trained on a frozen trunk; 0 = all is trained")
    ] = 0
    residual: Annotated[bool, Field(description="deepmedic: with the residual connections of 2016")] = False
    deep_supervision: Annotated[
        bool, Field(description="unet, attention-unet: coarser outputs are trained as well")
    ] = False
    fusion: Annotated[
        Literal["early", "late"], Field(description="of modalities: as channels, or with one encoder for each")
    ] = "early"
    modalities: Annotated[Positive, Field(description="of late fusion; in-channels is shared out evenly")] = 1


class TaskConfig(Section):
    """What the network learns."""

    kind: Literal["classification", "segmentation"] = "classification"
    labels: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> TaskConfig:
        twice = [label for number, label in enumerate(self.labels) if label in self.labels[:number]]
        if twice:
            raise ValueError(f'task.labels names "{twice[0]}" twice; give every label once')
        return self


class DataConfig(Section):
    """Where simulated hospitals and the server find their data, and how images become tensors."""

    sites: tuple[str, ...] = ()
    server: str = ""
    dataset: Annotated[str, Field(description='"module:function" for data that are no images')] = ""
    preset: str = "cxr"
    image_size: Annotated[int, Field(ge=8, le=4096)] = 64
    items: Annotated[
        Literal["images", "slices", "volumes", "patches"],
        Field(description="what one row of a batch is; slices, volumes and patches are cut from 3D images"),
    ] = "images"
    spacing_mm: Annotated[
        Triple[Annotated[float, Field(gt=0, strict=False)]],
        Field(description="volumes are resampled to this spacing along depth, height, width; empty = as acquired"),
    ] = ()
    volume_size: Annotated[
        Triple[Annotated[int, Field(ge=1, strict=False)]],
        Field(description="depth, height, width in voxels of a volume, cropped or padded at its centre, or of a patch"),
    ] = ()
    max_unreadable: Annotated[Fraction, Field(description="share of unreadable images above which a run refuses")] = (
        0.05
    )
    cache_gib: Annotated[
        float, Field(gt=0, description="size of the cache of decoded images, above which the oldest sets are removed")
    ] = 50.0

    @model_validator(mode="after")
    def _volumes_have_a_size(self) -> DataConfig:
        if self.items in ("volumes", "patches") and not self.volume_size:
            raise ValueError(f'data.items = "{self.items}" needs data.volume-size = [DEPTH, HEIGHT, WIDTH], in voxels')
        return self


class TrainConfig(Section):
    """What a site does in one round."""

    rounds: Positive = 5
    local_epochs: Positive = 1
    local_steps: Annotated[Count, Field(description="optimizer steps per round; 0 = local-epochs decides")] = 0
    batch_size: Positive = 16
    accumulate: Annotated[Positive, Field(description="batches whose gradients make one optimizer step")] = 1
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    layer_decay: Annotated[
        float, Field(gt=0, le=1, description="learning rate of a stage of the network as a share of the next one's")
    ] = 1.0
    schedule: Annotated[
        Literal["constant", "cosine", "plateau"], Field(description="of the learning rate, over all rounds")
    ] = "constant"
    warmup_rounds: Annotated[float, Field(ge=0, description="rounds in which the learning rate rises to its value")] = (
        0.0
    )
    plateau_patience: Annotated[
        Positive, Field(description="evaluations without improvement before the learning rate falls")
    ] = 3
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.3
    ema: Annotated[
        float, Field(ge=0, lt=1, description="decay of the moving average of weights that a site sends; 0 = none")
    ] = 0.0
    patience: Annotated[
        Count, Field(description="local epochs without improvement at the site before it stops; 0 = never")
    ] = 0
    validation_share: Annotated[
        float,
        Field(gt=0, lt=1, description="of each site's training patients, by whom `patience` is judged; not trained on"),
    ] = 0.2
    loss: Annotated[
        Literal["auto", "bce", "focal", "dice-bce", "dice-ce", "tversky"],
        Field(description="auto = bce for classification, dice-ce for several labels of masks, else dice-bce"),
    ] = "auto"
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    tversky_alpha: Annotated[float, Field(gt=0, lt=1, description="weight of false positives against misses")] = 0.3
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Annotated[
        Literal["none", "balanced"], Field(description="weight of positives in the loss, from the site's own counts")
    ] = "none"
    sampling: Annotated[
        Literal["shuffle", "balanced"], Field(description="balanced = images with rare labels come up more often")
    ] = "shuffle"
    augment: Annotated[
        tuple[Literal["flip", "rotate", "scale", "shift", "contrast", "noise"], ...],
        Field(description="random changes of training images, drawn anew for every batch"),
    ] = ()
    precision: Annotated[
        Literal["float32", "bfloat16", "auto"],
        Field(description="of activations; auto = bfloat16 where the machine multiplies it fast; weights stay float32"),
    ] = "float32"
    channels_last: Annotated[
        bool, Field(description="memory order of images; faster on GPUs with bfloat16, and mostly on CPUs")
    ] = False
    save_every_s: Annotated[
        float, Field(ge=0, description="seconds between saves of a site's unfinished round; 0 = never")
    ] = 300.0
    threads: Positive = 1


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
    retries: Annotated[Count, Field(description="how often a site whose process died is asked again in a round")] = 1
    lost_after: Annotated[
        Count, Field(description="rounds missed in a row after which a site is no longer asked; 0 = never")
    ] = 3
    max_update_norm: Annotated[
        float,
        Field(ge=0, description="distance from the network that was sent, above which updates are refused; 0 = any"),
    ] = 0.0
    checkpoint_every: Annotated[Positive, Field(description="rounds between checkpoints")] = 1
    keep_checkpoints: Annotated[Positive, Field(description="how many of the last checkpoints stay")] = 2
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
        Field(ge=1e-6, le=1e6, description="C: norm to which a gradient, or under central a site's change, is clipped"),
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
