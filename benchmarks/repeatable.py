"""Find the answers of vLLM on this CPU that depend on other requests: `python benchmarks/repeatable.py [SETTING ...]`.

A setting is variables of the maths libraries, such as `MKL_CBWR=AUTO,STRICT`; `plain` sets none. For each setting a
process builds tiny models of each family and asks vLLM's own engine, in that process, for the same items in several
ways. The table counts the items whose log-probs or tokens differ, in any bit, from those of the item alone with empty
caches.

- kernels: products of rows [M, K] x [K, N] for M from 1 to 256, against the same rows in the product of all 256; one
  line for each library.
- together, reversed: all items in one call; images are encoded together, sequences share each pass.
- cached: once more, so that prefixes and images are found in the caches.
- group: response i of 16 against a request of its own with seed + i.

The last columns are tokens a second of sampling and of scoring in the same process, for a comparison of settings (run
them in pairs).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmopd.serving.servers import CPU_ENV, ENV

TESTS = Path(__file__).parents[1] / "tests"  # tiny models of each family are built there
SETTINGS = ("plain", "MKL_CBWR=AUTO,STRICT", "MKL_CBWR=COMPATIBLE")
KERNELS = "kernels"  # stands among the families for the products alone
FAMILIES = (KERNELS, "demo", "demo bf16", "adapter", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe")
KERNEL_SHAPES = [(64, 192), (128, 128), (128, 1024), (384, 128), (1536, 64), (512, 512)]  # K, N
ROWS = [*range(1, 34), 40, 48, 63, 64, 65, 96, 127, 128, 129, 200, 255]
TOKENS = 12  # sampled for each item
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Answers = list[tuple[Any, ...]]  # of each item


def main() -> None:
    """Start a process for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=SETTINGS)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.families)
        return
    for setting in arguments.settings:
        print(f"== {setting}", flush=True)
        variables = dict(pair.split("=", 1) for pair in setting.split() if pair != "plain")
        env = {
            **os.environ,
            **CPU_ENV,
            **ENV,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            **variables,
        }
        env["PYTHONPATH"] = os.pathsep.join([str(TESTS), env.get("PYTHONPATH", "")])
        subprocess.run([sys.executable, __file__, "--child", "--families", *arguments.families], env=env, check=True)


def child(families: Sequence[str]) -> None:
    """Print the lines of one setting, which is in the environment."""
    import torch

    torch.set_num_threads(1)
    for family in families:
        if family == KERNELS:
            kernels()
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"{family:14}", json.dumps(measure(family, Path(folder))), flush=True)
            except Exception as error:  # a family that this CPU cannot serve is a line of the table, too
                print(f"{family:14} {type(error).__name__}: {str(error)[:200]}", flush=True)


def kernels() -> None:
    """For each kernel the numbers of rows M whose product differs from the first M rows of a product of 256."""
    import torch
    import vllm._custom_ops as ops
    from torch.nn.functional import linear
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        found: dict[str, set[int]] = {}
        for k, n in KERNEL_SHAPES:
            rows, weight = (torch.randn(size, k, generator=generator).to(dtype) for size in (256, n))
            products: dict[str, Callable[[Any], Any]] = {"F.linear": lambda x, w=weight: linear(x, w)}
            try:
                handle = ops.create_onednn_mm(weight.t(), 32)
                products["vLLM's packed oneDNN"] = lambda x, h=handle: ops.onednn_mm(h, x, None)
            except RuntimeError:
                pass  # then vLLM takes F.linear
            for name, product in products.items():
                whole = product(rows)
                found.setdefault(name, set()).update(m for m in ROWS if not torch.equal(product(rows[:m]), whole[:m]))
        for name, differ in found.items():
            print(
                f"kernel {str(dtype).removeprefix('torch.')} {name}: differ at M = {sorted(differ) or 'none'}",
                flush=True,
            )


def measure(family: str, folder: Path) -> dict[str, Any]:
    """Items that differ, by the way of asking; and tokens a second."""
    import gc

    engine = Asked(build(family, folder), family, folder)
    items = engine.items()
    result: dict[str, Any] = {}
    for what, ask in (("sample", engine.sample), ("score", engine.score)):
        alone = [ask([item])[0] for item in items if engine.forget()]
        engine.forget()
        begin = time.perf_counter()
        together = ask(items)
        seconds = time.perf_counter() - begin
        result[f"{what} together"], result[f"{what} cached"] = (
            differences(alone, together),
            differences(alone, ask(items)),
        )
        result[f"{what} alone, cached"] = differences(alone, [answer for item in items for answer in ask([item])])
        engine.forget()
        result[f"{what} reversed"] = differences(alone, ask(items[::-1])[::-1])
        result[f"{what} tokens/s"] = round(sum(map(len, together)) / seconds)
    engine.forget()
    groups = engine.group(items)
    engine.forget()
    result["group of 16"] = differences([answer for item in items[::8] for answer in engine.singles(item)], groups)
    engine.close()
    gc.collect()
    return result


def differences(alone: Answers, others: Answers) -> str:
    """Return how many answers differ in a bit, of all."""
    return f"{sum(a != b for a, b in zip(alone, others, strict=True))}/{len(alone)}"


def build(family: str, folder: Path) -> Path:
    """Write a tiny random model."""
    import torch
    from student_worker import build as build_family

    from mmopd.demo.world import build_student

    model = folder / "model"
    if family.startswith(("demo", "adapter")):
        build_student(model)
    else:
        build_family(family, model, torch.bfloat16 if "3_5" in family else torch.float32)
    return model


