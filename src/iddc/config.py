"""Every number of a run, with its symbol in the paper.

The models are frozen and checked: an unknown field or a value out of range is an error. `tyro`
turns them into flags (`--objective.negative-weight 1.2`), `runs.py` writes them to
`RUN/config.yaml`. This module imports neither torch nor timm, so that help and errors answer at
once.

Paper symbol -> field:
    K         num_clusters                     t+   objective.positive_threshold
    lambda_1  objective.negative_weight        t-   objective.negative_threshold
    lambda_2  objective.regularizer_weight     h    objective.penalty
    k (Eq. 7) objective.weibull_shape          w+   objective.positive_affinity
                                               w-   objective.negative_affinity
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Penalty = Literal["log", "linear", "exp"]
"""h+ and h- of Eqs. (3), (4) and (5), as functions of the disagreement of two pixels."""
Regularizer = Literal["none", "entropy", "weibull", "weibull-released"]
"""Eq. (6), Eq. (7) as printed, Eq. (7) as in the authors' release (decision 001)."""
NegativeAffinity = Literal["paper", "released", "off"]
"""w- of Eq. (2): 1 - u.u'; 1 - max(u.u', 0); 1 for every selected pair (Table 5)."""
Centering = Literal["none", "batch"]
"""Embeddings as the backbone gives them, or less their mean over the batch (decision 002)."""
Affinity = Literal["cosine", "coassociation"]
"""u.u' of the embeddings, or e.e' of their codes: how often many clusterings join two patches."""
Threshold = Annotated[float, Field(ge=-1, le=1)] | Literal["auto"]
"""An affinity; auto: where those of one and of two clusters of k-means cross, or a half."""
MethodName = Literal[
    "iddc",
    "kmeans",
    "stego",
    "acseg",
    "cause",
    "cause-tr",
    "consensus",
    "eagle",
    "grey",
    "hp",
    "iic",
    "mdc",
    "picie",
    "picie-h",
    "pixels",
    "primaps",
    "probe",
    "second-stage",
    "smooseg",
    "transfgu",
]
"""How a head learns: the table of methods. Each has its module, `iddc.methods.NAME`."""
HeadName = Literal[
    "conv",
    "linear",
    "centroids",
    "means",
    "codes",
    "smooth-codes",
    "codebook-codes",
    "concepts",
    "mask-transformer",
]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
ScheduleStep = Literal["iteration", "epoch"]
DatasetName = Literal["folder", "cityscapes", "cocostuff27", "cocostuff171", "potsdam3"]
ProtocolName = Literal["full", "stego-center-crop", "iddc-sliding", "squash", "squash-centers"]
MatchingRows = Literal["clusters", "classes"]
"""The rows of the table that is matched; scipy's order decides among equally good matchings."""
SoftmaxAt = Literal["patches", "pixels"]
"""Where logits become probabilities: on the grid of patches, or at every pixel, as released."""
Blend = Literal["mean", "tent"]
"""Overlapping windows count equally, or each pixel by its distance from the window's border."""
ValueRange = Literal["auto", "file"] | tuple[float, float]
"""One range of all images; one for each file; or the values that become 0 and 255."""
Pages = Literal["first", "all"] | tuple[Annotated[int, Field(ge=1)], ...]
NoData = Literal["auto", "file"] | float
"""Marks of missing data that are found; those alone that files name; or one more."""
Speed = Literal["exact", "balanced", "fast"]
"""Mirrored windows; as few windows as fit; as few large ones as fit."""
RefineName = Literal["none", "fast", "crf"]
"""Probabilities as they are; moved to edges by local windows; by the fully connected CRF."""
ExportFormat = Literal["onnx", "torch-export"]
EngineName = Literal["onnx", "openvino"]
BenchPart = Literal[
    "decode",
    "views",
    "backbone",
    "head",
    "loss",
    "optimizer",
    "step",
    "prediction",
    "evaluation",
]
RecipeName = Literal[
    "folder",
    "cocostuff27-vits16",
    "cocostuff27-vits16-released",
    "cocostuff27-vits16-e2e",
    "cocostuff27-vits8",
    "cocostuff27-vits8-e2e",
    "cocostuff171-vits8",
    "cocostuff171-vits8-e2e",
    "cityscapes-vitb8",
    "cityscapes-vitb8-e2e",
    "cityscapes-vits8",
    "cityscapes-vits8-e2e",
    "cityscapes-linear-vitb8",
    "cityscapes-linear-vits8",
    "cityscapes-linear-vits16",
    "cityscapes-linear-vitb16",
    "cityscapes-linear-xcits12-p16",
    "cityscapes-linear-xcits12-p8",
    "cityscapes-linear-ibot-vitb16",
    "cityscapes-linear-ibot-vitb16-in22k",
    "cityscapes-linear-ibot-vitb16-in22k-e2e",
    "cityscapes-linear-ibot-vits16",
    "ablation-log-unweighted",
    "ablation-linear-unweighted",
    "ablation-exp-unweighted",
    "ablation-log",
    "ablation-linear",
    "ablation-no-regularizer",
    "ablation-no-negatives",
]
BackboneName = Literal[
    "dino-vits16",
    "dino-vits8",
    "dino-vits8-300ep",
    "dino-vitb16",
    "dino-vitb8",
    "ibot-vits16",
    "ibot-vitb16",
    "ibot-vitb16-in22k",
    "dino-xcits12-p16",
    "dino-xcits12-p8",
    "dinov2-vits14",
    "dinov2-vits14-reg",
    "dinov2-vitb14",
    "dinov2-vitb14-reg",
    "dinov3-vits16",
    "dinov3-vitb16",
]


