"""vLLM side of the weight sync: a weight-transfer backend named `mmopd_file`.

vLLM's own protocol (init, start, update, finish) with safetensors files as the transport: its built-in backends need
CUDA or RDMA, this one works wherever trainer and server see the same folder, such as /dev/shm. vLLM finds `register` by
the entry-point group `vllm.general_plugins`, in each of its processes; the server is started with
`--weight-transfer-config '{"backend": "mmopd_file"}'`. The trainer side is `mmopd.rollout.sync`.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "mmopd_file"


@dataclass
class FileInit(WeightTransferInitInfo):
    """Nothing to agree on: the trainer names a file with every update."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """One bucket of weights: a safetensors file with names and shapes of the Hugging Face checkpoint."""

    path: str


class FileEngine(WeightTransferEngine[FileInit, FileUpdate]):
    """Loads buckets through vLLM's layer-by-layer reload, which fuses, casts, shards and re-packs as at start-up."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """No rendezvous."""

    def start_weight_update(self) -> None:
        """Expect a full set of weights."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._missing = {name for name, _ in self.model.named_parameters()}  # a tied head counts once, as the embedding
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, str]) -> None:
        """Load one bucket (the base class synchronises an accelerator, which a CPU does not have)."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdate) -> None:
        """Load the tensors of a file; they are memory-mapped, so the file may be removed afterwards."""
        load_weights: Callable[[Iterable[tuple[str, torch.Tensor]]], set[str]] = self.model.load_weights  # type: ignore[assignment]
        self._missing -= load_weights(load_file(update_info.path).items())

    def finish_weight_update(self) -> None:
        """Swap the new weights in.

        Raises:
            RuntimeError: a parameter of the model was not sent; vLLM would keep its old value with a mere warning.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead):  # tied to the embedding, it is never "loaded"; its packed copy on CPU would stay old
                layer.quant_method.process_weights_after_loading(layer)
        if self._missing:
            raise RuntimeError(f"{len(self._missing)} parameters were not sent, such as {sorted(self._missing)[:3]}")

    def shutdown(self) -> None:
        """Nothing is held between updates."""


@functools.cache  # vLLM may call a plugin more than once in a process
def register() -> None:
    """Make the backend known to this process."""
    WeightTransferEngineFactory.register_engine(BACKEND, FileEngine)
