"""`hf-mae export`: an encoder or a classifier as a graph, for ONNX runtimes or for `torch.export.load`.

Batches may have any size; images have the model's size. The graph is read back from the file and compared with the
model on several batches before the folder gets its name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..classifier_mae import MAEForImageClassification
from ..errors import UserError
from ..files import check_free, new_folder
from ..keys.publishing_keys import ExportRecipe, SourceFacts
from ..modeling_mae import MAEForPreTraining
from .compare import compare, make_probe
from .read import open_source

BATCHES = (1, 2, 5)  # batch sizes of the comparison
Graph = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


class Tensors(nn.Module):
    """A model that returns a tuple of tensors, as a graph does."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        classifies = isinstance(model, MAEForImageClassification)
        self.names = ["logits"] if classifies else ["last_hidden_state", "pooler_output"]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(pixel_values)
        return tuple(output[name] for name in self.names)


def export(recipe: ExportRecipe) -> dict[str, Any]:
    """Export a model, or write nothing.

    Returns:
        `part`: "encoder" or "classifier"; `file`: path of the graph; `inputs` and `outputs`: names with shapes;
        `difference`: the largest one; `use`: the code that runs the result.

    Raises:
        UserError: if the source can't be read, the output folder isn't empty, or outputs differ by more than 1e-5 of
            their scale.
    """
    check_free(Path(recipe.output_dir))
    source = open_source(recipe.model, SourceFacts())
    model = source.model.mae if isinstance(source.model, MAEForPreTraining) else source.model
    name, write = WRITERS[recipe.to]
    tensors = Tensors(model).eval()
    batches = [make_probe(model.config, images, seed=images).images for images in BATCHES]
    with new_folder(Path(recipe.output_dir), "--output_dir") as folder:
        graph = write(tensors, batches[1], folder / name)
        difference = max(_difference(tensors, graph, batch, recipe.to) for batch in batches)
        model.config.save_pretrained(folder)
        source.processor.save_pretrained(folder)
    file = f"{recipe.output_dir}/{name}"
    return {
        "part": "classifier" if isinstance(model, MAEForImageClassification) else "encoder",
        "file": file,
        "inputs": _shapes({"pixel_values": batches[0]}),
        "outputs": _shapes(dict(zip(tensors.names, tensors(batches[0]), strict=True))),
        "difference": difference,
        "use": USES[recipe.to].format(file=file),
    }


def _shapes(tensors: dict[str, torch.Tensor]) -> str:
    sides = {name: ", ".join(map(str, value.shape[1:])) for name, value in tensors.items()}
    return ", ".join(f"{name} (batch, {shape})" for name, shape in sides.items())


def write_onnx(tensors: Tensors, images: torch.Tensor, file: Path) -> Graph:
    """An ONNX file, with a second one for weights above 2 GB; runs in onnxruntime."""
    import onnx  # noqa: F401  # torch's exporter needs onnx and onnxscript; without them, fail before the export
    import onnxruntime
    import onnxscript  # noqa: F401

    program: Any = torch.onnx.export(
        tensors, (images,), dynamo=True, verbose=False, input_names=["pixel_values"], output_names=tensors.names,
        dynamic_shapes={"pixel_values": {0: "batch"}},
    )  # fmt: skip
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # local paths of the code
    program.save(file, external_data=sum(p.numel() for p in tensors.parameters()) * 4 > 2e9)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda batch: tuple(map(torch.from_numpy, session.run(tensors.names, {"pixel_values": batch.numpy()})))


def write_torch_export(tensors: Tensors, images: torch.Tensor, file: Path) -> Graph:
    """A .pt2 file of `torch.export`; runs without this package."""
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(tensors, (images,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # local paths of the code
    torch.export.save(program, file)
    return torch.export.load(file).module()


WRITERS: dict[str, tuple[str, Callable[[Tensors, torch.Tensor, Path], Graph]]] = {
    "onnx": ("model.onnx", write_onnx),
    "torch_export": ("model.pt2", write_torch_export),
}
USES = {
    "onnx": "import onnxruntime; onnxruntime.InferenceSession({file!r}).run(None, {{'pixel_values': numpy_array}})",
    "torch_export": "import torch; torch.export.load({file!r}).module()(pixel_values)",
}


@torch.no_grad()
def _difference(tensors: Tensors, graph: Graph, images: torch.Tensor, to: str) -> float:
    expected = dict(zip(tensors.names, tensors(images), strict=True))
    got = dict(zip(tensors.names, graph(images), strict=True))
    try:
        return compare(expected, got)
    except ValueError as error:
        raise UserError(
            f"the model and its {to} graph differ for {len(images)} images ({error}); nothing was written"
        ) from error


def describe_export(result: dict[str, Any]) -> str:
    """The lines that the command prints."""
    return (
        f"{result['part']} with {result['inputs']} -> {result['outputs']}: any batch, this image size\n"
        f"compared with the model on batches of {', '.join(map(str, BATCHES))}: largest difference "
        f"{result['difference']:.1g}\n"
        f"written  {result['file']}\n"
        f"run it   {result['use']}"
    )