class Frozen(BaseModel):
    """A configuration that does not change and refuses names it does not know."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        defer_build=True,  # of a dozen models a command needs a few
    )


class ObjectiveConfig(Frozen):
    """The weights and thresholds of Eq. (8). Defaults: COCO-Stuff-27, ViT-S/16, Sec. 4.2.3."""

    positive_weight: float = Field(1.0, ge=0)
    """The weight of L+, 1 in Eq. (8). A term of weight 0 is not computed (Table 6)."""
    negative_weight: float = Field(1.4, ge=0)
    """lambda_1, the weight of L-."""
    regularizer_weight: float = Field(0.4, ge=0)
    """lambda_2, the weight of the regulariser."""
    positive_threshold: Threshold = 0.2
    """t+, the affinity above which two pixels should agree; auto: from the images, or 0.5 of
    co-association."""
    negative_threshold: Threshold = 0.12
    """t-, the affinity below which two pixels should differ; or auto, as t+."""
    affinity: Affinity = "cosine"
    """How alike two pixels are. cosine: of their embeddings, as in the paper. coassociation: the
    share of the consensus' over-clusterings that join them, in [0, 1] (--method consensus).
    Thresholds of cosines mean little for it; auto does."""
    penalty: Penalty = "exp"
    """h+ and h-, Eqs. (3)-(5)."""
    positive_affinity: bool = True
    """w+ of Eq. (1): a selected pair counts by its affinity; off: by 1 (Table 5)."""
    negative_affinity: NegativeAffinity = "paper"
    """w- of Eq. (2)."""
    negatives: int = Field(3, ge=1, le=64)
    """How many other images each image is compared with; fewer if the batch is smaller."""
    negative_crops: Literal["first", "second"] = "first"
    """Which crop of the other image an image's first crop is compared with. The release: first."""
    regularizer: Regularizer = "weibull-released"
    """The form of the regulariser on p_c, the mean probability of each cluster."""
    regularizer_crops: Literal["first", "both"] = "first"
    """The crops over which p_c is averaged. The release: first."""
    weibull_shape: float = Field(0.3, gt=0, lt=1)
    """k of Eq. (7). The paper gives no value; this is the release's."""
    weibull_scale: float = Field(5.0, ge=1e-3)
    """The scale of the released Weibull density. Eq. (7) as printed has scale 1."""
    weibull_divisor: float = Field(50.0, ge=1e-3)
    """The release divides its Weibull term by this number."""
    weibull_offset: float = Field(1e-6, ge=1e-12)
    """Added to the argument of either Weibull form, so that an empty cluster stays finite."""
    log_offset: float = Field(1e-6, gt=0, lt=1)
    """The log penalty and the entropy see no argument below this, so that they stay finite."""
    centering: Centering = "none"
    """Affinities are cosines of the embeddings, or of their deviations from the batch mean."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> ObjectiveConfig:
        regularized = self.regularizer_weight and self.regularizer != "none"
        if not (self.positive_weight or self.negative_weight or regularized):
            raise ValueError("every term of the objective is off; give one of them a weight")
        return self


class ReadingConfig(Frozen):
    """How the numbers in image files become red, green and blue of 8 bits (docs/formats.md)."""

    range: ValueRange = "auto"
    """Values shown as black and white in files of more than 8 bits: auto: as the files say, else
    one range of all images; file: a range for each file; or two numbers."""
    bands: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Bands shown as red, green and blue, counted from 1, or one shown as grey; none: as the file
    says."""
    pages: Pages = "first"
    """Pages of a file that are images of their own: first, all, or numbers from 1."""
    nodata: NoData = "auto"
    """Pixels that hold no data: auto: those that the file marks, and numbers such as -9999 far from
    all others; file: those that the file marks; or a number that marks them, too."""
    measured: dict[str, tuple[float, float]] = {}
    """Ranges that `auto` found, for each kind of values, such as uint16."""
    alpha: Literal["auto", "ignore"] = "auto"
    """Alpha channels are masks, or, where `auto` found one that cannot be a mask, nothing."""
    band_names: tuple[str, ...] = ()
    """Names of all bands, where the files gave them names; `bands` are found by them again."""
    marks: dict[str, tuple[float, ...]] = {}
    """Numbers that `auto` found to mark pixels without data, for each kind of values."""
    kinds: tuple[str, ...] = ()
    """Kinds of images that a model was trained on, such as `uint8 rgb`."""

    @model_validator(mode="after")
    def _values_make_sense(self) -> ReadingConfig:
        if isinstance(self.range, tuple) and not self.range[0] < self.range[1]:
            raise ValueError(f"range must go from a smaller to a larger value, found {self.range}")
        if len(self.bands) not in (0, 1, 3):
            raise ValueError(f"bands must be three, or one for grey, found {self.bands}")
        if self.pages == ():
            raise ValueError("pages must be first, all or at least one number")
        if self.band_names and len(self.band_names) < max(self.bands, default=0):
            raise ValueError("band_names must name every one of bands")
        return self


