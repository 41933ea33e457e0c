"""What samplers, spacings and guidance are called, for those who ask before jax is loaded.

Tests hold them against `profiles.SAMPLERS`, `spacings.NAMES` and `methods.METHODS`.
"""

from typing import Any

from sdjax.errors import InputError

SAMPLERS = (
    "euler",
    "euler_ancestral",
    "heun",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpm_solver",
    "dpm_solver_single",
    "deis",
    "unipc",
    "sa_solver",
    "plms",
    "ipndm",
    "lcm",
    "tcd",
    "consistency",
    "res_multistep",
    "gradient_estimation",
    "exp_heun",
    "seeds_2",
    "seeds_3",
    "er_sde",
    "heunpp2",
    "restart",
)
SPACINGS = (
    "karras",
    "exponential",
    "polyexponential",
    "lu",
    "kl_optimal",
    "beta_sigmas",
    "vp",
    "linear_quadratic",
    "align_your_steps",
    "align_your_steps_sdxl",
    "leading",
    "trailing",
    "linspace",
    "simple",
    "normal",
    "sgm_uniform",
    "ddim_uniform",
    "quad",
    "beta",
)
GUIDANCE = (
    "cfg",
    "rescale",
    "apg",
    "cfg_zero",
    "tcfg",
    "cfg_plus_plus",
    "interval",
    "perp_neg",
)

CFG_PLUS_PLUS = {
    f"{name}_cfg_pp": name
    for name in (
        "euler",
        "euler_ancestral",
        "ddim",
        "dpmpp_2m",
        "dpmpp_2s_ancestral",
        "res_multistep",
        "gradient_estimation",
    )
}
"""A sampler and CFG++ in one word, as ComfyUI has most of them; and the sampler's own name."""


def apart(sampler: Any, guidance: Any) -> tuple[Any, Any]:
    """A sampler and a method of guidance, where the sampler's name may be of both."""
    if not (isinstance(sampler, str) and sampler in CFG_PLUS_PLUS):
        return sampler, guidance
    if not (guidance is None or (isinstance(guidance, str) and guidance == "cfg_plus_plus")):
        raise InputError(
            f"{sampler} is {CFG_PLUS_PLUS[sampler]} under CFG++, and guidance is {guidance!r:.60}: "
            "leave one of them out"
        )
    return CFG_PLUS_PLUS[sampler], "cfg_plus_plus"
