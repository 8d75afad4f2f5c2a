"""The trainer: DeepSpeed ZeRO-3 around a student, one optimiser step per `update`.

All methods are collective: every rank calls them with the same items. What differs between the ranks is decided by
`pack.assign`. Gradients are summed, not averaged, over micro-batches and ranks: the items' weights hold every normalisation.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmopd.algorithm.objective import clipped_loss
from mmopd.config import Algorithm, Train
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.train.distributed import Ranks
from mmopd.train.logprob import attention, load_student
from mmopd.train.pack import Collator, Item, Size, assign

# A weight of up to this many numbers stays gathered between micro-steps: norms and biases of a real model, nearly all of a tiny one,
# where it saves a quarter of the CPU time of four micro-steps.
RESIDENT = 1_000_000
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def learning_rate_factor(settings: Train) -> Callable[[int], float]:
    """Factor of `lr` for optimiser step 0, 1, ...: a linear warm-up that starts above zero, then the schedule."""
    total = settings.steps * settings.minibatches
    after = SCHEDULES[settings.schedule]

    def factor(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / (settings.warmup + 1)
        return after(min(1.0, (step - settings.warmup) / max(1, total - settings.warmup)))

    return factor


def deepspeed_config(settings: Train, ranks: Ranks) -> dict[str, Any]:
    """ZeRO-3 for these settings; nothing in it compiles code at run time unless weights are offloaded.

    Raises:
        UserError: offload on a machine without a GPU.
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
            raise UserError("train.offload: this machine has no GPU whose memory it would save; leave it out")
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu", "pin_memory": True}}
    else:
        optimizer["torch_adam"] = True
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # `update` says itself which micro-batch is the last
        "gradient_clipping": settings.grad_clip,
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "steps_per_print": 1_000_000_000,
    }


