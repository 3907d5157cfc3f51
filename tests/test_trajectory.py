"""A trajectory that starts from a picture is diffusers' image-to-image loop."""

import numpy as np
import pytest
from diffusers_loop import (
    DISCRETE,
    FLOW,
    RawConfig,
    Run,
    assert_matches_diffusers,
    gaussian_network,
    image_to_image_timesteps,
    scheduler_of,
)
from test_flow_samplers import DYNAMIC, flow
from test_samplers import BETAS, SPACINGS, STEPS, discrete

from engine.errors import OptionError

STRENGTHS = (0.3, 0.5, 0.75, 1.0)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def check(sampler: str, raw: RawConfig, image_seq_len: int | None = None) -> None:
    network = gaussian_network(raw)
    for steps in STEPS:
        for strength in STRENGTHS:
            run = Run(sampler, raw, steps, image_seq_len, strength=strength, network=network)
            assert_matches_diffusers(run)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("sampler", DISCRETE)
def test_a_picture_is_changed_as_by_diffusers(sampler: str, betas: str, spacing: str) -> None:
    check(sampler, discrete(timestep_spacing=spacing, **BETAS[betas]))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_a_picture_is_changed_as_by_diffusers_with_karras_sigmas(sampler: str) -> None:
    check(sampler, discrete(use_karras_sigmas=True, **BETAS["scaled_linear"]))


@pytest.mark.parametrize("sampler", FLOW)
def test_a_picture_is_changed_as_by_diffusers_in_flow_matching(sampler: str) -> None:
    check(sampler, flow(shift=3.0))
    if sampler != "heun":
        check(sampler, flow(**DYNAMIC), 1024)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "flow_euler"])
def test_the_first_call_is_that_of_diffusers_pipelines(sampler: str) -> None:
    raw = flow() if sampler == "flow_euler" else discrete()
    for steps in range(1, 51):
        for strength in np.arange(0.02, 1.01, 0.02).tolist():
            run = Run(sampler, raw, steps, strength=strength)
            remaining = len(image_to_image_timesteps(scheduler_of(run), run))
            if remaining:
                assert run.plan.start(strength) == len(run.plan.timesteps) - remaining
            else:
                with pytest.raises(OptionError, match="leaves no step"):
                    run.plan.start(strength)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan")])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(OptionError, match="strength must be more than 0 and at most 1, got"):
        Run("ddim", discrete(), 10).plan.start(strength)


def test_a_strength_that_leaves_no_step_says_what_is_enough() -> None:
    with pytest.raises(OptionError, match=r"strength 0\.1 of 4 steps leaves no step; it must be"):
        Run("ddim", discrete(), 4).plan.start(0.1)


def test_only_a_multistep_sampler_changes_where_it_begins() -> None:
    for sampler in DISCRETE:
        plan = Run(sampler, discrete(), 10).plan
        begun = plan.begun_at(4)
        changed = (begun.coefficients != plan.coefficients).any(axis=1)
        assert changed.nonzero()[0].tolist() == ([4] if sampler == "dpmpp_2m" else [])
        assert plan.begun_at(0) is plan
