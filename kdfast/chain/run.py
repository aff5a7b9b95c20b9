# SPDX-License-Identifier: Apache-2.0
"""Runs a chain: its links one after the other, for every seed, and the comparison at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kdfast.chain.compare import write_comparison
from kdfast.chain.link_run import LinkRun, checkpoints_of
from kdfast.chain.links import Link, links_of
from kdfast.chain.page import write_chain_page
from kdfast.chain.planning import check_links
from kdfast.chain.summary import SUMMARY, read_summary
from kdfast.chain.train_link import train_link
from kdfast.configs import ChainConfig, ConfigError, plain, save
from kdfast.configs.chain import stages
from kdfast.configs.fields import as_config_error
from kdfast.data.files import CorruptDataError
from kdfast.data.labelled import Classification, build_classification
from kdfast.machine.disk import require_writable
from kdfast.machine.files import write_text
from kdfast.machine.memory import release
from kdfast.trainer.commits import load_checkpoint, newest
from kdfast.trainer.logs import LOG
from kdfast.trainer.runs import run_folder, show_start, started_again

TWIN = "student_ce"


@dataclass(frozen=True)
class RunFolders:
    """Where the files of a chain's links are.

    Attributes:
        root: Output of the chain.
        seeds: Whether each seed has a folder of its own.
    """

    root: Path
    seeds: bool

    def of(self, link: Link, seed: int, data: str) -> Path:
        """Folder of a link: [seed<seed>/]<init>/<data>/<role>.

        A run that goes on with more or fewer seeds keeps the folders that it has.
        """
        inner = Path(link.folder, data, link.role)
        plain, own = self.root / inner, self.root / f"seed{seed}" / inner
        if self.seeds:
            return plain if not own.exists() and _seed_of(plain) == seed else own
        return own if own.exists() else plain


def _seed_of(folder: Path) -> int | None:
    """The seed of the link that was trained in a folder; None: it holds none."""
    path = newest(checkpoints_of(folder))
    if path is None:
        return None
    with as_config_error():
        seed: int = load_checkpoint(path)["meta"]["recipe"]["seed"]
    return seed


def run_chain(config: ChainConfig, accelerator: Accelerator, *, resume: bool) -> int:
    """Train the links that ``config.stage`` names.

    Args:
        config: The chain.
        accelerator: Device, precision and processes.
        resume: Go on with the newest run of ``config.output``: finished links are kept.

    Raises:
        ConfigError: The config, the data or a checkpoint cannot be used.
        Interrupted: A signal came; the state was saved.
        NonFiniteLoss: A training broke; the state before was saved.
    """
    chosen = stages(config)
    output = Path(config.output).expanduser().absolute()
    resume = resume or started_again(output, accelerator)
    missing = f"stage: {config.stage} needs an earlier run, " if resume or chosen[0] > 0 else None
    root = run_folder(output, accelerator, missing)
    if accelerator.is_main_process:
        _check_outputs(config)
    folders, spec = RunFolders(root, len(config.seeds) > 1), config.data
    words = [f"stage {config.stage}", f"seeds {list(config.seeds)}"]
    words += [" ".join(w for w in ("data", spec.kind, spec.set, spec.root) if w)]
    words += [
        f"{accelerator.num_processes} x {accelerator.device}",
        f"precision {config.precision}",
    ]
    show_start(
        root,
        accelerator,
        name=config.name,
        note=config.note,
        what="\n".join([*_arrows(config.chain), ", ".join(words)]),
        save=partial(save, config),
        resume=resume,
    )
    sets: dict[int, Classification] = {}
    results: list[dict[str, Any]] = []
    for seed in config.seeds:
        data_seed = _data_seed(config, seed)
        if data_seed not in sets:
            sets.clear()
            sets[data_seed] = read_data(config, data_seed)
        if seed == config.seeds[0]:
            check_links(config, len(sets[data_seed].class_names))
        for run in links_to_train(config, seed, folders, sets[data_seed]):
            finished = train_link(run, accelerator, resume=resume)
            if accelerator.is_main_process:
                save(config, root / "config.yaml")
            # Everything of the link was local to the call: now its memory can go.
            accelerator.free_memory()
            release(accelerator.device)
            if finished is None:
                LOG.info("max_steps reached in %s; go on with --resume", run.link.role)
                return 0
            results.append(finished)
    if accelerator.is_main_process:
        _finish(config, root, results, sets[data_seed].name)
    accelerator.wait_for_everyone()
    return 0


def _arrows(chain: Sequence[str]) -> list[str]:
    """The models of a chain, one a line, each below the one that teaches it."""
    return [f"-> {name}" if i else name for i, name in enumerate(chain)]


def _check_outputs(config: ChainConfig) -> None:
    """Raises ConfigError if what is written hours later could not be."""
    with as_config_error():
        if config.cache and config.cache_dir is not None:
            require_writable(Path(config.cache_dir).expanduser(), "cache_dir")
        if config.report is not None:
            require_writable(Path(config.report).expanduser().parent, "report")


def links_to_train(
    config: ChainConfig, seed: int, folders: RunFolders, data: Classification
) -> list[LinkRun]:
    """The links of a seed that ``config.stage`` names, in the order of their training."""
    links, chosen = links_of(config), stages(config)
    pairs: list[tuple[Link, Link | None]] = []
    for i in chosen:
        if config.vary == "student" and i < len(links) - 1 and seed != config.seeds[0]:
            continue
        pairs.append((links[i], links[i - 1] if i else None))
    if config.twin and len(links) - 1 in chosen:
        pairs.append((replace(links[-1], role=TWIN, distilled=False), None))
    teacher_seed = config.seeds[0] if config.vary == "student" else seed
    return [
        LinkRun(
            config=config,
            link=link,
            seed=seed,
            folder=folders.of(link, seed, data.folder),
            teacher=teacher,
            teacher_folder=None
            if teacher is None
            else folders.of(teacher, teacher_seed, data.folder),
            data=data,
        )
        for link, teacher in pairs
    ]


def _data_seed(config: ChainConfig, seed: int) -> int:
    if config.data.seed is not None:
        return config.data.seed
    return config.seeds[0] if config.vary == "student" else seed


def read_data(config: ChainConfig, seed: int) -> Classification:
    """The images of a config.

    Raises:
        ConfigError: They are missing or not what they should be.
    """
    data = config.data
    root = None if data.root is None else Path(data.root).expanduser()
    try:
        return build_classification(
            data.kind,
            root,
            subset=data.set,
            size=data.size,
            seed=seed,
            val_fraction=data.val_fraction,
            augment=data.augment,
            variants=data.variants,
            verify=data.verify,
        )
    except (OSError, ValueError, ImportError, CorruptDataError) as error:
        raise ConfigError([f"data: {error}"]) from error


def _finish(config: ChainConfig, root: Path, results: list[dict[str, Any]], name: str) -> None:
    """Compare the links, those of earlier stages included, and say where everything is."""
    known = {(result["role"], result["seed"]) for result in results}
    for path in sorted(root.rglob(SUMMARY)):
        saved = read_summary(path)
        if saved is None:
            continue
        if (saved["role"], saved["seed"]) not in known and saved["data"] == name:
            results.append(saved)
    order = [link.role for link in links_of(config)] + [TWIN]
    results.sort(key=lambda result: (order.index(result["role"]), result["seed"]))
    text, paths = write_comparison(root, results, name, {"config": plain(config)})
    if config.report is not None:
        copy = Path(config.report).expanduser()
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_text(copy, paths["json"].read_text(encoding="utf-8"))
        paths["report"] = copy
    paths["page"] = write_chain_page(root, results, name, config)
    LOG.info("\n\n%s\n", text)
    for result in results:
        LOG.info("%-12s %s", result["role"], result["folder"])
    for kind, path in paths.items():
        LOG.info("%-12s %s", kind, path)
