"""What a run is made of: frozen pydantic models, read from YAML (`settings_file`); an unknown key is an error.

A recipe names a student, a fleet, a mixture and a suite by file, and holds the settings of a run. The models of the
files of teachers/, data/, eval/ and recipes/ are here; those of the algorithm are in `mmopd.algorithm.settings`, and an
objective's own in its file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from mmopd.algorithm.settings import Algorithm
from mmopd.settings_file import Config, Fraction, Positive, suggest

Part = Literal["vision", "projector", "language"]  # of a student
Sync = Literal["file", "broadcast", "ipc"]


class Engine(Config):
    """How vLLM serves one model; the same fields for teachers and for the student."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: Positive = 20480
    max_num_seqs: Positive = 64
    kv_cache_mib: Positive | None = Field(
        None, description="KV cache in MiB; needed on CPU, where vLLM would take most of the memory"
    )
    gpu_share: Fraction = Field(0.9, description="share of a GPU's memory; unused on CPU")
    tensor_parallel: Positive = 1
    enforce_eager: bool = False
    videos: int = Field(0, ge=0, description="clips that a prompt may have; a server keeps memory for them")
    port: int | None = Field(None, ge=1024, le=65535, description="a free port if not set")
    extra_args: tuple[str, ...] = Field((), description="more flags for `vllm serve`, as they are")


class Student(Config):
    """The model that is trained, and the engine that samples from it."""

    model: Path = Field(description="HF folder of a Qwen-VL model")
    engine: Engine = Engine()
    replicas: Positive = Field(1, description="engines, on GPUs of their own; each samples its share of the groups")
    sync: Sync = Field(
        "file",
        description="how new weights reach the engine: `file` in memory; on GPUs also `broadcast` (NCCL), or `ipc`: "
        "the engine shares the GPU of rank 0, and sleeps while the trainer learns",
    )

    @model_validator(mode="after")
    def _one_gpu(self) -> Self:
        if self.sync == "ipc" and self.engine.tensor_parallel > 1:
            raise ValueError("sync: ipc is for an engine on one GPU; set engine.tensor_parallel: 1, or sync: broadcast")
        if self.sync == "ipc" and self.replicas > 1:
            raise ValueError(
                "sync: ipc is for one engine, which shares the GPU of rank 0; set replicas: 1, or sync: broadcast"
            )
        return self


class Rollout(Config):
    """How the student is sampled: P prompts a step, G responses each (defaults of the paper's Table B.1)."""

    prompts: Positive = 64
    group: Positive = 16
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = all tokens")
    max_tokens: Positive = 16384
    concurrency: Positive = Field(64, description="prompts in flight at once, per rank")
    async_steps: Literal[0, 1] = Field(
        0,
        description="1: the next step is rolled out while the trainer learns from this one, by weights that are one update older",
    )


class Lora(Config):
    """LoRA: matrices of rank `rank`, scaled by `alpha / rank`, beside linear layers; the model's own weights stay as
    they are.
    """

    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: float = Field(32.0, gt=0)
    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = Field(
        ("language",), description="vision, projector, language"
    )
    targets: tuple[str, ...] = Field(
        (),
        description="last names of linear layers, such as q_proj; all of the parts if not set, without the output head and experts",
    )


