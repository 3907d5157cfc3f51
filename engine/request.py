"""What a caller may ask for: one validated model, its limits, and the defaults of a model."""

from collections.abc import Mapping

from pydantic import Field, ValidationError

from engine.errors import OptionError
from engine.manifest import ModelSpec
from engine.options import Options, describe

DIFFUSION_ONLY = ("num_inference_steps", "guidance_scale", "sampler")


class Request(Options):
    """One picture. `None` means the model's default; `resolve` fills it in."""

    label: str = Field(description="a class name of the model")
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="start noise; torch uses its low 32 bits, so do we"
    )
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(
        None, ge=1, le=100, description="classifier-free guidance; 1 is off"
    )
    sampler: str | None = None

    @classmethod
    def of(cls, label: str, parameters: Mapping[str, object]) -> "Request":
        """A request as it came over the wire. Raises OptionError."""
        try:
            return cls.model_validate({**parameters, "label": label})
        except ValidationError as error:
            raise OptionError(describe(cls, error.errors()[0])) from None


def resolve(request: Request, model: ModelSpec) -> Request:
    """The same request with every default of the model filled in.

    Raises OptionError for an unknown label or sampler and for an option the model does not take.
    """
    if request.label not in model.labels:
        raise OptionError(f"label must be one of {', '.join(model.labels)}, got {request.label!r}")
    if model.defaults is None:
        return _refuse_diffusion_options(request)
    given = request.model_dump(exclude_none=True)
    resolved = request.model_copy(update={**model.defaults.model_dump(), **given})
    if resolved.sampler not in model.samplers:
        raise OptionError(
            f"sampler must be one of {', '.join(model.samplers)}, got {resolved.sampler!r}"
        )
    if model.null_label is None and resolved.guidance_scale != 1:
        raise OptionError(
            "guidance_scale must be 1 for a model trained without label dropout, "
            f"got {resolved.guidance_scale}"
        )
    return resolved


def _refuse_diffusion_options(request: Request) -> Request:
    for name in DIFFUSION_ONLY:
        value = getattr(request, name)
        if value is not None:
            raise OptionError(f"a GAN takes one step and no {name}, got {value!r}; leave it out")
    return request