class Trainer:
    """A student under ZeRO-3.

    Args:
        model: HF folder of the student.
        encoder: the student's own; decodes images.
        settings, algorithm: of the recipe.
        ranks: from `distributed.start`.

    Raises:
        UserError: the model cannot be loaded or is of an unknown family, or the settings do not suit this machine.
    """

    def __init__(self, model: Path, encoder: Encoder, settings: Train, algorithm: Algorithm, ranks: Ranks) -> None:
        import deepspeed
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        self.source = model
        self.settings = settings
        self.algorithm = algorithm
        self.ranks = ranks
        zero = deepspeed_config(settings, ranks)
        self._zero = HfDeepSpeedConfig(zero)  # from_pretrained shards at birth while this object lives
        student = load_student(model, getattr(torch, settings.dtype))
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
        vision, text = student.config.vision_config, student.config.text_config
        self._collate = Collator(
            encoder,
            student.model.get_rope_index,
            patch_size=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            merge=vision.spatial_merge_size,
            single_row=attention() == "flash_attention_2",
        )
        self._hidden: int = text.hidden_size
        self._patch_cost = _size(student.model.visual) / _size(student.model.language_model)

    @property
    def student(self) -> Any:
        """The model, its weights sharded."""
        return self.engine.module

    def update(self, items: Sequence[Item]) -> dict[str, float]:
        """One optimiser step on items whose token weights sum to the loss as it is.

        Returns:
            loss, grad_norm (before clipping), lr, tokens (trained), seconds, mismatch (largest |log pi - old| of a trained token: what
            trainer and engine disagree by, when nothing was updated in between), clip_fraction (of trained tokens), micro_steps,
            packing (share of computed tokens that are no padding).

        Raises:
            ValueError: no items.
            UserError: loss or gradient is not finite; the weights are as before.
        """
        if not items:
            raise ValueError("an update needs at least one response")
        started = time.perf_counter()
        loss_sum = tokens = clipped = mismatch = used = computed = 0.0
        share = self._share(items)
        for step, chosen in enumerate(share):
            micro = self._collate(items, chosen).to(self.ranks.device)
            self.engine.set_gradient_accumulation_boundary(step == len(share) - 1)
            logprob = self.engine(**micro.inputs)
            loss = clipped_loss(
                logprob, micro.old, micro.advantage, micro.weight, clip_low=self.algorithm.clip_low, clip_high=self.algorithm.clip_high
            )
            self.engine.backward(loss * self.ranks.size)  # DeepSpeed averages over the ranks
            trained = micro.weight > 0
            ratio = (logprob.detach() - micro.old)[trained]
            loss_sum += float(loss.detach())
            tokens += ratio.numel()
            clipped += int(self._is_clipped(ratio.exp(), micro.advantage[trained]).sum())
            mismatch = max([mismatch, *ratio.abs().amax(0, keepdim=True).tolist()]) if ratio.numel() else mismatch
            used += sum(items[i].length for i in micro.order)
            computed += micro.inputs["input_ids"].numel()
        loss_sum, tokens, clipped, used, computed = self.ranks.all_sum([loss_sum, tokens, clipped, used, computed])
        (mismatch,) = self.ranks.all_max([mismatch])
        if not math.isfinite(loss_sum):
            raise UserError(f"the loss is {loss_sum}: this update was not made; a lower train.lr or algorithm.log_ratio_clip may help")
        rate = self._schedule.get_last_lr()[0]
        self.engine.step()
        if self.engine.optimizer.overflow:
            raise UserError(f"a gradient is not finite (loss {loss_sum:.4g}): this update was not made; a lower train.lr may help")
        return {
            "loss": loss_sum,
            "grad_norm": float(self.engine.get_global_grad_norm()),
            "lr": rate,
            "tokens": tokens,
            "mismatch": mismatch,
            "clip_fraction": clipped / max(1.0, tokens),
            "micro_steps": float(len(share)),
            "packing": used / computed,
            "seconds": time.perf_counter() - started,
        }

    def logprobs(self, items: Sequence[Item]) -> list[Tensor]:
        """The student's log-probs [T] of each item's tokens, in float32 on the CPU, on every rank."""
        mine: dict[int, Tensor] = {}
        for chosen in self._share(items):
            micro = self._collate(items, chosen)
            with torch.no_grad():
                flat = self.engine(**micro.to(self.ranks.device).inputs).cpu()
            if micro.order:
                mine |= zip(micro.order, flat.split([len(items[i].tokens) for i in micro.order]), strict=True)
        everyone = dict(chain.from_iterable(part.items() for part in self.ranks.gather_objects(mine)))
        return [everyone[i] for i in range(len(items))]

    def named_weights(self, bucket_bytes: int = 64 << 20) -> Iterator[tuple[str, Tensor]]:
        """The whole weights by name, on rank 0; the other ranks get nothing, but must exhaust the iterator too.

        Gathered in buckets of about `bucket_bytes`: a tensor is valid until the next one is asked for. A tied head is not named.
        """
        import deepspeed

        for bucket in _buckets(self.student, bucket_bytes):
            with deepspeed.zero.GatheredParameters([p for _, p in bucket]):
                if self.ranks.rank == 0:
                    yield from ((name, p.data) for name, p in bucket)

    def _share(self, items: Sequence[Item]) -> list[list[int]]:
        """Item numbers of this rank by micro-step."""
        sizes = [Size(self._cost(i.length, i.patches), i.length, i.patches) for i in items]
        return assign(sizes, self.ranks.size, self.settings.micro_tokens, self.settings.micro_patches)[self.ranks.rank]

    def _cost(self, tokens: int, patches: int) -> float:
        """Of a sample, in tokens of a short one: attention adds T / (12 H) to each, a patch costs what its tower's size says."""
        return tokens * (1 + tokens / (12 * self._hidden)) + patches * self._patch_cost

    def _is_clipped(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        high, low = ratio > 1 + self.algorithm.clip_high, ratio < 1 - self.algorithm.clip_low
        return (high & (advantage > 0)) | (low & (advantage < 0))


def _size(module: Any) -> int:
    """Numbers in all weights of a sharded module."""
    return sum(p.ds_numel for p in module.parameters())


def _decay_groups(student: Any, decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    weights = [p for p in student.parameters() if p.requires_grad]
    matrices = [p for p in weights if len(p.ds_shape) > 1]
    vectors = [p for p in weights if len(p.ds_shape) <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _buckets(student: Any, size: int) -> Iterator[list[tuple[str, Any]]]:
    """Parameters by name, cut where a bucket reaches `size` bytes."""
    bucket: list[tuple[str, Any]] = []
    held = 0
    for name, p in student.named_parameters():
        bucket.append((name, p))
        held += p.ds_numel * p.element_size()
        if held >= size:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket
