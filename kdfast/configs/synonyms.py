# SPDX-License-Identifier: Apache-2.0
"""Names that other trainers give to keys: timm, Hugging Face, mmcv, and the documents of both runs.

Whoever writes one of them is told the key that is meant.
"""

from __future__ import annotations

import difflib

from kdfast.configs.chain import ChainConfig
from kdfast.configs.recovery import Config

Kind = type[Config] | type[ChainConfig]

# Names, then what they mean in a chain and in a pruning run: a key, a key with its value, or a
# sentence where there is none.
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("learning_rate base_lr blr peak_lr", "optim.lr", "optim.lr"),
    ("wd decay", "optim.weight_decay", "optim.weight_decay"),
    (
        "num_epochs num_train_epochs max_epochs total_epochs n_epochs",
        "epochs",
        "run.epochs",
    ),
    (
        "batch_size bs train_batch_size per_device_train_batch_size samples_per_gpu imgs_per_gpu",
        "batch",
        "run.batch_size",
    ),
    (
        "eval_batch_size per_device_eval_batch_size validation_batch_size test_batch_size",
        "eval_batch",
        "run.batch_size",
    ),
    (
        "warmup warmup_steps warmup_iters num_warmup_steps warmup_epoch",
        "optim.warmup_epochs",
        "optim.warmup",
    ),
    ("warmup_epochs", "optim.warmup_epochs", "optim.warmup, which counts steps"),
    ("warmup_lr warmup_factor", "optim.warmup_ratio", "optim.warmup_ratio"),
    ("min_lr lr_min eta_min min_lr_ratio", "optim.min_ratio", "optim.min_ratio"),
    (
        "num_workers dataloader_num_workers workers_per_gpu loader_workers",
        "data.workers",
        "data.workers",
    ),
    (
        "mixed_precision amp amp_dtype dtype bf16 fp16 native_amp half autocast",
        "precision",
        "run.precision",
    ),
    ("no_mixed_precision no_amp", "precision=fp32", "run.precision=fp32"),
    (
        "pretrained imagenet_pretrained",
        "init=pretrained",
        "teacher.checkpoint",
    ),
    (
        "initial_checkpoint load_from weights model_name_or_path",
        "init",
        "teacher.checkpoint",
    ),
    ("checkpoint ckpt teacher_checkpoint teacher_path", "init", "teacher.checkpoint"),
    ("dataset dataset_name data_type", "data.kind", "data.kind"),
    (
        "data_dir data_path data_root train_dir train_data root data_folder dataroot",
        "data.root",
        "data.root",
    ),
    ("img_size image_size input_size resolution", "data.size", "data.size"),
    ("val_split val_ratio validation_split", "data.val_fraction", "data.val_fraction"),
    ("aug augmentation aa auto_augment", "data.augment", "data.augment"),
    ("output_dir out out_dir work_dir save_dir results_dir experiment", "output", "output"),
    ("seed random_seed manual_seed", "seeds", "seed"),
    ("stages phase", "stage", "a pruning run has no stages"),
    (
        "model models student student_model model_student model_assistant assistant",
        "chain",
        "a pruning run makes its student of the teacher by prune.*",
    ),
    ("model_teacher teacher_model kd_model_name", "chain", "teacher.checkpoint"),
    ("temp kd_temperature t", "distill.temperature", "distill.temperature"),
    (
        "distillation_alpha kd_alpha distill_loss_weight distill_alpha",
        "distill.alpha",
        "distill.alpha",
    ),
    (
        "feature_weight feature_distill_weight feat_weight",
        "distill.feature",
        "distill.feature",
    ),
    ("attention_weight attention_distill_weight", "distill.attention", "distill.attention"),
    (
        "output_weight output_distill_weight logit_weight",
        "distill.alpha",
        "distill.output",
    ),
    ("vl_distill_weight vl_weight", "a chain has no language tokens", "distill.vl"),
    ("smoothing label_smoothing_factor", "distill.label_smoothing", "a pruning run has none"),
    ("focal focal_loss", "distill.focal_gamma", "a pruning run has none"),
    ("class_weight", "distill.class_weights", "a pruning run has none"),
    (
        "pruning_ratio prune_ratio keep_ratio sparsity head_keep keep",
        "a chain prunes nothing; orion50 does, and `kdfast prune`",
        "prune.keep, the share of heads that stays",
    ),
    ("pruning_method importance criterion", "a chain prunes nothing", "prune.method"),
    ("optimizer optim_name optimizer_type", "optim.opt", "a pruning run has AdamW alone"),
    (
        "scheduler lr_scheduler lr_scheduler_type schedule lr_schedule",
        "optim.sched",
        "a pruning run has a cosine alone",
    ),
    (
        "clip_grad grad_clip max_grad_norm max_norm gradient_clip_val",
        "optim.clip",
        "optim.clip",
    ),
    ("mixup_alpha", "optim.mixup", "a pruning run has none"),
    ("cutmix_alpha", "optim.cutmix", "a pruning run has none"),
    ("model_ema ema_decay model_ema_decay", "optim.ema", "a pruning run has none"),
    (
        "gradient_checkpointing grad_checkpointing activation_checkpointing with_cp",
        "checkpointing",
        "run.checkpointing",
    ),
    (
        "gradient_accumulation_steps grad_accum_steps accumulation_steps accumulate",
        "a chain cuts batches into pieces where memory runs out",
        "run.accumulate",
    ),
    ("drop_path_rate droppath", "model_args, as [{drop_path_rate: 0.1}]", "distill.drop_path"),
    ("log_interval logging_steps print_freq", "log_every", "run.log_every"),
    ("save_interval save_steps checkpoint_interval", "save_every", "run.save_every"),
    ("steps iters max_iters", "max_steps", "run.max_steps"),
    ("early_stopping early_stopping_patience", "patience", "a pruning run has none"),
    ("gpu gpus cuda device_type", "device", "run.device"),
    (
        "deterministic no_deterministic benchmark cudnn_benchmark",
        "deterministic=false",
        "run.deterministic=false",
    ),
    (
        "resume_from resume_from_checkpoint",
        "the flag --resume does it",
        "the flag --resume does it",
    ),
    ("val_batches eval_size", "eval_batch", "run.eval_images"),
)
_MEANT = {name: row[1:] for row in _ROWS for name in row[0].split()}


