"""vLLM side of the weight sync: weight-transfer backends named `mmopd_file`, `mmopd_broadcast` and `mmopd_ipc`.

They use vLLM's own protocol (init, start, update, finish) with transports of ours: its built-in backends need CUDA or
RDMA, cannot update a part of a model, and do not report which weights were not sent. vLLM finds `register` by the
entry-point group `vllm.general_plugins`, in each of its processes; the server is started, for example, with
`--weight-transfer-config '{"backend": "mmopd_file"}'`. The trainer side is `mmopd.rollout.sync`.
"""

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from mmopd.model_folder import CHECK_VARIABLE, NOT_FINITE, is_finite
from mmopd.rollout.buckets import Place, unpack
from mmopd.rollout.transport import broadcast, join, open_handle
from mmopd.serving import shared_prompts

PREFIX = "mmopd_"  # of the backends' names, followed by the `sync` of `mmopd.config.Student`


@dataclass
class Init(WeightTransferInitInfo):
    """An empty message: every update says where its weights are."""


@dataclass
class GroupInit(WeightTransferInitInfo):
    """The group that trainer and workers form."""

    port: int
    size: int
    timeout: float


@dataclass
class Update(WeightTransferUpdateInfo):
    """One bucket of weights, with names and shapes of the Hugging Face checkpoint."""

    partial: bool  # the set leaves out whole layers, which keep their values


@dataclass
class FileUpdate(Update):
    """A safetensors file."""

    path: str


@dataclass
class BroadcastUpdate(Update):
    """Bytes that arrive by the group's broadcast."""

    size: int
    table: list[Place]


@dataclass
class IpcUpdate(Update):
    """Bytes in the trainer's memory, on the GPU of this worker."""

    handle: list[Any]
    size: int
    table: list[Place]


I = TypeVar("I", bound=WeightTransferInitInfo)
U = TypeVar("U", bound=Update)


class BucketEngine(WeightTransferEngine[I, U], Generic[I, U]):
    """Loads buckets through vLLM's layer-by-layer reload, which fuses, casts, shards and re-packs as at start-up."""

    supports_draft_weight_update = False
    # Layers that the last full set filled only in part, with the number of values; None before the first set.
    _padded: dict[str, int] | None = None

    def tensors(self, update_info: U) -> Iterable[tuple[str, torch.Tensor]]:
        """Return the tensors of a bucket; vLLM may keep them until their layer is complete."""
        raise NotImplementedError

    def init_transfer_engine(self, init_info: I) -> None:
        """Do nothing: there is no rendezvous."""

    def start_weight_update(self) -> None:
        """Prepare for a set of weights."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._partial = False
        self._missing = {name for name, _ in self.model.named_parameters()}  # a tied head counts once, as the embedding
        # On CPU, vLLM 0.32 packs experts only where it also makes their kernel: without this reset it would silently
        # use a second set unpacked.
        methods: list[Any] = (
            [getattr(m, "quant_method", None) for m in self.model.modules()] if self.device.type == "cpu" else []
        )
        self._kernels = [(method, method.moe_kernel) for method in methods if getattr(method, "moe_kernel", None)]
        for method, _ in self._kernels:
            method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket (the base class synchronises an accelerator, which a CPU machine lacks)."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: U) -> None:
        """Load the tensors of a bucket."""
        self._partial |= update_info.partial
        load_weights: Callable[[Iterable[tuple[str, torch.Tensor]]], set[str]] = self.model.load_weights  # type: ignore[assignment]
        self._missing -= load_weights(self.tensors(update_info))

    def finish_weight_update(self) -> None:
        """Swap the new weights in; layers that got nothing keep theirs.

        Raises:
            RuntimeError: a full set lacks a parameter, or a layer was sent in part: vLLM would keep its old value, or
                none, with only a warning. Or a partial set came before any full one.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        filled = self._filled_in_part()
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]
        for method, kernel in self._kernels:
            method.moe_kernel = method.moe_kernel or kernel  # for experts that were not sent
        for layer in self.model.modules():
            # A head that is tied to the embedding is never "loaded"; its packed copy on CPU would stay old.
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
        if not self._partial:
            if self._missing:
                raise RuntimeError(
                    f"{len(self._missing)} parameters were not sent, such as {sorted(self._missing)[:3]}"
                )
            self._padded = filled
        if self._padded is None:
            raise RuntimeError(
                "a partial set of weights came first, and this server holds only those of its folder; send a full set"
            )
        if torn := sorted(name for name, n in filled.items() if self._padded.get(name) != n):
            raise RuntimeError(f"{len(torn)} layers were sent in part, such as {torn[0]}")

    def _filled_in_part(self) -> dict[str, int]:
        """Return the layers that got some of their values and not all, with how many."""
        from vllm.model_executor.layers.attention import is_deferred_attention_layer
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        infos = {
            name: get_layerwise_info(layer)
            for name, layer in self.model.named_modules()
            if not is_deferred_attention_layer(layer)
        }
        return {name: info.load_numel for name, info in infos.items() if info.can_load() and info.load_numel > 0}

    def shutdown(self) -> None:
        """Do nothing: nothing is held between updates."""