class Asked:
    """vLLM's engine in this process, with the settings of our servers."""

    def __init__(self, model: Path, family: str, folder: Path) -> None:
        from vllm import LLM, ModelRegistry

        from mmopd.modality import Encoder

        self._encoder, self._lora = Encoder(model), None
        more: dict[str, Any] = {}
        if family == "adapter":
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("words", 1, str(make_adapter(model, folder / "adapter")))
            # With all modules, vLLM adapts the output layer, too, and then fails at the second request in a pass.
            more = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": list(ADAPTED)}
        for architecture in json.loads((model / "config.json").read_text(encoding="utf-8"))[
            "architectures"
        ]:  # else vLLM inspects it in another process
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
        self._llm = LLM(
            str(model),
            dtype="bfloat16" if "bf16" in family or "3_5" in family else "float32",
            max_model_len=512,
            max_num_seqs=128,
            max_num_batched_tokens=4096,
            enable_chunked_prefill=False,
            enforce_eager=True,
            kv_cache_memory_bytes=128 << 20,
            limit_mm_per_prompt={"image": 2, "video": 1},
            **({"enable_prefix_caching": False} if "3_5" in family else {}),
            **more,
        )

    def items(self) -> list[dict[str, Any]]:
        """12 images of several sizes, 3 clips, 48 texts of 1 to 256 tokens."""
        import numpy as np
        from PIL import Image

        random, tokenizer = np.random.default_rng(0), self._encoder.tokenizer
        start, image, video, end = tokenizer.convert_tokens_to_ids(
            ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
        )
        found: list[dict[str, Any]] = []
        for i in range(12):
            height, width = [(32, 64), (64, 64), (96, 32), (32, 160)][i % 4]
            picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            ids = [*random.integers(10, 900, 3).tolist(), start, image, end, *random.integers(10, 900, 5).tolist()]
            found.append({"prompt_token_ids": ids, "multi_modal_data": {"image": picture}})
        for i in range(3):
            frames = random.integers(0, 256, (4 + 2 * i, 64, 64, 3), dtype=np.uint8)
            facts = {
                "fps": 2.0,
                "total_num_frames": len(frames),
                "frames_indices": list(range(len(frames))),
                "duration": len(frames) / 2,
            }
            ids = [start, video, end, *random.integers(10, 900, 5).tolist()]
            clip = (frames, facts | {"do_sample_frames": False, "video_backend": "opencv"})
            found.append({"prompt_token_ids": ids, "multi_modal_data": {"video": clip}})
        for length in [*range(1, 33), *np.linspace(33, 256, 16).astype(int).tolist()]:
            found.append({"prompt_token_ids": random.integers(10, 900, length).tolist()})
        return found

    def forget(self) -> bool:
        """Empty all caches; true, so that it can stand in a condition."""
        self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        return True

    def sample(self, items: list[dict[str, Any]]) -> Answers:
        """Tokens and log-probs of a response to each item; the seed goes with the prompt."""
        return [tuple(taken(output.outputs[0])) for output in self._generate(items, [self._sampling(i) for i in items])]

    def score(self, items: list[dict[str, Any]]) -> Answers:
        """Log-probs of every token of each prompt."""
        from vllm import SamplingParams

        items = [{**item, "prompt_token_ids": [*item["prompt_token_ids"], *range(40, 60)]} for item in items]
        outputs = self._generate(
            items, [SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)] * len(items)
        )
        return [tuple(next(iter(at.values())).logprob for at in output.prompt_logprobs[1:]) for output in outputs]

    def group(self, items: list[dict[str, Any]]) -> Answers:
        """16 responses to every eighth item, all in one call."""
        outputs = self._generate(items[::8], [self._sampling(i, n=16) for i in items[::8]])
        return [tuple(taken(one)) for output in outputs for one in output.outputs]

    def singles(self, item: dict[str, Any]) -> Answers:
        """The same 16, each by a request of its own."""
        return [tuple(taken(self._generate([item], [self._sampling(item, i)])[0].outputs[0])) for i in range(16)]

    def _sampling(self, item: dict[str, Any], i: int = 0, n: int = 1) -> Any:
        from vllm import SamplingParams

        seed = sum(item["prompt_token_ids"]) * 100 + i
        settings = {
            "max_tokens": TOKENS,
            "logprobs": 0,
            "detokenize": False,
            "ignore_eos": True,
            "logit_bias": {1000: -100.0},
        }
        return SamplingParams(n=n, seed=seed, **settings)

    def _generate(self, items: list[dict[str, Any]], sampling: list[Any]) -> Any:
        return self._llm.generate(items, sampling, use_tqdm=False, lora_request=self._lora)

    def close(self) -> None:
        """Free what the engine holds."""
        self._llm.llm_engine.engine_core.shutdown()


def taken(one: Any) -> list[Any]:
    """(token, log-prob) of each place."""
    return [(token, at[token].logprob) for token, at in zip(one.token_ids, one.logprobs, strict=True)]


def make_adapter(model: Path, folder: Path) -> Path:
    """Write random matrices on the linear layers of the language part."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    target = rf".*language_model.*\.({'|'.join(ADAPTED)})"
    base = Qwen3VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    get_peft_model(
        base, LoraConfig(r=4, lora_alpha=16, target_modules=target, init_lora_weights=False)
    ).save_pretrained(str(folder))
    return folder


if __name__ == "__main__":
    main()
