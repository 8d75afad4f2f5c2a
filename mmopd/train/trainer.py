"""The trainer: DeepSpeed ZeRO-3 around a student, one optimiser step per `update`.

All methods are collective: every rank calls them with the same items, and `pack.deal` decides which rank computes
which. Gradients are summed, not averaged, over micro-batches and ranks: the items' weights hold every normalisation.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmopd.algorithm.divergence import NOTHING
from mmopd.algorithm.settings import Algorithm
from mmopd.algorithm.step import Tokens
from mmopd.config import Train
from mmopd.errors import ConfigError
from mmopd.modality import Encoder
from mmopd.train.distributed import Ranks
from mmopd.train.families import unit
from mmopd.train.limits import RESIDENT
from mmopd.train.lora import Weight, add_adapters, weights
from mmopd.train.pack import Collator, Cost, MicroBatch, deal
from mmopd.train.prefix_tree import Item
from mmopd.train.students import as_checkpoint, freeze, layout, load_student

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def learning_rate_factor(settings: Train) -> Callable[[int], float]:
    """Return the factor of `lr` for optimiser step 0, 1, ...: warm-up that starts above zero, then the schedule."""
    total = settings.steps * settings.minibatches
    after = SCHEDULES[settings.schedule]

    def factor(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / (settings.warmup + 1)
        return after(min(1.0, (step - settings.warmup) / max(1, total - settings.warmup)))

    return factor


def deepspeed_config(settings: Train, ranks: Ranks) -> dict[str, Any]:
    """Return the ZeRO-3 settings; nothing in them compiles code at run time unless weights are offloaded.

    Raises:
        ConfigError: offload on a machine without a GPU.
    """
    on_gpu = ranks.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": RESIDENT,
    }
    optimizer: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.offload:
        if not on_gpu:
            raise ConfigError("train.offload: this machine has no GPU whose memory it could save; remove the setting")
        zero |= {
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        }
    else:
        optimizer["torch_adam"] = True
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # `update` itself marks the last micro-batch
        "gradient_clipping": settings.grad_clip,
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "steps_per_print": 1_000_000_000,
    }


class NotFiniteError(Exception):
    """An update that was not made, because its loss or its gradient is not finite."""


def collator(student: Any, encoder: Encoder) -> Collator:
    """Return the collator that makes micro-batches for a student."""
    vision = getattr(student.config, "vision_config", None)
    if vision is None:
        return Collator(encoder, None, 0, 0, layout(student))
    return Collator(
        encoder,
        student.model.get_rope_index,
        patch_size=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        merge=vision.spatial_merge_size,
        layout=layout(student),
    )


def loss_of(output: Tensor, micro: MicroBatch, settings: Algorithm) -> tuple[Tensor, Tensor]:
    """Return (loss, log-probs [M] of the micro-batch's tokens) from the student's output."""
    logprob = output
    likeliest = None
    if micro.likeliest is not None:
        logprob = output[:, 0]
        likeliest = (micro.likeliest, output[:, 1:].masked_fill(micro.likeliest <= NOTHING, NOTHING))
    tokens = Tokens(logprob, micro.old, micro.advantage, micro.weight, likeliest)
    return settings.objective.loss(tokens, settings), logprob


class Trainer:
    """A student under ZeRO-3.

    Args:
        model: HF folder of the student.
        encoder: the student's own; decodes images.
        settings, algorithm: of the recipe.
        ranks: from `distributed.start`.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: the model is of an unknown family, or the settings do not suit this machine.
    """

    def __init__(self, model: Path, encoder: Encoder, settings: Train, algorithm: Algorithm, ranks: Ranks) -> None:
        import deepspeed
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        self.source = model
        self.settings = settings
        self.algorithm = algorithm
        self.ranks = ranks
        zero = deepspeed_config(settings, ranks)
        self._zero = HfDeepSpeedConfig(zero)  # while this object lives, from_pretrained shards as it creates
        student = load_student(model, getattr(torch, settings.dtype))
        freeze(student, settings.freeze)
        if settings.lora is not None:
            add_adapters(student, settings.lora)
        if settings.gradient_checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.train()
        factor = learning_rate_factor(settings)
        self.engine, _, _, self._schedule = deepspeed.initialize(
            model=student,
            model_parameters=_decay_groups(student, settings.weight_decay),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
            config=zero,
        )
        self._collate = collator(student, encoder)
        self._cost = Cost(
            student.config.get_text_config().hidden_size,
            _size(student.model.visual) / _size(student.model.language_model) if self._collate.rope else 0.0,
        )

    @property
    def student(self) -> Any:
        """The model, with sharded weights."""
        return self.engine.module

    @property
    def keeps_some(self) -> bool:
        """True if some weights never change: parts are frozen, or adapters are trained."""
        return bool(self.settings.freeze or self.settings.lora)

    def update(self, items: Sequence[Item]) -> dict[str, float]:
        """Make one optimiser step. The items' token weights hold every mean, so the weighted sum is the loss.

        Returns:
            loss, grad_norm (before clipping), lr, tokens (trained), seconds, mismatch and mismatch_mean (largest and
                mean |log pi - old| of a trained token: the difference between trainer and engine, if no update came in
                between), clip_fraction (of trained tokens), micro_steps, packing (share of computed tokens that are not
                padding), sharing (tokens of all prompts and responses / computed tokens: the work saved because
                responses share a prompt).

        Raises:
            ValueError: no items.
            NotFiniteError: loss or gradient is not finite, on all ranks; weights, optimiser and schedule are unchanged.
        """
        if not items:
            raise ValueError("an update needs at least one response")
        started = time.perf_counter()
        used = computed = whole = 0.0
        measured: list[Tensor] = []
        share = self._share(items)
        for step, micro in enumerate(self._micro_batches(items, share)):
            self.engine.set_gradient_accumulation_boundary(step == len(share) - 1)
            loss, logprob = loss_of(self.engine(**micro.inputs), micro, self.algorithm)
            self.engine.backward(loss * self.ranks.size)  # DeepSpeed averages over the ranks
            measured.append(self._measure(loss.detach(), logprob.detach(), micro))
            used += micro.used
            whole += sum(items[i].length for i in micro.order)
            computed += micro.inputs["input_ids"].numel()
        *sums, largest = zip(*torch.stack(measured).tolist(), strict=True)
        loss_sum, tokens, clipped, apart, used, computed, whole = self.ranks.all_sum(
            [*map(sum, sums), used, computed, whole]
        )
        (mismatch,) = self.ranks.all_max([max(largest)])
        if not math.isfinite(loss_sum):
            self.engine.optimizer._overflow_clean_up(None)  # drops all gradients, as `step` does after an overflow
            raise NotFiniteError(f"the loss is {loss_sum}")
        rate = self._schedule.get_last_lr()[0]
        self.engine.step()
        if self.engine.optimizer.overflow:
            raise NotFiniteError(f"a gradient is not finite (loss {loss_sum:.4g})")
        return {
            "loss": loss_sum,
            "grad_norm": float(self.engine.get_global_grad_norm()),
            "lr": rate,
            "tokens": tokens,
            "mismatch": mismatch,
            "mismatch_mean": apart / max(1.0, tokens),
            "clip_fraction": clipped / max(1.0, tokens),
            "micro_steps": float(len(share)),
            "packing": used / computed,
            "sharing": whole / used,
            "seconds": time.perf_counter() - started,
        }

    def logprobs(self, items: Sequence[Item]) -> list[Tensor]:
        """Return the student's log-probs [T] of each item's tokens, in float32 on the CPU, on every rank."""
        mine: dict[int, Tensor] = {}
        for micro in self._micro_batches(items, self._share(items)):
            with torch.no_grad():
                flat = self.engine(**micro.inputs).cpu()
            if micro.order:
                mine |= zip(micro.order, flat.split([len(items[i].tokens) for i in micro.order]), strict=True)
        everyone = dict(chain.from_iterable(part.items() for part in self.ranks.gather_objects(mine)))
        return [everyone[i] for i in range(len(items))]

    def named_weights(self, bucket_bytes: int = 64 << 20, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole weights by their names in a checkpoint, on rank 0; other ranks must exhaust the iterator too.

        Weights are gathered in buckets of about `bucket_bytes`: a tensor is valid until the next one is requested. A
        tied head is left out, adapters are merged.

        Args:
            trained: only the weights that updates change, and those that an engine may fuse with them.
        """
        import deepspeed

        chosen = list(weights(self.student))
        if trained:
            units = {unit(weight.name) for weight in chosen if weight.trained}
            chosen = [weight for weight in chosen if unit(weight.name) in units]
        for bucket in _buckets(chosen, bucket_bytes):
            self.ranks.beat()
            with deepspeed.zero.GatheredParameters([p for weight in bucket for p in weight.parameters]):
                if self.ranks.rank == 0:
                    yield from as_checkpoint(self.student, {weight.name: weight.value() for weight in bucket}).items()

    def _share(self, items: Sequence[Item]) -> list[list[int]]:
        """Return the item numbers of this rank by micro-step."""
        budgets = (self.settings.micro_tokens, self.settings.micro_patches)
        together = self._collate.layout != "alone"
        return deal(items, self.ranks.size, *budgets, self._cost, together=together)[self.ranks.rank]

    def _micro_batches(self, items: Sequence[Item], share: Sequence[Sequence[int]]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of this rank, each made while the one before it is computed.

        Decoding images takes a considerable part of that time.
        """
        with ThreadPoolExecutor(1) as maker:
            following = maker.submit(self._collate, items, share[0])
            for step in range(1, len(share) + 1):
                micro = following.result()
                if step < len(share):
                    following = maker.submit(self._collate, items, share[step])
                yield micro.to(self.ranks.device)

    def _measure(self, loss: Tensor, logprob: Tensor, micro: MicroBatch) -> Tensor:
        """Return [5]: loss, tokens, clipped tokens, sum and maximum of |log pi - old|, over the trained tokens.

        It does not wait for the device.
        """
        trained = micro.weight > 0
        high = 1 + self.algorithm.clip_high
        low = 1 - self.algorithm.clip_low
        apart = torch.where(trained, logprob - micro.old, 0.0)
        clipped = torch.where(micro.advantage > 0, apart.exp() > high, (apart.exp() < low) & (micro.advantage < 0))
        return torch.stack(
            [x.double() for x in (loss, trained.sum(), clipped.sum(), apart.abs().double().sum(), apart.abs().max())]
        )


def _size(module: Any) -> int:
    """Return the number of parameters of a sharded module."""
    return sum(p.ds_numel for p in module.parameters())


def _decay_groups(student: Any, decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: matrices decay; biases and norms do not."""
    by_kind: tuple[list[Any], list[Any]] = ([], [])
    for p in student.parameters():
        if p.requires_grad:
            by_kind[len(getattr(p, "ds_shape", p.shape)) <= 1].append(p)  # an adapter is not sharded yet
    return [{"params": p, "weight_decay": d} for p, d in zip(by_kind, (decay, 0.0), strict=True) if p]


def _buckets(chosen: Sequence[Weight], size: int) -> Iterator[list[Weight]]:
    """Yield the weights in buckets, cut where one reaches `size` bytes."""
    bucket: list[Weight] = []
    held = 0
    for weight in chosen:
        bucket.append(weight)
        held += sum(p.ds_numel * p.element_size() for p in weight.parameters)
        if held >= size:
            yield bucket
            bucket = []
            held = 0
    if bucket:
        yield bucket
