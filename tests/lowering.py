"""Kernels of programs for hardware that is not here."""

from jaxlib.mlir import ir
from jaxlib.triton import dialect


def triton_kernels(lowered):
    """The Triton kernels of a program lowered for CUDA, each as the compiler will parse it; refused as it would."""
    found, operations = [], [lowered.compiler_ir("stablehlo").operation]
    while operations:
        operation = operations.pop()
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            context = ir.Context()
            dialect.register_dialect(context)
            code = ir.StringAttr(operation.attributes["mhlo.backend_config"]["ir"]).value_bytes
            found.append(ir.Module.parse(code, context=context))  # verifies it
        operations += [each.operation for region in operation.regions for block in region for each in block]
    return found