class ViewsConfig(Frozen):
    """How two overlapping crops are cut from an image (Sec. 4.2.2; the release's overlap rule)."""

    short_side: int = Field(448, ge=0)
    """Working size: larger images are reduced to this shorter side, in pixels; 0: as they are."""
    crop_size: int = Field(224, ge=16)
    """The side of a crop, in pixels."""
    min_scale: float = Field(0.8, gt=0)
    """Width and height are resized independently by factors in [min_scale, max_scale]."""
    max_scale: float = Field(1.2, gt=0)
    """The largest factor of width and height; min_scale is the smallest."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """The chance of a horizontal flip, one draw for both crops."""
    max_offset: float = Field(0.5, ge=0, lt=1)
    """The second crop starts within this share of crop_size of the first, on each axis."""
    repeat: int = Field(0, ge=0)
    """An image's crops come again after this many epochs, and a frozen backbone embeds each only
    once; 0: every epoch has new ones."""

    @model_validator(mode="after")
    def _scales_in_order(self) -> ViewsConfig:
        if self.min_scale > self.max_scale:
            raise ValueError(
                f"min_scale must not exceed max_scale, found {self.min_scale} > {self.max_scale}"
            )
        return self


class TrainingConfig(Frozen):
    """Optimiser, schedule and precision (Sec. 4.2.2)."""

    batch_size: int = Field(64, ge=2)
    """Images in one step, over all processes; fewer if there are fewer images."""
    learning_rate: float = Field(5e-4, gt=0)
    """The head's initial learning rate (Adam)."""
    backbone_learning_rate: float = Field(5e-7, gt=0)
    """The backbone's initial learning rate, used only end to end."""
    patches: int = Field(0, ge=0)
    """How many patches of a crop, drawn anew in each step, the loss compares; 0: all of them."""
    heads: int = Field(1, ge=1, le=64)
    """Heads that learn from the same batches, each from first weights of its own; the one of the
    lowest loss is kept, as in SCAN (Van Gansbeke et al., 2020). In end-to-end training,
    only the best head continues once the backbone is unfrozen."""
    start: Literal["random", "consensus"] = "random"
    """The first weights of the head: random, or taught the classes of --method consensus, which may
    differ much in size. All heads would then begin alike, so it takes --training.heads 1."""
    power: float = Field(0.9, ge=0)
    """The exponent of the poly schedule (1 - t)^power."""
    schedule_step: ScheduleStep = "iteration"
    """When the learning rate falls: every iteration (paper) or every epoch (release)."""
    end_to_end: bool = False
    """Whether the backbone trains too, between the two shares below (Sec. 4.2.2)."""
    backbone_from: float = Field(0.4, ge=0, le=1)
    """The share of the run after which the backbone trains; 2/5 in the paper."""
    backbone_until: float = Field(0.8, ge=0, le=1)
    """The share of the run after which it is frozen again; 4/5 in the paper."""
    min_steps: int = Field(400, ge=1)
    """With `epochs` 0, the run has as many epochs as reach this number of steps."""
    precision: Precision = "auto"
    """The backbone's arithmetic; auto: bf16 where the hardware has it, else fp32."""

    @model_validator(mode="after")
    def _shares_in_order(self) -> TrainingConfig:
        if self.backbone_from >= self.backbone_until:
            raise ValueError(
                f"backbone_from must be less than backbone_until, found {self.backbone_from} >= "
                f"{self.backbone_until}"
            )
        return self

    @model_validator(mode="after")
    def _heads_begin_apart(self) -> TrainingConfig:
        if self.start == "consensus" and self.heads > 1:
            raise ValueError(
                f"with start consensus all heads begin alike: expected heads 1, found {self.heads}"
                "; several heads take --training.start random"
            )
        return self


