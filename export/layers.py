"""The layers of a graph that may be quantized, and those that a recipe keeps, with the reason."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onnx import NodeProto

from engine.errors import ArtifactError
from engine.manifest import KeptLayer
from export.finding import label
from export.lint_graph import ONNX_DOMAINS, WEIGHTED, Graph, Scope, open_graph
from export.lint_layers import LEAST_CHANNELS
from export.recipes import KeepRule, Recipe

_REASONS: dict[KeepRule, str] = {
    "first": "the first convolution: few channels, and every later layer reads its error",
    "last": "the last layer: its error is the picture's",
    "embedding": "depends on the step and the class alone: one vector for each picture",
    "shortcut": "a shortcut convolution: cheap, and its error bypasses the block",
    "small": f"fewer than {LEAST_CHANNELS} channels: an int8 kernel gains nothing",
    "conv_transpose": "the runtime has no ConvTranspose of this type and would compute it in float",
}
_MOVES = {"Cast", "Div", "Identity", "Mul", "Resize"}  # between a shortcut and its Add


@dataclass(frozen=True)
class Layers:
    """Names in the order of the graph: what a search may quantize, and what it may not."""

    quantizable: tuple[str, ...]
    kept: tuple[KeptLayer, ...]


def layers(graph: Path, recipe: Recipe) -> Layers:
    """The layers of a float graph. Weights are not read.

    Raises ArtifactError where the file is no ONNX model or two layers share a name.
    """
    opened = open_graph(graph)
    reasons = {
        name: _REASONS[rule]
        for rule in reversed(recipe.rules)  # the first rule that holds is the reason
        for name in _matching(rule, opened.main)
    }
    names = [node.name for node in weighted_nodes(opened.main)]
    _check_names(graph, names)
    return Layers(
        quantizable=tuple(name for name in names if name not in reasons),
        kept=(
            *(KeptLayer(name=name, reason=reasons[name]) for name in names if name in reasons),
            *_out_of_reach(opened),
        ),
    )


def weighted_nodes(scope: Scope) -> list[NodeProto]:
    """Convolutions and matrix products with a constant weight; attention products have none."""
    return [
        node
        for node in scope.nodes
        if node.domain in ONNX_DOMAINS
        and node.op_type in WEIGHTED
        and scope.constant(node.input[1]) is not None
        and len(scope.shape(node.input[1]) or ()) >= 2
        and not scope.is_constant(node.input[0])
    ]


def _out_of_reach(graph: Graph) -> Iterator[KeptLayer]:
    """Layers that no form is written for."""
    reached = {id(node) for node in weighted_nodes(graph.main)}
    for scope, node in graph.nodes(*WEIGHTED):
        if scope is not graph.main:
            yield KeptLayer(name=label(node), reason="inside an If, Loop or Scan")
        elif id(node) not in reached and any(scope.is_constant(name) for name in node.input[:2]):
            yield KeptLayer(name=label(node), reason="its weight is no constant matrix")


def _check_names(graph: Path, names: list[str]) -> None:
    taken = Counter(names)
    for name, count in taken.items():
        if not name or count > 1:
            raise ArtifactError(
                f"'{graph}': {count} layers are named '{name}', and a layer is chosen by its name; "
                "export the network again: vitrine export CHECKPOINT --output ARTIFACT"
            )


def _matching(rule: KeepRule, scope: Scope) -> Iterator[str]:
    nodes = weighted_nodes(scope)
    match rule:
        case "first":
            yield from _first_convolutions(scope, nodes)
        case "last":
            yield from _last(scope, nodes)
        case "embedding":
            yield from _embeddings(scope, nodes)
        case "shortcut":
            yield from (node.name for node in nodes if _is_shortcut(scope, node))
        case "small":
            yield from (node.name for node in nodes if _channels(scope, node) < LEAST_CHANNELS)
        case "conv_transpose":
            yield from (node.name for node in nodes if node.op_type == "ConvTranspose")


def _channels(scope: Scope, node: NodeProto) -> int:
    """The smaller of K and N: of the first two axes of a weight, of the last two in a MatMul."""
    shape = scope.shape(node.input[1]) or ()
    pair = shape[-2:] if node.op_type == "MatMul" else shape[:2]
    return min((size for size in pair if isinstance(size, int)), default=0)


def _first_convolutions(scope: Scope, nodes: list[NodeProto]) -> Iterator[str]:
    """Convolutions that no other layer stands before."""
    layers = {id(node) for node in nodes}
    for node in nodes:
        if node.op_type.startswith("Conv"):
            before = _ancestors(scope, node.input[0])
            if not any(id(other) in layers for other in before):
                yield node.name


def _last(scope: Scope, nodes: list[NodeProto]) -> Iterator[str]:
    """For each output the last layer of the graph whose result reaches it through no other one."""
    layers = {id(node): index for index, node in enumerate(nodes)}
    for output in scope.outputs:
        reached = _ancestors(scope, output, stop=set(layers))
        indices = [layers[id(node)] for node in reached if id(node) in layers]
        if indices:
            yield nodes[max(indices)].name


def _embeddings(scope: Scope, nodes: list[NodeProto]) -> Iterator[str]:
    """Layers that no picture or text [B, .., ..] flows into, in a network that takes one."""
    dense = {name for name in scope.inputs if len(scope.shape(name) or ()) >= 3}
    if not dense:  # a generator's latent or a text encoder's tokens: all there is
        return
    reached = set(dense)
    for node in scope.nodes:  # in topological order; a shape is no data
        if node.op_type != "Shape" and not reached.isdisjoint(node.input):
            reached.update(node.output)
    yield from (node.name for node in nodes if node.input[0] not in reached)


def _is_shortcut(scope: Scope, node: NodeProto) -> bool:
    """A 1x1 convolution whose result is added to what other layers make of its own input."""
    shape = scope.shape(node.input[1]) or ()
    if node.op_type != "Conv" or set(shape[2:]) != {1}:
        return False
    source = node.input[0]
    return any(
        source in other.input
        for add, own in _adds(scope, node.output[0])
        for operand in add.input
        if operand != own
        for other in _ancestors(scope, operand, stop={id(node)})
        if other is not node
    )


def _adds(scope: Scope, name: str) -> Iterator[tuple[NodeProto, str]]:
    """The Adds that read a tensor, at once or scaled, and by which name."""
    for reader in scope.consumers.get(name, []):
        if reader.op_type == "Add":
            yield reader, name
        elif reader.op_type in _MOVES:
            yield from _adds(scope, reader.output[0])


def _ancestors(scope: Scope, name: str, stop: set[int] | None = None) -> Iterator[NodeProto]:
    """Every node that a tensor is computed from, each once; nothing before the `stop` nodes."""
    waiting, seen = [name], set[str]()
    while waiting:
        name = waiting.pop()
        node = scope.producers.get(name)
        if node is None or node.op_type == "Shape" or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        yield node
        if stop is None or id(node) not in stop:
            waiting.extend(node.input)
