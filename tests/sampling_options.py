"""Ways of drawing that are not the paper's: every knob that makes it sooner, in any combination."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import strategies as st

from mar.config import MaskSchedule, Order, RevealRule, Solver, TimestepSpacing


@st.composite
def sampling_options(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of SamplingConfig beside `steps` and `diffusion_steps`; few diffusion steps, guidance or none."""
    start, end = sorted(draw(st.tuples(*2 * [st.sampled_from([0.0, 0.2, 0.5, 1.0])])))
    return {
        "guidance_scale": draw(st.sampled_from([1.0, 2.5])),
        "guidance_schedule": draw(st.sampled_from(["linear", "constant"])),
        "solver": draw(st.sampled_from(get_args(Solver))),
        "timestep_spacing": draw(st.sampled_from(get_args(TimestepSpacing))),
        "diffusion_steps_end": draw(st.sampled_from([None, 1, 5])),
        "start_t": draw(st.sampled_from([1.0, 0.95])),
        "guidance_interval": (start, end),
        "uncond_interval": draw(st.integers(1, 4)),
        "mask_schedule": draw(st.sampled_from(get_args(MaskSchedule))),
        "order": draw(st.sampled_from(get_args(Order))),
        "reveal": draw(st.sampled_from(get_args(RevealRule))),
        "guidance_time": draw(st.sampled_from([(0.0, 1.0), (0.1, 0.5)])),
    }