class PredictionConfig(Frozen):
    """How a whole image is segmented. The windows are those of the protocol `full`."""

    window: int = Field(224, ge=0, le=4096)
    """The side of a sliding window at working size, in pixels; 0: the whole image at once."""
    overlap: int = Field(75, ge=0)
    """How many pixels neighbouring windows share, at least."""
    fit: bool = False
    """Cover an image with as few windows as can be, evenly spaced and none smaller than `window`;
    otherwise windows have that side, and the last one is moved back to the border."""
    flip: bool = True
    """Average the probabilities (or logits, see `softmax`) with those of the mirrored image."""
    softmax: SoftmaxAt = "patches"
    """Where logits become probabilities: on the grid of patches, whose probabilities are enlarged
    bilinearly; or at every pixel, after the logits were enlarged (the authors' release)."""
    align_corners: bool = False
    """Enlarge the grid so that corner patches lie on corner pixels (the release's check after each
    epoch), instead of at the centres of the pixels they cover."""
    blend: Blend = "mean"
    """How overlapping windows are averaged: equally, or by the distance from a window's border."""
    refine: RefineName = "none"
    """Make masks follow edges; crf needs the extra `crf`, and memory for the whole image."""

    @property
    def min_side(self) -> int:
        """The shorter side to which smaller images are enlarged, in pixels."""
        return min(self.window, 224) if self.fit else self.window

    @model_validator(mode="after")
    def _windows_advance(self) -> PredictionConfig:
        if self.window and self.overlap >= self.window:
            raise ValueError(
                f"overlap must be smaller than window, found {self.overlap} >= {self.window}"
            )
        return self


_METHODS_BY_HEAD: dict[Any, MethodName] = {"centroids": "kmeans", "codes": "stego"}

SPEEDS: dict[Speed, dict[str, int | bool | str]] = {
    "exact": {"window": 224, "overlap": 75, "fit": False, "flip": True, "blend": "tent"},
    "balanced": {"window": 224, "overlap": 75, "fit": True, "flip": False, "blend": "tent"},
    "fast": {"window": 448, "overlap": 64, "fit": True, "flip": False, "blend": "tent"},
}
"""The fields of PredictionConfig that each speed sets (decision 011)."""


CONSENSUS_USES = frozenset({"training.precision"})
"""What the consensus reads of the groups of an Experiment, beside its own numbers."""


