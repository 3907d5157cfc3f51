"""What a checkpoint's `scheduler_config.json` says about its noise schedule."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from engine.errors import OptionError
from engine.options import Options

TimestepSpacing = Literal["leading", "trailing", "linspace"]

# Of these we read the noise schedule that the network was trained on; the solver is the caller's.
DISCRETE_CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

# Noise schedules whose defaults in diffusers are not those of the other classes.
_BETAS: dict[str, dict[str, object]] = {
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "LCMScheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
}

# Keys that we do not act on, with the values that leave our samplers as they are in diffusers.
# An empty tuple: every value, because the key only matters to a part that is off or not ours.
_ANY: tuple[object, ...] = ()
_OFF: tuple[object, ...] = (False, None)
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "use_exponential_sigmas": _OFF,
    "use_beta_sigmas": _OFF,
    "use_lu_lambdas": _OFF,
    "thresholding": _OFF,
    "dynamic_thresholding_ratio": _ANY,  # this and the next: thresholding only
    "sample_max_value": _ANY,
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint", "bh1", "bh2"),  # UniPC's two are midpoint to DPM-Solver
    "lambda_min_clipped": (float("-inf"),),
    # the noise that DDPM adds, which is no sampler of ours; a learned one is a wider output
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "skip_prk_steps": _ANY,  # PNDM, whose solver is not ours; other configs carry it along
    "predict_x0": _ANY,  # this and the next two: UniPC, whose solver is not ours
    "disable_corrector": _ANY,
    "solver_p": _ANY,
}
_NEUTRAL_DISCRETE: dict[str, tuple[object, ...]] = _NEUTRAL | {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": _OFF,
    "flow_shift": _ANY,  # flow sigmas only
    "use_dynamic_shifting": _OFF,
    "time_shift_type": _ANY,  # dynamic shifting only
    "shift_terminal": _OFF,
}
_FLOW_FIELDS = {
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
    "shift_terminal",
}
_SHARED_FIELDS = {"num_train_timesteps", "use_karras_sigmas", "solver_order"}
_NEUTRAL_FLOW: dict[str, tuple[object, ...]] = _NEUTRAL | {
    "invert_sigmas": _OFF,
    "stochastic_sampling": _OFF,
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "use_flow_sigmas": _ANY,  # it chose this table
    "flow_shift": _ANY,  # in a class that has `shift`
    "lower_order_final": _ANY,  # this and the next: the last step to sigma 0 is of first order
    "euler_at_final": _ANY,
    # the discrete noise schedule, which configs of DPM-Solver carry although flow sigmas ignore it
    **dict.fromkeys(
        (
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
            "prediction_type",
            "timestep_spacing",
            "steps_offset",
        ),
        _ANY,
    ),
}


class SchedulerConfig(Options):
    """What a `scheduler_config.json` says about the noise schedule; construct with `parse`.

    Names and defaults are diffusers'. `timestep_spacing` or `clip_sample` None: the config does not
    say, and each sampler takes its own diffusers class's default. Betas that the config leaves out
    are those of its own class, because the network was trained on them.
    """

    scheduler_class: str
    num_train_timesteps: int = Field(default=1000, ge=1)
    beta_start: float = Field(default=0.0001, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int = Field(default=0, ge=0)
    use_karras_sigmas: bool | None = False
    sigma_min: float | None = Field(default=None, gt=0)  # this and the next: Karras sigmas only
    sigma_max: float | None = Field(default=None, gt=0)
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    set_alpha_to_one: bool = True
    clip_sample: bool | None = None
    clip_sample_range: float = Field(default=1.0, gt=0)
    solver_order: int = Field(default=2, ge=1, le=3)
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int = Field(default=50, ge=1)
    timestep_scaling: float = Field(default=10.0, gt=0)
    shift: float = Field(default=1.0, gt=0)
    use_dynamic_shifting: bool | None = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = Field(default=256, ge=1)
    max_image_seq_len: int = Field(default=4096, ge=1)
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    shift_terminal: float | None = Field(default=None, ge=0, lt=1)

    @property
    def is_flow(self) -> bool:
        """Whether this is flow matching (else a discrete noise schedule)."""
        return self.prediction_type == "flow_prediction"

    @classmethod
    def parse(
        cls, values: Mapping[str, object], source: str = "scheduler_config.json"
    ) -> "SchedulerConfig":
        """Read the JSON object of a `scheduler_config.json`.

        Raises:
            OptionError: the scheduler class is not known, or a key has a value that our samplers
                would not honour.
        """
        class_name = values.get("_class_name")
        if class_name not in DISCRETE_CLASSES + FLOW_CLASSES:
            known = ", ".join(DISCRETE_CLASSES + FLOW_CLASSES)
            raise _error("_class_name", f"must be one of {known}", class_name)
        is_flow = class_name in FLOW_CLASSES or bool(values.get("use_flow_sigmas"))
        _check_prediction_type(values, is_flow)
        fields = _flow_fields(values) if is_flow else _discrete_fields(values)
        config = super().parse({"scheduler_class": class_name, **fields}, source)
        if config.base_image_seq_len == config.max_image_seq_len:
            other = f"must differ from base_image_seq_len {config.base_image_seq_len}"
            raise _error("max_image_seq_len", other, config.max_image_seq_len)
        return config


def _error(key: str, must_be: str, value: object) -> OptionError:
    return OptionError(f"scheduler_config.json: {key} {must_be}, got {value!r}")


def _check_prediction_type(values: Mapping[str, object], is_flow: bool) -> None:
    class_name, value = values["_class_name"], values.get("prediction_type", "epsilon")
    if is_flow and class_name not in FLOW_CLASSES and value != "flow_prediction":
        raise _error("prediction_type", "must be flow_prediction with use_flow_sigmas", value)
    if not is_flow and value == "flow_prediction":
        allowed = f"must be epsilon, v_prediction or sample for {class_name}"
        raise _error("prediction_type", f"{allowed} without use_flow_sigmas", value)


def _flow_fields(values: Mapping[str, object]) -> dict[str, object]:
    if values["_class_name"] not in FLOW_CLASSES:
        values = {**values, "shift": values.get("flow_shift", 1.0)}
    fields = _honoured(values, _FLOW_FIELDS | _SHARED_FIELDS, _NEUTRAL_FLOW)
    if not fields.get("use_dynamic_shifting"):
        fields.pop("time_shift_type", None)  # dynamic shifting only
    return {**fields, "prediction_type": "flow_prediction"}


def _discrete_fields(values: Mapping[str, object]) -> dict[str, object]:
    fields = set(SchedulerConfig.model_fields) - _FLOW_FIELDS - {"scheduler_class"}
    betas = _BETAS.get(str(values["_class_name"]), {})
    return {**betas, **_honoured(values, fields, _NEUTRAL_DISCRETE)}


def _honoured(
    values: Mapping[str, object],
    fields: set[str],
    neutral: Mapping[str, tuple[object, ...]],
) -> dict[str, object]:
    """The keys that are fields; every other key is checked to have no effect."""
    honoured = {}
    for key, value in values.items():
        if key in fields:
            honoured[key] = value
        elif not key.startswith("_"):
            _check_neutral(key, value, neutral)
    return honoured


def _check_neutral(key: str, value: object, neutral: Mapping[str, tuple[object, ...]]) -> None:
    if key not in neutral:
        raise OptionError(
            f"scheduler_config.json: {key} (here {value!r}) is not a key that "
            "Vitrine knows; remove it"
        )
    allowed = neutral[key]
    if allowed and value not in allowed:
        raise _error(key, f"must be {' or '.join(map(repr, allowed))}", value)
