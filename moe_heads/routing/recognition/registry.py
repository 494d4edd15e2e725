"""Routers of other packages that are recognized without an adapter, by the package and the name of their class.

To add a router, add its class below: the rule for its scores if it returns (logits, weights, indices), else a function
from a `Pass` to a `Routing`. Where the decisions are those of a layer and not of a module of their own, add the class
of the layer to `LAYERS`. Routers of other classes are recognized by the shapes of their output (`shapes.py`), without
entropy and margin. Every rule is checked on every pass: if a row did not choose its highest scores, the margin is nan.
"""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from moe_heads.routing.recognition import layers
from moe_heads.routing.recognition.observed import Pass
from moe_heads.routing.recognition.scores import PROBABILITIES, SIGMOID, SOFTMAX, ScoreRule
from moe_heads.routing.routing import Routing

__all__ = ["LAYERS", "REGISTRY", "Entry", "entry_of", "inner_entries"]

Entry = ScoreRule | Callable[[Pass], Routing]
"""The rule for the scores of a router that returns (logits, weights, indices), or its adapter."""

_CORRECTION = "e_score_correction_bias"


def _of_class(owner: str) -> ScoreRule:
    """Return the rule of a router that keeps the function of its scores as an attribute."""
    return ScoreRule(lambda module, logits: getattr(module, owner)(logits), _CORRECTION)


def _selected_function(module: nn.Module, logits: Tensor) -> Tensor:
    return logits.sigmoid() if getattr(module, "expert_selection_fn", "softmax") == "sigmoid" else logits.softmax(-1)


# from transformers 5.23; the classes of a rule have the same forward pass up to names
_TRANSFORMERS: Mapping[Entry, tuple[str, ...]] = {
    SOFTMAX: (
        "AriaTextTopKRouter FlexOlmoTopKRouter GptOssTopKRouter GraniteMoeHybridTopKRouter GraniteMoeSWATopKRouter",
        "GraniteMoeSharedTopKRouter GraniteMoeTopKRouter HunYuanMoEV1Gate JambaTopKRouter MellumTopKRouter",
        "MiniMaxTopKRouter MixtralTopKRouter OlmoeTopKRouter OpenAIPrivacyFilterTopKRouter Qwen2MoeTopKRouter",
        "Qwen3MoeTopKRouter Qwen3NextTopKRouter Qwen3OmniMoeTalkerTextTopKRouter Qwen3OmniMoeTextTopKRouter",
        "Qwen3OmniMoeThinkerTextTopKRouter Qwen3VLMoeTextTopKRouter Qwen3_5MoeTopKRouter Qwen4ExpTextTopKRouter",
    ),
    ScoreRule(bias="moe_statics.e_score_correction_bias"): ("Ernie4_5_MoeTopKRouter Ernie4_5_VLMoeMoeTopKRouter",),
    ScoreRule(bias=_CORRECTION): ("LongcatFlashTopkRouter",),
    ScoreRule(groups="max"): ("DeepseekOcr2TextTopkRouter DeepseekV2TopkRouter UnlimitedOcrTextTopkRouter",),
    ScoreRule(groups="top2"): ("Mistral4TopkRouter MistralLarge4TextTopkRouter",),
    SIGMOID: ("FlintTopKRouter",),
    ScoreRule(_selected_function): ("Cohere2MoeTopKRouter",),
    ScoreRule(SIGMOID.function, _CORRECTION, groups="top2"): (
        "AXK1TopkRouter AXK2TopkRouter BailingHybridTopkRouter BeamTopKRouter DeepseekV32TopkRouter",
        "DeepseekV3TopkRouter",
        "Dots1TopkRouter Dots3NoteTextTopkRouter ExaoneMoeTopkRouter Glm4MoeLiteTopkRouter Glm4MoeTopkRouter",
        "Glm4vMoeTextTopkRouter Glm5NextTextTopkRouter GlmMoeDsaTopkRouter HYV4TopkRouter KimiLinearTopkRouter",
        "MiMoV2FlashTopkRouter NemotronHTopkRouter SolarOpenTopkRouter",
    ),
    ScoreRule(SIGMOID.function, _CORRECTION): (
        "InklingTopkRouter LagunaTopKRouter MiniMaxM3VLTopKRouter Step3p7TopKRouter",
    ),
    ScoreRule(SIGMOID.function, bias=1): (
        "AfmoeTokenChoiceRouter Dots3NoteVisionTopKRouter HYV3TopKRouter Lfm2MoeTopKRouter MiniMaxM2TopKRouter",
    ),
    ScoreRule(SIGMOID.function, _CORRECTION, biased="logits"): ("Kolibri1TopKRouter",),
    _of_class("score_fn"): ("DeepseekV4TopKRouter Inkling2TopKRouter",),
    _of_class("scoring_function"): ("MuseSparkTopkRouter",),
    PROBABILITIES: ("DiffusionGemmaTextRouter Gemma4TextRouter",),
    layers.one_hot_with_capacity: ("SwitchTransformersTop1Router",),
    layers.gates_with_capacity: ("NllbMoeTop2Router",),
    layers.sigmoid_of_top_logits: ("Llama4Router",),
    layers.sorted_by_expert: ("JetMoeTopKGating",),
}