class ConsensusConfig(Frozen):
    """The numbers of the consensus. Recipe selected on IDD-Lite, LabelMeFacade and digital rock."""

    groupings: int = Field(6, ge=1, le=64)
    """M, how many over-clusterings vote."""
    prototypes: int = Field(200, ge=2, le=5000)
    """K', the centroids of an over-clustering; at least 2 K are used."""
    vectors: int = Field(30_000, ge=2, le=2**24)
    """The most regions that each over-clustering sees, drawn anew; patches if regions are off."""
    size_power: float = Field(0.5, ge=0, le=1)
    """The power of a region's patches that is its weight in an over-clustering. 0: every region
    counts alike. 1: every patch does."""
    iterations: int = Field(10, ge=1)
    """Updates of the centroids of an over-clustering."""
    temperature: float = Field(0.03, gt=0)
    """What cosines to centroids are divided by: lower values give harder groupings."""
    class_temperature: float = Field(0.05, gt=0)
    """What the agreement with each class is divided by in the final probabilities."""
    images: int = Field(600, ge=2)
    """The most images that are looked at, spread evenly over the collection."""
    sample: int = Field(60_000, ge=2)
    """Patches of these images from which the head learns."""
    regions: bool = True
    """Whether embeddings are averaged over regions of their image."""
    lengths: Literal["auto", "unit", "free"] = "auto"
    """The length of a region's mean embedding. unit: 1. free: as it comes, so that regions in which
    embeddings differ lie near the mean of all. auto: free where the backbone does not know such
    images, that is where colours explain less than `known_share` of how embeddings vary."""
    colour: Annotated[float, Field(ge=0, le=8)] | Literal["auto"] = "auto"
    """The weight of a region's colour beside its embedding while the classes are found. auto: 1
    where the backbone does not know such images, as for lengths, else 0."""
    known_share: float = Field(0.36, ge=0, le=1)
    """The part of the variance within images between regions of like colour below which the
    backbone does not know such images; see lengths and colour."""
    steps: int = Field(300, ge=1)
    """Steps in which the head learns the classes."""
    batch_size: int = Field(4096, ge=1)
    """Patches in such a step."""
    learning_rate: float = Field(1e-2, gt=0)
    """The learning rate of the head at the start (Adam); it falls to 0."""


class Experiment(Frozen):
    """All choices of a run: one row of a table, or a user's own folder."""

    recipe: RecipeName = "folder"
    """The recipe that sets every number you do not give (`iddc recipes`)."""
    method: MethodName = "iddc"
    """How the head learns."""
    num_clusters: int = Field(27, ge=2, le=65535)
    """K, how many clusters to find."""
    backbone: str = "auto"
    """A name of `iddc models`, NAME=FILE, a folder, or untrained:TIMM_NAME."""
    head: HeadName = "conv"
    """3x3-1x1-1x1 convolutions (tables 1-3) or one 1x1 convolution (ablations)."""
    epochs: int = Field(0, ge=0)
    """Passes over the images; 0: as many as reach training.min_steps."""
    seed: int = Field(0, ge=0, lt=2**32)
    """The seed of everything random."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Eq. (8)."""
    reading: ReadingConfig = ReadingConfig()
    """Numbers in files become colours."""
    views: ViewsConfig = ViewsConfig()
    """The two crops."""
    training: TrainingConfig = TrainingConfig()
    """Optimiser and schedule."""
    prediction: PredictionConfig = PredictionConfig()
    """How the trained model segments a whole image."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The numbers of a method other than IDDC, as `iddc train --method NAME --help` lists them."""

    @model_validator(mode="before")
    @classmethod
    def _heads_of_old_runs(cls, values: Any) -> Any:
        """A run that knew of no methods says by its head which one it was."""
        if isinstance(values, dict) and "method" not in values:
            method = _METHODS_BY_HEAD.get(values.get("head"))
            return values | {"method": method} if method else values
        return values


class Runtime(Frozen):
    """What the machine does, not what the run computes: no part of a run's identity."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto: a GPU if there is one."""
    workers: int = Field(-1, ge=-1, le=256)
    """Processes that decode images. 0: only the main process; -1: as many as help."""
    micro_batch_size: int = Field(0, ge=0)
    """Images in one forward pass; 0: chosen for the device. It changes memory and time, never the
    result."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between two saved training states."""
    max_unreadable: float = Field(0.05, ge=0, le=1)
    """The share of unreadable images above which the run stops."""
    tensorboard: bool = False
    """Also write TensorBoard events to RUN/tensorboard (extra `tensorboard`)."""
    snapshots: bool = False
    """Keep what has trained at the end of each epoch in RUN/snapshots (Fig. 7b)."""


PretrainMethod = Literal["contrast", "dino"]
"""For networks with stages, such as convolutional ones; for plain ViTs."""
TeacherCentering = Literal["mean", "sinkhorn"]
"""What keeps DINO's teacher from collapsing: a moving mean of its logits, or balanced targets."""


