"""The vLLM plugin: every name of vLLM that llep uses is in this folder."""

from __future__ import annotations

TESTED_VLLM = ("0.32.",)
# With these vLLM gathers the tokens of all ranks on each, in order of ranks; with both kinds of parallelism it deals a
# batch's tokens out over the tensor-parallel ranks, none twice.
DEALING_BACKENDS = ("allgather_reducescatter", "naive")


def register() -> None:
    """Entry point in `vllm.general_plugins`: puts llep's MoE runner in place of vLLM's, in every process of an engine.

    Harmless when called twice. With an untested vLLM it says so loudly and leaves vLLM as it is. Raises SettingsError
    for a mistake in the environment.
    """
    import logging

    import vllm

    logger = logging.getLogger("vllm.llep")
    if not vllm.__version__.startswith(TESTED_VLLM):
        logger.error(
            "llep is NOT active: vLLM %s is not in the tested range %s. Install a tested vLLM, or set "
            "VLLM_PLUGINS='' to silence this.",
            vllm.__version__,
            " ".join(f"{version}x" for version in TESTED_VLLM),
        )
        return
    from llep.config import load_settings
    from llep.vllm_plugin.runner import put_in_place

    load_settings()  # a mistake in LLEP_* or LLEP_CONFIG ends the API server at once, not a worker after a minute
    _bring_settings_to_workers_of_ray()
    put_in_place()


def _bring_settings_to_workers_of_ray() -> None:
    """vLLM's older Ray executor hands its workers only those of its variables whose names begin as listed here."""
    import os

    variable = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    prefixes = [prefix for prefix in os.environ.get(variable, "").split(",") if prefix.strip()]
    os.environ[variable] = ",".join(dict.fromkeys([*prefixes, "LLEP_"]))
