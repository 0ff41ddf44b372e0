"""The code that an adapter's section names: reward functions, code of the base's folder, kernels, files of accelerate."""

from __future__ import annotations

from pathlib import Path

from paft_merge.errors import Problems, TrainError
from paft_merge.recipe.sections import beside_recipe
from paft_merge.recipe.trust import needs_trust, refused
from paft_merge.training.rewards import check_function
from paft_merge.training.schema import AdapterSpec

_SERVER = {"vllm_server_base_url", "vllm_server_host"}
"""Fields of the TRL configs with the address of a vLLM server, whose messages vLLM unpickles."""


def check_code(spec: AdapterSpec, folder: Path, *, trust_code: bool = False) -> None:
    """Check the code that a section names without running it.

    Args:
        spec: the section.
        folder: the recipe's folder.
        trust_code: the user allows all of it.

    Raises:
        TrainError: TRUST, code that needs `trust_code`; REWARD, a function that does not exist.
    """
    problems, base = Problems(), spec.base
    if not trust_code:
        if base.trust_remote_code:
            problems.found.append(refused("base.trust_remote_code", "runs the Python code of the base's folder"))
        if "/" in (base.attn_implementation or ""):
            what = f"runs the code of the Hub repository {base.attn_implementation}"
            problems.found.append(refused("base.attn_implementation", what))
        if spec.lora.extra.get("megatron_core") or spec.lora.extra.get("megatron_config"):
            problems.found.append(refused("lora.extra.megatron_core", "imports a module that the recipe names"))
        if given := sorted(_SERVER & spec.training.keys()):
            what = "lets a server that the recipe names take part in the training, and such servers can run code here"
            problems.found.append(refused(f"training.{given[0]}", what))
        file = beside_recipe(spec.accelerate_config, folder) if spec.accelerate_config else None
        does = "starts processes, on machines and with settings of"
        if file and file.exists() and (problem := needs_trust("accelerate_config", file, folder, does)):
            problems.found.append(problem)
    for reward in spec.reward:
        if reward.function:
            with problems.catching():
                check_function(reward.function, folder, trust_code=trust_code)
    for part in (spec.parts or {}).values():
        with problems.catching():
            check_code(part, folder, trust_code=trust_code)
    problems.raise_as(TrainError)
