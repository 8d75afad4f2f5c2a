"""Arguments that other packages take by name are arguments that they know.

A function with `**kwargs`, a model that allows extra fields, a dict that is read with `get`, and a route that ignores
unknown parameters accept a name that an older or a newer version does not know, and do nothing. Each test compares what
mmopd hands over at one place with the names that the installed package declares.
"""

import inspect
import json
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import transformers
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from mmopd.config import Engine, Train
from mmopd.config.student import Sync
from mmopd.modality import video
from mmopd.modality.registry import MEDIA, slots
from mmopd.records import Encoded, Prompt
from mmopd.serving import servers
from mmopd.serving.lora import Adapter
from mmopd.serving.specs import ServerSpec, to_server
from mmopd.serving.wire import Sampling, sampling_body, scoring_body
from mmopd.train.families import FAMILIES
from mmopd.train.prefix_tree import Tree, sequences, with_key_index
from mmopd.train.students import load_student
from mmopd.train.trainer import deepspeed_config

MMOPD = Path(servers.__file__).parents[1]
PROMPT = Prompt("a/0", "task", "image", (), (b"x",), "")
ENCODED = Encoded(PROMPT, (1, 2), (1, 2), ((1, 2, 2),))


def named(function: Callable[..., Any]) -> set[str]:
    """Return the parameters that a function declares, without what `**kwargs` swallows."""
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return {name for name, one in inspect.signature(function).parameters.items() if one.kind in kinds}


def source(*parts: str) -> str:
    return (MMOPD / Path(*parts)).read_text(encoding="utf-8")


def model_class(kind: str) -> Any:
    """Return the class of `student.model`, which the log-prob head calls itself."""
    return getattr(transformers, re.sub("For(ConditionalGeneration|CausalLM)", "Model", FAMILIES[kind][1]))


@pytest.mark.parametrize("kind", FAMILIES)
def test_models_know_what_the_student_gives_them(kind: str) -> None:
    model = model_class(kind)
    assert {"input_ids", "attention_mask", "position_ids"} <= named(model.forward)
    if not hasattr(model, "get_image_features"):
        assert FAMILIES[kind][1].endswith("ForCausalLM")
        return
    assert "mm_encoder_outputs" in named(model.forward)
    assert 'kwargs["mm_encoder_outputs"] =' in source("train", "logprob.py")
    assert {"pixel_values", "image_grid_thw"} <= named(model.get_image_features)
    grids = {f"{slot}_grid_thw" for slot in slots()}
    assert {"input_ids", "mm_token_type_ids", *grids} <= named(model.get_rope_index)


def test_what_goes_through_to_the_attention_is_known_there() -> None:
    given = set(sequences([Tree.blank(1)]))
    known = set(FlashAttentionKwargs.__annotations__) | named(with_key_index(lambda *args, **more: None))
    assert given <= known


def test_loading_names_options_of_transformers() -> None:
    text = inspect.getsource(transformers.PreTrainedModel.from_pretrained)
    given = re.search(r"from_pretrained\(\n(.*?)\n\s*\)", inspect.getsource(load_student), re.DOTALL)
    assert given is not None
    options = re.findall(r"(\w+)=", given[1])
    assert options == ["dtype", "attn_implementation", "output_loading_info", "use_safetensors"]
    assert [name for name in options if f'"{name}"' not in text and f"{name}:" not in text] == []


def test_processors_know_what_readers_ask() -> None:
    images = transformers.Qwen2VLImageProcessor.valid_kwargs.__annotations__
    assert "return_tensors" in images
    assert "images" in named(transformers.Qwen2VLImageProcessor.__call__) | named(
        transformers.Qwen2VLImageProcessor.preprocess
    )
    said = re.search(r"said = \{(.*?)\}", inspect.getsource(video), re.DOTALL)
    assert said is not None
    asked = set(re.findall(r'"(\w+)":', said[1]))
    assert asked == {"do_sample_frames", "input_data_format", "cap_pixels_per_frame"}
    assert asked <= set(transformers.Qwen3VLVideoProcessor.valid_kwargs.__annotations__)
    assert {"tokenize", "add_generation_prompt"} <= named(transformers.ProcessorMixin.apply_chat_template)


@pytest.mark.parametrize("offload", [False, True])
def test_deepspeed_knows_every_key_of_its_settings(offload: bool) -> None:
    from deepspeed.runtime import constants, engine
    from deepspeed.runtime.precision_config import get_bfloat16_config
    from deepspeed.runtime.zero import config

    ranks: Any = SimpleNamespace(device=torch.device("cuda"))
    given = deepspeed_config(Train(offload=offload), ranks)
    top = {value for module in (config, constants) for value in vars(module).values() if isinstance(value, str)}
    assert set(given) <= top
    config.get_zero_config(given)  # these two refuse unknown keys
    get_bfloat16_config(given)
    params = dict(given["optimizer"]["params"])
    assert bool(params.pop(engine.TORCH_ADAM_PARAM, False)) == (not offload)
    assert set(params) <= named(torch.optim.AdamW.__init__)
    with pytest.raises(ValueError, match="no_such_key"):
        config.get_zero_config({"zero_optimization": {"no_such_key": 1}})


