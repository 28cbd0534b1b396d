"""What a section of a run file is, and those on a site's part: the network, the task, the data, the training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator


def _three_or_none(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(values) not in (0, 3):
        raise ValueError(f"expected three numbers: depth, height, width; got {len(values)}")
    return values


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Number = TypeVar("Number", int, float)
Triple = Annotated[tuple[Number, ...], AfterValidator(_three_or_none)]
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]*$")]


def checked_name(text: object) -> str:
    """A site's name, or a consortium's or coordinator's, which other machines sent or a person typed.

    Raises:
        ValueError: it is no such name.
    """
    name: str = TypeAdapter(Name).validate_python(text, strict=True)
    return name


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
        Field(
            description="what one row of a batch is; slices, volumes and patches are cut from 3D images. With slices a "
            "case of the metrics is one slice"
        ),
    ] = "images"
    spacing_mm: Annotated[
        Triple[Annotated[float, Field(gt=0, strict=False)]],
        Field(
            description="volumes are resampled to this spacing along depth, height, width; empty = as acquired. HD95 "
            "and ASSD need it, and items = volumes or patches"
        ),
    ] = ()
    volume_size: Annotated[
        Triple[Annotated[int, Field(ge=1, strict=False)]],
        Field(
            description="depth, height, width in voxels of a volume, cropped or padded at its centre, or of a patch; "
            "metrics of volumes are of what the crop leaves"
        ),
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
        float,
        Field(
            ge=0,
            lt=1,
            description="decay of the moving average of weights that a site sends, less in a round's first steps; "
            "0 = none",
        ),
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
