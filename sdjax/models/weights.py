"""Names and shapes of weights as torch has them, from sizes alone and without jax.

They are written down beside the networks and not traced from them, so that a checkpoint is held
against its config before jax is imported; a test holds them against what Linen makes.
"""

Shapes = dict[str, tuple[int, ...]]
"""Every weight by its torch key: a matrix is [out, in], a kernel [out, in, height, width]."""


def tree(parts: dict[str, Shapes]) -> Shapes:
    """The weights of named parts, each key under its part's name."""
    return {f"{name}.{key}": shape for name, part in parts.items() for key, shape in part.items()}


def listed(name: str, parts: list[Shapes]) -> dict[str, Shapes]:
    """Parts in a list, under its name and their numbers."""
    return {f"{name}.{i}": part for i, part in enumerate(parts)}


def linear(inputs: int, outputs: int, bias: bool = True) -> Shapes:
    """A matrix, and what is added."""
    return {"weight": (outputs, inputs)} | ({"bias": (outputs,)} if bias else {})


def conv(inputs: int, outputs: int, size: int = 3, bias: bool = True) -> Shapes:
    """A square convolution."""
    return {"weight": (outputs, inputs, size, size)} | ({"bias": (outputs,)} if bias else {})


def norm(width: int) -> Shapes:
    """A scale and a shift."""
    return {"weight": (width,), "bias": (width,)}


def table(count: int, width: int) -> Shapes:
    """`count` vectors."""
    return {"weight": (count, width)}


def resnet(inputs: int, outputs: int, time: int | None = None) -> Shapes:
    """`models.resnet.ResnetBlock`; `time` is the width of its time embedding, if it has one."""
    parts = {
        "norm1": norm(inputs),
        "conv1": conv(inputs, outputs),
        "norm2": norm(outputs),
        "conv2": conv(outputs, outputs),
    }
    if time is not None:
        parts["time_emb_proj"] = linear(time, outputs)
    if inputs != outputs:
        parts["conv_shortcut"] = conv(inputs, outputs, 1)
    return tree(parts)


def resample(width: int) -> Shapes:
    """`models.resnet.Downsample`, and both kinds of `Upsample`."""
    return tree({"conv": conv(width, width)})