class FileEngine(BucketEngine[Init, FileUpdate]):
    """Loads files in memory."""

    init_info_cls = Init
    update_info_cls = FileUpdate

    def tensors(self, update_info: FileUpdate) -> Iterable[tuple[str, torch.Tensor]]:
        """Return memory-mapped tensors; the file may be removed afterwards."""
        return load_file(update_info.path).items()


class BroadcastEngine(BucketEngine[GroupInit, BroadcastUpdate]):
    """Receives the trainer's broadcasts, which go to all workers."""

    init_info_cls = GroupInit
    update_info_cls = BroadcastUpdate

    def init_transfer_engine(self, init_info: GroupInit) -> None:
        """Join the group."""
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = join(init_info.port, rank, init_info.size, self.device, timeout=init_info.timeout)

    def tensors(self, update_info: BroadcastUpdate) -> Iterable[tuple[str, torch.Tensor]]:
        """Return tensors in newly allocated memory."""
        data = torch.empty(update_info.size, dtype=torch.uint8, device=self.device)
        broadcast(self._group, data).wait()
        return unpack(data, update_info.table)


class IpcEngine(BucketEngine[Init, IpcUpdate]):
    """Reads the trainer's memory on the same GPU. [not run on GPU]"""

    init_info_cls = Init
    update_info_cls = IpcUpdate

    def tensors(self, update_info: IpcUpdate) -> Iterable[tuple[str, torch.Tensor]]:
        """Return copies, because the trainer reuses that memory."""
        data = open_handle(update_info.handle, update_info.size, self.device)
        return [(name, tensor.clone()) for name, tensor in unpack(data, update_info.table)]


ENGINES: dict[str, type[WeightTransferEngine[Any, Any]]] = {
    "file": FileEngine,
    "broadcast": BroadcastEngine,
    "ipc": IpcEngine,
}


@functools.cache  # vLLM may call a plugin several times in a process
def register() -> None:
    """Register the backends in this process, and let requests for scores share their prompts."""
    shared_prompts.install()
    for kind, engine in ENGINES.items():
        WeightTransferEngineFactory.register_engine(PREFIX + kind, engine)
    if CHECK_VARIABLE in os.environ:
        refuse_nan()


def refuse_nan() -> None:
    """Make vLLM refuse weights of a folder that are not finite, while it reads them.

    It would serve them, and every log-prob would be NaN. The check reads 11 GB a second on one core.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    plain = DefaultModelLoader.get_all_weights

    def checked(self: Any, model_config: Any, model: Any) -> Iterable[tuple[str, torch.Tensor]]:
        for name, tensor in plain(self, model_config, model):
            if not is_finite(tensor):
                raise ValueError(f"{model_config.model}: the tensor {name!r} {NOT_FINITE}")
            yield name, tensor

    DefaultModelLoader.get_all_weights = checked  # type: ignore[method-assign,assignment]