def fields(model: Any) -> set[str]:
    return set(model.model_fields)


def test_vllm_knows_every_field_of_a_request() -> None:
    from vllm import SamplingParams
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
    from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest

    sampling = Sampling(n=2, seed=1, temperature=1.0, top_p=1.0, top_k=0, max_tokens=5, banned=[3])
    for body in map(json.loads, (scoring_body("m", ENCODED, [3, 4], 2), sampling_body("m", ENCODED, sampling))):
        assert set(body) <= fields(GenerateRequest)
        assert set(body["sampling_params"]) <= set(inspect.signature(SamplingParams).parameters)
    assert {"model", "tokens"} <= fields(DetokenizeRequest)  # extra fields are allowed there


def test_vllm_knows_every_parameter_of_the_weight_sync() -> None:
    from vllm.entrypoints.rl.online import api_router as weights
    from vllm.entrypoints.serve.dev.sleep import api_router as sleeping

    posts = re.findall(r'post\(\s*"(\w+)\??([^"]*)"(?:,\s*\{"(\w+)")?', source("rollout", "sync.py"))
    routes = {route.path[1:]: route.endpoint for module in (weights, sleeping) for route in module.router.routes}
    assert {path for path, _, _ in posts} >= {"sleep", "wake_up", "pause", "update_weights", "finish_weight_update"}
    for path, query, key in posts:
        asked = {key, *re.findall(r"(\w+)=", query)} - {""}
        if path == "wake_up":  # it reads the query itself
            assert all(f'"{name}"' in inspect.getsource(routes[path]) for name in asked)
        else:
            assert asked <= named(routes[path]), path


def specs() -> list[ServerSpec]:
    every = Engine(
        tensor_parallel=2,
        gpu_share=0.5,
        kv_cache_mib=64,
        enforce_eager=True,
        repeatable=True,
        port=8000,
        dtype="float32",
    )
    adapter = Adapter(Path("a"), 8, frozenset({"q_proj"}), True, {})
    students = [ServerSpec("student", Path("m"), every, updatable=True, sync=sync) for sync in get_args(Sync)]
    teachers = [
        ServerSpec("t.0", Path("m"), Engine(), updatable=False),
        ServerSpec("t.0", Path("m"), every, updatable=False, adapters={"t.0": adapter}),
    ]
    return [*students, *teachers]


@pytest.mark.parametrize("gpus", ["", "1,0"])
def test_vllm_knows_every_flag_and_variable_of_a_server(gpus: str) -> None:
    import vllm.envs
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(exit_on_error=False))
    variables = {**servers.ENV, **servers.CPU_ENV}
    for spec in specs():
        server = to_server(spec, ("127.0.0.1", 8000), Path("log"), gpus)
        parsed: Namespace = parser.parse_args(server["argv"])  # an unknown flag ends in SystemExit
        assert parsed.max_model_len == spec.engine.max_model_len
        variables |= server["env"]
        if spec.updatable:
            flag = server["argv"][server["argv"].index("--weight-transfer-config") + 1]
            assert set(json.loads(flag)) <= named(WeightTransferConfig)
    known = vllm.envs.environment_variables
    assert [name for name in variables if name.startswith("VLLM_") and name not in known] == []


def test_vllm_reads_every_media_setting_of_a_server() -> None:
    from vllm.multimodal.media.video import VideoMediaIO

    text = inspect.getsource(VideoMediaIO)
    assert [name for medium in MEDIA.values() for name in medium.io_settings if f'"{name}"' not in text] == []


def lmms_options() -> dict[str, str]:
    found = re.findall(r'"(--\w+)"(?:\]\s*=|:)\s*(f?"[^"\n]*")?', source("evaluate", "runners", "lmms.py"))
    return dict(found) | {"--log_samples": ""}


def test_lmms_eval_knows_every_option_and_every_argument_of_its_model() -> None:
    from lmms_eval import __main__ as command
    from lmms_eval.models.chat.openai import OpenAICompatible
    from lmms_eval.models.simple.openai import OpenAICompatible as Plain

    options = lmms_options()
    assert {"--model", "--model_args", "--tasks", "--gen_kwargs", "--limit"} <= set(options)
    parser_source = inspect.getsource(command.parse_eval_args)
    assert [option for option in options if f'"{option}"' not in parser_source] == []
    given = re.findall(r"(\w+)=", options["--model_args"])
    assert given == ["model", "num_concurrent", "max_retries"]
    assert set(given) <= named(Plain.__init__) | named(OpenAICompatible.__init__)
