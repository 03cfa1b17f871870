# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Everything private of other libraries that we lean on, in one list, and whether the installed versions have it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from typing import Any

import pytest

from tests.conftest import ROOT


PACKAGES = ("peft_ext", "generation_ext", "trl_ext")
# Owner -> name, with the parameters that we pass or override -> who leans on it, and why. An instance's attribute stands
# under its class.
SEAMS = {
    "argparse.ArgumentParser": {
        "_actions": "peft_ext.command_line: which flags `--help` leaves out",
    },
    "transformers.GenerationMixin": {
        "_prefill(input_ids, generation_config, model_kwargs)": "generation_ext.critic: as generate runs the prompt",
        "_update_model_kwargs_for_generation(outputs, model_kwargs)": "generation_ext.critic: masks and positions, as generate's",
        "_pad_token_tensor": "generation_ext.critic: what finished rows are filled with",
        "_supports_logits_to_keep()": "peft_ext.memory: a plan makes the logits that generate makes",
    },
    "transformers.cache_utils.Cache": {
        "layers": "generation_ext.shared_prefix, critic: a prefix's keys and values, layer by layer",
        "reorder_cache(beam_idx)": "generation_ext.granularity: overridden in the class that is swapped in (`cache.__class__`)",
    },
    "transformers.cache_utils.CacheLayerMixin": {
        "is_initialized": "generation_ext.shared_prefix: layers that are made by ourselves",
    },
    "transformers.cache_utils.DynamicLayer": {
        "keys": "generation_ext.shared_prefix: what is shared",
        "values": "generation_ext.shared_prefix: what is shared",
    },
    "transformers.cache_utils.StaticLayer": {
        "max_cache_len": "generation_ext.shared_prefix, granularity: slots of a static cache",
    },
    "transformers.cache_utils.DynamicSlidingWindowLayer": {
        "cumulative_length": "generation_ext.shared_prefix: a static window that goes on as a dynamic one",
    },
    "transformers.cache_utils.EncoderDecoderCache": {
        "self_attention_cache": "generation_ext: the decoder's own past",
        "cross_attention_cache": "generation_ext: the encoder's states, shared",
        "is_updated": "generation_ext: copies of a cache go on by themselves",
    },
    "transformers.PretrainedConfig": {
        "_attn_implementation": "language_model, granularity: which attention runs, and what masks it takes",
        "_name_or_path": "everywhere: what the user called the model",
    },
    "transformers.generation.candidate_generator.CandidateGenerator": {
        "get_candidates": "generation_ext.shared_prefix: found among the callers, whether tokens are being drafted",
    },
    "transformers.utils.PushToHubMixin": {
        "_upload_modified_files(working_dir, repo_id)": "peft_ext.packed_cards: writes the card before it is uploaded",
    },
    "transformers.PreTrainedModel": {
        "_load_pretrained_model(model, state_dict, checkpoint_files, load_config)": "peft_ext.sealing: compares digests before",
        "_can_set_attn_implementation": "shared_prefix: attention goes through transformers' interface",
        "_supports_attention_backend": "generation_ext.shared_prefix: masks of our own reach the layers",
        "_no_split_modules": "peft_ext.memory: the blocks that FSDP wraps",
        "_keep_in_fp32_modules": "peft_ext.checkpoint: what isn't packed",
        "_tied_weights_keys": "peft_ext.quant.embedding: a head that shares a packed embedding is left out of the file",
        "_init_weights(module)": "generation_ext.critic, granularity: how new parts are initialised",
        "_is_hf_initialized": "peft_ext.checkpoint: packed layers aren't initialised over",
        "initialize_weights()": "peft_ext.checkpoint: whether stock loading ends in a layer without a weight",
        "_supports_sdpa": "peft_ext.ood: PooledClassifier says that its backbone may use it",
        "_supports_flash_attn": "generation_ext.granularity: C-DNPG says that it has none",
        "_supports_flex_attn": "generation_ext.granularity: C-DNPG says that it has none",
    },
    "transformers.integrations.moe": {
        "_default_apply_gate(gate_up_out)": "peft_ext.quant.experts: the gate that most families have",
        "_is_expert_parallel": "peft_ext.quant.experts: experts that other processes have are left alone",
    },
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts": {
        "_apply_gate(gate_up)": "peft_ext.quant.experts: a family's own gate",
    },
    "transformers.core_model_loading.WeightConverter": {
        "_original_source_patterns": "peft_ext.quant.experts: what a family's checkpoints call an expert's layers",
        "_original_target_patterns": "peft_ext.quant.experts: the fused parameters",
    },
    "peft.utils.transformers_weight_conversion": {
        "convert_peft_config_for_transformers(peft_config, model)": "peft_ext.registration: wrapped",
        "convert_peft_adapter_state_dict_for_transformers(model, adapter_state_dict)": "peft_ext.registration: wrapped",
    },
    "transformers.integrations.peft.PeftAdapterMixin": {
        "load_adapter(peft_model_id, adapter_name, peft_config, adapter_state_dict)": "peft_ext.scale_tuning: wrapped",
        "_hf_peft_config_loaded": "peft_ext.scale_tuning: whether the model has adapters once one failed to load",
    },
    "transformers.modeling_utils.LoadStateDictConfig": {
        "download_kwargs": "peft_ext.scale_tuning: where from_pretrained looks for an adapter's files",
        "pretrained_model_name_or_path": "peft_ext.scale_tuning: where from_pretrained looks for an adapter's files",
    },
    "transformers.core_model_loading.convert_and_load_state_dict_in_model": {
        "items": "peft_ext.scale_tuning: a state dict is asked for its items once the adapter's layers are there",
    },
    "transformers.modeling_utils.PreTrainedModel": {
        "get_encoder(modality)": "peft_ext.modalities: which part sees, which hears",
        "get_decoder()": "peft_ext.modalities: the language model beside them",
        "input_modalities": "peft_ext.modalities: parts that read no text",
    },
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLModel": {
        "rope_deltas": "peft_ext.scale_tuning: calibrate leaves no positions behind",
    },
    "transformers.models.auto.modeling_auto": {
        "MODEL_FOR_MULTIMODAL_LM_MAPPING": "peft_ext.models: which class loads models that see or hear",
    },
    "transformers.configuration_utils": {
        "_is_quantized": "peft_ext.checkpoint: a dequantised model is an ordinary one again",
    },
    "transformers.quantizers.base.HfQuantizer": {
        "update_weight_conversions(weight_conversions, model)": "peft_ext.checkpoint: experts that stay layers",
        "_convert_model_for_quantization(model)": "peft_ext.checkpoint: experts that we unfuse ourselves",
        "_process_model_before_weight_loading(model)": "peft_ext.checkpoint: bcq and GPTQ make room for packed layers",
        "_process_model_after_weight_loading(model)": "peft_ext.checkpoint: bcq and GPTQ finish packed layers",
        "_dequantize": "peft_ext.checkpoint: model.dequantize()",
    },
    "transformers.quantizers.quantizer_gguf.GgufHfQuantizer": {
        "read_header(gguf_file)": "peft_ext.checkpoint.gguf_loading: overridden, reads our own header as well",
        "get_state_dict(checkpoint_file, model)": "peft_ext.checkpoint.gguf_loading: overridden, what stays blocks is left out",
        "_process_model_before_weight_loading(model, kwargs)": "peft_ext.checkpoint.gguf_loading: overridden, makes room",
    },
    "transformers.modeling_gguf_pytorch_utils": {
        "TENSOR_PROCESSORS": "peft_ext.checkpoint.gguf_loading: what a family's tensors become",
        "get_gguf_hf_weights_map(hf_model, processor)": "peft_ext.checkpoint.gguf_loading: what the model calls them",
    },
    "transformers.modeling_gguf_pytorch_utils.TensorProcessor": {
        "process(weights, name, kwargs)": "peft_ext.checkpoint.gguf_loading: rows that come out in another order are found by it",
    },
    "transformers.quantizers.auto": {
        "AUTO_QUANTIZER_MAPPING": "peft_ext.registration: whether a name is taken",
        "AUTO_QUANTIZATION_CONFIG_MAPPING": "peft_ext.registration: whether a name is taken",
    },
    "transformers.core_model_loading.ConversionOps": {
        "convert(input_dict)": "peft_ext.checkpoint: bcq packs while it loads",
    },
    "transformers.core_model_loading": {
        "WeightConverter": "peft_ext.checkpoint: names and shapes in a checkpoint",
        "WeightRenaming": "peft_ext.checkpoint: names in a checkpoint",
        "rename_source_key": "peft_ext.checkpoint: names in a checkpoint",
        "dot_natural_key": "peft_ext.checkpoint: the order of names that a model loads in",
    },
    "transformers.quantizers.quantizers_utils": {
        "should_convert_module": "peft_ext.checkpoint: modules that bcq leaves alone",
    },
    "transformers.Trainer": {
        "_get_collator_with_removed_columns(data_collator, description)": "peft_ext.distillation: texts as a batch has them",
        "get_tp_size()": "peft_ext.token_mean: a loss that is scaled as Trainer scales its own",
        "_loss_shifts_labels": "peft_ext.token_mean: which labels Trainer counts",
        "model_accepts_loss_kwargs": "peft_ext.token_mean, distillation: so that all accumulated batches' items are counted",
        "current_gradient_accumulation_steps": "peft_ext.distillation: the share of a mixture's balancing loss",
        "set_initial_training_values(args, dataloader)": "peft_ext.trainer_checkpoints: begins with the number of epochs",
        "_train_batch_size": "generation_ext.critic: the number that auto_find_batch_size may have halved",
        "_save(output_dir, state_dict)": "generation_ext.critic: a checkpoint holds the critic, not its model",
    },
    "transformers.TrainingArguments": {
        "_n_gpu": "peft_ext.devices: --device names one GPU",
    },
    "trl.RLOOTrainer": {
        "_generate_single_turn(prompt_ids, images, multimodal_fields)": "trl_ext.almost: a merged copy writes",
        "_tokenizer": "trl_ext.almost: the tokenizer under a processor",
    },
    "trl.GRPOTrainer": {
        "_generate_single_turn(prompt_ids, images, multimodal_fields)": "trl_ext.almost: a merged copy writes",
        "_tokenizer": "trl_ext.almost: the tokenizer under a processor",
    },
    "transformers.PreTrainedConfig": {
        "_dict_from_json_file(json_file)": "peft_ext.sealing: a config that is no object is told with its file",
    },
    "transformers.modeling_utils": {
        "get_checkpoint_shard_files(index_filename)": "peft_ext.sealing: an index names files of its folder alone",
    },
    "peft.config.PeftConfigMixin": {
        "from_json_file(path_json_file)": "peft_ext.adapter_files: checks adapter_config.json where PEFT reads it",
        "_get_peft_type(model_id)": "peft_ext.adapter_files: a missing type is told with the file",
    },
    "peft.utils.save_and_load": {
        "safe_load_file(filename, device)": "peft_ext.adapter_files: checks an adapter's tensors where PEFT reads them",
        "has_valid_embedding_base_layer(layer)": "peft_ext.adapter_files: no packed head in an adapter",
        "torch_load": "peft_ext.adapter_files: refuses an adapter that is a pickle",
    },
    "peft.peft_model": {
        "load_peft_weights(model_id)": "peft_ext.adapter_files: a folder without weights is no hub id",
        "set_peft_model_state_dict(model, adapter_name)": "peft_ext.adapter_files: names what a file lacks",
    },
    "peft.utils.PeftType": {
        "_member_map_": "peft_ext.registration: members of our own",
        "_member_names_": "peft_ext.registration: members of our own",
        "_value2member_map_": "peft_ext.registration: members of our own",
    },
    "peft.mapping": {
        "PEFT_TYPE_TO_CONFIG_MAPPING": "peft_ext.registration: registering again after a reload",
        "PEFT_TYPE_TO_TUNER_MAPPING": "peft_ext.registration: registering again after a reload",
        "PEFT_TYPE_TO_PREFIX_MAPPING": "peft_ext.registration: registering again after a reload",
    },
    "peft.auto": {
        "_BaseAutoPeftModel": "peft_ext.auto_classes: the class whose from_pretrained all of AutoPeftModel* share",
    },
    "peft.AutoPeftModel": {
        "_target_class": "peft_ext.auto_classes: the class of the base",
        "_target_peft_class": "peft_ext.auto_classes: the class of the model with the adapter",
        "from_pretrained(pretrained_model_name_or_path, adapter_name, is_trainable, config, revision, import_allowlist)": (
            "peft_ext.registration: asks for the base first"
        ),
    },
    "peft.PeftModel": {
        "_enable_peft_forward_hooks": "our tuners: mixed batches",
    },
    "peft.tuners.tuners_utils.BaseTuner": {
        "_check_merge_allowed()": "peft_ext.bottleneck: can't be merged",
        "_check_target_module_exists(peft_config, key)": "peft_ext.targets: before injection",
        "_create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)": "our tuners: injection",
        "_get_adapter_state_dict": "peft_ext.scale_tuning: files hold plain scales",
        "_remap_adapter_state_dict_for_load": "peft_ext.scale_tuning: files hold plain scales",
        "_post_injection_hook": "peft_ext.scale_tuning: what is told once all layers are packed",
        "_prepare_adapter_config(peft_config, model_config)": "our tuners: default targets",
        "_prepare_model(peft_config, model)": "our tuners: every target is checked before any changes",
        "_replace_module(parent, child_name, new_module, child)": "our tuners: injection, unloading",
        "_unload_and_optionally_merge": "peft_ext.scale_tuning: merging into packed layers",
    },
    "peft.tuners.tuners_utils.BaseTunerLayer": {
        "_active_adapter": "our tuners' layers",
        "_disable_adapters": "our tuners' layers",
        "_cast_input_dtype(x, dtype)": "peft_ext.bottleneck: the adapter's float type",
        "_get_base_layer_device_and_dtype": "peft_ext.scale_tuning: codes have no float type",
        "_move_adapter_to_device_of_base_layer(adapter_name)": "our tuners' layers",
    },
    "peft.tuners.tuners_utils": {
        "_maybe_include_all_linear_layers": "our tuners: 'all-linear'",
        "SEQ_CLS_HEAD_NAMES": "peft_ext.modalities, scale_tuning: heads of classifiers",
        "_get_in_out_features": "peft_ext.bottleneck: sizes of any linear layer",
    },
    "peft.utils.other": {
        "get_pattern_key": "peft_ext.scale_tuning: bits_pattern, as LoRA's rank_pattern",
    },
    "peft.utils.AuxiliaryTrainingWrapper": {
        "_adapters": "our tuners: weighted adapters and pools look for modules_to_save",
    },
    "accelerate.hooks": {
        "_hf_hook": "peft_ext.scale_tuning: layers whose weights are elsewhere can't be packed",
    },
    "compressed_tensors.compressors": {
        "compress_module": "peft_ext.checkpoint: what transformers does with a packed layer",
    },
    "compressed_tensors.compressors.pack_quantized.helpers": {
        "pack_to_int32": "peft_ext.checkpoint: the layout of codes on disk",
        "unpack_from_int32": "peft_ext.checkpoint: the layout of codes on disk",
    },
    "lm_eval.models.huggingface.HFLM": {
        "_loglikelihood_tokens(requests, disable_tqdm, override_bs)": "generation_ext.in_context.lm_eval: overridden",
        "_create_model(pretrained, revision, dtype, peft, gguf_file)": "generation_ext.in_context.lm_eval: overridden",
        "batch_size_per_gpu": "generation_ext.in_context.lm_eval: how many windows of a text come at once",
    },
    "lm_eval.models": {
        "MODEL_MAPPING": "peft_ext.startup: it has registered its own models once it is imported",
    },
    "sklearn.base.BaseEstimator": {
        "_metadata_request": "generation_ext.probing: a clone keeps its metadata routing",
    },
    "sklearn.utils": {
        "_safe_indexing(X, indices)": "peft_ext.ood.open_set: rows of texts, arrays and data frames, as its splitters give them",
    },
    "torch._C": {
        "_disabled_torch_function_impl": "peft_ext.quant: a weight that is a view of codes",
        "_current_graph_task_id()": "peft_ext.threads: whether a backward pass runs a forward pass again",
        "_len_torch_dispatch_stack": "peft_ext.quant: whether someone traces a kernel's call",
    },
    "torch.Tensor": {
        "_make_wrapper_subclass": "peft_ext.quant: a weight that is a view of codes",
    },
    "torch.nn.Module": {
        "forward": "critic (of a backbone that has run), ALMoST (accelerate's): swapped on instances",
        "_forward_hooks": "generation_ext.probing: whether transformers left hooks that can't be pickled",
        "_forward_pre_hooks": "peft_ext.mixed_batches: whether a wrapper has our hook already",
        "_parameters": "peft_ext.quant: a packed layer's tensors without a module's slow look-up",
        "_modules": "peft_ext.quant: an expert's layers without it",
        "_apply(fn)": "peft_ext.quant: codes keep their type when a model is cast",
        "_load_from_state_dict(state_dict, prefix)": "peft_ext.quant: a packed layer's buffers",
    },
    "torch.distributed.fsdp._fully_shard._fully_shard": {
        "_is_fsdp_managed_module": "peft_ext.sharding: whether FSDP has a module's parameters; set on instances",
    },
    "torch.ops.aten": {
        "_local_scalar_dense": "peft_ext.memory: questions about data on the meta device",
        "_scaled_dot_product_flash_attention_for_cpu": "peft_ext.memory: attention without a matrix of scores",
    },
    "torch._ops.OpOverload": {
        "_schema": "peft_ext.quant: what an operation would write to",
    },
}
# Of extras.
NOT_ALWAYS_INSTALLED = ("lm_eval",)
# Not needed to be there: asked for with `hasattr`, and absent on some machines.
OPTIONAL = {"_linear_pointwise"}
# Private by its underscore alone: named tuples, enums and exit codes are documented so.
DOCUMENTED = {"_asdict", "_fields", "_replace", "_exit", "_name_", "_value_", "_sort_order_", "_C"}