REGISTRY: Mapping[tuple[str, str], Entry] = {
    **{
        ("transformers", name): entry
        for entry, lines in _TRANSFORMERS.items()
        for line in lines
        for name in line.split()
    },
    ("st_moe_pytorch", "TopNGating"): layers.dispatch_and_combine,
    ("soft_moe_pytorch", "SoftMoE"): layers.slots,
    ("*", "TokenChoiceTopKRouter"): layers.token_choice,  # torchtitan and its many copies
}
"""Entry by package (first part of the name of the class's module, "*" for any) and class. Subclasses are included."""


def _dbrx(layer: nn.Module) -> dict[str, Entry]:
    order = layer.moe_normalize_expert_weights
    return {"router": layers.top_k_of_logits(int(layer.top_k), None if order is None else float(order))}  # type: ignore[arg-type]


def _noisy_gating(layer: nn.Module) -> dict[str, Entry]:
    """davidmrau/mixture-of-experts, a single file that is copied into other projects: known by its attributes."""
    names = ("w_gate", "w_noise", "k", "num_experts")
    if not all(hasattr(layer, name) for name in names) or not isinstance(getattr(layer, "softmax", None), nn.Softmax):
        return {}
    return {"softmax": layers.softmax_of_all(int(layer.k), int(layer.num_experts))}  # type: ignore[arg-type]


def _tutel(layer: nn.Module) -> dict[str, Entry]:
    gates = getattr(layer, "gates", None)
    if not isinstance(gates, nn.ModuleList):
        return {}
    return {f"gates.{i}": layers.linear_gate(layer) for i, gate in enumerate(gates) if hasattr(gate, "top_k")}


LAYERS: Mapping[tuple[str, str], Callable[[nn.Module], dict[str, Entry]]] = {
    ("transformers", "DbrxFFN"): _dbrx,
    ("*", "MoE"): _noisy_gating,
    ("*", "MOELayer"): _tutel,
}
"""Entries of the modules inside a layer, by their path in it, by package and class of the layer."""


def entry_of(module: nn.Module) -> Entry | None:
    """Return the entry of a router, or None."""
    return next((REGISTRY[key] for key in _keys_of(module) if key in REGISTRY), None)


def inner_entries(module: nn.Module) -> dict[str, Entry]:
    """Return the entries of the modules inside a layer, by their path in it."""
    return next((LAYERS[key](module) for key in _keys_of(module) if key in LAYERS), {})


def _keys_of(module: nn.Module) -> Iterator[tuple[str, str]]:
    for cls in type(module).__mro__:
        yield cls.__module__.partition(".")[0], cls.__name__
        yield "*", cls.__name__