class Train(Config):
    """The optimiser and the micro-batches (defaults of the paper's Table B.1)."""

    steps: Positive = 100
    ranks: Positive = Field(1, description="training processes, over all machines")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lr: float = Field(1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(5, ge=0, description="optimiser steps in which `lr` rises to its full value")
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(0.1, ge=0)
    grad_clip: float = Field(1.0, gt=0, description="largest norm of a gradient")
    minibatches: Positive = Field(
        1, description="optimiser steps per rollout batch, each on whole groups, and a mean over its own responses"
    )
    old_logprobs: Literal["engine", "recompute"] | None = Field(
        None,
        description="the student's log-probs to learn from: the engine's, or by one more pass of the trainer; recompute with async_steps",
    )
    micro_tokens: Positive = Field(16384, description="tokens in a packed micro-batch, per rank")
    micro_patches: Positive = Field(16384, description="vision patches in a packed micro-batch, per rank")
    gradient_checkpointing: bool = True
    offload: bool = Field(False, description="optimiser state and weights in CPU memory")
    freeze: tuple[Part, ...] = Field(
        (), description="parts that are not trained: vision (the tower), projector (its merger), language"
    )
    lora: Lora | None = Field(None, description="train LoRA adapters instead of the model's own weights")
    checkpoint_every: Positive = 50
    keep_checkpoints: Positive = Field(2, description="how many, the newest")
    keep_best: int = Field(
        0, ge=0, description="and how many of those before: the ones after whose steps most responses were right"
    )
    probe_tolerance: float = Field(
        0.1, gt=0, description="largest |log-prob difference| of engine and trainer after a sync; 1e-4 in fp32"
    )
    max_absent: Fraction = Field(0.2, description="share of responses that may lack a score before the run stops")
    timeout: Positive = Field(
        7200,
        description="seconds for an answer of an engine, its queue included: more than a rollout; ranks wait a tenth longer for each other",
    )

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if set(self.freeze) == set(get_args(Part)):
            raise ValueError("freeze: vision, projector and language are all that a student has: nothing would train")
        if self.freeze and self.lora is not None:
            raise ValueError(
                "freeze: with `lora` all of the model's own weights are frozen already; say in lora.parts what gets adapters"
            )
        return self


class Teacher(Config):
    """A teacher that mmopd serves (`model`), or one that runs elsewhere (`endpoints`)."""

    model: Path | None = None
    engine: Engine = Engine()
    replicas: Positive = 1
    endpoints: tuple[str, ...] = Field((), description="base URLs of vLLM servers that run elsewhere")
    api_key_env: str | None = Field(None, description="environment variable that holds their key")
    adapter: Path | None = Field(
        None, description="LoRA folder (peft) on top of `model`; adapters of one model share its servers"
    )
    view: str = Field(
        "full",
        description="what it is shown of a prompt, unless a route says otherwise: a name of `views`, or a built-in one",
    )
    weight: float = Field(1.0, gt=0, description="w_k of Eq. 4")
    concurrency: Positive = Field(32, description="requests in flight at once, per rank and replica")
    timeout: float = Field(120.0, gt=0, description="seconds in which a score must arrive, retries included")

    @model_validator(mode="after")
    def _served_or_elsewhere(self) -> Self:
        if (self.model is None) == (not self.endpoints):
            raise ValueError("a teacher has either `model` (served by mmopd) or `endpoints` (running elsewhere)")
        if self.adapter is not None and self.model is None:
            raise ValueError("`adapter` goes on top of `model`; a server that runs elsewhere has its adapters already")
        return self


class View(Config):
    """What a teacher is shown of a prompt. The ids of the response never change, so that its log-probs stay aligned."""

    images: Literal["keep", "drop", "blank"] = Field(
        "keep", description="and clips, too; blank: an even grey of the same size"
    )
    min_pixels: Positive | None = Field(None, description="smaller images are enlarged to it before they are sent")
    max_pixels: Positive | None = Field(None, description="larger images are reduced to it before they are sent")
    instead: str = Field(
        "",
        description="text in place of the images, such as `{caption}`; fields are the row's extra texts, and {answer}",
    )
    hint: str = Field("", description="text after the question, such as `The answer is {answer}.`; the same fields")


class Route(Config):
    """Who scores a prompt: globs on task and modality, first match wins."""

    teacher: str | Mapping[str, Annotated[float, Field(gt=0)]] = Field(
        description="a teacher, or several with the weights of their log-probs: {math: 2, general: 1}"
    )
    task: str = "*"
    modality: str = "*"
    view: str | None = Field(None, description="what they are shown; each teacher's own view if not set")

    @property
    def teachers(self) -> Mapping[str, float]:
        """Teacher -> share of its log-probs in the target; the shares sum to 1."""
        weights = {self.teacher: 1.0} if isinstance(self.teacher, str) else self.teacher
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}


class Fleet(Config):
    """`teachers/*.yaml`: teachers, the routes to them, and views beside the built-in ones."""

    teachers: Mapping[str, Teacher]
    routes: tuple[Route, ...]
    views: Mapping[str, View] = {}

    @model_validator(mode="after")
    def _routes_lead_somewhere(self) -> Self:
        for i, route in enumerate(self.routes):
            if not route.teacher:
                raise ValueError(f"routes.{i}.teacher: names no teacher")
            for name in route.teachers:
                if name not in self.teachers:
                    raise ValueError(f"routes.{i}.teacher: no teacher {name!r}{suggest(name, self.teachers)}")
        return self


class Source(Config):
    """One folder of shards, all of one task."""

    shards: str | Path = Field(
        description="folder of .tar shards with their .index.safetensors, or its URL (s3://..., https://...)"
    )
    task: str = Field(description="a task of modalities/")
    weight: float = Field(1.0, ge=0)
    schedule: Mapping[Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0)]] = Field(
        {}, description="step -> weight at that step, linear in between: {100: 0.5, 200: 2}; `weight` is that of step 0"
    )
    max_prompt_tokens: Positive | None = Field(
        None, description="rows with a longer prompt are left out, images included"
    )

    def weight_at(self, step: int) -> float:
        """The weight at a step of the run."""
        points = sorted({0: self.weight, **self.schedule}.items())
        before, low = [point for point in points if point[0] <= step][-1]
        after, high = next((point for point in points if point[0] > step), (before + 1, low))
        return low + (high - low) * (step - before) / (after - before)