class ContrastConfig(Frozen):
    """Contrast of images and of matched points (`contrast`). Defaults: see docs/log.md.

    A step sees either small crops of any images, with NT-Xent (SimCLR) and its dense form, or
    larger crops of larger images, with the dense form alone.
    """

    learning_rate: float = Field(1.5e-3, gt=0)
    """The highest one (AdamW)."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay of matrices and kernels; biases and norms have none."""
    warmup: int = Field(50, ge=0)
    """Steps in which the learning rate rises."""
    cooldown: float = Field(0.35, gt=0, le=1)
    """The last share of the steps, in which it falls to 0."""
    momentum: float = Field(0.99, ge=0, lt=1)
    """Momentum of the moving average of the weights, which is the result."""
    gradient_clip: float = Field(5.0, gt=0)
    """The largest norm of all gradients together."""
    temperature: float = Field(0.2, gt=0)
    """The number by which NT-Xent and its dense form divide cosines."""
    small_size: int = Field(64, ge=32)
    """The side of a small crop, in pixels."""
    small_grid: int = Field(3, ge=0, le=32)
    """Small crops share this number of points, squared; 0: they have NT-Xent alone."""
    small_shares: tuple[float, ...] = ()
    """The share of each IMAGES argument in a small batch; none: as many images as it has."""
    large_every: int = Field(2, ge=0)
    """Every n-th step sees large crops; 0: none does."""
    large_size: int = Field(128, ge=32)
    """The side of a large crop. A large batch has as many pixels as a small one."""
    large_grid: int = Field(6, ge=1, le=32)
    """Large crops share this number of points, squared."""
    large_min_side: int = Field(80, ge=8)
    """The shortest side of a large crop before it is resized, and of an image that gives one."""
    large_shares: tuple[float, ...] = ()
    """The share of each IMAGES argument in a large batch; none: as many images as it has."""
    min_overlap: float = Field(0.4, ge=0, lt=1)
    """The part of the smaller of two crops that the other one covers."""
    jitter: float = Field(0.5, ge=0, le=1)
    """The strength of random changes of brightness, contrast, saturation and hue."""
    gray: float = Field(0.05, ge=0, le=1)
    """The chance of a crop without colour."""
    recalibration_steps: int = Field(24, ge=1)
    """Batches, half of them large, from which the result's batch norms take their statistics."""
    recalibration_size: int = Field(224, ge=32)
    """The side of a large crop among them, in pixels: that of prediction's windows."""
    recalibration_min_side: int = Field(160, ge=8)
    """The shortest side of a large crop among them before it is resized, in pixels."""
    recalibration_jitter: float = Field(0.3, ge=0, le=1)
    """The strength of their random changes of colour; no such crop is without colour."""

    @model_validator(mode="after")
    def _shares_are_shares(self) -> ContrastConfig:
        for name in ("small_shares", "large_shares"):
            shares = getattr(self, name)
            if shares and (min(shares) < 0 or not sum(shares) > 0):
                raise ValueError(f"{name} must not be negative nor all zero, found {shares}")
        return self


