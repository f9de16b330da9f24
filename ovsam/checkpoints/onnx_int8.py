"""The text tower of an ONNX export with weights of 8 bits.

Dynamic quantisation of whole matrices, with one scale a column and one for all activations, loses too much on MiniLM
(mean cosine 0.991). Here matrices have a scale for each BLOCK weights, activations are quantised in the same blocks
when the graph runs, and each token's embedding has a scale of its own.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from ovsam.errors import InputError

BLOCK = 16
TABLE = 100_000  # weights; smaller tables stay as they are


def quantise(path: Path) -> None:
    """Store the matrices and the embedding table of a graph as 8-bit integers, in place.

    Raises:
        InputError: onnx or onnxruntime are not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    except ImportError as error:
        raise InputError("8-bit weights need onnx and onnxruntime: `pip install 'ovsam[onnx]'`.") from error
    model = onnx.load(path)
    _quantise_tables(model.graph)
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    # Level 4: activations are quantised to 8 bits as well, block by block.
    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    small = path.with_suffix(".int8")
    quantizer.model.save_model_to_file(str(small), False)
    small.replace(path)


def _quantise_tables(graph: Any) -> None:
    """Tables from which rows are taken: integers, and a scale a row, which multiplies the rows that are taken."""
    from onnx import TensorProto, helper, numpy_helper

    stored = {one.name: one for one in graph.initializer}
    for place, node in reversed(list(enumerate(graph.node))):
        table = stored.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or len(table.dims) != 2 or np.prod(table.dims) < TABLE:
            continue
        values = numpy_helper.to_array(table)  # [tokens, width]
        scale = np.abs(values).max(1, keepdims=True).clip(1e-12) / 127
        integers, scales, taken, index = f"{table.name}_int8", f"{table.name}_scale", node.output[0], node.input[1]
        graph.initializer.remove(table)
        graph.initializer.append(numpy_helper.from_array(np.round(values / scale).astype(np.int8), integers))
        graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), scales))
        graph.node.remove(node)
        for offset, (kind, inputs, output, more) in enumerate(
            (
                ("Gather", [integers, index], f"{taken}_int8", {}),
                ("Gather", [scales, index], f"{taken}_scale", {}),
                ("Cast", [f"{taken}_int8"], f"{taken}_float", {"to": TensorProto.FLOAT}),
                ("Mul", [f"{taken}_float", f"{taken}_scale"], taken, {}),
            )
        ):
            graph.node.insert(place + offset, helper.make_node(kind, inputs, [output], **more))