def missing(owner: str, seam: str) -> str:
    """What of a seam the installed version lacks; nothing if it is whole."""
    name, _, parameters = seam.rstrip(")").partition("(")
    try:
        holder = _resolved(owner)
    except (ImportError, AttributeError) as error:
        return str(error)
    if not hasattr(holder, name):
        return "" if re.search(rf"\b{name}\b", _source(holder)) else f"{owner} has no {name}"
    if not parameters:
        return ""
    taken = inspect.signature(getattr(holder, name)).parameters
    absent = [parameter for parameter in parameters.split(", ") if parameter not in taken]
    return f"{owner}.{name} takes {list(taken)}, not {absent}" if absent else ""


def _resolved(name: str) -> Any:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise ImportError(f"{name} can't be imported")


def _source(holder: Any) -> str:
    """Where an attribute is set that only instances have: in the class, its bases, or beside them."""
    kinds = holder.__mro__[:-1] if inspect.isclass(holder) else [holder]
    modules = {inspect.getmodule(kind) for kind in kinds}
    return "\n".join(
        inspect.getsource(module) for module in modules if getattr(module, "__file__", "").endswith(".py")
    )


@pytest.mark.parametrize("owner", SEAMS)
def test_the_installed_versions_have_it(owner):
    if (package := owner.partition(".")[0]) in NOT_ALWAYS_INSTALLED:
        pytest.importorskip(package)
    lacking = {why: what for seam, why in SEAMS[owner].items() if (what := missing(owner, seam))}
    assert not lacking


def test_something_missing_is_told():
    assert missing("transformers.GenerationMixin", "_nothing_of_ours") and missing("transformers.nothing", "_x")
    assert missing("transformers.GenerationMixin", "_prefill(no_such_parameter)")


def test_the_list_is_complete():
    """Every private name that our packages read and don't define themselves is in it."""
    used: dict[str, str] = {}
    own = set()
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                used.setdefault(node.attr, f"{file}:{node.lineno}")
            own |= _defined(node)
    listed = {seam.partition("(")[0] for seams in SEAMS.values() for seam in seams} | OPTIONAL | DOCUMENTED
    assert {name: where for name, where in used.items() if name not in own | listed} == {}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(node: ast.AST) -> set[str]:
    """Names that a statement gives to functions, classes, variables and attributes of `self`."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    flat = [one for target in targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
    attributes = {t.attr for t in flat if isinstance(t, ast.Attribute) and ast.unparse(t.value) in ("self", "cls")}
    return {target.id for target in flat if isinstance(target, ast.Name)} | attributes