class DinoConfig(Frozen):
    """DINO with iBOT's loss of masked patches (`dino`). Defaults: for small data."""

    learning_rate: float = Field(5e-4, gt=0)
    """The highest one (AdamW)."""
    final_learning_rate: float = Field(1e-6, ge=0)
    """The learning rate at which its cosine ends."""
    weight_decay: float = Field(0.04, ge=0)
    """Weight decay of matrices at the start; biases and norms have none."""
    final_weight_decay: float = Field(0.4, ge=0)
    """The weight decay at which its cosine ends."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """The share of the steps in which the learning rate rises."""
    momentum: float = Field(0.994, ge=0, le=1)
    """Momentum of the teacher's moving average at the start; its cosine ends at 1."""
    gradient_clip: float = Field(3.0, gt=0)
    """The largest norm of all gradients together."""
    frozen_epochs: int = Field(1, ge=0)
    """Epochs at the start, at most a quarter of all steps, in which the prototypes stay."""
    global_size: int = Field(96, ge=16)
    """The side of the two global crops, in pixels."""
    local_size: int = Field(48, ge=16)
    """The side of the local crops, in pixels."""
    local_crops: int = Field(6, ge=0)
    """How many local crops each image gives."""
    local_scale: float = Field(0.05, gt=0, le=1)
    """The smallest share of an image's area in a local crop."""
    global_scale: float = Field(0.32, gt=0, le=1)
    """The smallest share of its area in a global crop, the largest in a local one."""
    prototypes: int = Field(4096, ge=2)
    """The heads' output dimension."""
    hidden: int = Field(2048, ge=1)
    """The width of the heads' two hidden layers."""
    bottleneck: int = Field(256, ge=1)
    """The heads' width before the prototypes."""
    shared_head: bool = True
    """Class token and patches have one head (iBOT), or one each (DINOv2)."""
    student_temperature: float = Field(0.1, gt=0)
    """The sharpness of the student."""
    first_teacher_temperature: float = Field(0.04, gt=0)
    """The sharpness of the teacher at the start."""
    teacher_temperature: float = Field(0.07, gt=0)
    """The sharpness of the teacher after the warm-up."""
    temperature_warmup: float = Field(0.3, ge=0, le=1)
    """The share of the steps in which it goes from the one to the other."""
    centering: TeacherCentering = "mean"
    """A moving mean of the teacher's logits (DINO), or Sinkhorn iterations (SwAV, DINOv2)."""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the moving mean of the teacher's logits."""
    patch_weight: float = Field(1.0, ge=0)
    """The weight of iBOT's loss; DINO's is 1."""
    mask_share: float = Field(0.5, gt=0, le=1)
    """The share of the global crops in which the student does not see some patches."""
    min_masked: float = Field(0.1, gt=0, lt=1)
    """The smallest share of patches that are masked in such a crop."""
    max_masked: float = Field(0.5, gt=0, lt=1)
    """The largest share of them."""
    koleo_weight: float = Field(0.0, ge=0)
    """The weight of KoLeo, which spreads class tokens evenly; 0.1 in DINOv2."""
    jitter: float = Field(0.5, ge=0, le=1)
    """The strength of random changes of brightness, contrast, saturation and hue."""
    gray: float = Field(0.2, ge=0, le=1)
    """The chance of a crop without colour."""

    @model_validator(mode="after")
    def _shares_in_order(self) -> DinoConfig:
        if self.min_masked > self.max_masked:
            raise ValueError(
                f"min_masked must not exceed max_masked, found {self.min_masked} > "
                f"{self.max_masked}"
            )
        if self.local_scale > self.global_scale:
            raise ValueError(
                f"local_scale must not exceed global_scale, found {self.local_scale} > "
                f"{self.global_scale}"
            )
        return self


class PretrainConfig(Frozen):
    """All choices of a pretraining."""

    method: PretrainMethod = "contrast"
    """contrast: for networks with stages, such as ResNets; dino: for plain ViTs."""
    init: str = ""
    """A backbone whose weights to begin with, of the same network: bundled, a weights folder, or
    another name that `train --backbone` takes; none: random weights."""
    network: str = "resnet18"
    """A network of timm."""
    patch_size: int = Field(0, ge=0)
    """The patch size of a ViT, in pixels; 0: as its name says."""
    depth: int = Field(0, ge=0)
    """The blocks of a ViT; 0: as its name says."""
    stages: tuple[int, ...] = ()
    """The stages that make an embedding (contrast); none: those of stride 8 to 32."""
    steps: int = Field(2200, ge=1)
    """How many batches are seen."""
    epochs: int = Field(0, ge=0)
    """Instead of steps: how many times each image is seen."""
    batch_size: int = Field(192, ge=8)
    """Images in a batch, over all processes; fewer if there are fewer images."""
    short_side: int = Field(360, ge=32)
    """Larger images are reduced to this shorter side when they are decoded, in pixels."""
    components: int = Field(128, ge=0)
    """What the stages of the result are reduced to (contrast); 0: all channels."""
    min_side: int = Field(28, ge=8)
    """Images with a shorter side are left out, and count as unreadable; contrast: the least side of
    a small crop."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """The network's arithmetic; auto: bf16 where the hardware has it, else fp32."""
    seed: int = Field(0, ge=0, lt=2**32)
    """The seed of everything random."""
    reading: ReadingConfig = ReadingConfig()
    """Numbers in files become colours."""
    contrast: ContrastConfig = ContrastConfig()
    """The method `contrast`."""
    dino: DinoConfig = DinoConfig()
    """The method `dino`."""