class Mixture(Config):
    """`data/*.yaml`: weighted sources."""

    sources: Mapping[str, Source]
    adapt: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="how strongly sources are preferred in which the student is now right and now wrong; 0 = off",
    )
    cache_gib: float = Field(
        50.0, gt=0, description="local copies of remote shards, at most; the least recently used go first"
    )

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        for step in sorted({0}.union(*(source.schedule for source in self.sources.values()))):
            if sum(source.weight_at(step) for source in self.sources.values()) <= 0:
                raise ValueError("sources: the weights sum to zero" + (f" at step {step}" if step else ""))
        return self


class Benchmark(Config):
    """One row of a suite, one column of the results table."""

    column: str
    task: str = Field(description="an lmms-eval task: built in, or a .yaml of eval/")
    metric: str = Field(description="key in lmms-eval's results, such as `exact_match,none`")
    scale: float = Field(1.0, gt=0, description="largest value of the metric; results are shown on 0-100")
    data: Path | None = Field(None, description="local parquet file to use instead of the task's own data")
    max_tokens: Positive | None = None
    reasoning_tags: Literal["none", "default"] = "none"
    limit: Positive | None = None


class Suite(Config):
    """`eval/*.yaml`: benchmarks."""

    benchmarks: tuple[Benchmark, ...]
    concurrency: Positive = 16
    timeout: Positive = Field(1800, description="seconds for one benchmark")


class Recipe(Config):
    """`recipes/*.yaml`: a whole run."""

    prepare: Path | None = Field(
        None, description="a .py of data/ whose `prepare(workspace)` makes what the recipe refers to"
    )
    seed: int = 0
    student: Student
    fleet: Path | None = Field(None, description="a file of teachers/; GRPO alone needs none")
    mixture: Path
    suite: Path | None = None
    rollout: Rollout = Rollout()
    algorithm: Algorithm = Algorithm()
    train: Train = Train()

    @model_validator(mode="after")
    def _has_teachers(self) -> Self:
        objective = self.algorithm.objective
        if self.fleet is None and objective.needs_teachers:
            raise ValueError(f"fleet: missing, and `{objective.kind}` learns from teachers; `grpo` needs none")
        return self

    @model_validator(mode="after")
    def _sync_has_its_trainer(self) -> Self:
        objective = self.algorithm.objective
        if self.student.sync != "file" and not objective.trains:
            raise ValueError(
                f"student.sync: `{objective.kind}` sends merged weights once, without a trainer; leave it out"
            )
        if self.student.sync == "ipc" and self.rollout.async_steps:
            raise ValueError(
                "student.sync: with ipc the engine sleeps while the trainer learns; rollout.async_steps needs it awake"
            )
        return self

    @model_validator(mode="after")
    def _may_run_ahead(self) -> Self:
        objective = self.algorithm.objective
        if self.recomputes and not objective.samples_rollouts:
            key = "rollout.async_steps" if self.rollout.async_steps else "train.old_logprobs"
            raise ValueError(f"{key}: `{objective.kind}` learns from no rollouts; leave it out")
        if self.rollout.async_steps and self.train.old_logprobs == "engine":
            raise ValueError(
                "train.old_logprobs: with rollout.async_steps the engine's log-probs are those of older weights; leave it out, or recompute"
            )
        return self

    @property
    def recomputes(self) -> bool:
        """Whether the trainer computes the log-probs of what was sampled itself."""
        return self.train.old_logprobs == "recompute" or self.rollout.async_steps > 0

    @model_validator(mode="after")
    def _engine_takes_a_group(self) -> Self:
        limit = self.student.engine.max_num_seqs
        attempts = self.algorithm.difficulty.attempts if self.algorithm.difficulty else 0
        for key, n in (("rollout.group", self.rollout.group), ("algorithm.difficulty.attempts", attempts)):
            if n > limit:
                raise ValueError(
                    f"{key} is {n}, and student.engine.max_num_seqs is {limit}: vLLM takes no request for more responses than that"
                )
        return self


class Variant(Config):
    """One method of a comparison: the recipe with some settings changed."""

    label: str = Field("", description="how tables call it; its name if not given")
    set: Mapping[str, Any] = Field({}, description="key.path -> value, as on the command line")


class ComparisonTable(Config):
    """Variants side by side, each with the same seeds."""

    title: str
    seeds: Positive = Field(3, description="seeds 0, 1, ...")
    baseline: str = Field(description="the variant that the others are paired with, seed by seed")
    variants: tuple[str, ...]


class Comparison(Config):
    """`recipes/compare_*.yaml`: a grid of variants and seeds over one recipe."""

    recipe: Path
    set: Mapping[str, Any] = Field({}, description="changes for all variants")
    variants: Mapping[str, Variant]
    tables: Mapping[str, ComparisonTable]

    @model_validator(mode="after")
    def _tables_name_variants(self) -> Self:
        for name, table in self.tables.items():
            for variant in (table.baseline, *table.variants):
                if variant not in self.variants:
                    raise ValueError(f"tables.{name}: no variant {variant!r}{suggest(variant, self.variants)}")
        return self
