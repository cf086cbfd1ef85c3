"""Every method: the effective delta of what PEFT wrote is PEFT's own merged model minus the base, and what the live model did."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, LowRank, dense
from rankleap.errors import BaseMismatchError, CheckpointError

TARGETS = ["q_proj", "v_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5}}


def lora(**settings: object) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS, **settings})  # pyright: ignore[reportArgumentType]


# A fresh config each time, for PEFT writes into the one it is given. With it: the largest rank, or None where none is promised.
VARIANTS: dict[str, tuple[Callable[[], PeftConfig], int | None]] = {
    "LoRA": (lora(), 4),
    "LoRA patterns": (lora(**PATTERNS), 6),
    "LoRA orthogonal": (lora(init_lora_weights="orthogonal"), 4),
    "LoRA embeddings": (lora(target_modules=["embed_tokens", "lm_head", "o_proj"]), 4),
    "LoRA biases": (lora(bias="all"), 4),
    "LoRA lora_bias": (lora(lora_bias=True, target_modules=["q_proj", "v_proj"]), 4),
    "rsLoRA": (lora(use_rslora=True, **PATTERNS), 6),
    "DoRA": (lora(use_dora=True), None),
    "PiSSA": (lora(init_lora_weights="pissa"), 8),
    "PiSSA rsLoRA": (lora(init_lora_weights="pissa", use_rslora=True), 8),
    "PiSSA DoRA": (lora(init_lora_weights="pissa", use_dora=True), None),
    "MiCA": (lora(init_lora_weights="mica"), 4),
    "AdaLoRA": (lambda: AdaLoraConfig(init_r=6, target_r=3, lora_alpha=9, target_modules=TARGETS, total_step=9), 6),
    "MiSS": (lambda: MissConfig(r=4, target_modules=TARGETS), 4),
    "MiSS of a rank that divides nothing": (lambda: MissConfig(r=5, target_modules=TARGETS), 5),
    "MiSS mini": (lambda: MissConfig(r=6, mini_r=8, init_weights="mini", target_modules=TARGETS), 6),
    "MiSS bat": (lambda: MissConfig(r=4, init_weights="bat", target_modules=TARGETS), None),
    "VeRA": (lambda: VeraConfig(r=6, target_modules=TARGETS), 6),
    "VeRA without projections": (lambda: VeraConfig(r=6, target_modules=TARGETS, save_projection=False), 6),
    "IA³": (lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]), None),
    "LN tuning": (lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"]), None),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`",
    "ignore:Specified to not",
    "ignore:Unsupported layer type",
    # PEFT takes a bias for a shard, and AdaLoRA's masks for LoRA's ranks.
    "ignore:Adapter 'default'. 4 LoRA tensor.s. have invalid shape",
    "ignore:The following rank_pattern keys did not match",
)


@dataclass(frozen=True)
class Written:
    """A base, an adapter that PEFT wrote for it, and the model that it was written from."""

    base: FullCheckpoint
    directory: Path
    model: PeftModel
    rank: int | None

    @property
    def checkpoint(self) -> AdapterCheckpoint:
        return AdapterCheckpoint(self.directory)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def base(
    request: pytest.FixtureRequest,
    make_model: Callable[..., PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    make_model(request.param, attention_bias=True, tie_word_embeddings=False).save_pretrained(directory)
    # Transformers starts biases at zero, where nothing that scales them would show.
    tensors = load_file(directory / "model.safetensors")
    moved = {name: torch.linspace(-1, 1, len(bias)) for name, bias in tensors.items() if name.endswith("bias")}
    save_file({**tensors, **moved}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module", params=VARIANTS)
def written(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    config, rank = VARIANTS[request.param]
    directory = tmp_path_factory.mktemp("adapter")
    return Written(FullCheckpoint(base), directory, write(base, config(), directory), rank)


def write(base: Path, config: PeftConfig, directory: Path, seed: int = 3, start: Path | None = None) -> PeftModel:
    """An adapter all of whose trainable weights have moved; ``start`` is where it goes before that, if anywhere."""
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)  # pyright: ignore[reportArgumentType]
    if start:
        model.save_pretrained(str(start))
    move(model)
    model.save_pretrained(str(directory))
    return model


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape))


def adapted_modules(model: PeftModel) -> dict[str, nn.Module]:
    base = model.get_base_model()
    names = [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    return {name: base.get_submodule(name) for name in names}


@torch.no_grad()
def live_weights(model: PeftModel) -> dict[str, Tensor]:
    """What each adapted module does to its input, as a weight and a bias: nothing is merged, only forward is used."""
    model.eval()
    found: dict[str, Tensor] = {}
    for name, module in adapted_modules(model).items():
        layer = module.get_submodule("base_layer")
        if isinstance(layer, nn.Linear):
            bias = module(torch.zeros(1, layer.in_features))[0]
            found[f"{name}.weight"] = (module(torch.eye(layer.in_features)) - bias).T
            found |= {f"{name}.bias": bias} if layer.bias is not None else {}
        elif isinstance(layer, nn.Embedding):
            found[f"{name}.weight"] = module(torch.arange(layer.num_embeddings))
        else:
            weight = layer.get_parameter("weight")
            found[f"{name}.weight"] = module(torch.ones(len(weight))) * weight / layer(torch.ones(len(weight)))
    return found


def as_merged_by_peft(written: Written) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(written.base.directory)
    merged = PeftModel.from_pretrained(model, str(written.directory)).merge_and_unload()
    return {name: weight.detach() for name, weight in merged.named_parameters()}


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6 * max(1.0, float(expected.abs().max())), rtol=0)


def test_the_delta_is_peft_s_merged_model_minus_the_base(written: Written) -> None:
    merged, base, checkpoint = as_merged_by_peft(written), written.base, written.checkpoint
    shapes = checkpoint.shapes_on(base)
    assert {name for name, weight in merged.items() if not torch.equal(weight, base.weight(name))} == set(shapes)
    for name, shape in shapes.items():
        delta = dense(checkpoint.delta(name, base))
        assert delta.dtype == torch.float32
        assert shape == tuple(delta.shape) == base.shapes[name]
        assert_same(delta, merged[name] - base.weight(name))
        assert_same(checkpoint.weight(name, base), merged[name])


def test_the_delta_is_what_the_live_model_does(written: Written) -> None:
    live, base, checkpoint = live_weights(written.model), written.base, written.checkpoint
    shapes = checkpoint.shapes_on(base)
    assert {name for name in shapes if name.endswith("weight")} <= live.keys()
    for name, weight in live.items():
        effective = checkpoint.weight(name, base) if name in shapes else base.weight(name)
        torch.testing.assert_close(effective, weight, atol=3e-6, rtol=0)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 12), slice(None, 5), slice(13, None)])
def test_some_rows_are_those_of_the_whole_delta_and_no_more_is_read_of_the_base(written: Written, rows: slice) -> None:
    class Watched(FullCheckpoint):
        rows_read = 0

        def weight(self, name: str, rows: slice | None = None) -> Tensor:
            read = super().weight(name, rows)
            self.rows_read = max(self.rows_read, len(read))
            return read

    watched, checkpoint = Watched(written.base.directory), written.checkpoint
    for name in checkpoint.shapes_on(watched):
        whole, watched.rows_read = dense(checkpoint.delta(name, written.base)), 0
        some = checkpoint.delta(name, watched, rows)
        torch.testing.assert_close(dense(some), whole[rows], atol=1e-6, rtol=0)
        if "init_lora_weights" not in checkpoint.config or checkpoint.config["init_lora_weights"] != "pissa":
            # "bat" mixes the rows of a tile of 4, so it reads whole tiles.
            assert watched.rows_read <= -(-len(whole[rows]) // 4) * 4 + 4


def test_products_stay_products_of_the_rank_that_was_trained(written: Written) -> None:
    base, checkpoint = written.base, written.checkpoint
    for name, shape in checkpoint.shapes_on(base).items():
        delta = checkpoint.delta(name, base)
        if written.rank is None or len(shape) == 1:
            assert isinstance(delta, Tensor)
        else:
            assert isinstance(delta, LowRank)
            assert delta.right_RN.shape[0] <= written.rank


def test_the_settings_name_the_method(written: Written, request: pytest.FixtureRequest) -> None:
    variant = request.node.callspec.params["written"]
    settings = written.checkpoint.settings
    assert variant.startswith(settings["method"])
    assert set(settings) <= {"method", "rank", "alpha", "target_modules"}
    assert set(settings["target_modules"]) == set(VARIANTS[variant][0]().target_modules)  # pyright: ignore[reportAttributeAccessIssue]


def rewrite(written: Written, directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """The same adapter with changed tensors."""
    (directory / "adapter_config.json").write_bytes((written.directory / "adapter_config.json").read_bytes())
    tensors = change(load_file(written.directory / "adapter_model.safetensors"))
    save_file(tensors, directory / "adapter_model.safetensors")


def one_key_of_each_part(written: Written) -> dict[str, str]:
    keys = load_file(written.directory / "adapter_model.safetensors")
    parts = {key.removesuffix(".weight").rpartition(".")[2]: key for key in keys}
    return {part: key for part, key in parts.items() if part.startswith(("lora_", "vera_", "miss_", "ia3_"))}


def in_memory(key: str) -> str:
    """PEFT's name of a tensor in a live model: that of the adapter comes before the parameter's own, if there is one."""
    module, _, last = key.rpartition(".")
    if module.endswith("base_layer"):
        return key
    return f"{module}.default.{last}" if last in ("weight", "bias") else f"{key}.default"


def test_the_keys_may_still_name_the_adapter(written: Written, tmp_path: Path) -> None:
    rewrite(written, tmp_path, lambda tensors: {in_memory(key): tensor for key, tensor in tensors.items()})
    found, expected = AdapterCheckpoint(tmp_path), written.checkpoint
    assert found.shapes == expected.shapes
    for name in found.shapes_on(written.base):
        assert torch.equal(dense(found.delta(name, written.base)), dense(expected.delta(name, written.base)))


def test_a_part_that_is_missing_is_an_error_that_names_the_weight(written: Written, tmp_path: Path) -> None:
    for part, lost in one_key_of_each_part(written).items():
        # The only part of its weight; nothing tells that the weight was adapted.
        if part in ("miss_block", "ia3_l"):
            continue
        rewrite(written, tmp_path, lambda tensors, lost=lost: {k: t for k, t in tensors.items() if k != lost})
        with pytest.raises(CheckpointError, match=r"holds .* of (model|lm_head)\..*; needed .*or the whole tensor"):
            AdapterCheckpoint(tmp_path)


def test_a_part_that_is_empty_is_an_error_that_says_what_to_do(written: Written, tmp_path: Path) -> None:
    for key in one_key_of_each_part(written).values():
        rewrite(written, tmp_path, lambda tensors, key=key: {**tensors, key: torch.zeros(0)})
        with pytest.raises(CheckpointError, match=r"\(0,\).* of .*; needed .*gather the weights before saving"):
            AdapterCheckpoint(tmp_path)


def test_a_truncated_file_is_an_error_that_names_it(written: Written, tmp_path: Path) -> None:
    rewrite(written, tmp_path, dict)
    content = (tmp_path / "adapter_model.safetensors").read_bytes()
    for size in (0, len(content) // 2, len(content) - 1):
        (tmp_path / "adapter_model.safetensors").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is truncated"):
            AdapterCheckpoint(tmp_path)


def test_adalora_s_pruned_ranks_keep_the_scale_of_the_rank_before(base: Path, tmp_path: Path) -> None:
    config = AdaLoraConfig(
        init_r=6, target_r=1, lora_alpha=9, target_modules=TARGETS, total_step=8, tfinal=2, task_type="CAUSAL_LM"
    )
    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)  # pyright: ignore[reportArgumentType]
    move(model)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    tokens = torch.randint(0, 64, (4, 12))
    for step in range(1, 9):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)  # pyright: ignore[reportCallIssue]
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match="invalid shape"):  # a rank of 0, which PEFT takes for a shard
        model.save_pretrained(str(tmp_path))
    written = Written(FullCheckpoint(base), tmp_path, model, 6)
    checkpoint, live, merged = written.checkpoint, live_weights(model), as_merged_by_peft(written)
    products = {name: checkpoint.delta(name, written.base) for name in checkpoint.shapes}
    ranks = {product.right_RN.shape[0] for product in products.values() if isinstance(product, LowRank)}
    assert min(ranks) == 0 and 0 < max(ranks) <= 6 and len(ranks) > 1
    for name, product in products.items():
        assert_same(dense(product), merged[name] - written.base.weight(name))
        assert_same(checkpoint.weight(name, written.base), live[name])


@pytest.mark.parametrize("place", ["checkpoint-10/pissa_init", "initial", "pissa_init", "leaps/start"])
@pytest.mark.parametrize("kind", ["olora", "pissa_niter_4", "pissa"])
def test_the_delta_is_measured_from_the_initial_adapter_that_was_kept(
    base: Path, tmp_path: Path, kind: str, place: str
) -> None:
    step = tmp_path / ("checkpoints/checkpoint-10" if place == "leaps/start" else "checkpoint-10")
    live = live_weights(write(base, lora(init_lora_weights=kind)(), step, start=tmp_path / place))
    checkpoint, full = AdapterCheckpoint(step), FullCheckpoint(base)
    for name in checkpoint.shapes:
        delta = checkpoint.delta(name, full)
        assert isinstance(delta, LowRank)
        assert delta.right_RN.shape[0] == 8
        assert_same(full.weight(name) + dense(delta), live[name])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_peft_converts_to_plain_lora_reads_as_what_it_was_converted_from(
    base: Path, tmp_path: Path, use_rslora: bool
) -> None:
    config, start = lora(init_lora_weights="pissa_niter_4", use_rslora=use_rslora)(), tmp_path / "pissa_init"
    model = write(base, config, tmp_path / "checkpoint-10", start=start)
    model.save_pretrained(str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(start))
    found, converted = AdapterCheckpoint(tmp_path / "checkpoint-10"), AdapterCheckpoint(tmp_path / "converted")
    assert converted.settings["method"] == ("rsLoRA" if use_rslora else "LoRA")
    full = FullCheckpoint(base)
    for name in found.shapes:
        assert_same(dense(found.delta(name, full)), dense(converted.delta(name, full)))


def write_milora(base: Path, directory: Path) -> PeftModel:
    """MiLoRA as it is published; PEFT has none, so the base is lowered here."""
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for module in adapted_modules(model).values():
            weight = module.get_parameter("base_layer.weight")
            u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
            root = (sigma[-4:] / 3).sqrt()
            module.get_parameter("lora_A.default.weight").copy_(root[:, None] * vh[-4:])
            module.get_parameter("lora_B.default.weight").copy_(u[:, -4:] * root)
            weight.sub_(u[:, -4:] * sigma[-4:] @ vh[-4:])
    config.init_lora_weights = "milora"  # pyright: ignore[reportAttributeAccessIssue]
    move(model)
    model.save_pretrained(str(directory))
    return model


def test_milora_s_start_is_the_smallest_triplets_of_the_base(base: Path, tmp_path: Path) -> None:
    live, checkpoint, full = (
        live_weights(write_milora(base, tmp_path)),
        AdapterCheckpoint(tmp_path),
        FullCheckpoint(base),
    )
    assert checkpoint.settings["method"] == "MiLoRA"
    for name in checkpoint.shapes:
        delta = checkpoint.delta(name, full)
        assert isinstance(delta, LowRank)
        assert delta.right_RN.shape[0] == 8
        assert_same(full.weight(name) + dense(delta), live[name])


def test_a_run_pays_once_for_the_svd_of_its_base(base: Path, tmp_path: Path) -> None:
    class Counting(FullCheckpoint):
        reads = 0

        def weight(self, name: str, rows: slice | None = None) -> Tensor:
            self.reads += 1
            return super().weight(name, rows)

    full = Counting(base)
    for step in (10, 20, 30):
        write(base, lora(init_lora_weights="pissa")(), tmp_path / str(step), seed=step)
        checkpoint = AdapterCheckpoint(tmp_path / str(step))
        for name in checkpoint.shapes:
            checkpoint.delta(name, full)
        assert full.reads == len(checkpoint.shapes)


def test_projections_that_a_rounded_base_leaves_unknown_are_refused(base: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    write(base, VeraConfig(r=6, target_modules=TARGETS, save_projection=False), tmp_path / "adapter")
    checkpoint, full = AdapterCheckpoint(tmp_path / "adapter"), FullCheckpoint(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"save_projection=False.*base in BF16.*save_projection=True"):
        checkpoint.delta(next(iter(checkpoint.shapes)), full)


def test_another_base_is_refused_whatever_sides_the_adapter_stores(
    written: Written, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "shorter")
    wide = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96, "vocab_size": 80}
    make_model(**wide).save_pretrained(tmp_path / "wider")
    # "mini" stores neither side, so that only names can tell it.
    others = ["shorter"] if written.checkpoint.settings["method"] == "MiSS mini" else ["shorter", "wider"]
    for other in others:
        with pytest.raises(BaseMismatchError, match="was not trained from the base"):
            written.checkpoint.shapes_on(FullCheckpoint(tmp_path / other))
