"""Whether tensors can be looked at while a formula is computed."""

import torch


def is_eager() -> bool:
    """Whether operations are carried out one after the other, on numbers that are there.

    Not so in a graph that is being compiled, nor inside a transform such as ``torch.func.vmap``.
    """
    return (
        not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
    )
