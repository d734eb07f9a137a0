"""What a DeepSeek-V2, V3 or V3.1 model is made of, and what follows: softmax scale, layers with experts.

Sources: DeepSeek-V3 `inference/model.py`, DeepSeek-V2 and V3 in transformers 5.23; YaRN: Peng et al. 2023,
arXiv:2309.00071.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic_core import PydanticCustomError

from blockscale.checkpoint.precision import AS_STORED, Precision
from blockscale.errors import BlockscaleError
from blockscale.formats import ScaleFmt, parse_block_size, parse_scale_fmt
from blockscale.quantization_config import Quantization


def _token_ids(value: Any) -> Any:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int) else value


Size = Annotated[int, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=0)]
_CountOrNull = Annotated[Count, pydantic.BeforeValidator(lambda value: 0 if value is None else value)]
_Rank = Annotated[Size | None, pydantic.BeforeValidator(lambda value: None if value == 0 else value)]
_TokenIds = Annotated[tuple[Count, ...], pydantic.BeforeValidator(_token_ids)]
_ScaleFmt = Annotated[ScaleFmt, pydantic.BeforeValidator(parse_scale_fmt)]
_BlockSize = Annotated[tuple[int, int], pydantic.BeforeValidator(parse_block_size)]
_MISFIT = "misfit"
_STRICT = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Yarn(pydantic.BaseModel):
    """Rotary embeddings stretched by YaRN: a context of original_max_position_embeddings grows by factor.

    Attributes:
        beta_fast, beta_slow: turns within the original context, above and below which a frequency is kept or
            divided by `factor`.
        mscale, mscale_all_dim: strength of the growth of attention with `factor`, see `softmax_scale` and
            `rope_attention_scale` of `ModelConfig`; None and 0 leave it out.
        attention_factor: sets `rope_attention_scale` outright.
    """

    model_config = _STRICT

    factor: Annotated[float, pydantic.Field(ge=1)]
    original_max_position_embeddings: Size
    beta_fast: Annotated[float, pydantic.Field(gt=0)] = 32.0
    beta_slow: Annotated[float, pydantic.Field(gt=0)] = 1.0
    mscale: Annotated[float, pydantic.Field(ge=0)] | None = None
    mscale_all_dim: Annotated[float, pydantic.Field(ge=0)] | None = None
    attention_factor: Annotated[float, pydantic.Field(gt=0)] | None = None


class ModelConfig(pydantic.BaseModel):
    """What a model is made of, in Hugging Face's names; sizes in elements, lengths in tokens. Hashable.

    Attributes:
        q_lora_rank: None for queries projected at once; 0 is taken for None.
        n_routed_experts: 0 for a dense model, whose other expert fields mean nothing.
        topk_method: "noaux_tc" chooses by score plus correction bias, a group by its two best;
            "group_limited_greedy" by score, a group by its best; "greedy" by score, without groups.
        norm_topk_prob: whether the weights of the chosen experts are divided by their sum.
        rope_interleave: rotary pairs are neighbours; otherwise halves of the head.
        rope_scaling: None for plain rotary embeddings.
        num_nextn_predict_layers: multi-token prediction layers past the last decoder layer.
        attention_bias: `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have a bias.
        dtype: whether the linear layers are declared to be stored in FP8.
        scale_fmt: declared format of the FP8 scales.
        weight_block_size: declared (block_n, block_k), None where nothing is quantized.
        precision: that linear layers are to have once loaded; by default the one they are stored in.
        stored: declared layout, and who has which format; None where nothing is quantized.

    Raises:
        pydantic.ValidationError: a value out of range or of the wrong type, or two that do not fit together;
            the functions of `blockscale.model.config` turn it into a BlockscaleError.
    """

    model_config = _STRICT

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    max_position_embeddings: Size
    q_lora_rank: _Rank
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    n_routed_experts: _CountOrNull
    n_shared_experts: _CountOrNull
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    first_k_dense_replace: Count
    moe_layer_freq: Size = 1
    n_group: Size = 1
    topk_group: Size = 1
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"]
    scoring_func: Literal["sigmoid", "softmax"]
    norm_topk_prob: bool
    routed_scaling_factor: float = 1.0
    rms_norm_eps: Annotated[float, pydantic.Field(gt=0)] = 1e-6
    rope_theta: Annotated[float, pydantic.Field(gt=1)] = 10000.0
    rope_interleave: bool = True
    rope_scaling: Yarn | None = None
    num_nextn_predict_layers: Count = 0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    bos_token_id: Count | None = None
    eos_token_id: _TokenIds = ()
    dtype: Literal["bf16", "fp8"] = "bf16"
    scale_fmt: _ScaleFmt = "float32"
    weight_block_size: _BlockSize | None = None
    precision: Precision = AS_STORED
    stored: Quantization | None = None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without position, then the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor of attention logits: qk_head_dim^-1/2, under YaRN times mscale(factor, mscale_all_dim)^2.

        mscale(f, m) = 0.1 m ln f + 1. Source: `MLA` of DeepSeek-V3's `inference/model.py`.
        """
        yarn = self.rope_scaling
        growth = _mscale(yarn.factor, yarn.mscale_all_dim) if yarn and yarn.mscale_all_dim else 1.0
        return self.qk_head_dim**-0.5 * growth**2

    @property
    def rope_attention_scale(self) -> float:
        """Factor of cos and sin under YaRN: mscale(factor, mscale) / mscale(factor, mscale_all_dim).

        Where one of the two is missing or 0 it is mscale(factor, 1); without YaRN it is 1. Source:
        `attention_factor` in `_compute_yarn_parameters` of transformers 5.23.
        """
        yarn = self.rope_scaling
        if yarn is None:
            return 1.0
        if yarn.attention_factor is not None:
            return yarn.attention_factor
        if yarn.mscale and yarn.mscale_all_dim:
            return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
        return _mscale(yarn.factor, 1.0)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts. Source: DeepSeek's `modeling_deepseek.py`."""
        past_dense = layer >= self.first_k_dense_replace
        return self.n_routed_experts > 0 and past_dense and layer % self.moe_layer_freq == 0

    def check_ranks(self, world_size: int) -> None:
        """Check that heads and routed experts share out evenly; the vocabulary and dense layers need not.

        Raises:
            BlockscaleError: they do not, or `world_size` is not positive.
        """
        heads, experts = self.num_attention_heads, self.n_routed_experts
        common = math.gcd(heads, experts)
        if world_size < 1 or common % world_size:
            fitting = ", ".join(str(ranks) for ranks in range(1, common + 1) if common % ranks == 0)
            raise BlockscaleError(
                "model does not share out evenly over the ranks",
                expected=f"a number that divides {heads} heads" + f" and {experts} experts" * bool(experts),
                got=f"{world_size} ranks",
                remedy=f"start {fitting} ranks",
            )

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        misfits = list(self._misfits())
        if misfits:
            field, expected, got = misfits[0]
            context = {"field": field, "expected": expected, "got": got, "more": len(misfits) - 1}
            raise PydanticCustomError(_MISFIT, "bad {field}: expected {expected}, got {got}", context)
        return self

    def _misfits(self) -> Iterator[tuple[str, str, object]]:
        """(field, expected, got) of every value that is impossible beside the others."""
        experts, groups, chosen = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        yarn = self.rope_scaling
        if self.qk_rope_head_dim % 2:
            yield "qk_rope_head_dim", "an even number, to turn in pairs", self.qk_rope_head_dim
        if yarn and yarn.beta_fast < yarn.beta_slow:
            yield "rope_scaling.beta_fast", f"at least beta_slow {yarn.beta_slow}", yarn.beta_fast
        if not experts:
            return
        if not self.moe_intermediate_size:
            yield "moe_intermediate_size", f"a positive size for {experts} experts", 0
        if experts % groups:
            yield "n_group", f"a divisor of {experts} experts", groups
        elif self.topk_method == "noaux_tc" and groups > 1 and experts < 2 * groups:
            yield "n_group", f"two experts in each group of {experts}, for noaux_tc adds up two", groups
        if self.topk_group > groups:
            yield "topk_group", f"at most {groups}, the number of groups", self.topk_group
        within = experts if self.topk_method == "greedy" else experts // groups * self.topk_group
        if not 1 <= chosen <= within:
            yield "num_experts_per_tok", f"1 to {within}, the experts of the chosen groups", chosen


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def checked_config(
    fields: Mapping[str, Any], where: object, names: Mapping[str, str], given: Collection[str]
) -> ModelConfig:
    """A ModelConfig of fields read from a file, whose first problem is told in the file's own names.

    Args:
        fields: ModelConfig's arguments.
        where: what to call the file.
        names: field, or path as `rope_scaling.factor`, -> the file's name for it, where they differ.
        given: fields or paths that the file sets; the others are defaults.

    Raises:
        BlockscaleError: a value that is wrong or does not fit the others.
    """
    try:
        return ModelConfig.model_validate(fields)
    except pydantic.ValidationError as error:
        problems = error.errors()
        first, context = problems[0], problems[0].get("ctx", {})
        path = context["field"] if first["type"] == _MISFIT else ".".join(map(str, first["loc"]))
        head, _, rest = path.partition(".")
        name = names.get(path) or ".".join(filter(None, (names.get(head, head), rest)))
        more = len(problems) - 1 + context.get("more", 0)
        counted = f" ({more} more problem{'s' * (more > 1)})" if more else ""
        if first["type"] == "missing":
            raise BlockscaleError(f"key {name} is missing", where=where, remedy=f"add it{counted}") from error
        remedy = f"correct it, or fetch the file again{counted}"
        if "error" in context:  # a parser's BlockscaleError, which says what it expected
            raise BlockscaleError(str(context["error"]), where=where, remedy=remedy) from error
        got = repr(context.get("got", first["input"]))
        raise BlockscaleError(
            f"bad {name}",
            where=where,
            expected=context.get("expected", first["msg"].removeprefix("Input should be ")),
            got=got if path in given or head in given else f"the default {got}",
            remedy=remedy,
        ) from error
