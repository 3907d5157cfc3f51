"""How a runtime wants a network quantized: number types, sides of a layer, layers to leave out."""

from typing import Literal

from pydantic import Field

from engine.errors import OptionError
from engine.manifest import Precision, Runtime
from engine.options import Options

ActivationType = Literal["uint8", "int8", "float8e4m3fn"]
WeightType = Literal["int8", "float8e4m3fn"]
KeepRule = Literal["first", "last", "embedding", "shortcut", "small", "conv_transpose"]

_TENSORRT_RULES: tuple[KeepRule, ...] = ("first", "last", "embedding", "shortcut", "small")


class Recipe(Options):
    """One form of QuantizeLinear and DequantizeLinear in a graph."""

    activations: ActivationType | None = Field(
        description="uint8 is asymmetric, the others symmetric; none: only weights are quantized"
    )
    weights: WeightType = Field(description="symmetric, one scale for each output channel")
    outputs: bool = Field(False, description="quantize also what a layer returns")
    rules: tuple[KeepRule, ...] = Field((), description="layers that the form leaves out")


def recipe(runtime: Runtime, precision: Precision, weights_only: bool = False) -> Recipe:
    """The form that a runtime computes in int8 or fp8, or stores in int8.

    Raises OptionError where there is none.
    """
    match runtime, precision, weights_only:
        case "onnxruntime", "int8", True:
            return Recipe(activations=None, weights="int8")
        case "onnxruntime", "int8", False:  # U8S8: x86 kernels multiply unsigned by signed
            return Recipe(
                activations="uint8",
                weights="int8",
                outputs=True,  # or convolutions run in float: 2 dB better, 2.5 to 4 times slower
                rules=("conv_transpose",),
            )
        case "tensorrt", "int8", False:
            return Recipe(
                activations="int8",
                weights="int8",
                rules=_TENSORRT_RULES,
            )
        case "tensorrt", "fp8", False:
            return Recipe(
                activations="float8e4m3fn",
                weights="float8e4m3fn",
                rules=("conv_transpose", *_TENSORRT_RULES),
            )
    form = f"{precision} weights only" if weights_only else precision
    raise OptionError(
        f"there is no Q/DQ form of {form} for {runtime}; allowed: onnxruntime int8, "
        "tensorrt int8, tensorrt fp8, and int8 weights only for onnxruntime"
    )
