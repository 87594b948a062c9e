"""Config of models that are any sequence of blocks."""

import difflib
import math
from typing import Any, ClassVar, TypeGuard

from huggingface_hub.dataclasses import strict

from ssm_hf.layers.attention import check_attention
from ssm_hf.layers.mamba3 import check_mamba3
from ssm_hf.models.configuration import NativeConfigMixin, check_choice, check_positive
from ssm_hf.models.hybrid.patterns import expand_pattern
from ssm_hf.ops.moe import check_router

_STEP_SIZES = {"time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4}
_ATTENTION: dict[str, Any] = {
    "num_heads": 12,
    "num_kv_heads": None,
    "head_dim": None,
    "window": None,
    "rotary_dim": 0,
    "rope_theta": 10000.0,
    "scaling": None,
    "dropout": 0.0,
    "conv_kernel": 0,
    "use_conv_bias": True,
    "use_bias": False,
    "use_out_bias": False,
}
# What kinds of blocks there are, their options, and the options' defaults.
KINDS: dict[str, dict[str, Any]] = {
    "mamba1": {
        "expand": 2,
        "state_size": 16,
        "conv_kernel": 4,
        "time_step_rank": None,
        **_STEP_SIZES,
        "time_step_scale": 1.0,
        "time_step_init_scheme": "random",
        "use_bias": False,
        "use_conv_bias": True,
        "inner_norms": False,
    },
    "mamba2": {
        "expand": 2,
        "d_ssm": None,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "conv_kernel": 4,
        "chunk_size": 256,
        **_STEP_SIZES,
        "time_step_limit": None,
        "norm": True,
        "norm_before_gate": False,
        "D_per_channel": False,
        "use_bias": False,
        "use_conv_bias": True,
    },
    "mamba3": {
        "expand": 2,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "mimo_rank": 1,
        "rope_fraction": 0.5,
        "rope_layout": None,
        "A_activation": "heavy_tail",
        "A_floor": 1e-4,
        "trapezoid": True,
        "bc_bias": True,
        "output_norm": False,
        "chunk_size": 64,
        **_STEP_SIZES,
        "use_bias": False,
    },
    "attention": _ATTENTION,
    "sliding_attention": {**_ATTENTION, "window": 2048},
    "mlp": {"intermediate_size": None, "activation": "silu", "gated": True},
    "moe": {
        "intermediate_size": None,
        "num_experts": 16,
        "top_k": 2,
        "activation": "silu",
        "gated": True,
        "kind": "softmax",
        "renormalise": False,
        "scale": 1.0,
        "groups": 1,
        "top_groups": 1,
        "correction_bias": False,
        "wide_router": False,
        "shared_size": 0,
        "shared_gate": False,
    },
}
# What an option is whose default is None.
_OPTIONAL: dict[str, Any] = {
    "time_step_rank": 1,
    "d_ssm": 1,
    "time_step_limit": (0.0, 1.0),
    "rope_layout": "half",
    "num_kv_heads": 1,
    "head_dim": 1,
    "window": 1,
    "scaling": 1.0,
    "intermediate_size": 1,
}
_LAYER_TYPES = {"attention": "full_attention"} | {
    kind: kind if kind in ("sliding_attention", "mlp", "moe") else "linear_attention"
    for kind in KINDS
    if kind != "attention"
}


@strict
class HybridConfig(NativeConfigMixin):
    """A sequence of blocks, each x + sublayer(norm(x)).

    The kinds of blocks and their options with defaults are those of `KINDS`: `mamba1`, `mamba2`,
    `mamba3`, `attention`, `sliding_attention`, `mlp` and `moe`. Letters and names are those of the
    layers in `ssm_hf.layers`. An option of None has a default that follows from others: mamba1's
    `time_step_rank` is ceil(D / 16), mamba2's `d_ssm` (channels of the scan; what is left of
    expand * D is a gated MLP) all of them, its `time_step_limit` none; `num_kv_heads` is
    `num_heads`, `head_dim` of attention D / num_heads; mamba3's `rope_layout` follows `mimo_rank`;
    `intermediate_size` is 4 D, or 8/3 D where there is a gate, rounded up to a multiple of 128
    (a gated MLP's always is). An MLP is gated with `"silu"`, or plain with `"relu2"`.

    Args:
        vocab_size: V, rows of the embedding.
        hidden_size: D, width of the residual stream.
        blocks: what the model consists of, in order: kinds, or dicts `{"type": kind, option: value,
            ...}` with options of that block alone; or a pattern in a string, see `expand_pattern`.
            Blocks that give the same name as `"shared"` use the same weights; each has a norm and a
            state of its own.
        options: `{kind: {option: value, ...}, ...}`, for all blocks of a kind.
        layer_norm_epsilon: of all norms.
        residual_in_fp32: keep the residual stream in fp32.
        initialization: `"mamba_ssm"` (linear layers uniform in ±1/sqrt(fan_in), embeddings of
            standard deviation 0.02, the last projection of every block divided by the root of the
            number of blocks) or `"transformers"` (normal with standard deviation
            `initializer_range`; divided only with `rescale_prenorm_residual`).
        initializer_range: see above.
        rescale_prenorm_residual: see above.
        output_router_logits: return what routers of experts decided, and add their losses.
        router_aux_loss_coef: weight of the load-balancing loss.
        router_z_loss_coef: weight of the routers' z-loss.
        use_cache: return the state.
        tie_word_embeddings: the head is the embedding.
        bos_token_id, eos_token_id, pad_token_id: see transformers.

    Raises:
        ValueError (from a validator: inside huggingface_hub's StrictDataclassError):
            an unknown argument, kind of block or option, or values that contradict one another.
    """

    model_type = "ssm_hybrid"
    _inexpressible: ClassVar[dict[str, Any]] = {}

    vocab_size: int = 50288
    hidden_size: int = 768
    blocks: str | list[Any] = "3*(7*mamba2 attention)"
    options: dict[str, Any] | None = None
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    initialization: str = "mamba_ssm"
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.blocks, str):
            self.blocks = list(expand_pattern(self.blocks))
        self.options = dict(self.options or {})
        self._check_kinds()
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def layer_types(self) -> list[str]:
        """transformers' words for what each block keeps between calls."""
        return [_LAYER_TYPES[_kind(block)] for block in self.blocks]

    @property
    def sliding_window(self) -> int | None:
        """The first sliding attention's window, for those who ask with transformers' word."""
        for index, kind in enumerate(self.layer_types):
            if kind == "sliding_attention":
                return self.block_options(index)[1]["window"]
        return None

    def validate_layer_type(self) -> None:
        """Blocks are checked by `validate_architecture`; transformers knows fewer kinds."""

    def block_options(self, index: int) -> tuple[str, dict[str, Any]]:
        """Kind of a block, and all its options by name."""
        block = self.blocks[index]
        kind = _kind(block)
        own = {} if isinstance(block, str) else {k: v for k, v in block.items() if k != "type"}
        own.pop("shared", None)
        options = {**KINDS[kind], **(self.options or {}).get(kind, {}), **own}
        return kind, self._derived_options(kind, options)

    def _derived_options(self, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        width, given = self.hidden_size, dict(options)

        def default(name: str, value: Any) -> None:
            if given[name] is None:
                given[name] = value

        if kind == "mamba1":
            default("time_step_rank", -(-width // 16))
        elif kind == "mamba2":
            default("d_ssm", given["expand"] * width)
            default("time_step_limit", (0.0, float("inf")))
            given["time_step_limit"] = tuple(given["time_step_limit"])
        elif kind == "mamba3":
            default("rope_layout", "pairwise" if given["mimo_rank"] == 1 else "half")
        elif kind in ("attention", "sliding_attention"):
            default("num_kv_heads", given["num_heads"])
            heads = max(given["num_heads"], 1)
            default("head_dim", None if width % heads else width // heads)
        else:
            inner = width * 8 / 3 if given["gated"] else width * 4
            default("intermediate_size", -(-int(inner) // 128) * 128)
        return given

    def shared_with(self, index: int) -> int:
        """The first block whose weights this block uses; its own number where it has its own."""
        block = self.blocks[index]
        name = None if isinstance(block, str) else block.get("shared")
        if name is None:
            return index
        return next(
            i for i, b in enumerate(self.blocks) if isinstance(b, dict) and b.get("shared") == name
        )

    def validate_architecture(self) -> None:
        """Run by the constructor and by `from_dict`."""
        check_positive(self, "vocab_size", "hidden_size")
        check_choice(self, "initialization", ("mamba_ssm", "transformers"))
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        self._check_kinds()
        experts = set()
        for index in range(len(self.blocks)):
            where = f"blocks[{index}]"
            kind, options = self.block_options(index)
            try:
                _CHECKS[kind](self, options)
            except ValueError as error:
                raise ValueError(f"{where}, {kind}: {error}") from error
            if kind == "moe":
                experts.add(options["num_experts"])
            first = self.shared_with(index)
            if self.block_options(first) != (kind, options):
                raise ValueError(f"{where} shares weights with blocks[{first}], but is another")
        kinds = {_kind(block) for block in self.blocks}
        if kinds <= {"mlp", "moe"}:
            raise ValueError(f"blocks are only {sorted(kinds)}: no token would see another one")
        if self.output_router_logits and len(experts) > 1:
            raise ValueError(
                "output_router_logits balances experts over all layers, which must have the same "
                f"number of them, got {sorted(experts)}"
            )

    def _check_kinds(self) -> None:
        """Raise `ValueError` unless blocks and options are lists and names that are known."""
        if not self.blocks or isinstance(self.blocks, str):
            raise ValueError(f"blocks must list at least one block, got {self.blocks!r}")
        for kind, options in (self.options or {}).items():
            _check_names(f"options[{kind!r}]", kind, options)
        for index, block in enumerate(self.blocks):
            if isinstance(block, dict):
                own = {k: v for k, v in block.items() if k not in ("type", "shared")}
                _check_names(f"blocks[{index}]", block.get("type"), own)
            else:
                _check_names(f"blocks[{index}]", block, {})


def _kind(block: Any) -> str:
    return block if isinstance(block, str) else block["type"]


def _check_names(where: str, kind: Any, options: Any) -> None:
    """Raise `ValueError` unless the kind and the names of its options are known."""
    if not isinstance(kind, str) or kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{where}: unknown kind of block {kind!r}, known are {list(KINDS)}{hint}")
    if not isinstance(options, dict):
        raise ValueError(f"{where} must hold options by name, got {options!r}")
    for name in options:
        if name not in KINDS[kind]:
            close = difflib.get_close_matches(str(name), KINDS[kind], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: {kind} has no option {name!r}{hint}")
        _check_type(f"{where}: {name}", name, options[name], KINDS[kind][name])


def _check_type(where: str, name: str, value: Any, default: Any) -> None:
    """Raise `ValueError` unless an option is what its default is; a number must be finite."""
    if value is None and default is None:
        return
    like = _OPTIONAL[name] if default is None else default
    if isinstance(like, bool | str):
        fits = isinstance(value, type(like))
        expected = "a word" if isinstance(like, str) else "true or false"
    elif isinstance(like, tuple):
        fits = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))
        expected = "two numbers"
    elif isinstance(like, int):
        fits, expected = _is_number(value) and isinstance(value, int), "a whole number"
    else:
        fits, expected = _is_number(value) and math.isfinite(value), "a finite number"
    if not fits:
        raise ValueError(f"{where} must be {expected}, got {value!r}")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least_one(options: dict[str, Any], *names: str) -> None:
    for name in names:
        if options[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {options[name]}")


def _divides(name: str, divisor: int, what: str, value: int) -> None:
    if value % divisor:
        raise ValueError(f"{name}={divisor} must divide {what} = {value}")


def _check_step_sizes(options: dict[str, Any]) -> None:
    low, high = options["time_step_min"], options["time_step_max"]
    if not 0 < low <= high:
        raise ValueError(
            f"time_step_min and time_step_max must satisfy 0 < min <= max, got {low}, {high}"
        )


def _check_mamba1(config: HybridConfig, options: dict[str, Any]) -> None:
    _at_least_one(options, "expand", "state_size", "conv_kernel", "time_step_rank")
    if options["time_step_init_scheme"] not in ("random", "constant"):
        raise ValueError(
            'time_step_init_scheme must be "random" or "constant", '
            f"got {options['time_step_init_scheme']!r}"
        )
    _check_step_sizes(options)


def _check_mamba2(config: HybridConfig, options: dict[str, Any]) -> None:
    _at_least_one(options, "expand", "d_ssm", "head_dim", "state_size", "n_groups", "conv_kernel",
                  "chunk_size")  # fmt: skip
    inner, scanned = options["expand"] * config.hidden_size, options["d_ssm"]
    if scanned > inner:
        raise ValueError(f"d_ssm={scanned} must not exceed expand * hidden_size = {inner}")
    _divides("head_dim", options["head_dim"], "d_ssm", scanned)
    heads = scanned // options["head_dim"]
    _divides("n_groups", options["n_groups"], "the number of heads", heads)
    if options["norm_before_gate"] and not options["norm"]:
        raise ValueError("norm_before_gate=True needs norm=True")
    low, high = options["time_step_limit"]
    if not 0 <= low <= high:
        raise ValueError(
            "time_step_limit must be (lowest, highest) with 0 <= lowest <= highest, got "
            f"{options['time_step_limit']}"
        )
    _check_step_sizes(options)


def _check_mamba3(config: HybridConfig, options: dict[str, Any]) -> None:
    _at_least_one(options, "expand", "head_dim", "state_size", "n_groups", "mimo_rank",
                  "chunk_size")  # fmt: skip
    inner = options["expand"] * config.hidden_size
    _divides("head_dim", options["head_dim"], "expand * hidden_size", inner)
    heads = inner // options["head_dim"]
    states, fraction = options["state_size"], options["rope_fraction"]
    if fraction not in (0, 0.5, 1):
        raise ValueError(f"rope_fraction must be 0 or 0.5 or 1, got {fraction!r}")
    num_angles = int(states * fraction) // 2
    if fraction and not num_angles:
        raise ValueError(f"state_size={states} leaves no pair of states to rotate")
    names = ("n_groups", "mimo_rank", "rope_layout", "A_activation", "A_floor")
    given = {name: options[name] for name in names}
    check_mamba3(num_heads=heads, state_size=states, num_angles=num_angles, **given)
    _check_step_sizes(options)


def _check_attention(config: HybridConfig, options: dict[str, Any]) -> None:
    if options["head_dim"] is None:
        heads, width = options["num_heads"], config.hidden_size
        raise ValueError(f"num_heads={heads} does not divide hidden_size={width}: give a head_dim")
    check_attention(
        options["num_heads"],
        options["num_kv_heads"],
        options["head_dim"],
        options["window"],
        options["rotary_dim"],
    )
    if options["rope_theta"] <= 0:
        raise ValueError(f"rope_theta must be greater than 0, got {options['rope_theta']}")
    if options["scaling"] is not None and options["scaling"] <= 0:
        raise ValueError(f"scaling must be greater than 0, or None, got {options['scaling']}")
    taps = options["conv_kernel"]
    if taps < 0 or taps == 1:
        raise ValueError(f"conv_kernel must be 0 (none) or at least 2, got {taps}")
    if not 0 <= options["dropout"] < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {options['dropout']}")


def _check_mlp(config: HybridConfig, options: dict[str, Any]) -> None:
    _at_least_one(options, "intermediate_size")
    expected = "silu" if options["gated"] else "relu2"
    if options["activation"] != expected:
        raise ValueError(
            f"activation must be {expected!r} with gated={options['gated']}, "
            f"got {options['activation']!r}"
        )


def _check_moe(config: HybridConfig, options: dict[str, Any]) -> None:
    _at_least_one(options, "intermediate_size")
    check_router(
        options["num_experts"],
        options["top_k"],
        kind=options["kind"],
        bias=options["correction_bias"],
        groups=options["groups"],
        top_groups=options["top_groups"],
    )
    if options["activation"] not in ("silu", "relu2"):
        raise ValueError(f'activation must be "silu" or "relu2", got {options["activation"]!r}')
    if options["shared_size"] < 0:
        raise ValueError(f"shared_size must be 0 or more, got {options['shared_size']}")
    if options["shared_gate"] and not options["shared_size"]:
        raise ValueError("shared_gate=True needs shared_size > 0")


_CHECKS = {
    "mamba1": _check_mamba1,
    "mamba2": _check_mamba2,
    "mamba3": _check_mamba3,
    "attention": _check_attention,
    "sliding_attention": _check_attention,
    "mlp": _check_mlp,
    "moe": _check_moe,
}
