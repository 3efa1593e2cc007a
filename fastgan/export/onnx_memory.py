"""How much memory a graph of ONNX operations takes, found out from shapes alone, before anything is run.

An operation such as ConstantOfShape, Expand, Tile, Pad or Resize makes a large tensor from a few bytes, and onnxruntime
computes constants while it loads a file. So the shape of every tensor must follow from the file and the batch size.
"""

from __future__ import annotations

import math
from typing import Any

_KEPT = 256  # numbers of a constant that shapes may depend on; of larger ones only the shape is looked at
_MOST = 2**31 - 1  # a larger size or attribute overflows somewhere


class UnboundedGraph(Exception):
    """A graph whose memory is not known before it is run."""


class GraphMemory:
    """The memory of a graph by its batch size.

    Args:
        model: `onnx.ModelProto`; it is not changed.

    Attributes:
        batch: batch size of the graph; None: any.
        inputs: names of its inputs.
    """

    def __init__(self, model: Any) -> None:
        import onnx

        self._onnx = onnx
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        graph = self._model.graph
        del graph.value_info[:]  # claims, which inference would believe
        for value in graph.output:
            value.type.tensor_type.ClearField("shape")
        initial = {tensor.name for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in initial]
        del graph.input[:]
        graph.input.extend(inputs)
        self.inputs = [value.name for value in inputs]
        for node in graph.node:
            for attribute in node.attribute:
                if any(abs(number) > _MOST for number in (attribute.i, *attribute.ints)):
                    raise UnboundedGraph(f"its attribute {attribute.name[:60]!r} is too large")
        kept = [tensor for tensor in graph.initializer if math.prod(tensor.dims) <= _KEPT]
        for tensor in graph.initializer:
            if math.prod(tensor.dims) > _KEPT:
                shape = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                graph.input.append(shape)
        del graph.initializer[:]
        graph.initializer.extend(kept)
        if not inputs or not inputs[0].type.tensor_type.shape.dim:
            raise UnboundedGraph("it has no input with a batch")
        first = inputs[0].type.tensor_type.shape.dim[0]
        self.batch = first.dim_value if first.HasField("dim_value") else None
        self._peaks: dict[int, int] = {}

    def peak(self, batch: int) -> int:
        """Bytes of the tensors that are there at the same time, and of the largest working memory.

        Tensors that depend on no input are there from the start: they are computed when the file is loaded.

        Raises:
            UnboundedGraph: a size does not follow from the file and the batch size.
        """
        if batch not in self._peaks:
            self._peaks[batch] = self._peak(self._shapes(batch))
        return self._peaks[batch]

    def shape(self, name: str, batch: int) -> list[int]:
        """Shape of a tensor; -1 is a size that is not known, and so is that of a tensor that is not there."""
        return self._shapes(batch).get(name, ([-1], 1))[0]

    def fits(self, batch: int, most: int) -> bool:
        """Whether `peak` is known, and at most `most`."""
        try:
            return self.peak(batch) <= most
        except UnboundedGraph:
            return False

    def _shapes(self, batch: int) -> dict[str, tuple[list[int], int]]:
        """Shape, and bytes of a number, of every tensor."""
        model = self._onnx.ModelProto()
        model.CopyFrom(self._model)
        for value in model.graph.input[: len(self.inputs)]:
            for position, size in enumerate(value.type.tensor_type.shape.dim):
                if not size.HasField("dim_value"):
                    if position:
                        raise UnboundedGraph(f"its input {value.name[:60]!r} has sizes besides the batch that are open")
                    size.Clear()
                    size.dim_value = batch
        try:
            # Without data_prop: it computes values, such as those of Range, and takes memory for them.
            model = self._onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=False)
        except Exception as error:  # of the library, which documents none
            raise UnboundedGraph(
                f"its shapes cannot be inferred: {str(error).strip().splitlines()[-1][:200]}"
            ) from None
        graph = model.graph
        values = {tensor.name: (list(tensor.dims), tensor.data_type) for tensor in graph.initializer}
        for value in (*graph.value_info, *graph.input, *graph.output):
            kind = value.type.tensor_type
            sizes = [size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim]
            values[value.name] = (sizes if kind.HasField("shape") else [-1], kind.elem_type)
        return {name: (sizes, self._bytes(kind)) for name, (sizes, kind) in values.items()}

    def _bytes(self, kind: int) -> int:
        try:
            return int(self._onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)
        except (KeyError, TypeError, ValueError):
            raise UnboundedGraph(f"it has tensors of an unknown type ({kind})") from None

    def _peak(self, shapes: dict[str, tuple[list[int], int]]) -> int:
        nodes = self._model.graph.node
        last = {name: number for number, node in enumerate(nodes) for name in node.input}
        made = set(self.inputs)  # what depends on an input
        sizes: dict[str, int] = {}
        constant = peak = 0
        alive = sum(_size(name, shapes) for name in made)
        for number, node in enumerate(nodes):
            outputs = [name for name in node.output if name]
            fresh = sum(_size(name, shapes) for name in outputs)
            if made.isdisjoint(node.input):
                constant += fresh
            else:
                made.update(outputs)
                alive += fresh
                sizes.update((name, _size(name, shapes)) for name in outputs)
            peak = max(peak, alive + _working_memory(node, shapes))
            freed = {name for name in (*node.input, *outputs) if last.get(name, number) <= number}
            alive -= sum(sizes.pop(name, 0) for name in freed)
        return constant + peak


def _size(name: str, shapes: dict[str, tuple[list[int], int]]) -> int:
    """Bytes of a tensor."""
    sizes, item = shapes.get(name, ([-1], 1))
    if not all(0 <= size <= _MOST for size in sizes):
        raise UnboundedGraph(f"the shape of {name[:60]!r} does not follow from the file")
    return math.prod(sizes) * item


def _working_memory(node: Any, shapes: dict[str, tuple[list[int], int]]) -> int:
    """Bytes that an operation takes besides its outputs. A transposed convolution has its matrix product in memory."""
    if node.op_type != "ConvTranspose" or len(node.input) < 2:
        return 0
    (x, item), (weight, _) = (shapes.get(name, ([-1], 1)) for name in node.input[:2])
    return math.prod(weight[1:]) * math.prod(x[2:]) * item
