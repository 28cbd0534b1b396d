"""A whole run: its sections, and what must agree between them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fedmed.config.federation import EvaluateConfig, PrivacyConfig, SimulationConfig, StrategyConfig
from fedmed.config.sections import (
    DataConfig,
    ModelConfig,
    Name,
    Section,
    TaskConfig,
    TrainConfig,
)

POST_PROCESSING = {"fedavg", "fedprox", "ditto", "fedavgm", "fedadam", "fedyogi", "fedadagrad"}  # of the mean change
WAY_OUT = 'use "group", or model.freeze or model.low-rank with model.weights'


class RunConfig(Section):
    """One federation, completely described. No `data.sites` means the built-in phantom hospitals."""

    name: Name = "quickstart"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 7
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    strategy: StrategyConfig = StrategyConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    simulation: SimulationConfig = SimulationConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if any("," in site for site in self.data.sites):
            raise ValueError("data.sites: a path must not hold a comma, which separates sites in Flower's run config")
        if self.data.sites and not self.task.labels:
            raise ValueError("task.labels is empty: name the label columns of the manifests")
        metric, slash, label = self.primary.partition("/")
        known = {
            "classification": ("auroc", "auprc", "sensitivity-at-90-specificity", "f1", "accuracy"),
            "segmentation": ("dice", "iou", "micro-dice", "micro-iou", "lesion-sensitivity"),
        }[self.task.kind]
        if metric not in known or (slash and label not in self.task.labels):
            raise ValueError(f'evaluate.primary = "{self.primary}": expected {", ".join(known)}, or one with /LABEL')
        fits = {"classification": ("bce", "focal"), "segmentation": ("bce", "focal", "dice-bce", "dice-ce", "tversky")}
        if self.train.loss not in ("auto", *fits[self.task.kind]):
            raise ValueError(f'train.loss = "{self.train.loss}" is no loss for {self.task.kind}')
        if self.train.class_weights != "none" and self.train.loss in ("dice-ce", "tversky"):
            raise ValueError(f'train.class-weights = "balanced" weighs nothing in train.loss = "{self.train.loss}"')
        if self.train.schedule == "plateau" and self.data.sites and not self.data.server:
            raise ValueError('train.schedule = "plateau" follows the server\'s metric, and data.server names no set')
        if self.train.patience and self.train.local_steps:
            raise ValueError("train.patience counts local epochs; leave train.local-steps at 0")
        if self.train.patience and self.train.ema:
            raise ValueError("train.patience sends the best epoch and train.ema an average; leave one of them at 0")
        self._sites_can_do_their_part()
        if self.simulation.partition != "as-given" and self.data.dataset:
            raise ValueError("simulation.partition deals manifests of images; with data.dataset leave it as-given")
        if self.privacy.metrics_epsilon and self.privacy.mode != "dp-sgd":
            raise ValueError('privacy.metrics-epsilon is for privacy.mode = "dp-sgd": other metrics bear no noise')
        if self.strategy.secure_sum:
            self._sites_show_a_sum_alone()
        if self.privacy.mode == "dp-sgd":
            self._touches_patients_only_under_noise()
        elif self.privacy.mode == "central":
            self._sites_meet_only_in_the_noised_sum()
        elif self.privacy.clipping != "flat":
            raise ValueError('privacy.clipping clips nothing with privacy.mode = "none"')
        return self

    def _sites_can_do_their_part(self) -> None:
        """Refuse what an algorithm's work at the sites is not defined for."""
        name = f'strategy.name = "{self.strategy.name}"'
        if self.strategy.name == "scaffold" and self.train.layer_decay < 1:
            raise ValueError(f"{name} needs one learning rate for all layers; leave train.layer-decay at 1")
        if self.strategy.name == "ditto" and self.strategy.personal_steps:
            raise ValueError(f"{name} already trains a network for every site; leave strategy.personal-steps at 0")
        if self.strategy.name == "feddg-ga" and self.privacy.mode != "none":
            raise ValueError(f'{name} needs un-noised losses of the sites, which privacy.mode = "none" alone allows')

    def _touches_patients_only_under_noise(self) -> None:
        """Refuse what would let private data past the noise: docs/privacy-model.md, claim 7."""
        train, privacy = self.train, self.privacy
        refused = {
            'model.norm = "batch"': (self._batch_norm_trains, f"couples the images of a batch; {WAY_OUT}"),
            'train.class-weights = "balanced"': (train.class_weights != "none", "come from the site's own counts"),
            'train.sampling = "balanced"': (train.sampling != "shuffle", "voids the Poisson sampling of patients"),
            "train.patience": (bool(train.patience), "stops by what private patients show; use evaluate.patience"),
            f"privacy.augmentations = {privacy.augmentations}": (
                privacy.augmentations > 1 and not train.augment,
                "takes the mean over equal copies; name changes in train.augment",
            ),
        }
        for key, (present, reason) in refused.items():
            if present:
                raise ValueError(f'{key} {reason}; it cannot be used with privacy.mode = "dp-sgd"')
        together = (privacy.images_per_patient if privacy.unit == "patient" else 1) * privacy.augmentations
        if together > privacy.physical_batch_size:  # else one patient's memory could fail the task
            raise ValueError(
                f"privacy.images-per-patient x privacy.augmentations = {together} images of a patient go through the "
                f"network together; privacy.physical-batch-size = {privacy.physical_batch_size} must hold them"
            )

    def _sites_meet_only_in_the_noised_sum(self) -> None:
        """Refuse what would use a site's change other than clipped, in a sum with noise: claim 9."""
        strategy = self.strategy
        refused = {
            f'strategy.name = "{strategy.name}"': (
                strategy.name not in POST_PROCESSING,
                f"uses more of a site than the noised mean; use one of {', '.join(sorted(POST_PROCESSING))}",
            ),
            f'strategy.combine = "{strategy.combine}"': (strategy.combine != "mean", "compares single changes"),
            f'strategy.weight-by = "{strategy.weight_by}"': (
                strategy.weight_by != "uniform",
                'gives a site more than its clip; use "uniform"',
            ),
            'model.norm = "batch"': (self._batch_norm_trains, f"keeps statistics that no noised sum holds; {WAY_OUT}"),
            "strategy.fraction": (
                strategy.fraction < 1,
                "gives no amplification, because the server sees who takes part; use 1",
            ),
            "strategy.clip-norm": (strategy.clip_norm > 0, "clips twice; use privacy.max-grad-norm"),
            "strategy.max-update-norm": (strategy.max_update_norm > 0, "would reveal the norm of a site's change"),
            'privacy.clipping = "per-layer"': (self.privacy.clipping == "per-layer", "is for dp-sgd"),
        }
        for key, (present, reason) in refused.items():
            if present:
                raise ValueError(f'{key} {reason}; it cannot be used with privacy.mode = "central"')

    def _sites_show_a_sum_alone(self) -> None:
        """Refuse what would need a single site's change."""
        strategy = self.strategy
        known = POST_PROCESSING | {"fedbn"}
        capped = strategy.weight_by != "uniform" and strategy.max_weight_share < 1
        refused = {
            f'strategy.name = "{strategy.name}"': (
                strategy.name not in known and ":" not in strategy.name,
                f"uses more of a site than a sum; use one of {', '.join(sorted(known))}",
            ),
            f'strategy.combine = "{strategy.combine}"': (strategy.combine != "mean", "compares single changes"),
            "strategy.max-update-norm": (
                strategy.max_update_norm > 0,
                "looks at single changes; use strategy.clip-norm, which the sites apply themselves",
            ),
            f"strategy.max-weight-share = {strategy.max_weight_share}": (
                capped,
                'is for weights that the server can lower; use 1, or strategy.weight-by = "uniform"',
            ),
            f"strategy.min-sites = {strategy.min_sites}": (strategy.min_sites < 3, "hides nobody; use 3 or more"),
            'privacy.mode = "central"': (self.privacy.mode == "central", "clips single changes at the server"),
        }
        for key, (present, reason) in refused.items():
            if present:
                raise ValueError(f"{key} {reason}; it cannot be used with strategy.secure-sum")

    @property
    def _batch_norm_trains(self) -> bool:
        """Whether no BatchNorm is frozen as it was given. Sites are sent the weights and no file's name."""
        model = self.model
        given = bool(model.weights) or not self.data.sites
        return model.norm == "batch" and not (given and (model.freeze or model.low_rank))

    @property
    def dimensions(self) -> int:
        """Of what the network sees: 2 for images and slices, 3 for volumes and patches."""
        return 3 if self.data.items in ("volumes", "patches") else 2

    @property
    def scored_spacing_mm(self) -> tuple[float, ...]:
        """Of the voxels in which distances are measured; empty where none are: slices are resized after resampling."""
        return self.data.spacing_mm if self.dimensions == 3 else ()

    @property
    def split_seed(self) -> int:
        """The seed that decides who is held out: several trainings with it are judged on the same patients."""
        return self.evaluate.split_seed or self.seed

    @property
    def primary(self) -> str:
        """The metric that selects a network."""
        return self.evaluate.primary or ("auroc" if self.task.kind == "classification" else "dice")