def meant(name: str, kind: Kind, known: list[str]) -> str | None:
    """What a name stands for in a config of a kind: a key, perhaps with words; None if unheard of.

    Args:
        name: As the user wrote it, with dots, dashes or underscores.
        kind: ``Config`` or ``ChainConfig``.
        known: All dotted keys of the kind.
    """
    plain = name.lower().strip("-").replace("-", "_")
    leaf = plain.rsplit(".", 1)[-1]
    for tried in (plain, leaf):
        if tried in _MEANT:
            return _MEANT[tried][0 if kind is ChainConfig else 1]
        named = [key for key in known if key.rsplit(".", 1)[-1] == tried]
        if named:
            return min(named, key=lambda key: (key.count("."), key.startswith("teacher.")))
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    if close:
        return close[0]
    leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    near = difflib.get_close_matches(leaf, [*leaves, *_MEANT], n=1, cutoff=0.6)
    return meant(near[0], kind, known) if near else None


def unknown(key: str, kind: Kind, known: list[str]) -> str:
    """The complaint about a key that does not exist, with what is meant."""
    answer = meant(key, kind, [name for name in known if name != "name"])
    if answer is None:
        return f"{key}: unknown key"
    named = is_key(answer.partition(",")[0], known)
    return f"{key}: unknown key; " + (f"did you mean {answer}?" if named else answer)


def is_key(answer: str, known: list[str]) -> bool:
    """Whether an answer of ``meant`` is a key, or a key with its value, and not a sentence."""
    return answer.partition("=")[0] in known
