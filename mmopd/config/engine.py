"""Settings of a vLLM engine; the same for teachers and for the student."""

from typing import Literal

from pydantic import Field

from mmopd.settings_file import Config, Count, Fraction, Positive


class Engine(Config):
    """Settings of vLLM for one model; the same fields for teachers and for the student."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type in which vLLM computes. `auto` takes the one that the checkpoint names; `float32` on CPU, "
        "where bfloat16 is slow",
    )
    max_model_len: Positive = Field(
        20480,
        description="Longest sequence in tokens, prompt with its image tokens and response together. The default "
        "holds a prompt of 2,048 and a response of 16,384 tokens (paper) with room for images; a longer "
        "one needs more KV cache",
    )
    max_num_seqs: Positive = Field(
        64,
        description="Sequences that the engine computes at once. More is faster until the KV cache is full; at least "
        "rollout.group for the student, since one request asks for a whole group",
    )
    kv_cache_mib: Positive | None = Field(
        None,
        description="KV cache in MiB. Needed on CPU, where vLLM would take most of the memory; on GPU `null` leaves "
        "it to gpu_share",
    )
    gpu_share: Fraction = Field(
        0.9,
        description="Share of a GPU's memory that the engine takes, weights and KV cache together. 0.9 leaves a tenth"
        " to CUDA itself; lower it where something else uses the GPU. No effect on CPU",
    )
    tensor_parallel: Count = Field(
        1, description="GPUs over which one engine is split. 1 where the weights and the KV cache fit one GPU"
    )
    enforce_eager: bool = Field(
        False,
        description="True runs without CUDA graphs: the start is quicker and needs less memory, sampling is slower. "
        "On CPU it is always so",
    )
    videos: int = Field(
        0,
        ge=0,
        description="Clips that one prompt may have. 0 by default, since a server keeps memory for the longest clip "
        "of each",
    )
    repeatable: bool | None = Field(
        None,
        description="Answers whose last bits do not depend on concurrent requests. `null` is true on CPU and "
        "false on GPU, where it is vLLM's batch invariance and costs speed",
    )
    port: int | None = Field(
        None,
        ge=1024,
        le=65535,
        description="Port that the server listens on. `null` takes a free one; set it where a firewall lets only some"
        " through",
    )
    extra_args: tuple[str, ...] = Field(
        (), description="More flags for `vllm serve`, passed as they are and last, so that they win over mmopd's own"
    )
