"""What certificates of version 1 say of their own meaning, word by word, and how their bounds compare. Frozen."""

from __future__ import annotations

from cactus_ray.bounds.graph import Graph
from cactus_ray.bounds.quantizer import has_quantisers
from cactus_ray.compression.family import Family
from cactus_ray.compression.quantize import largest_code

SCHEME = (
    "a sample is FALSIFIED by an input that replays in onnxruntime (itself, or found by projected gradient descent); "
    "CERTIFIED where interval or linear (CROWN) lower bounds of every margin, taken in float64 on the weights read "
    "back from the file and charged with their own rounding, are finite and positive; UNKNOWN otherwise"
)
SCHEMES = {
    "cactus": SCHEME,
    "auto_lirpa": SCHEME.replace("and charged with their own rounding,", "by auto_LiRPA, without their own rounding,"),
}
"""How a sample is decided, by engine."""
IN_ARITHMETIC = {
    "real": ("the bounds hold in real arithmetic: the rounding of the network's float32 inference is not charged",),
    "float32": (
        "the runtime multiplies and adds in IEEE float32, rounding to nearest; the order of sums, fused multiply-add, "
        "flushing of subnormal numbers, and folding of channel scales or additions into the layer before are free; "
        "TF32, bfloat16 or float16 products and Winograd or FFT convolutions are not allowed",
        "weights that are stored in float16, bfloat16 or integers are unpacked to float32 before use, as "
        "onnxruntime's CPU provider does (where activations are floating-point numbers)",
    ),
}
"""What is assumed of the runtime's arithmetic, by ``arithmetic``."""
INTEGERS = (
    "activations are rounded to 8-bit codes with the static scales and zero points of the file, and so they are in "
    "every bound: nothing is inferred from a network with floating-point activations",
    "the runtime computes a layer between quantisers in floating-point numbers, or in integers: products of codes are "
    "added exactly in 32 bits, then scaled in float32 (additions of branches also in fixed point of at least 22 bits) "
    "and rounded; how ties are rounded is free, and rounding may turn a code beside a tie into its neighbour",
    "kernels that saturate before 32 bits are not allowed: onnxruntime's of uint8 inputs times int8 weights do on x86 "
    "CPUs without VNNI, those of uint8 times uint8, as in the files that this tool writes, do not",
)
"""What is assumed as well where activations are quantised."""
ASSUMPTIONS = (
    "the weights are the float32 values that onnxruntime computes from the constants of the file, after dequantisation",
    "the runtime evaluates the operators of the file as the ONNX standard defines them, up to rounding",
    "inputs are float32, in the stated layout and domain; nothing outside of the stated ball is covered",
)
EARLIER = {
    "weights that are stored in float16, bfloat16 or integers are unpacked to float32 before use, as onnxruntime's CPU "
    "provider does": IN_ARITHMETIC["float32"][1],
}
"""Earlier words of this version, and the words that stand for them. Never of more than was proved."""
BOUND_TOLERANCE = 1e-6
"""How much larger, relative to itself (at least 1), a stated lower bound may be than the recomputed one: machines sum
in other orders."""


def assumptions(graph: Graph, arithmetic: str) -> tuple[str, ...]:
    """What a certificate of this network in this arithmetic takes for granted."""
    return IN_ARITHMETIC[arithmetic] + (INTEGERS if has_quantisers(graph) else ()) + ASSUMPTIONS


def words(family: Family) -> str:
    """What the members of a family are, for people."""
    steps = "half a quantisation step" if family.radius == "half" else "one quantisation step"
    level, bits = family.level, family.level.bits or 0
    parts = "affine" if level.affine else "symmetric", "per tensor" if level.per_tensor else "per output channel"
    largest = f"(max w - min w) / {2**bits - 1}" if level.affine else f"max|w| / {largest_code(bits)}"
    zeros = (
        "; weights that are exactly 0 in the file are 0 in every member, as 0 is a code of the format"
        if family.zeros == "fixed"
        else ""
    )
    return (
        f"every network whose convolution and linear weights differ from those of the file by at most {steps} of "
        f"{family.format} ({', '.join(parts)}; the steps are those of the file's weights, {largest}, and do not change "
        f"from member to member) and by float32 rounding{zeros}; biases are those of the file"
    )


def exceeds(stated: float, found: float) -> bool:
    """Whether a stated lower bound is more than what was found again allows."""
    return stated > found + BOUND_TOLERANCE * max(1.0, abs(found))
