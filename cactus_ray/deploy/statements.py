"""What a certificate says of its own meaning: how samples are decided and what is taken for granted, word by word.

``check`` compares these words, so that nobody reads more into a certificate than was proved. Whoever changes a text
keeps the earlier one in ``EARLIER``: certificates that hold must go on to hold.
"""

from __future__ import annotations

from cactus_ray.bounds.graph import Graph
from cactus_ray.bounds.quantizer import has_quantisers
from cactus_ray.deploy.document import Document

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
"""Earlier words, by themselves, and the words that stand for them now. Never of more than was proved."""
ENGINES = {"cactus": "cactus-ray", "auto_lirpa": "auto_LiRPA"}
"""``engine.name`` by the engine of the settings."""
SELF_TESTS = ("alpha moves: ", "alpha frozen: ")
"""How the self-test of an engine that is not our own begins."""


def assumptions(graph: Graph, arithmetic: str) -> tuple[str, ...]:
    """What a certificate of this network in this arithmetic takes for granted."""
    return IN_ARITHMETIC[arithmetic] + (INTEGERS if has_quantisers(graph) else ()) + ASSUMPTIONS


def misstatements(document: Document, graph: Graph) -> list[str]:
    """Where a certificate says of its meaning, or of who computed it, what this tool never says of such a file."""
    found, about, engine = [], document.soundness, document.engine
    name = str(engine.settings.get("engine", "cactus"))
    if name not in ENGINES:  # that the settings are wrong is found where they are read
        return []
    if about.scheme != SCHEMES[name]:
        found.append(f"soundness.scheme: {about.scheme!r}; with engine {name} it is {SCHEMES[name]!r}")
    stated, meant = tuple(EARLIER.get(text, text) for text in about.assumptions), assumptions(graph, about.arithmetic)
    found += [f"soundness.assumptions: {text!r} is missing" for text in meant if text not in stated]
    found += [f"soundness.assumptions: {text!r} is none of this file" for text in stated if text not in meant]
    if not found and stated != meant:
        found.append("soundness.assumptions: in another order, or one stands twice")
    if engine.name != ENGINES[name]:
        found.append(f"engine.name: {engine.name!r}, but engine.settings.engine {name!r} is {ENGINES[name]!r}")
    if name == "cactus":
        if engine.version != (version := document.versions.get("cactus-ray")):
            found.append(f"engine.version: {engine.version!r}, but versions.cactus-ray is {version!r}")
        if engine.self_test is not None:
            found.append(f"engine.self_test: {engine.self_test!r}; expected null: our own engine has none")
    elif not (engine.self_test or "").startswith(SELF_TESTS):
        found.append(f"engine.self_test: {engine.self_test!r}; expected one of {', '.join(map(repr, SELF_TESTS))}")
    return found
